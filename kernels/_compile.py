"""Compiles recorded launches ahead of time, for any architecture, on a machine without a GPU.

What is compiled is what a launch would compile: the same specialisation of the same arguments, through Triton's own
binder, so the result in Triton's cache is the one that the launch on a GPU will find. Uses Triton's internals of 3.6
and 3.7. Compiling needs a process without TRITON_INTERPRET.
"""

import functools
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler import compile as triton_compile
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from blip3o_fast.kernels._launch import Launch


@functools.cache
def _backend(capability: int) -> Any:
    return make_backend(GPUTarget("cuda", capability, 32))


@functools.cache
def _binder(kernel: Any, capability: int) -> Any:
    if not isinstance(kernel, JITFunction):  # one for the interpreter: what it would be specialised for is known too
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    return create_function_from_signature(kernel.signature, kernel.params, _backend(capability))


def _bound(launch: Launch, capability: int) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    return _binder(launch.kernel, capability)(*launch.args, **launch.constants, **launch.options)


def specialisation(launch: Launch, capability: int = 90) -> str:
    """What Triton keys a compiled kernel by: two launches with the same text run the same machine code."""
    arguments, specialised, options = _bound(launch, capability)
    constants = {
        name: value
        for (name, value), kind in zip(arguments.items(), specialised, strict=True)
        if kind[0] == "constexpr"
    }
    return f"{launch.name} {specialised} {constants} {options}"


def compile_launch(launch: Launch, capability: int) -> CompiledKernel:
    """The machine code of a launch for sm_<capability>, from Triton's cache where it is there.

    Its `metadata` has the shared memory, its `asm` the code of each stage ("ttgir", "ptx", "cubin").
    """
    kernel, backend = launch.kernel, _backend(capability)
    if not isinstance(kernel, JITFunction):
        raise RuntimeError(f"{launch.name} was loaded for the interpreter: unset TRITON_INTERPRET to compile kernels")
    arguments, specialised, options = _bound(launch, capability)
    # As the launch on a device does it, which adds these two.
    options |= {"debug": False, "instrumentation_mode": ""}
    options, signature, constants, attributes = kernel._pack_args(backend, options, arguments, specialised, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton_compile(source, target=GPUTarget("cuda", capability, 32), options=options.__dict__)
