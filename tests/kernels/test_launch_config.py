"""The launch configuration is a pure function of shape and architecture."""

import json

import pytest

from blip3o_fast.kernels import _config
from blip3o_fast.kernels._config import LaunchConfig, launch_config, rows_per_program


@pytest.mark.parametrize("width", [1, 2, 31, 32, 64, 257, 768, 1024, 1790, 1792, 4864, 8192, 16384])
@pytest.mark.parametrize("elements", [4, 8, 16])
def test_a_block_covers_its_row(width, elements):
    config = launch_config("swiglu.forward", width=width, elements_per_thread=elements)
    assert config.block >= width and config.block < 2 * max(width, 1)
    assert config.block & (config.block - 1) == 0, "a power of two"
    assert 1 <= config.num_warps <= 16 and config.num_warps & (config.num_warps - 1) == 0
    assert config.num_warps == 16 or config.block <= 2 * config.num_warps * 32 * elements


def test_the_batch_changes_only_the_rows_per_program():
    made = [launch_config("rms_norm_modulate.backward", width=1792, batch=b, tokens=64) for b in range(1, 257)]
    assert {(c.num_warps, c.block) for c in made} == {(made[0].num_warps, 2048)}
    assert [made[b - 1].rows for b in (1, 32, 64, 128, 256)] == [4, 8, 16, 16, 64]


@pytest.mark.parametrize("tokens", [1, 3, 64, 77, 4096])
def test_rows_keep_a_gpu_busy_where_there_are_enough(tokens):
    for batch in (1, 2, 8, 31, 64, 255, 256, 1000):
        rows = rows_per_program(batch, tokens)
        programs = batch * -(-tokens // rows)
        assert rows in (4, 8, 16, 64)
        assert programs >= 256 or rows == 4


def test_a_tuned_entry_replaces_the_default_of_its_kernel_only(tmp_path, monkeypatch):
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"90": {"swiglu.forward": {"1792": {"num_warps": 2}}}}))
    monkeypatch.setattr(_config, "TABLE", table)
    _config._table.cache_clear()
    try:
        default = LaunchConfig(num_warps=4, block=2048, rows=4)
        assert launch_config("swiglu.forward", width=1792) == LaunchConfig(num_warps=2, block=2048, rows=4)
        assert launch_config("swiglu.forward", width=1792, capability=80) == default
        assert launch_config("swiglu.forward", width=1790) == default
        assert launch_config("swiglu.backward", width=1792) == default
    finally:
        _config._table.cache_clear()
