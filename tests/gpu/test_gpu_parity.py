"""Every op on each backend against the fp64 gold and stock's sequence, by the numerics contract."""

import pytest
import torch
from torch import Tensor

from benchmarks.cases import OPS, WITHOUT_KERNELS, Case, assert_case, module_of
from blip3o_fast.kernels._launch import recording
from blip3o_fast.ops import flow_matching_loss, flow_matching_loss_ref, use_backend
from blip3o_fast.ops.flow_matching_loss import METRICS
from blip3o_fast.testing import with_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*determinis")]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# What each op's outputs are under autocast, where that is not autocast's dtype alone.
AUTOCAST_OUTPUTS = {
    "gated_residual": ["x"],
    "gated_residual_modulate": ["x", None],
    "flow_interpolate": ["data"],
    "flow_matching_loss": [F32],
    "ode_step": ["x"],
}
# Widths, lengths, head sizes and settings beside the model's own; each small enough for the interpreter.
ATTENTION = [
    {"tokens": 5, "context": 77, "heads": 6, "key_heads": 2, "head_dim": 72, "masked": True},
    {"tokens": 5, "context": 77, "heads": 2, "head_dim": 128},
    {"tokens": 1, "context": 130, "heads": 3, "key_heads": 1, "head_dim": 20, "masked": True},
    {"tokens": 7, "context": 1, "heads": 2, "head_dim": 6},
    {"tokens": 70, "context": 64, "heads": 2, "head_dim": 16, "masked": True},
    {"tokens": 64, "context": 64, "heads": 2, "key_heads": 1, "head_dim": 64, "masked": True},
    {"tokens": 64, "context": 64, "heads": 2, "head_dim": 64},
]
NORMS = [{"tokens": 5, "width": 1790}, {"tokens": 1, "width": 257}, {"tokens": 66, "width": 96}]
VARIANTS = {
    "rms_norm_modulate": [*NORMS, {"tokens": 5, "width": 768, "scaled": False}],
    "gated_residual": NORMS,
    "gated_residual_modulate": [*NORMS, {"tokens": 5, "width": 768, "scaled": False}],
    "layer_norm_modulate": NORMS,
    "qk_norm_rope": [
        {"grid": (3, 5), "heads": (3, 1, 3), "head_dim": 72},
        {"grid": (1, 1), "heads": (5,), "head_dim": 4},
        {"grid": (2, 3), "heads": (4, 2, 4), "head_dim": 20, "normed": (True, False)},
        {"grid": (4, 4), "heads": (4,), "head_dim": 64, "rotated": False},
    ],
    "flash_attention": ATTENTION,
    "dual_attention": ATTENTION,
    "swiglu": [{"tokens": 5, "width": 257}, {"tokens": 66, "width": 96}, {"tokens": 1, "width": 1}],
    "flow_interpolate": [
        {"tokens": 5, "width": 7},
        {"tokens": 5, "width": 7, "seeded": True},
        {"tokens": 9, "width": 768, "seeded": True, "schedule": "cosine"},
    ],
    "flow_matching_loss": [
        {"tokens": 5, "width": 7},
        {"tokens": 5, "width": 7, "seeded": True, "weight": 0.3},
        {"tokens": 9, "width": 768, "seeded": True},
    ],
    "ode_step": [{"tokens": 5, "width": 7}, {"tokens": 9, "width": 768, "guided": False}],
    "merged_linear": [{"tokens": 5, "width": 24, "parts": (8, 40)}],
}
DTYPES = {"fp32": F32, "bf16": BF16, "fp16": F16, "mixed bf16": BF16, "mixed fp16": F16}


def make(op: str, kind: str, batch: int, device: str, **sizes) -> Case:
    """A case in one of DTYPES; the mixed ones are those that autocast makes."""
    module = module_of(op)
    mixed = module.MIXED if kind.startswith("mixed") else None
    return module.case(batch, DTYPES[kind], device, dtypes=mixed, **sizes)


def output_dtypes(case: Case) -> list[torch.dtype]:
    """Outside of autocast every op answers in its first input's dtype, the loss in fp32."""
    first = next(t.dtype for t in case.inputs.values() if t is not None)
    return [F32] if case.op == "flow_matching_loss" else [first] * len(case.upstream)


def variants() -> list:
    pairs = [(op, sizes) for op in OPS for sizes in VARIANTS[op]]
    return [pytest.param(op, sizes, id=f"{op}-{' '.join(map(str, sizes.values()))}") for op, sizes in pairs]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize("op", OPS)
def test_contract_at_the_models_sizes(device, sized, op, backend, batch, kind):
    case = make(op, kind, batch if device == "cuda" else min(batch, 3), device, **sized({}, module_of(op).SMALL))
    with use_backend(backend):
        assert_case(case, dtypes=output_dtypes(case))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(("op", "sizes"), variants())
def test_contract_at_other_sizes(device, sized, op, backend, sizes, kind):
    case = make(op, kind, sized(3, 1 if op in ("flash_attention", "dual_attention") else 2), device, **sizes)
    with use_backend(backend):
        assert_case(case, dtypes=output_dtypes(case))


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("op", ["flash_attention", "dual_attention"])
def test_masked_attention_at_the_models_sizes(device, sized, op, backend, kind):
    case = make(op, kind, sized(32, 2), device, **sized({}, module_of(op).SMALL), masked=True)
    with use_backend(backend):
        assert_case(case, dtypes=output_dtypes(case))


