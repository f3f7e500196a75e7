"""What `import blip3o_fast` and `--help` may cost, and what they must not load: measured in fresh processes."""

import json
import resource
import subprocess
import sys

HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "diffusers",
    "accelerate",
    "triton",
    "PIL",
    "matplotlib",
    "wandb",
    "datasets",
)


def run(code: str) -> dict:
    """Run code in a fresh interpreter; it fills `result`, a JSON-able dict."""
    done = subprocess.run(
        [sys.executable, "-c", f"result = {{}}\n{code}\nimport json; print(json.dumps(result))"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing_heavy() -> None:
    result = run(
        "import sys, blip3o_fast\n"
        f"result['loaded'] = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "result['ours'] = [m for m in sys.modules if m.startswith('blip3o_fast.')]"
    )
    assert result == {"loaded": [], "ours": []}


def test_the_library_loads_torch_and_no_framework() -> None:
    """The names a training script or a notebook starts with. Triton is torch's business, not ours."""
    result = run(
        "import torch, sys\n"
        "before = set(sys.modules)\n"
        "from blip3o_fast import BLIP3oConfig, BLIP3oDiT, ops, sample, use_backend\n"
        f"result['loaded'] = [m for m in {HEAVY!r} if m in set(sys.modules) - before]\n"
        "result['cuda'] = torch.cuda.is_initialized()\n"
        "result['dynamo'] = 'torch._dynamo' in set(sys.modules) - before"
    )
    assert result == {"loaded": [], "cuda": False, "dynamo": False}


def test_import_takes_under_a_fifth_of_a_second_beyond_torch() -> None:
    """Seconds of the processor, the best of five: the budget is about our work, not about a busy machine."""
    seconds = [
        run(
            "import torch, time\n"
            "start = time.process_time()\n"
            "import blip3o_fast\n"
            "result['seconds'] = time.process_time() - start"
        )["seconds"]
        for _ in range(5)
    ]
    assert min(seconds) < 0.2, seconds


def test_help_takes_under_four_tenths_of_a_second() -> None:
    """The whole process, interpreter included; counted as above."""
    command = [sys.executable, "-m", "blip3o_fast", "--help"]
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.4, seconds


def test_help_loads_no_torch() -> None:
    result = run(
        "import sys, io, contextlib\n"
        "from blip3o_fast.cli import main\n"
        "for argv in (['--help'], ['train', '--help'], ['--version']):\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        "        assert main(argv) == 0\n"
        f"result['loaded'] = [m for m in {HEAVY!r} if m in sys.modules]"
    )
    assert result == {"loaded": []}


def test_importing_touches_no_environment_and_no_network() -> None:
    """Others are loaded first: what they read is theirs. Then any look at os.environ and any socket is an error."""
    result = run(
        "import torch, typer, subprocess, platform, importlib.metadata, os, socket\n"
        "class Forbidden(dict):\n"
        "    def __getitem__(self, key): raise AssertionError('read ' + key)\n"
        "    get = __contains__ = __getitem__\n"
        "def no_socket(*a, **k): raise AssertionError('opened a socket')\n"
        "socket.socket = no_socket\n"
        "os.environ = Forbidden()\n"
        "import blip3o_fast, blip3o_fast.cli, blip3o_fast.env\n"
        "result['imported'] = True"
    )
    assert result == {"imported": True}
