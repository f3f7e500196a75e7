"""FSDP2 on CPU processes: sharded parameters, the loss of one process, checkpoints for another number of ranks."""

import copy
import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict  # here, for all forks; it takes a second
import torch.distributed.fsdp
import torch.multiprocessing as mp

from blip3o_fast.flow.loss import FlowMatchingLoss
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.training import fsdp
from blip3o_fast.training.ema import EMA

BATCH = 4
CUT, STEPS = 4, 8


def build():
    generator = torch.Generator().manual_seed(0)
    model = BLIP3oDiT(BLIP3oConfig.preset("tiny", num_layers=2), generator=generator)
    with torch.no_grad():
        for block in model.layers:
            block.gate.normal_(generator=generator)
    return model.train()


def train(model, optimizer, first, last, rank=0, world=1, average=None):
    """Steps first .. last - 1 over this rank's part of the batches; the losses over the whole batches."""
    loss_function, losses, mine = FlowMatchingLoss.from_config(model.config), [], BATCH // world
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        target = torch.randn(BATCH, 64, 16, generator=generator)[rank * mine : (rank + 1) * mine]
        condition = torch.randn(BATCH, 5, 24, generator=generator)[rank * mine : (rank + 1) * mine]
        loss, _ = loss_function(model, target, condition, seed=1, sample_index=step * BATCH + rank * mine)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update(model)
        mean = loss.detach() / world
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean))
    return losses


def assert_same(weights, expected):
    assert set(weights) == set(expected)
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)


def adamw(model):
    # Its usual eps of 1e-8 makes whole steps of gradients that are nothing but rounding, which differs between ranks.
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)


def _worker(rank, body, world, folder, *args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    try:
        body(rank, world, folder, *args)
    finally:
        dist.destroy_process_group()


def on_ranks(body, world, folder, *args):
    mp.start_processes(_worker, (body, world, folder, *args), nprocs=world, start_method="fork")


def _begin(rank, world, folder, losses):
    from torch.distributed.tensor import DTensor

    model = fsdp.shard(build())
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert sum(p.to_local().numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    assert all(type(block).__name__ == "FSDPNextDiTBlock" for block in model.layers)
    optimizer, average = adamw(model), EMA(model, 0.9)
    assert train(model, optimizer, 0, CUT, rank, world, average) == pytest.approx(losses[:CUT], rel=1e-5)
    assert all(isinstance(state["exp_avg"], DTensor) for state in optimizer.state.values())
    fsdp.save(folder / f"checkpoint-{CUT}", model, optimizer, step=CUT, average=average.average, extra={"seed": 1})


def _continue(rank, world, folder, losses, weights):
    model = fsdp.shard(build())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # everything comes from the file
    optimizer, average = adamw(model), EMA(model, 0.9)
    state = fsdp.load(folder / f"checkpoint-{CUT}", model, optimizer, average=average.average)
    assert state == {"step": CUT, "seed": 1}
    assert train(model, optimizer, CUT, STEPS, rank, world) == pytest.approx(losses[CUT:], rel=1e-5)
    assert_same({name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}, weights)


def test_sharded_training_is_that_of_one_process_and_continues_on_other_ranks(tmp_path):
    model = build()
    optimizer, average = adamw(model), EMA(model, 0.9)
    losses = train(model, optimizer, 0, CUT, average=average)
    then = copy.deepcopy(model.state_dict())
    losses += train(model, optimizer, CUT, STEPS)
    on_ranks(_begin, 2, tmp_path, losses)
    weights = dict(model.state_dict())
    for world in (4, 1):
        on_ranks(_continue, world, tmp_path, losses, weights)

    for averaged, expected in ((False, then), (True, average.average)):
        fsdp.consolidate(tmp_path / f"checkpoint-{CUT}", tmp_path / "whole", averaged=averaged)
        whole = BLIP3oDiT.from_pretrained(tmp_path / "whole").state_dict()
        assert_same(whole, expected)


def _whole_weights(rank, world, folder):
    model, given = fsdp.shard(build()), {name: value + 1 for name, value in build().state_dict().items()}
    fsdp.load_whole(model, given)
    assert all(torch.equal(parameter.full_tensor(), given[name]) for name, parameter in model.named_parameters())


def test_whole_weights_go_into_a_sharded_network(tmp_path):
    on_ranks(_whole_weights, 2, tmp_path)


def test_a_rule_that_matches_nothing_is_refused():
    for names in ((), ("OurBlock",), ("NextDiTBlock", "OurBlock")):
        with pytest.raises(ValueError, match=r"match nothing.* NextDiTBlock"):
            fsdp.shard(build(), block_classes=names)
    arguments = fsdp.trainer_arguments(build())
    assert arguments["fsdp_config"]["transformer_layer_cls_to_wrap"] == ["NextDiTBlock"]


def test_the_trainer_refuses_fsdp_that_it_would_ignore(tmp_path):
    from transformers import TrainingArguments

    from blip3o_fast.training.trainer import BLIP3oTrainer

    args = TrainingArguments(
        str(tmp_path), use_cpu=True, remove_unused_columns=False, **fsdp.trainer_arguments(build())
    )
    with pytest.raises(ValueError, match="fsdp needs GPUs here: on a CPU the Trainer ignores it and runs DDP"):
        BLIP3oTrainer(
            build(), args, conditions=torch.ones(4, 5, 24), targets=torch.ones(4, 64, 16), loss_function=print
        )
    on_gpu = SimpleNamespace(fsdp=args.fsdp, device=torch.device("cuda"))
    fsdp.check_trainer(on_gpu, 0.0)
    with pytest.raises(ValueError, match=r"ema_decay must be 0 with fsdp, got 0\.9"):
        fsdp.check_trainer(on_gpu, 0.9)
    fsdp.check_trainer(TrainingArguments(str(tmp_path), use_cpu=True), 0.9)


class _Planted:
    def __reduce__(self):
        return (Path.touch, (Path("planted"),))


def test_a_checkpoint_that_is_cut_off_or_planted_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, model = tmp_path / "checkpoint-1", build()
    with pytest.raises(ValueError, match="is not a whole sharded checkpoint"):
        fsdp.load(folder, model)
    fsdp.save(folder, model, step=1)  # one process without a group
    with torch.no_grad():
        model.layers[0].gate.zero_()
    assert fsdp.load(folder, model) == {"step": 1}
    assert torch.equal(model.layers[0].gate, build().layers[0].gate)
    (folder / "sharded" / ".metadata").write_bytes(pickle.dumps(_Planted()))
    with pytest.raises(ValueError, match="which no sharded checkpoint needs: not read"):
        fsdp.load(folder, model)
    assert not Path("planted").exists()
    (folder / "complete.json").unlink()
    with pytest.raises(ValueError, match="writing it was interrupted"):
        fsdp.load(folder, model)


@pytest.mark.parametrize("index", [b"cbuiltins\ngetattr\n(ctorch\nSize\nVcount\ntR.", b"cos\nsystem\n(Vtrue\ntR."])
def test_an_index_gets_members_of_enums_and_nothing_else(index):
    with pytest.raises(ValueError, match="which no sharded checkpoint needs: not read"):
        fsdp._Index(io.BytesIO(index)).load()
