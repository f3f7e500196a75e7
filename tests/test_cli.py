"""The command line: help, hints, both spellings of flags, one-line errors, exit codes."""

import inspect
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import typer

from blip3o_fast import cli
from blip3o_fast.cli import main, normalized

VERBS = (
    *("env", "extract", "train", "sample", "evaluate", "interpolate", "demo", "try", "compare", "export", "warmup"),
    *("tune-sampler", "bench"),
)


def command(*argv: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "blip3o_fast", *argv], capture_output=True, text=True)


def test_module_and_script_are_the_same_program() -> None:
    script = Path(sys.executable).with_name("blip3o-fast")
    assert script.exists(), "the console script is not installed"
    by_script = subprocess.run([script, "--help"], capture_output=True, text=True)
    by_module = command("--help")
    assert by_script.returncode == by_module.returncode == 0
    assert by_script.stdout == by_module.stdout
    for verb in VERBS:
        assert verb in by_module.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"blip3o-fast {verb}" in text
    assert "Example" in text


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "error", "hint"),
    [
        (["trian"], "No such command 'trian'.", "did you mean 'train'?"),
        (["train", "--embedding_path", "x"], "No such option: --embedding_path", "did you mean --embeddings_path?"),
        (["train", "--output_dir", "x"], "Missing option '--embeddings_path'.", None),
        (["train", "--embeddings_path", "x", "--output_dir", "y", "--num_layers", "few"], "'--num_layers'", None),
    ],
)
def test_a_mistyped_command_line_says_what_was_meant(
    argv: list[str], error: str, hint: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ") and error in lines[0]
    if hint:
        assert lines[1].startswith("hint: ") and hint.removesuffix("?") in lines[1]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "--eval-split", "0.1"], ["train", "--eval_split", "0.1"]),
        (["train", "--output-dir=a-b/c-d"], ["train", "--output_dir=a-b/c-d"]),
        (["train", "--output_dir", "a-b"], ["train", "--output_dir", "a-b"]),
        (["-h"], ["-h"]),
        (["x", "--", "--a-b"], ["x", "--", "--a-b"]),
    ],
)
def test_hyphens_in_flags_are_underscores(argv: list[str], expected: list[str]) -> None:
    assert normalized(argv) == expected


def settings_class(verb: str) -> type:
    from blip3o_fast.demo.run import DemoSettings
    from blip3o_fast.demo.try_pictures import TrySettings
    from blip3o_fast.evaluation.evaluate import EvaluateSettings
    from blip3o_fast.evaluation.interpolation import InterpolateSettings
    from blip3o_fast.evaluation.settings import SampleSettings
    from blip3o_fast.evaluation.tune_sampler import TuneSettings
    from blip3o_fast.models.compare_folder import CompareSettings
    from blip3o_fast.models.warmup import WarmupSettings
    from blip3o_fast.training.arguments import TrainSettings

    return {
        "train": TrainSettings,
        "sample": SampleSettings,
        "evaluate": EvaluateSettings,
        "interpolate": InterpolateSettings,
        "demo": DemoSettings,
        "try": TrySettings,
        "compare": CompareSettings,
        "warmup": WarmupSettings,
        "tune-sampler": TuneSettings,
    }[verb]


