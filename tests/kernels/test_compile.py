"""What is compiled ahead of time is what a launch on a GPU finds: the same entry of Triton's cache."""

import os
import subprocess
import sys

import pytest

from blip3o_fast.kernels import _compile
from blip3o_fast.kernels._launch import recording

# A process of its own: kernels that were loaded for the interpreter cannot be compiled.
SCRIPT = """
import torch, triton
from triton.backends.compiler import GPUTarget

from blip3o_fast.kernels._compile import compile_launch
from blip3o_fast.kernels._launch import recording
from blip3o_fast.ops import rms_norm_modulate, use_backend


class Driver:
    # What a launch asks a GPU's driver before it compiles.
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)


triton.runtime.driver.set_active(Driver())
x, weight = torch.empty(3, 64, 1792, dtype=torch.bfloat16, device="meta"), torch.empty(1792, device="meta")
with recording() as launches, use_backend("triton"):
    rms_norm_modulate(x, weight)
(launch,) = launches
ahead = compile_launch(launch, 90)
launched = launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.constants, **launch.options)
assert ahead.hash == launched.hash, (ahead.hash, launched.hash)
assert compile_launch(launch, 80).hash != ahead.hash
print(ahead.hash)
"""


def test_a_launch_finds_what_was_compiled_ahead(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) == 64


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
def test_kernels_of_the_interpreter_are_not_compiled():
    import torch

    from blip3o_fast.ops import rms_norm_modulate, use_backend

    with recording() as launches, use_backend("triton"):
        rms_norm_modulate(torch.empty(1, 2, 8, device="meta"), torch.empty(8, device="meta"))
    with pytest.raises(RuntimeError, match="rms_norm_modulate_fwd was loaded for the interpreter: unset TRITON_INT"):
        _compile.compile_launch(launches[0], 90)
