"""BLIP3oTrainer on a stand-in network: continuation, independence of batching, stops, checkpoints, logs."""

import json

import pytest
import torch
from safetensors.torch import load_file

from blip3o_fast.training import checkpoints
from blip3o_fast.training.clock import MEASURED


def weights(folder, name="model.safetensors"):
    return load_file(folder / name)


def same(first, second):
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def logged(output):
    """metrics.jsonl without the clock."""
    entries = checkpoints.read_metrics(output / "metrics.jsonl")
    return [{key: value for key, value in entry.items() if key not in MEASURED} for entry in entries]


def test_a_continued_run_is_bitwise_the_same(tmp_path, make_trainer, stand_in):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    # Cut off after the checkpoint of step 4: later logs and a torn checkpoint are lying around.
    cut = make_trainer(tmp_path / "cut")

    class CutOff(Exception):
        pass

    def cut_off_at_6(model, *args, loss_function=cut.loss_function, **kwargs):
        if cut.state.global_step == 6:
            raise CutOff
        return loss_function(model, *args, **kwargs)

    cut.loss_function = cut_off_at_6
    with pytest.raises(CutOff):
        cut.train()
    assert [entry["step"] for entry in logged(tmp_path / "cut")][-1] == 6
    (tmp_path / "cut" / "checkpoint-6").mkdir()
    resume = checkpoints.last_whole(tmp_path / "cut")
    assert resume.name == "checkpoint-4"

    continued = make_trainer(tmp_path / "cut", model=stand_in(seed=99))
    continued.train(resume_from_checkpoint=str(resume))
    for name in ("model.safetensors", "ema.safetensors"):
        assert same(weights(tmp_path / "cut/checkpoint-8", name), weights(tmp_path / "whole/checkpoint-8", name))
    optimizers = [
        torch.load(tmp_path / run / "checkpoint-8/optimizer.pt", weights_only=True) for run in ("cut", "whole")
    ]
    for slot, state in optimizers[0]["state"].items():
        assert same(state, optimizers[1]["state"][slot])
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")


def test_accumulation_and_batch_size_change_rounding_only(tmp_path, make_trainer):
    losses, final = [], []
    for name, batch, accumulate in (("a", 8, 1), ("b", 4, 2), ("c", 2, 4)):
        # A small rate: Adam divides by the gradient's size, which blows up the rounding of tiny gradients.
        changes = {"batch_size": batch, "gradient_accumulation_steps": accumulate, "learning_rate": 1e-4}
        trainer = make_trainer(tmp_path / name, **changes)
        trainer.train()
        entries = logged(tmp_path / name)
        losses.append(torch.tensor([entry["loss"] for entry in entries if "loss" in entry]))
        final.append(weights(tmp_path / name / "checkpoint-8"))
    assert len(losses[0]) == 5  # step 1, then every second
    for other, weight in zip(losses[1:], final[1:], strict=True):
        assert (other / losses[0] - 1).abs().max() <= 1e-5
        assert max(float((weight[k] - final[0][k]).abs().max()) for k in weight) <= 1e-5


def test_evaluation_does_not_depend_on_the_runs_seed_and_changes_nothing(tmp_path, make_trainer):
    values = []
    for seed in (1, 2):
        trainer = make_trainer(tmp_path / str(seed), seed=seed)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        values.append(trainer.evaluate()["eval_loss"])
        assert same(before, trainer.model.state_dict()) and trainer.model.training
    assert values[0] == values[1]


def test_evaluation_uses_the_averaged_weights(tmp_path, make_trainer, stand_in):
    trainer = make_trainer(tmp_path / "run")
    trainer.train()
    own = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    averaged = trainer.evaluate()["eval_loss"]
    assert same(own, trainer.model.state_dict())
    trainer.ema.copy_to(trainer.model)
    trainer.ema = None
    assert trainer.evaluate()["eval_loss"] == averaged


def test_a_checkpoint_is_a_model_and_no_pickle_of_ours(tmp_path, make_trainer):
    make_trainer(tmp_path).train()
    names = {path.name for path in (tmp_path / "checkpoint-8").iterdir()}
    assert {"model.safetensors", "config.json", "ema.safetensors", "complete.json", "optimizer.pt"} <= names
    assert "training_args.bin" not in names
    config = json.loads((tmp_path / "checkpoint-8" / "config.json").read_text())
    assert config["in_channels"] == 6
    # What torch wrote can be read without running code.
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(tmp_path / "checkpoint-8" / name, weights_only=True)


def test_a_checkpoint_cut_off_while_writing_is_never_taken_for_whole(tmp_path, make_trainer, monkeypatch):
    trainer = make_trainer(tmp_path)

    def cut_off(folder):
        if trainer.state.global_step == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.ema, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (tmp_path / "checkpoint-8" / "model.safetensors").is_file()
    assert checkpoints.what_is_missing(tmp_path / "checkpoint-8") is not None
    assert checkpoints.last_whole(tmp_path).name == "checkpoint-4"


