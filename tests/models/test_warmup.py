"""`blip3o-fast warmup` fills Triton's cache on a machine without a GPU, and says what it cannot do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.launches import distinct, model_calls
from blip3o_fast.models.warmup import WarmupSettings, warmup


def run(folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-m", "blip3o_fast", "warmup", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_cache_holds_every_kernel_that_sampling_launches(tmp_path):
    done = run(tmp_path, "--preset", "tiny", "--precision", "bfloat16", "--no_training", "--arch", "90")
    assert done.returncode == 0, done.stderr
    compiled = int(re.match(r"(\d+) kernels for sm_90 in ", done.stdout)[1])
    assert len(list(tmp_path.rglob("*.cubin"))) == compiled
    config = BLIP3oConfig.preset("tiny")
    kernels = {
        launch.name
        for masked in (False, True)
        for launch in distinct(model_calls(config, uses=("sample",), masked=masked), 90).values()
    }
    assert kernels == {path.stem for path in tmp_path.rglob("*.cubin")}
    assert "dual_attention_tile_fwd" in kernels or "dual_attention_fwd" in kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_architecture_must_be_named(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2 and "hint: name it: --arch 90" in done.stderr
    assert not list(tmp_path.rglob("*.cubin"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": [70]}, "--arch must be one of 80, 86,"),
        ({"precision": ["int8"]}, "--precision must be one of bfloat16, float16, float32, autocast, got 'int8'"),
        ({"model": "x", "preset": "tiny"}, "--model and --preset exclude each other, got 'x' and 'tiny'"),
    ],
)
def test_a_wrong_setting_is_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        warmup(WarmupSettings(**change))


def test_the_interpreter_compiles_nothing():
    if os.environ.get("TRITON_INTERPRET") == "1":
        with pytest.raises(ValueError, match="TRITON_INTERPRET is set, so kernels are interpreted; unset it"):
            warmup(WarmupSettings(arch=[90]))