@pytest.mark.parametrize("op", ["flash_attention", "dual_attention"])
def test_a_sample_that_sees_nothing_gets_no_context(device, sized, op, backend):
    case = make(op, "bf16", 3, device, **sized({}, module_of(op).SMALL), masked=True)
    case.given["mask"][1] = False
    with use_backend(backend):
        results = with_gradients(case.bound(case.ours), case.inputs, *case.upstream)
    for name in {"flash_attention": ("y", "dq", "dk", "dv"), "dual_attention": ("dk2", "dv2")}[op]:
        assert torch.equal(results[name][1], torch.zeros_like(results[name][1])), name
    assert all(value.isfinite().all() for value in results.values())


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("given", ["fp32", "mixed"])
@pytest.mark.parametrize("op", OPS)
def test_contract_under_autocast(device, sized, op, backend, given, dtype):
    kind = "fp32" if given == "fp32" else {BF16: "mixed bf16", F16: "mixed fp16"}[dtype]
    case = make(op, kind, sized(8, 2), device, **sized({}, module_of(op).SMALL))
    outputs = AUTOCAST_OUTPUTS.get(op, [None] * len(case.upstream))
    dtypes = [dtype if o is None else case.inputs[o].dtype if isinstance(o, str) else o for o in outputs]
    with torch.autocast(device, dtype), use_backend(backend):
        assert_case(case, dtypes=dtypes)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_an_empty_batch_is_an_empty_result(device, sized, op, backend, kind):
    case = make(op, kind, 0, device, **sized({}, module_of(op).SMALL))
    with use_backend(backend):
        results = with_gradients(case.bound(case.ours), case.inputs, *case.upstream)
    expected = dict(zip([n for n in results if n.startswith("y")], (u.shape for u in case.upstream), strict=True))
    for name, value in results.items():
        assert value.shape == (expected[name] if name in expected else case.inputs[name[1:]].shape), name
        assert torch.equal(value, torch.zeros_like(value)), f"{name} of no sample is not zero"


def strided(tensor: Tensor) -> Tensor:
    """The same values where they lie apart: every other row of a wider tensor; a vector with stride 2."""
    if tensor.dim() == 1:
        wide = tensor.new_zeros(2 * tensor.shape[0])[::2]
    else:
        middle = [2 * size for size in tensor.shape[1:-1]]
        wide = tensor.new_zeros(tensor.shape[0], *middle, tensor.shape[-1] + 8)[..., 4:-4]
        wide = wide[(slice(None), *(slice(None, None, 2) for _ in middle))]
    return wide.copy_(tensor)


@pytest.mark.parametrize("upstream", ["transposed", "expanded"])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_strided_inputs(device, sized, op, backend, kind, upstream):
    case = make(op, kind, sized(8, 2), device, **sized({}, module_of(op).SMALL))
    for name, tensor in case.inputs.items():
        case.inputs[name] = None if tensor is None else strided(tensor)
    for name, tensor in case.given.items():
        if tensor is not None and tensor.is_floating_point() and tensor.dim() > 1 and name != "rope":
            case.given[name] = strided(tensor)
    if case.upstream[0].dim():
        given = tuple(
            u.transpose(1, 2).contiguous().transpose(1, 2) if upstream == "transposed" else u[:1, :, :1].expand(u.shape)
            for u in case.upstream
        )
        case = Case(**{**vars(case), "upstream": given})
    with use_backend(backend):
        assert_case(case, dtypes=output_dtypes(case))


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("op", [op for op in OPS if op not in WITHOUT_KERNELS])
def test_kernels_are_launched(device, sized, op, batch):
    """The op's own kernels, a forward before a backward, at most one finalising launch after each."""
    case = make(op, "bf16", batch, device, **sized({}, module_of(op).SMALL))
    with use_backend("triton"), recording() as launches:
        with_gradients(case.bound(case.ours), case.inputs, *case.upstream)
    names = [launch.name for launch in launches]
    assert names and names[0].startswith(op) and "fwd" in names[0], names
    assert any(name.startswith(op) and "bwd" in name for name in names), names
    assert {launch.module for launch in launches if not launch.module.startswith("_")} == {op}
    assert len(names) <= 4, names


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("op", ["flow_matching_loss"])
def test_metrics_of_the_loss(device, sized, op, backend, kind, seeded):
    case = make(op, kind, sized(32, 2), device, **sized({}, {"tokens": 4, "width": 32}), seeded=seeded)
    given = {**case.inputs, "data": case.given["data"], "sigma": case.given["sigma"]}
    noise, seed = case.given["noise"], case.given["seed"]
    with use_backend(backend):
        ours = flow_matching_loss(
            **given, **({"seed": seed} if seeded else {"noise": noise}), regularization_weight=0.3
        )[1]
    wide = {name: tensor.double() for name, tensor in given.items()}
    gold = flow_matching_loss_ref(**wide, noise=noise.double(), regularization_weight=0.3)[1]
    assert set(ours) == set(METRICS)
    for name, value in ours.items():
        scale = max(1.0, abs(float(gold[name])))
        assert not abs(float(value) - float(gold[name])) > 16 * torch.finfo(F32).eps * scale, name
