"""What the CUDA compiler has made of the kernels: nothing of theirs lies in memory that is not asked for."""

import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from blip3o_fast import _ext

ROOT = Path(__file__).resolve().parent.parent.parent
ARCHITECTURES = {80, 89, 90}
# Of a block, without asking for more at the launch; the tool's numbers include what the system keeps for itself.
SHARED_LIMIT = 48 * 1024 + 1024


def cuobjdump() -> str:
    """NVIDIA's, of the toolkit or as Triton brings it along."""
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    try:
        import triton

        folders.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    except ImportError:
        pass
    found = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if found is None:
        pytest.skip("there is no cuobjdump (a CUDA toolkit or Triton brings it along)")
    return found


@pytest.fixture(scope="module")
def extension() -> str:
    module, reason = _ext.load("_cuda", "cuda")
    if module is None:
        pytest.skip(reason)
    return str(module.__file__)


def dumped(*command: str) -> str:
    return subprocess.run([cuobjdump(), *command], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def usage(extension: str) -> dict[int, dict[str, dict[str, int]]]:
    """Per architecture and kernel the numbers that cuobjdump tells."""
    found: dict[int, dict[str, dict[str, int]]] = defaultdict(dict)
    architecture, kernel = 0, ""
    for line in dumped("--dump-resource-usage", extension).splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = match[1]
        elif "REG:" in line:
            found[architecture][kernel] = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)}
    return found


def test_every_kernel_is_there_for_every_architecture(usage: dict[int, dict[str, dict[str, int]]]) -> None:
    assert set(usage) == ARCHITECTURES
    assert len({frozenset(kernels) for kernels in usage.values()}) == 1
    sources = [path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu")]
    declared = {name for text in sources for name in re.findall(r"__global__ void[^;{]*?(\w+)\((?!\w*_threads)", text)}
    declared -= {"__launch_bounds__"}
    assert len(declared) > 10
    for name in declared:
        assert any(name in kernel for kernel in usage[90]), name


def test_no_kernel_spills_or_needs_a_stack(usage: dict[int, dict[str, dict[str, int]]]) -> None:
    for architecture, kernels in usage.items():
        for kernel, used in kernels.items():
            assert used["STACK"] == 0 and used["LOCAL"] == 0, f"sm_{architecture} {kernel}: {used}"
            assert 0 < used["REG"] <= 255 and used["SHARED"] <= SHARED_LIMIT, f"sm_{architecture} {kernel}: {used}"


def test_newer_gpus_can_compile_for_themselves(extension: str) -> None:
    assert "sm_90" in dumped("--list-ptx", extension)
