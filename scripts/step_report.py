"""What one sampling step costs at full size, stock beside ours: floating-point operations and launches.

    python -m scripts.step_report                  a table, with and without the context projection
    python -m scripts.step_report --json rows.json the same as data

One condition, guidance, 30 Euler steps, 24 layers of width 1792. Operations are counted by `torch.utils.flop_counter`
on tensors without data, those of a whole run, so that what ours makes once is in every step by its thirtieth part.
Launches are those of bfloat16 on an sm_90; stock's are what its forward, the guidance and the update dispatch.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from blip3o_fast import ops
from blip3o_fast.kernels._launch import assumed_capability, recording
from blip3o_fast.models import BLIP3oConfig, BLIP3oDiT
from blip3o_fast.models.eager import eager_forward
from blip3o_fast.models.launches import fake_model
from blip3o_fast.ops._library import _IMPLEMENTATIONS
from blip3o_fast.sampling import Sampler
from scripts.launch_report import cost, report

STEPS, LAYERS = 30, 24
NETWORKS = {"BLIP3-o (context projection)": True, "stock diffusers": False}


def _products_of(implementation: Any) -> Any:
    """The counter's formula of one of our ops: the products of aten that its reference runs."""

    def formula(*args: Any, out_val: Any = None, **options: Any) -> int:
        with FlopCounterMode(display=False) as inside:
            implementation(*args, **options)
        return inside.get_total_flops()

    formula._get_raw = True  # type: ignore[attr-defined]  # the arguments themselves, not their shapes
    return formula


_OURS = {op.overloadpacket: _products_of(implementation) for op, implementation in _IMPLEMENTATIONS.items()}


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of the products that function runs, ours included."""
    with FlopCounterMode(display=False, custom_mapping=_OURS) as counter, ops.use_backend("reference"), torch.no_grad():
        function()
    return counter.get_total_flops()


def network(layers: int, context_projection: bool, rows: int = 1) -> tuple[BLIP3oDiT, dict[str, torch.Tensor]]:
    """At full width and without values, and the arguments of a call of so many rows."""
    config = BLIP3oConfig(num_layers=layers, context_projection=context_projection)
    side = config.sample_size
    with torch.device("meta"):
        call = {
            "hidden_states": torch.empty(rows, config.in_channels, side, side),
            "timestep": torch.empty(rows),
            "encoder_hidden_states": torch.empty(rows, config.num_tokens, config.cross_attention_dim),
        }
        return BLIP3oDiT(config).eval(), call


def run_flops(sampler: Sampler, condition: torch.Tensor, steps: int, guidance_scale: float = 3.0) -> int:
    return flops(lambda: sampler(condition, num_steps=steps, guidance_scale=guidance_scale))


@functools.cache
def step_flops(layers: int, context_projection: bool, guidance_scale: float = 3.0) -> tuple[float, int]:
    """(ours, stock's) of a step with one condition; stock has every row in one forward."""
    model, call = network(layers, context_projection, 1 if guidance_scale in (0, 1) else 2)
    condition = call["encoder_hidden_states"][:1]
    sampler = Sampler(model)
    # Every step costs the same (a test counts all 30), so two short runs tell what a long one costs.
    one, two = (run_flops(sampler, condition, steps, guidance_scale) for steps in (1, 2))
    return (one + (STEPS - 1) * (two - one)) / STEPS, flops(lambda: eager_forward(model, **call))


def step_launches(layers: int, context_projection: bool) -> dict[str, int]:
    """stock, our: of a guided step; once: of what ours makes before the first step of a run."""
    config = BLIP3oConfig(num_layers=layers, context_projection=context_projection)
    with recording(), FakeTensorMode(allow_non_fake_inputs=True), assumed_capability(90), ops.use_backend("triton"):
        model = fake_model(config, torch.bfloat16).eval()
        side, dtype = config.sample_size, torch.bfloat16
        latents = torch.empty(1, config.num_tokens, config.in_channels)
        context = torch.empty(2, config.num_tokens, config.cross_attention_dim, dtype=dtype)
        time, number = torch.empty(2), torch.empty(())

        def stock() -> None:
            image = latents.to(dtype).transpose(1, 2).unflatten(2, (side, side))
            null, conditional = eager_forward(model, torch.cat([image, image]), time, context).float().chunk(2)
            latents.transpose(1, 2).unflatten(2, (side, side)) + number * (null + number * (conditional - null))

        made: list[Any] = []

        def once() -> None:
            condition = model.prepare_condition(context)
            modulations = model.prepare_modulations(condition, torch.empty(STEPS))
            made.extend([condition, modulations])

        def ours() -> None:
            x_t = latents.to(dtype)
            null, conditional = model(torch.cat([x_t, x_t]), time, made[0], modulations=made[1][0]).chunk(2)
            ops.ode_step(latents, conditional, null, number, number)

        with torch.no_grad():
            return {name: cost(run).launches for name, run in (("stock", stock), ("once", once), ("our", ours))}


def _at_full_depth(two: float, three: float) -> float:
    """Of 24 layers, from 2 and 3: every layer costs the same (a test looks at 4)."""
    return two + (LAYERS - 2) * (three - two)


def rows() -> list[dict[str, Any]]:
    """One row per network: FLOPs of a step, the saved share, launches of a step and of what is made once."""
    found = []
    for name, projection in NETWORKS.items():
        pairs = zip(*(step_flops(layers, projection) for layers in (2, 3)), strict=True)
        ours, stock = (_at_full_depth(*pair) for pair in pairs)
        few, more = (step_launches(layers, projection) for layers in (2, 3))
        launches = {f"{kind}_launches": round(_at_full_depth(few[kind], more[kind])) for kind in few}
        found.append(
            {"network": name, "stock_flops": stock, "our_flops": ours, "flops_saved": 1 - ours / stock, **launches}
        )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Of `rows`, in Markdown."""
    lines = [
        "| one guided step of 30, batch 1 | GFLOP, stock | GFLOP, ours | saved | launches, stock | launches, ours |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row['network']} | {row['stock_flops'] / 1e9:.1f} | {row['our_flops'] / 1e9:.1f} | "
            f"{100 * row['flops_saved']:.1f} % | {row['stock_launches']} | "
            f"{row['our_launches']} (and {row['once_launches']} once per run) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(report(__doc__, rows, table, sys.argv[1:]))
