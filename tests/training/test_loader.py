"""A data loader that dies is named, with the micro-batch or the process, and what to do."""

import os
import signal
import sys

import pytest
import torch

from blip3o_fast.training import checkpoints
from blip3o_fast.training.loader import DataLoaderError
from blip3o_fast.training.optimizers import check_optimizer
from blip3o_fast.training.stream import BatchStream, SampleOrder, stream_loader


class Dying(BatchStream):
    """Micro-batch 5 cannot be had."""

    def __init__(self, how):
        features = torch.zeros(8, 4, 3)
        super().__init__(features, features, SampleOrder(8, 0), 2, rank=0, world_size=1)
        self.how = how

    def __getitem__(self, micro_batch):
        if micro_batch == 5:
            self.how()
        return super().__getitem__(micro_batch)


@pytest.fixture
def polled(monkeypatch):
    """Dead workers are noticed by polling alone: torch's signal handler would raise anywhere, also inside pytest."""
    from torch.utils.data._utils import signal_handling

    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", True)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


def raise_error():
    raise OSError("shard_0003.safetensors cannot be read")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_while_loading_names_the_micro_batch(workers):
    loader = stream_loader(Dying(raise_error), 8, lambda: 2, num_workers=workers, pin_memory=False)
    got = []
    with pytest.raises(DataLoaderError) as error:
        got.extend(batch["sample_index"] for batch in loader)
    assert len(loader) == 8
    assert got == [4, 6, 8]  # micro-batches 2, 3, 4
    start = "the data loader failed at micro-batch 5 of the run: OSError: "
    assert str(error.value) == start + ("" if workers == 0 else "OSError: ") + "shard_0003.safetensors cannot be read"


def test_a_worker_that_dies_stops_a_run_by_name(polled, tmp_path, make_trainer):
    trainer = make_trainer(tmp_path, num_workers=1, save_steps=2)
    original = trainer.get_train_dataloader

    def loader():
        made = original()
        made.dataset.__class__ = Dying
        made.dataset.how = die
        return made

    trainer.get_train_dataloader = loader
    with pytest.raises(DataLoaderError, match="a process of the data loader died: [A-Za-z]+Error") as error:
        trainer.train()
    assert "--num_workers 0" in str(error.value) and "--resume_from_checkpoint auto" in str(error.value)
    step = trainer.state.global_step  # what the worker had loaded ahead may be lost with it
    assert step <= 5 and [c.name for c in checkpoints.checkpoints(tmp_path)] == [
        f"checkpoint-{s}" for s in (2, 4) if s <= step
    ]


@pytest.mark.parametrize(("message", "error"), [("DataLoader worker (pid 7) is killed", DataLoaderError),
                                               ("another", RuntimeError)])  # fmt: skip
def test_what_torchs_signal_handler_raises_anywhere_is_named_too(tmp_path, make_trainer, message, error):
    def loss_function(*args, **kwargs):
        raise RuntimeError(message)

    with pytest.raises(error, match=message.split(" (")[0]):
        make_trainer(tmp_path, loss_function=loss_function).train()


def test_an_optimizer_that_is_not_installed_is_named(make_trainer, tmp_path, monkeypatch):
    for good in ("adamw_torch_fused", "adamw_torch", "sgd", "adamw_torch_8bit"):
        check_optimizer(good)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for optim in ("adamw_bnb_8bit", "adamw_8bit", "paged_lion_8bit"):
        with pytest.raises(ValueError, match=f"--optim {optim} needs bitsandbytes, which cannot be imported"):
            check_optimizer(optim)
    trainer = make_trainer(tmp_path)
    assert trainer.args.optim == "adamw_torch_fused"
    trainer.args.optim = "adamw_bnb_8bit"
    parts = {"loss_function": trainer.loss_function, "conditions": trainer.conditions, "targets": trainer.targets}
    with pytest.raises(ValueError, match="needs bitsandbytes"):
        type(trainer)(trainer.model, trainer.args, **parts)
    monkeypatch.setitem(sys.modules, "bitsandbytes", os)  # anything that can be imported
    check_optimizer("adamw_bnb_8bit")