@pytest.mark.parametrize(
    "verb", ["train", "sample", "evaluate", "interpolate", "demo", "try", "compare", "warmup", "tune-sampler"]
)
def test_a_verb_has_every_setting_with_its_default(verb: str) -> None:
    def plain(value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    flags = {name: plain(p.default) for name, p in inspect.signature(cli.VERBS[verb]).parameters.items()}
    # what `train` needs may also stand in the file of --config
    needed = None if verb == "train" else inspect.Parameter.empty
    for name in ("ctx", "recipe", "config") if verb == "train" else ():
        assert flags.pop(name) in (None, inspect.Parameter.empty)
    expected = {
        f.name: needed if f.default is MISSING else plain(f.default)
        for f in fields(settings_class(verb))
        if f.metadata.get("flag", True)
    }
    assert flags == expected


def test_extract_has_every_argument_with_its_default() -> None:
    from blip3o_fast.data.extract import extract

    flags = {name: p.default for name, p in inspect.signature(cli.VERBS["extract"]).parameters.items()}
    expected = {name: p.default for name, p in inspect.signature(extract).parameters.items()}
    assert flags == expected | {"quiet": False}
    assert expected["quiet"] is None


def test_export_has_every_argument_with_its_default() -> None:
    from blip3o_fast.models import export

    flags = {name: p.default for name, p in inspect.signature(cli.VERBS["export"]).parameters.items()}
    assert flags == {name: p.default for name, p in inspect.signature(export).parameters.items()}


def test_bench_has_every_flag_of_the_benchmarks_and_hands_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import __main__ as benchmarks

    parser, received = benchmarks.make_parser(), []
    flags = {o: a for a in parser._actions for o in a.option_strings if o not in ("-h", "--help")}
    ours = {name.rstrip("_") for name in inspect.signature(cli.VERBS["bench"]).parameters} - {"pytest"}
    assert ours == {flag[2:].replace("-", "_") for flag in flags}
    monkeypatch.setattr(benchmarks, "main", lambda arguments: received.append(arguments) or 1)
    given = ["--op", "swiglu", "--op", "ode_step", "--set", "full", "--rounds", "3", "--check-only", "--isa", "avx2"]
    assert main(["bench", *given, "--no-report", "--", "-k", "a-b"]) == 1  # the exit code of the benchmarks
    (words,) = received
    assert words[-3:] == ["--", "-k", "a-b"]
    expected = vars(parser.parse_args([*given, "--no-report"]))
    assert vars(parser.parse_args(words[:-3])) == expected and expected["check_only"] is True


def test_bench_says_where_the_benchmarks_are_and_takes_no_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "quick"]) == 2
    assert "bench takes no argument 'quick': a set is --set NAME" in capsys.readouterr().err
    monkeypatch.setattr("blip3o_fast.cli_bench.ROOT", tmp_path)  # as installed: no checkout around the package
    assert main(["bench", "--list"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: the benchmarks are part of a checkout") and "pip install -e" in hint


@pytest.mark.parametrize("verb", ["train", "sample", "evaluate", "interpolate", "demo", "warmup"])
def test_flags_are_named_as_their_settings(verb: str) -> None:
    import typer.main

    command = typer.main.get_command(cli.app).commands[verb]  # type: ignore[attr-defined]
    flags = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} - {"--help", "-h"}
    for f in fields(settings_class(verb)):
        assert (f"--{f.name}" in flags) == f.metadata.get("flag", True)
    assert not [flag for flag in flags if "-" in flag[2:]], "flags are written with underscores"


def test_train_passes_every_flag_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import blip3o_fast.training.run as run

    seen = []
    monkeypatch.setattr(run, "train", seen.append)
    argv = ["train", "--embeddings-path", "e", "--output_dir", "o", "--num-layers", "3", "--bf16", "--no-progress"]
    assert main(argv) == 0
    assert (seen[0].embeddings_path, seen[0].output_dir) == (Path("e"), Path("o"))
    assert (seen[0].num_layers, seen[0].bf16, seen[0].progress) == (3, True, False)


def bad_app(error: BaseException) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    def only() -> None:
        raise error

    return app


@pytest.mark.parametrize("defect", [TypeError("defect"), RuntimeError("defect")])
def test_a_defect_of_ours_keeps_its_traceback(defect: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", bad_app(defect))
    with pytest.raises(type(defect), match="defect"):
        main([])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("split must be one of all, train, eval, got 'test'"), "error: split must be one of"),
        (ValueError("bad\nhint: do this"), "error: bad\nhint: do this\n"),
        (FileNotFoundError("no file x"), "error: no file x\n"),
        (FloatingPointError("the result has NaN"), "error: the result has NaN\n"),
        (type("OurError", (RuntimeError,), {"__module__": "blip3o_fast.x"})("loss is nan"), "error: loss is nan\n"),
        (
            ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.pyplot"),
            'error: this needs matplotlib.pyplot, which is not installed\nhint: pip install "blip3o_fast[report]"\n',
        ),
    ],
)
def test_errors_of_the_layers_are_one_line_and_exit_code_2(
    error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "app", bad_app(error))
    assert main([]) == 2
    assert capsys.readouterr().err.startswith(expected)


def test_a_note_is_the_hint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error = ValueError("no pictures in x")
    error.add_note("give a folder with pictures")
    monkeypatch.setattr(cli, "app", bad_app(error))
    assert main([]) == 2
    assert capsys.readouterr().err == "error: no pictures in x\nhint: give a folder with pictures\n"


def test_the_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP3O_FAST_TRACEBACK", "1")
    monkeypatch.setattr(cli, "app", bad_app(ValueError("wanted")))
    with pytest.raises(ValueError, match="wanted"):
        main([])


def test_ctrl_c_is_one_line_and_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "app", bad_app(KeyboardInterrupt()))
    assert main([]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_train_reports_all_bad_settings_before_it_starts(tmp_path: Path) -> None:
    """Through the real program: nothing is created, every problem is named."""
    output = tmp_path / "run"
    done = command(
        "train", "--embeddings_path", str(tmp_path / "none"), "--output_dir", str(output), "--batch_size", "0"
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "batch_size" in done.stderr or "none" in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()
