"""Whether Triton can run here, and the door to the kernels: imported at the first use, never with the package.

`why_not` is asked once per process and device. It builds what Triton builds before its first launch (a small C module),
so that a machine without a compiler, without Python's headers or with a cache that cannot be written is found before a
model runs and not in the middle of it.
"""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from blip3o_fast.kernels import _launch

MINIMUM_CAPABILITY = (8, 0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels(op: str) -> ModuleType:
    """`blip3o_fast.kernels.<op>`."""
    return importlib.import_module(f"blip3o_fast.kernels.{op}")


def refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """None where Triton can run an op on these tensors, else the reason; integer and bool tensors may be any."""
    tensors = [x, *(t for t in others if t is not None)]
    device = x.device
    recorded = _launch.is_recording() and _launch.is_hollow(x)
    reason = None if recorded else why_not(device.type, device.index)
    if reason is not None:
        return reason
    wrong = sorted({str(t.dtype) for t in tensors if t.is_floating_point() and t.dtype not in _DTYPES})
    return f"its triton kernel takes float32, bfloat16 and float16, got {', '.join(wrong)}" if wrong else None


_reasons: dict[tuple[str, int | None], str | None] = {}


def why_not(device_type: str, index: int | None = None) -> str | None:
    """The reason why Triton cannot run on a device, or None. "not available" where an installation would mend it."""
    key = (device_type, index)
    if key not in _reasons:
        _reasons[key] = _why_not(*key)
    return _reasons[key]


# What `torch.compiler.assume_constant_result` sets, without its import of dynamo: a trace asks and looks no further.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_not(device_type: str, index: int | None) -> str | None:
    reason = why_no_triton()
    if reason is not None or _interpreted():
        return reason
    if device_type != "cuda":
        return (
            f"it needs cuda tensors, got {device_type} (TRITON_INTERPRET=1 runs kernels on the CPU, in Python, slowly)"
        )
    if not torch.cuda.is_available() or torch.version.hip is not None:
        # fake tensors of a GPU that is not there; AMD's GPUs, whose architectures the kernels know nothing of
        return "it needs an NVIDIA GPU, and PyTorch sees none"
    capability = torch.cuda.get_device_capability(index)
    if capability < MINIMUM_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        needed, given = (".".join(map(str, c)) for c in (MINIMUM_CAPABILITY, capability))
        return f"not available: it needs compute capability {needed} or newer, {name} has {given}"
    return why_no_launcher()


def why_no_triton() -> str | None:
    """The reason why Triton cannot be imported, or None."""
    if importlib.util.find_spec("triton") is None:
        return "not available: Triton is not installed (a CUDA build of PyTorch brings it along)"
    try:
        import triton  # noqa: F401
    except Exception as error:  # whatever breaks while a broken installation is imported is the reason
        return f"not available: Triton cannot be imported ({type(error).__name__}: {error})"
    return None


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def why_no_compiler() -> str | None:
    """The reason why kernels cannot be compiled ahead of time here, or None. Needs no GPU."""
    reason = why_no_triton()
    if reason is None and _interpreted():
        return "TRITON_INTERPRET is set, so kernels are interpreted; unset it"
    return reason


# What Triton builds once per machine before it can launch anything: a C extension module of Python.
_MODULE = """
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "blip3o_fast_probe", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_blip3o_fast_probe(void) { return PyModule_Create(&definition); }
"""


@functools.cache
def why_no_launcher() -> str | None:
    """The reason why Triton cannot build its launcher, with the cure, or None. Needs no GPU."""
    from triton.runtime.build import compile_module_from_src

    try:
        compile_module_from_src(_MODULE, "blip3o_fast_probe")
    except Exception as error:  # each way to fail has its own type; all mean the same
        return f"not available: Triton cannot build its launcher: {_cause(error)}"
    return None


def _cause(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "C compiler" in text:
        return "there is no C compiler (Debian: apt-get install gcc; or set CC)"
    if isinstance(error, OSError):
        from triton import knobs

        if isinstance(error, FileNotFoundError) and error.filename and "cache" not in str(error.filename):
            return f"the C compiler {error.filename} does not exist (CC names another, or apt-get install gcc)"
        return f"its cache folder {knobs.cache.dir} cannot be written ({text}); set TRITON_CACHE_DIR to one that can"
    if type(error).__name__ == "CalledProcessError":
        return f"the C compiler failed, most often for want of Python.h (Debian: apt-get install python3-dev): {text}"
    return f"{type(error).__name__}: {text}"
