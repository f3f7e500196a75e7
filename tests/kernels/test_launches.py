"""How many kernels a block launches: the promise, counted from outside, inside, and on real tensors."""

from collections import Counter
from typing import Any

import pytest
import torch

from blip3o_fast import ops
from blip3o_fast.kernels._launch import recording
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.launches import model_calls
from blip3o_fast.models.nextdit import BLIP3oDiT
from scripts import launch_report


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(row["what"], row["setting"], row["who"]): row for row in launch_report.rows()}


@pytest.mark.parametrize(
    ("what", "most"),
    [
        ("block: forward", 13),
        ("block: forward and backward", 44),
        ("block: training step", 44),
        ("block: sampling step, hoisted", 9),
    ],
)
def test_a_block_launches_no_more_than_promised(rows, what, most):
    """Parameters in the compute dtype; diffusers dispatches 107 and 278 (`tests/models/test_eager.py`)."""
    ours, stock = rows[what, "bfloat16", "ours"], rows[what, "bfloat16", "stock"]
    assert 0 < ours["launches"] <= most
    assert ours["launches"] < stock["launches"] / 3
    assert ours["bytes"] < stock["bytes"]


def test_autocast_costs_casts_and_no_more_kernels_of_ours(rows):
    ours, stock = (rows["block: forward and backward", "autocast", who] for who in ("ours", "stock"))
    assert ours["launches"] < stock["launches"] / 2


def test_an_op_is_one_call_from_outside(rows):
    """So a user who counts with a TorchDispatchMode sees fewer calls than there are launches, never more."""
    for (what, _, who), row in rows.items():
        if who == "ours":
            assert row["dispatched"] <= row["launches"], what


def test_meta_tensors_see_each_op_as_its_one_schema():
    calls: Counter[str] = Counter()

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls[str(func)] += 1
            return func(*args, **(kwargs or {}))

    x = torch.empty(2, 8, 64, device="meta", requires_grad=True)
    with Names():
        y = ops.rms_norm_modulate(x, torch.empty(64, device="meta"), torch.empty(2, 64, device="meta"))
        y.backward(torch.empty_like(y))
    ours = {name: n for name, n in calls.items() if name.startswith("blip3o_fast")}
    assert ours == {"blip3o_fast.rms_norm_modulate_fwd.default": 1, "blip3o_fast.rms_norm_modulate_bwd.default": 1}


def test_what_is_recorded_without_data_is_what_runs():
    """The same kernels in the same order, with the same grids, constants and argument dtypes."""
    config = BLIP3oConfig.preset("tiny", sample_size=2)
    recorded = [
        launch
        for call in model_calls(config, batch=2, dtype=torch.float32, uses=("train",))
        for launch in call.launches
        if not launch.module.startswith("flow")
    ]
    model = BLIP3oDiT(config).train()
    x, context = torch.randn(2, 4, config.in_channels), torch.randn(2, 4, config.cross_attention_dim)
    with ops.use_backend("triton"), recording() as launches:
        y = model(x, torch.rand(2), context)
        y.backward(torch.randn_like(y))

    def described(launch):
        dtypes = [a.dtype if isinstance(a, torch.Tensor) else a for a in launch.args]
        return launch.name, launch.grid, launch.constants, launch.options, dtypes

    assert [described(launch) for launch in launches] == [described(launch) for launch in recorded]


def test_the_report_prints_stock_beside_ours(rows, capsys):
    found = list(rows.values())
    text = launch_report.table(found)
    for what in {row["what"] for row in found}:
        assert sum(line[:36].strip() == what for line in text.splitlines()) == 2, what
