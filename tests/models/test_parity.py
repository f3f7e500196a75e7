"""The network equals diffusers' own, outputs and every gradient, wherever the stock class can go."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blip3o_fast.kernels._launch import recording
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.ops import use_backend

OUTPUT_TOLERANCE = 1e-5


def gradients(model: Any, parameters: dict[str, nn.Parameter], call: Any, upstream: Tensor | None) -> Any:
    """Output, gradients by name, of the inputs too; the upstream gradient is drawn once and shared."""
    hidden_states, timestep, context, mask, base = call
    hidden_states, context = hidden_states.clone().requires_grad_(), context.clone().requires_grad_()
    out = model(hidden_states, timestep, context, mask, base_sequence_length=base)
    if upstream is None:
        upstream = torch.randn_like(out)
    trained = {name: p for name, p in parameters.items() if name != "pad_token"}
    grads = torch.autograd.grad(out, [*trained.values(), hidden_states, context], upstream)
    return out.detach(), dict(zip([*trained, "hidden_states", "context"], grads, strict=True)), upstream


def assert_same(ours: Any, stock: Any, call: Any) -> None:
    expected, stock_grads, upstream = gradients(stock, stock.named(), call, None)
    out, grads, _ = gradients(ours, dict(ours.named_parameters()), call, upstream)
    error = (out - expected).abs().max().item()
    assert error <= OUTPUT_TOLERANCE, f"output: max abs error {error:.2e}"
    assert set(grads) == set(stock_grads)
    largest = max(g.norm().item() for g in stock_grads.values())
    for name, expected_grad in stock_grads.items():
        error = (grads[name] - expected_grad).norm().item()
        allowed = 1e-4 * expected_grad.norm().item() + 1e-6 * largest
        assert error <= allowed, f"gradient of {name}: {error:.2e} > {allowed:.2e}"


def tiny(**overrides: Any) -> BLIP3oConfig:
    return BLIP3oConfig.preset("tiny", **overrides)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "blip3o": ({}, {}),
    "stock": ({"context_projection": False}, {}),
    "masked": ({"context_projection": False}, {"context": 9, "masked": True}),
    "masked-blip3o": ({}, {"context": 9, "masked": True}),
    "one-context-token": ({}, {"context": 1}),
    "head-64": ({"hidden_size": 128}, {}),
    "head-72-stock": ({"hidden_size": 144, "context_projection": False}, {"masked": True}),
    "head-4": ({"hidden_size": 16, "num_attention_heads": 4, "in_channels": 8}, {}),
    "head-20": ({"hidden_size": 60, "num_attention_heads": 3}, {}),
    "gqa": ({"num_attention_heads": 4, "num_kv_heads": 2}, {"masked": True}),
    "mqa": ({"num_attention_heads": 4, "num_kv_heads": 1}, {}),
    "no-qk-norm": ({"qk_norm": False}, {}),
    "no-qk-norm-gqa": ({"qk_norm": False, "num_attention_heads": 4, "num_kv_heads": 2}, {"masked": True}),
    "grid-4": ({"sample_size": 4}, {}),
    "rectangle": ({"context_projection": False}, {"height": 3, "width": 11}),
    "one-token": ({}, {"height": 1, "width": 1}),
    "patch-2": ({"patch_size": 2, "in_channels": 4}, {"height": 6, "width": 10}),
    "patch-2-sigma": ({"patch_size": 2, "in_channels": 4, "learn_sigma": True, "context_projection": False}, {}),
    "learn-sigma": ({"learn_sigma": True}, {}),
    "proportional": ({}, {"base": 256}),
    "proportional-stock": ({"context_projection": False}, {"base": 16, "height": 12, "width": 12, "masked": True}),
    "ffn-multiplier": ({"ffn_dim_multiplier": 1.5}, {}),
    "eps": ({"norm_eps": 1e-3}, {}),
    "deep": ({"num_layers": 5}, {}),
    "one-layer": ({"num_layers": 1}, {}),
    "one-sample": ({}, {"batch": 1}),
}


def run_case(stock_pair: Any, inputs: Any, overrides: dict[str, Any], call: dict[str, Any], **kwargs: Any) -> None:
    config = tiny(**overrides)
    stock, ours = stock_pair(config, **kwargs)
    shapes = {key: call[key] for key in ("batch", "context", "height", "width") if key in call}
    hidden_states, timestep, context = inputs(config, **shapes, **kwargs)
    mask = None
    if call.get("masked"):
        mask = torch.rand(context.shape[:2]) < 0.5
        mask[:, 0] = True
    assert_same(ours, stock, (hidden_states, timestep, context, mask, call.get("base")))


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers(case: str, stock_pair: Any, inputs: Any) -> None:
    run_case(stock_pair, inputs, *CASES[case])


@pytest.mark.parametrize("case", ["blip3o", "masked", "gqa", "no-qk-norm"])
def test_equals_diffusers_in_fp64(case: str, stock_pair: Any, inputs: Any) -> None:
    # Not closer than this: diffusers takes the variance of its RMSNorms in fp32 for fp64 inputs too.
    run_case(stock_pair, inputs, *CASES[case], dtype=torch.float64)


@pytest.mark.parametrize("context", [2, 63, 64, 65, 257])
def test_equals_diffusers_at_every_context_length(context: int, stock_pair: Any, inputs: Any) -> None:
    run_case(stock_pair, inputs, {"num_layers": 1}, {"context": context, "masked": context % 2 == 0})


# Under the interpreter, so the grids are small; "eight-by-eight" takes the path for 64 tokens.
TRITON_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "eight-by-eight": ({"num_layers": 1, "hidden_size": 128}, {"batch": 1, "context": 64}),
    "blip3o": ({}, {"height": 3, "width": 2}),
    "stock-masked": ({"context_projection": False}, {"height": 3, "width": 2, "context": 9, "masked": True}),
    "head-72-gqa": (
        {"hidden_size": 288, "num_attention_heads": 4, "num_kv_heads": 2, "num_layers": 1},
        {"batch": 1, "height": 2, "width": 2},
    ),
    "no-qk-norm": ({"qk_norm": False, "num_layers": 1}, {"height": 2, "width": 2}),
}


@pytest.mark.parametrize("case", TRITON_CASES)
def test_equals_diffusers_on_triton(case: str, stock_pair: Any, inputs: Any) -> None:
    with use_backend("triton"), recording() as launches:
        run_case(stock_pair, inputs, *TRITON_CASES[case])
    ops = {launch.module for launch in launches}
    expected = {"qk_norm_rope", "dual_attention", "gated_residual_modulate", "gated_residual", "swiglu"}
    assert expected | {"rms_norm_modulate", "layer_norm_modulate", "_sample_sums"} <= ops


def test_compiles_whole_on_triton(inputs: Any) -> None:
    """`torch.compile(fullgraph=True)`, forward and backward: the bits of the model that is not compiled."""
    config = tiny(num_layers=2)
    model = BLIP3oDiT(config)
    call = (*inputs(config, batch=2, height=2, width=2), None, None)
    parameters = dict(model.named_parameters())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with use_backend("triton"):
        out, grads, upstream = gradients(model, parameters, call, None)
        with recording() as launches:
            compiled_out, compiled_grads, _ = gradients(compiled, parameters, call, upstream)
    assert {"dual_attention_bwd_gate", "gated_residual_modulate_bwd"} <= {launch.name for launch in launches}
    assert torch.equal(compiled_out, out)
    for name, grad in grads.items():
        assert torch.equal(compiled_grads[name], grad), name


@pytest.mark.slow
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 1)])
@pytest.mark.parametrize("head_dim", [8, 16, 64, 72, 128])
@pytest.mark.parametrize("context", [1, 17, 129])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_diffusers_everywhere(
    projection: bool, heads: tuple[int, int], head_dim: int, context: int, masked: bool, stock_pair: Any, inputs: Any
) -> None:
    overrides = {
        "context_projection": projection,
        "num_attention_heads": heads[0],
        "num_kv_heads": heads[1],
        "hidden_size": heads[0] * head_dim,
        "in_channels": 8,
    }
    run_case(stock_pair, inputs, overrides, {"context": context, "masked": masked})


@pytest.mark.parametrize("projection", [True, False], ids=["blip3o", "stock"])
def test_equals_diffusers_at_full_width(projection: bool, stock_pair: Any, inputs: Any, two_threads: None) -> None:
    config = BLIP3oConfig(num_layers=2, context_projection=projection)
    stock, ours = stock_pair(config)
    assert_same(ours, stock, (*inputs(config, batch=1, context=64), None, None))