def test_a_stop_request_ends_after_the_step_with_a_checkpoint(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path)
    original = trainer.loss_function

    def request(*args, **kwargs):
        if trainer.state.global_step == 2:
            trainer.stop.requested = True
        return original(*args, **kwargs)

    trainer.loss_function = request
    trainer.train()
    assert trainer.state.global_step == 3
    assert checkpoints.last_whole(tmp_path).name == "checkpoint-3"


def test_old_checkpoints_go_when_the_new_one_is_whole(tmp_path, make_trainer):
    make_trainer(tmp_path, save_steps=2, save_total_limit=2).train()
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-8"]


def test_logs_have_the_loss_its_parts_and_its_yardstick(tmp_path, make_trainer):
    make_trainer(tmp_path).train()
    entries = logged(tmp_path)
    train = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in train] == [1, 2, 4, 6, 8]
    wanted = {"loss", "grad_norm", "learning_rate", "mse", "cosine_similarity", "snr_db", "loss_over_linear", "samples"}
    for entry in train:
        assert wanted <= set(entry)
        assert entry["samples"] == 4 * entry["step"] and entry["epoch"] == entry["samples"] / 40
        assert entry["loss"] == pytest.approx(entry["mse"], rel=1e-5)
        assert entry["loss_over_linear"] == entry["mse"]  # the fixture's yardstick is 1
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [4, 8]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]


def test_gradients_are_clipped(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path, max_grad_norm=0.01, max_steps=2)
    norms = []
    original = trainer.check_grad_norm

    def look():
        norms.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm().item())
        original()

    trainer.check_grad_norm = look
    trainer.train()
    assert len(norms) == 2 and all(norm == pytest.approx(0.01, rel=1e-3) for norm in norms)


def test_only_matrices_decay(tmp_path, make_trainer):
    from blip3o_fast.models.nextdit import BLIP3oDiT

    model = BLIP3oDiT({"in_channels": 6, "cross_attention_dim": 12, "sample_size": 4, "hidden_size": 16,
                       "num_layers": 1, "num_attention_heads": 2, "multiple_of": 8})  # fmt: skip
    trainer = make_trainer(tmp_path, model=model)
    decayed, spared = (group["params"] for group in trainer.create_optimizer().param_groups)
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.01
    assert trainer.optimizer.param_groups[1]["weight_decay"] == 0.0
    assert all(parameter.ndim == 2 for parameter in decayed) and all(parameter.ndim == 1 for parameter in spared)
    assert len(decayed) + len(spared) == len(list(model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {"layers.0.gate", "layers.0.norm2.weight"} <= {names[id(parameter)] for parameter in spared}


def test_bf16_is_autocast_over_float32_weights(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path, bf16=True, max_steps=2)
    trainer.train()
    assert set(trainer.model.dtypes) == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in trainer.model.state_dict().values())


def test_the_models_frozen_config_survives_the_trainer(tmp_path, make_trainer, stand_in):
    model = stand_in()
    config = model.config
    assert make_trainer(tmp_path, model=model).model.config is config
    assert not hasattr(config, "use_cache")


def test_predicting_gives_the_loss(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs, labels = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    assert loss.ndim == 0 and not loss.requires_grad and outputs is None and labels is None
    assert loss == trainer.compute_loss(trainer.model, batch).detach()


def test_the_trainer_alone_averages_and_leaves_bad_steps_out(tmp_path, make_trainer, stand_in):
    """As somebody's own script has it, without the callbacks of `run.train`."""
    from blip3o_fast.flow.loss import FlowMatchingLoss
    from blip3o_fast.training.callbacks import StepCallback

    model, calls = stand_in(), []

    def nan_in_step_3(*args, **kwargs):
        loss, metrics = FlowMatchingLoss.from_config(model.config)(*args, **kwargs)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 3 else loss), metrics

    trainer = make_trainer(tmp_path, model, loss_function=nan_in_step_3, max_steps=5)
    trainer.remove_callback(StepCallback)
    trainer.train()
    assert trainer.watch.total == 1 and trainer.ema.updates == 5
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_bad_input_is_named(tmp_path, make_trainer):
    trainer = make_trainer(tmp_path)
    parts = {"loss_function": trainer.loss_function, "conditions": trainer.conditions}
    with pytest.raises(ValueError, match="conditions and targets must be equally many"):
        type(trainer)(trainer.model, trainer.args, targets=trainer.targets[:3], **parts)
    trainer.validation = None
    with pytest.raises(ValueError, match="without held-out data"):
        trainer.evaluate()
    trainer.args.remove_unused_columns = True
    with pytest.raises(ValueError, match="remove_unused_columns must be False"):
        type(trainer)(trainer.model, trainer.args, targets=trainer.targets, **parts)
