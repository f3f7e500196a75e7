"""`train(settings)` end to end on a small network, and everything that it refuses or says first."""

import json
import shutil
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.training import checkpoints, prepare, report_plots, resume, run
from blip3o_fast.training.arguments import TrainSettings
from blip3o_fast.training.run import train
from blip3o_fast.training.yardstick_lines import yardstick_for

SMALL = {
    "model_dim": 16, "num_layers": 1, "num_heads": 2, "multiple_of": 8, "batch_size": 4, "learning_rate": 1e-2,
    "max_steps": 6, "save_steps": 3, "logging_steps": 2, "eval_steps": 3, "eval_generation_samples": 4,
    "num_inference_steps": 2, "normalize": "pca:4", "no_wandb": True, "device": "cpu",
}  # fmt: skip


@pytest.fixture
def settings(embeddings, tmp_path):
    def make(**changes):
        return TrainSettings(embeddings, tmp_path / "run", **SMALL | changes)

    return make


@pytest.fixture(autouse=True)
def figures_of_reports(monkeypatch):
    """Most runs here do without their report's figures, which take longer than they; `finished` has them."""
    for name in ("levels", "quality", "health"):
        monkeypatch.setattr(report_plots, name, lambda *args: b"")


@pytest.fixture(scope="module")
def finished(embeddings, tmp_path_factory):
    """A finished run, for the tests that only look at it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    result = train(TrainSettings(embeddings, output, **SMALL))
    return output, result


def test_a_finished_run_is_a_model_with_its_history(finished):
    output, result = finished
    assert result["status"] == "finished" and result["step"] == 6
    model = BLIP3oDiT.from_pretrained(output)
    assert (model.config.in_channels, model.config.cross_attention_dim, model.config.sample_size) == (4, 12, 4)
    assert model.config.condition_dropout == TrainSettings.condition_dropout == 0.1
    assert model.normalizer.target.spec == "pca:4" and model.normalizer.target.in_features == 6
    # The trained model is the average, which the last checkpoint also has.
    average = load_file(output / "checkpoint-6" / "ema.safetensors")
    assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())
    whole = json.loads((output / "run.json").read_text())
    assert whole["status"] == "finished" and whole["steps"] == 6 and whole["settings"]["learning_rate"] == 1e-2
    assert (output / "loss.png").is_file()
    entries = checkpoints.read_metrics(output / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 4, 6]
    last = [entry for entry in entries if "eval_loss" in entry][-1]
    assert last["step"] == 6 and last["eval_recall_at_1_chance"] == 0.25
    wanted = {"eval_loss_over_linear", "eval_loss_sigma_0.06", "eval_token_cosine", "eval_recall_at_1"}
    assert wanted <= set(last) and result["eval_loss"] == last["eval_loss"]
    assert {"eval_recall_at_10_ridge", "eval_frechet_distance_mean_embedding"} <= set(last)
    # The report names the held-out pictures by their keys.
    report = (output / "report.html").read_text()
    assert "picture_" in report and report.count("data:image/png") == 4 and "mfu" in entries[0]


def test_the_yardstick_is_in_step_with_the_evaluation(finished):
    lines = json.loads((finished[0] / "run.json").read_text())["yardstick"]
    assert len(lines["linear_at_levels"]) == 8
    assert lines["linear_conditional"]["overall"] < lines["linear_unconditional"]["overall"] < lines["zero"]["overall"]
    # A tenth of the training samples has no condition.
    assert lines["linear_conditional"]["overall"] * 0.9 < lines["training"] < lines["linear_unconditional"]["overall"]
    # Eight midpoints of the same curve: equal up to its curvature.
    assert sum(lines["linear_at_levels"]) / 8 == pytest.approx(lines["linear_conditional"]["overall"], rel=0.05)


def test_the_linear_line_is_the_strongest_of_its_ridges(settings):
    from blip3o_fast.flow.path import FlowPath
    from blip3o_fast.flow.yardstick import yardstick

    data = prepare.load_data(settings(normalize="standardize"))
    # Few pictures, and a condition that says little: a fit without ridge is worse than none.
    data.targets = data.targets + 3 * torch.randn(data.targets.shape)
    data.conditions, data.targets = data.conditions[:12], data.targets[:12]
    config = prepare.config_for(settings(), data)
    lines = yardstick_for(settings(), data, config)
    held_out = (data.held_out_conditions, data.held_out_targets)
    path = FlowPath("linear", config.sigma_min, config.sigma_max)
    losses = {
        ridge: yardstick(data.conditions, data.targets, path=path, held_out=held_out, ridge=ridge)
        for ridge in (1.0, 0.1, 1e-3)
    }
    best = min(losses, key=lambda ridge: losses[ridge].linear_conditional.overall)
    assert lines["ridge"] == best
    assert lines["linear_conditional"]["overall"] == pytest.approx(losses[best].linear_conditional.overall)


def test_a_finished_run_says_so(finished, embeddings, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    result = train(TrainSettings(embeddings, finished[0], resume_from_checkpoint="auto", **SMALL))
    assert result["status"] == "finished"
    assert "is finished: 6 steps" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--seed: the run has 42, now 7"):
        train(TrainSettings(embeddings, finished[0], resume_from_checkpoint="auto", seed=7, **SMALL))
    assert before == {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}


def test_a_stock_network_is_continued_like_any_other(settings):
    train(settings(context_projection=False, max_steps=3, ema_decay=0))
    last = checkpoints.last_whole(settings().output_dir)
    assert last is not None and (last / "diffusion_pytorch_model.safetensors").is_file()
    assert train(settings(context_projection=False, ema_decay=0, resume_from_checkpoint="auto"))["step"] == 6


def test_ctrl_c_saves_a_whole_checkpoint_and_the_run_goes_on_to_the_same_end(
    settings, finished, monkeypatch, capsys, tmp_path
):
    original = run._flow_loss

    def interrupting(*args):
        loss, calls = original(*args), []

        def call(*inner, **kwargs):
            calls.append(None)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            return loss(*inner, **kwargs)

        return call

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(run, "_flow_loss", interrupting)
        with pytest.raises(KeyboardInterrupt):
            train(settings())
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped at step 2 of 6; continue with --resume_from_checkpoint auto" in capsys.readouterr().out
    assert checkpoints.read_run(tmp_path / "run")["status"] == "interrupted"
    assert not (tmp_path / "run" / "model.safetensors").exists()

    train(settings(resume_from_checkpoint="auto"))
    assert "resuming" in capsys.readouterr().out
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", finished[0]))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_run_cut_off_before_its_final_model_only_writes_that(finished, embeddings, tmp_path):
    import shutil

    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    whole = json.loads((output / "run.json").read_text())
    checkpoints.write_json(output / "run.json", whole | {"status": "running"})
    (output / "model.safetensors").unlink()
    metrics = (output / "metrics.jsonl").read_text()
    result = train(TrainSettings(embeddings, output, resume_from_checkpoint="auto", **SMALL))
    assert result["status"] == "finished" and result["step"] == 6
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (output, finished[0]))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert (output / "metrics.jsonl").read_text() == metrics


def test_a_finished_run_goes_on_with_more_steps(finished, embeddings, tmp_path, capsys):
    import shutil

    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    more = SMALL | {"max_steps": 8}
    assert train(TrainSettings(embeddings, output, resume_from_checkpoint="auto", **more))["step"] == 8
    assert "planned for 6 steps; the learning rate now follows 8" in capsys.readouterr().out
    steps = [entry["step"] for entry in checkpoints.read_metrics(output / "metrics.jsonl") if "loss" in entry]
    assert steps == [1, 2, 4, 6, 8]


def test_a_finished_run_without_its_checkpoints_is_not_made_again(finished, embeddings, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(finished[0], output, ignore=shutil.ignore_patterns("checkpoint-*"))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    result = train(TrainSettings(embeddings, output, resume_from_checkpoint="auto", **SMALL))
    assert (result["status"], result["step"]) == ("finished", 6)
    assert "is finished: 6 steps. Nothing to do\n" in capsys.readouterr().out
    for changed in ({"max_steps": 8}, {"seed": 7}, {"max_steps": None, "num_epochs": 11}):
        with pytest.raises(ValueError, match="a finished run whose checkpoints are gone.*--init_from"):
            train(TrainSettings(embeddings, output, resume_from_checkpoint="auto", **SMALL | changed))
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


def test_a_folder_with_somebodys_model_is_refused(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes(b"precious")
    for wanted in (None, "auto"):
        with pytest.raises(ValueError, match="holds a model that no run here made"):
            train(settings(resume_from_checkpoint=wanted))


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside(finished, embeddings, tmp_path, capsys):
    """Or rotation would delete what is saved now, and `auto` would take up the course that was left."""
    output = tmp_path / "run"
    shutil.copytree(finished[0], output)
    back = str(output / "checkpoint-3")
    (output / "checkpoint-4").mkdir()  # cut off while it was written: made again under its own name
    other = SMALL | {"max_steps": 5, "save_steps": 1, "save_total_limit": 1}
    assert train(TrainSettings(embeddings, output, resume_from_checkpoint=back, **other))["step"] == 5
    assert "earlier-checkpoint-6 comes from steps that are now made again" in capsys.readouterr().out
    assert sorted(path.name for path in output.glob("*checkpoint*")) == ["checkpoint-5", "earlier-checkpoint-6"]
    assert checkpoints.last_whole(output) == output / "checkpoint-5"
    assert checkpoints.set_aside(output, output / "checkpoint-5") == []


def test_a_checkpoint_continued_in_another_folder_keeps_its_settings(finished, embeddings, tmp_path):
    """AdamW's state and the schedule bring the learning rate along: another one would be ignored."""
    source = str(finished[0] / "checkpoint-3")
    with pytest.raises(ValueError, match="--learning_rate: the run has 0.01, now 0.5"):
        train(
            TrainSettings(embeddings, tmp_path / "b", resume_from_checkpoint=source, **SMALL | {"learning_rate": 0.5})
        )
    assert not (tmp_path / "b").exists()
    assert train(TrainSettings(embeddings, tmp_path / "b", resume_from_checkpoint=source, **SMALL))["step"] == 6
    assert (finished[0] / "checkpoint-6").is_dir()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "b", finished[0]))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_running_out_of_memory_says_which_flags_help(settings, monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")

    monkeypatch.setattr(run, "_flow_loss", lambda *args: no_memory)
    with pytest.raises(ValueError, match="--batch_size 2 --gradient_accumulation_steps 2, or add --gradient_check"):
        train(settings())


def test_a_run_is_never_overwritten(finished, embeddings):
    with pytest.raises(ValueError, match=r"already holds a run \(its last whole checkpoint is step 6\).*auto"):
        train(TrainSettings(embeddings, finished[0], **SMALL))


def test_continuing_keeps_the_fitted_normalisation(settings, finished, monkeypatch):
    stored = run.stored_normalizer(finished[0] / "checkpoint-6")

    original = prepare.FeatureNormalizers.fit

    def fit(conditions, targets, spec):
        assert spec == "none", "fitted again: another number of threads would give other bits"
        return original(conditions, targets, spec)

    monkeypatch.setattr(prepare.FeatureNormalizers, "fit", fit)
    data = prepare.load_data(settings(), normalizer=stored)
    assert data.normalizer is stored and data.targets.shape[2] == 4
    assert run.stored_normalizer(None) is None


def test_continuing_with_other_settings_or_data_is_refused(finished, embeddings):
    changed = SMALL | {"learning_rate": 0.5, "batch_size": 8, "max_steps": 9, "normalize": "pca:3", "eval_split": 0.2}
    with pytest.raises(ValueError) as error:
        train(TrainSettings(embeddings, finished[0], resume_from_checkpoint="auto", **changed))
    message = str(error.value)
    assert "--learning_rate: the run has 0.01, now 0.5" in message
    assert "--normalize: the run has 'pca:4', now 'pca:3'" in message
    sizes = "--batch_size x --gradient_accumulation_steps x processes: the run has 4 x 1 x 1 = 4, now 8 x 1 x 1 = 8"
    assert f"{sizes}; each may change, their product may not" in message
    assert "embeddings: train was 44, now 39" in message and "embeddings: checksum was" in message


def test_another_number_of_processes_is_another_batch(finished, settings):
    earlier = checkpoints.read_run(finished[0])
    assert (earlier["world_size"], earlier["effective_batch"]) == (1, 4)
    data, last = prepare.load_data(settings()), checkpoints.last_whole(finished[0])
    with pytest.raises(ValueError, match="x processes: the run has 4 x 1 x 1 = 4, now 4 x 1 x 2 = 8"):
        resume.check_same_run(settings(), earlier, data, last, 2)
    resume.check_same_run(settings(batch_size=2), earlier, data, last, 2)  # the same samples in each step
    resume.check_same_run(settings(), {**earlier, "world_size": 2}, data, last, 2)
    del earlier["world_size"]
    resume.check_same_run(settings(), earlier, data, last, 2)


def test_other_epochs_are_told_and_continue_a_finished_run(settings, capsys):
    epochs = {"max_steps": None, "save_steps": 11, "eval_steps": 100, "eval_generation_samples": 0}
    train(settings(num_epochs=0.5, **epochs))
    capsys.readouterr()
    again = settings(num_epochs=0.5, resume_from_checkpoint="auto", **epochs)
    assert train(again)["step"] == 6 and "note:" not in capsys.readouterr().out
    assert train(settings(num_epochs=0.6, resume_from_checkpoint="auto", **epochs))["step"] == 7
    assert "planned for 6 steps; the learning rate now follows 7" in capsys.readouterr().out


def test_auto_starts_where_there_is_nothing_whole(settings, tmp_path, capsys):
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    assert run.resume_point(settings(resume_from_checkpoint="auto")) is None
    assert "starting" in capsys.readouterr().out
    with pytest.raises(ValueError, match="it has no whole checkpoint"):
        run.resume_point(settings())
    with pytest.raises(ValueError, match=r"checkpoint-3 is not a whole checkpoint: it has no complete\.json"):
        run.resume_point(settings(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3")))


def test_a_dry_run_checks_everything_and_writes_nothing(settings, tmp_path, capsys):
    result = train(settings(dry_run=True, gradient_checkpointing=True, bf16=True))
    assert result["status"] == "dry run"
    out = capsys.readouterr().out
    for text in ("bf16 autocast over fp32 weights", "parameters", "6 (0.5 epochs)", "one batch forward and backward"):
        assert text in out
    assert not (tmp_path / "run").exists()


def test_starting_from_a_trained_model_uses_its_weights_and_normalisation(finished, embeddings, tmp_path):
    output = tmp_path / "second"
    changed = SMALL | {"max_steps": 1, "warmup_steps": 1, "ema_decay": 0.0}
    train(TrainSettings(embeddings, output, init_from=str(finished[0]), **changed))
    first, second = BLIP3oDiT.from_pretrained(finished[0]), BLIP3oDiT.from_pretrained(output)
    assert second.normalizer.target.spec == "pca:4"
    assert torch.equal(first.normalizer.target.statistics["basis"], second.normalizer.target.statistics["basis"])
    # The first step of a warm-up has learning rate 0: still the first run's weights.
    assert torch.equal(first.patch_embedder.proj.weight, second.patch_embedder.proj.weight)
    assert not (output / "checkpoint-1" / "ema.safetensors").exists()


def test_a_network_narrower_than_its_target_is_warned_about(settings):
    data = prepare.load_data(settings(normalize="none"))
    with pytest.warns(UserWarning, match="narrower"):
        prepare.config_for(settings(model_dim=4, num_heads=1), data)


def test_presets_and_sizes(settings):
    data = prepare.load_data(settings())
    config = prepare.config_for(settings(preset="small", model_dim=None, num_layers=2, num_heads=None), data)
    assert (config.hidden_size, config.num_layers, config.in_channels) == (256, 2, 4)
    default = prepare.config_for(settings(model_dim=None, num_layers=None, num_heads=None), data)
    assert (default.hidden_size, default.num_layers, default.num_attention_heads) == (1792, 24, 28)
    assert default.sigma_min == 1e-4


def test_epochs_become_steps_of_full_batches(settings):
    assert prepare.total_steps(settings(max_steps=None, num_epochs=3), pictures=44, world_size=1) == 33
    assert prepare.total_steps(settings(max_steps=None, num_epochs=0.1), pictures=44, world_size=2) == 1


def test_the_subset_is_that_of_the_dataset(settings, embeddings):
    from blip3o_fast.data.dataset import EmbeddingDataset

    data = prepare.load_data(settings(subset_size=7, normalize="none"))
    expected = EmbeddingDataset(embeddings, split="train", subset=7)
    assert torch.equal(data.conditions, expected.conditions)
    assert len(data.held_out_conditions) == 4
    # so are its statistics: of the whole train split
    data = prepare.load_data(settings(subset_size=7, normalize="standardize"))
    expected = EmbeddingDataset(embeddings, split="train", subset=7, normalize="standardize")
    for name, value in expected.normalizer.target.statistics.items():
        assert torch.equal(data.normalizer.target.statistics[name], value)
    assert torch.allclose(data.targets, expected.targets) and torch.allclose(data.conditions, expected.conditions)
    with pytest.raises(ValueError, match=r"--subset_size 999: .* has only 44 training pictures"):
        prepare.load_data(settings(subset_size=999))
    assert len(prepare.load_data(settings(debug=True)).conditions) == 44


def test_without_a_held_out_split_nothing_is_evaluated(settings, tmp_path):
    result = train(settings(eval_split=0.0, max_steps=2, progress=False))
    assert "eval_loss" not in result
    assert all("eval_loss" not in entry for entry in checkpoints.read_metrics(tmp_path / "run" / "metrics.jsonl"))


def test_bad_input_is_named_before_anything_is_written(settings, tmp_path, monkeypatch):
    missing = settings()
    missing.embeddings_path = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(missing)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda: torch sees no CUDA device"):
            train(settings(device="cuda"))
    with pytest.raises(ValueError, match="K must be"):
        train(settings(normalize="pca:99"))
    (tmp_path / "file").write_text("")
    wrong = settings()
    wrong.output_dir = tmp_path / "file"
    with pytest.raises(ValueError, match="is a file; a folder is needed"):
        train(wrong)
    with pytest.raises(ValueError, match="--profile_steps 7:9: the run has only 6 steps"):
        train(settings(profile_steps="7:9"))
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"training needs transformers: pip install .*\[train\]"):
        train(settings())
    assert not (tmp_path / "run").exists()


def test_a_signal_handler_is_only_set_in_the_main_thread():
    from blip3o_fast.training.callbacks import StopRequest

    before = signal.getsignal(signal.SIGINT)
    seen = []

    def inside():
        with StopRequest().listening():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


def test_wandb_is_off_with_one_line_that_says_how_to_turn_it_on(monkeypatch, tmp_path):
    from blip3o_fast.training import trainer_args

    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(trainer_args.importlib.util, "find_spec", lambda name: None)
    ready, line = trainer_args.wandb_is_ready()
    assert not ready and 'pip install "blip3o_fast[wandb]"' in line and "\n" not in line
    monkeypatch.setattr(trainer_args.importlib.util, "find_spec", lambda name: object())
    ready, line = trainer_args.wandb_is_ready()
    assert not ready and "wandb login" in line
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert trainer_args.wandb_is_ready()[0]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert not trainer_args.wandb_is_ready()[0]
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert trainer_args.wandb_is_ready()[0]


def test_a_run_that_began_from_a_model_keeps_its_objective(embeddings, settings, tmp_path):
    train(TrainSettings(embeddings, tmp_path / "base", **SMALL, prediction_type="epsilon", sigma_min=0.2))
    flags = dict.fromkeys(("model_dim", "num_layers", "num_heads", "multiple_of"))
    for wrong, message in (
        ({"sigma_min": 0.3}, "--sigma_min 0.3: the network of --init_from has 0.2"),
        ({"model_dim": 32}, "--model_dim 32: the network of --init_from has 16"),
        ({"preset": "tiny"}, "--preset: --init_from brings its network along"),
    ):
        with pytest.raises(ValueError, match=message):
            train(settings(init_from=str(tmp_path / "base"), **flags | wrong))
    flags["condition_dropout"] = 0.0
    train(settings(init_from=str(tmp_path / "base"), max_steps=3, **flags))
    train(settings(resume_from_checkpoint="auto", **flags))  # as without --init_from, which is not asked for again
    config = BLIP3oDiT.from_pretrained(settings().output_dir).config
    assert (config.prediction_type, config.sigma_min) == ("epsilon", 0.2)
    assert config.condition_dropout == 0, "of the last training"
