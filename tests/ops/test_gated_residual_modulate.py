"""gated_residual_modulate against the norms, gates and adds of diffusers' LuminaNextDiTBlock, and by the contract."""

import importlib
import re

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiTBlock
from torch import Tensor, nn

from blip3o_fast import _ext
from blip3o_fast.kernels._launch import recording
from blip3o_fast.ops import (
    gated_residual,
    gated_residual_modulate,
    gated_residual_modulate_ref,
    merged_linear,
    rms_norm_modulate,
    swiglu,
    use_backend,
)
from blip3o_fast.testing import (
    assert_compiles_once,
    assert_deterministic,
    assert_needed_gradients,
    assert_op_contract,
    assert_rounded_once,
    assert_transforms_refused,
    in_double,
    with_gradients,
)

OP = importlib.import_module(
    "blip3o_fast.ops.gated_residual_modulate"
)  # the module: the package's name is the function
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# as autocast makes them: fp32 residual and weights, half-precision branch and modulation from the GEMMs
MIXED = (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16)
SHAPES = [(2, 8, 1792), (3, 5, 1790), (1, 1, 257), (0, 64, 32), (2, 0, 32)]
SCALED = pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])


def inputs(
    shape: tuple[int, int, int], dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 6, scaled: bool = True
) -> dict[str, Tensor | None]:
    batch, _, dim = shape
    # gate and scale are chunks of one modulation tensor, as adaLN's GEMM writes them
    gate, next_scale = (0.5 * torch.randn(batch, 4 * dim)).chunk(4, dim=1)[1:3]
    return {
        "x": torch.randn(shape).to(dtypes[0]),
        "y": (2 * torch.randn(shape)).to(dtypes[1]),
        "gate": gate.to(dtypes[2]),
        "weight": (1 + 0.1 * torch.randn(dim)).to(dtypes[3]),
        "next_weight": (1 + 0.1 * torch.randn(dim)).to(dtypes[4]),
        "next_scale": next_scale.to(dtypes[5]) if scaled else None,
    }


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    norm = RMSNorm(x.shape[-1], eps=eps)
    del norm.weight
    norm.weight = weight
    return norm(x)


def eager(x, y, gate, weight, next_weight, next_scale, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    h = x + gate.unsqueeze(1).tanh() * rms(y, weight, eps)
    n = rms(h, next_weight, eps)
    return h, n if next_scale is None else n * (1 + next_scale.unsqueeze(1))


class Given(nn.Module):
    """Stands in for an attention: returns what it was given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, **ignored) -> Tensor:
        return self.output


def test_is_diffusers_block():
    """A stock block with its two attentions replaced by fixed outputs is our ops in a row, gradients included."""
    dim, heads = 32, 4
    block = LuminaNextDiTBlock(dim, heads, heads, 8, None, 1e-5, True, dim)
    for norm in (block.norm1.norm, block.norm2, block.ffn_norm1, block.ffn_norm2, block.norm1_context):
        nn.init.normal_(norm.weight, 1, 0.2)
    a = torch.randn(2, 6, heads, dim // heads, requires_grad=True)
    output_projection = block.attn2.to_out
    block.attn1, block.attn2 = Given(a), Given(torch.zeros_like(a))
    block.attn2.to_out = output_projection
    x, temb, context = torch.randn(2, 6, dim, requires_grad=True), torch.randn(2, dim), torch.randn(2, 3, dim)
    stock = block(x, None, None, context, None, temb, {})

    _, gate1, scale2, gate2 = block.norm1.linear(nn.functional.silu(temb)).chunk(4, dim=1)
    ffn = block.feed_forward
    y = merged_linear(a.flatten(-2), [output_projection[0].weight])
    h, n = gated_residual_modulate(x, y, gate1, block.norm2.weight, block.ffn_norm1.weight, scale2)
    f = merged_linear(swiglu(merged_linear(n, [ffn.linear_1.weight, ffn.linear_3.weight])), [ffn.linear_2.weight])
    ours = gated_residual(h, f, gate2, block.ffn_norm2.weight)

    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    named = {name: p for name, p in block.named_parameters() if not name.startswith(("norm1.norm", "norm1_c", "gate"))}
    leaves, upstream = [x, a, *named.values()], torch.randn_like(stock)
    for name, mine, theirs in zip(
        ("x", "a", *named),
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(stock, leaves, upstream),
        strict=True,
    ):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm(), name


@SCALED
def test_reference_is_the_two_steps(scaled):
    args = [None if value is None else value.double() for value in inputs((2, 5, 48), scaled=scaled).values()]
    x, y, gate, weight, next_weight, next_scale = args
    h = x + gate.tanh()[:, None] * nn.functional.rms_norm(y, (48,), weight, 1e-3)
    n = nn.functional.rms_norm(h, (48,), next_weight, 1e-3) * (1 + (0 if next_scale is None else next_scale[:, None]))
    for function in (gated_residual_modulate_ref, gated_residual_modulate):
        ours = function(*args, eps=1e-3)
        torch.testing.assert_close(ours, (h, n), rtol=1e-13, atol=1e-13)


@SCALED
@pytest.mark.parametrize("dtypes", [*[(d,) * 6 for d in DTYPES], MIXED], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(backend, shape, dtypes, scaled):
    named, upstream = inputs(shape, dtypes, scaled), (torch.randn(shape), torch.randn(shape))
    with use_backend(backend):
        assert_op_contract(gated_residual_modulate, eager, gated_residual_modulate_ref, named, *upstream)


@pytest.mark.parametrize(
    "shape", [(80, 1, 48), (1, 70, 24), pytest.param((128, 17, 48), marks=pytest.mark.slow)], ids=str
)
def test_many_rows(backend, shape):
    """More partial sums, in all and of one sample, than are added up at once; programs that own 16 rows, not 4."""
    upstream = torch.randn(2, *shape).unbind()
    with use_backend(backend):
        assert_op_contract(gated_residual_modulate, eager, gated_residual_modulate_ref, inputs(shape), *upstream)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 6, MIXED], ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 4096), (2, 5, 5003), (1, 2, 16384)], ids=str)
def test_cuda_wide_rows(shape, dtypes):
    """The widest that a block's registers hold, and those that it reads again."""
    named, upstream = inputs(shape, dtypes), torch.randn(2, *shape).unbind()
    with use_backend("cuda"):
        assert_op_contract(gated_residual_modulate, eager, gated_residual_modulate_ref, named, *upstream)


def test_cuda_blocks_of_several_tokens():
    """As on large batches: a block walks over tokens, the last one of a sample over fewer."""
    shape = (65, 127, 24)
    upstream = torch.randn(2, *shape).unbind()
    with use_backend("cuda"):
        assert_op_contract(gated_residual_modulate, eager, gated_residual_modulate_ref, inputs(shape), *upstream)


def test_cpu_kernels_are_called(cpu_calls):
    with_gradients(gated_residual_modulate, inputs((2, 3, 16)), *torch.randn(2, 2, 3, 16))
    assert cpu_calls == ["gated_residual_modulate_fwd", "gated_residual_modulate_bwd"]


def test_threads_change_no_bit(threads_agree):
    threads_agree(gated_residual_modulate, inputs((3, 37, 96)), *torch.randn(2, 3, 37, 96))


@SCALED
def test_triton_kernels_are_launched(scaled):
    with use_backend("triton"), recording() as launches:
        with_gradients(gated_residual_modulate, inputs((2, 3, 16), scaled=scaled), *torch.randn(2, 2, 3, 16))
    assert [launch.name for launch in launches] == [
        "gated_residual_modulate_fwd",
        "gated_residual_modulate_bwd",
        "gated_residual_modulate_sums",
    ]


@pytest.mark.parametrize("dtypes", [*[(d,) * 6 for d in DTYPES], MIXED], ids=str)
def test_equals_the_two_ops(backend, dtypes):
    """The outputs bit for bit: n is the norm of the rounded h, and h has the bits of gated_residual."""
    named = inputs((2, 5, 48), dtypes)
    x, y, gate, weight, next_weight, next_scale = named.values()
    with use_backend(backend):
        h, n = gated_residual_modulate(**named)
        if backend != "cuda":  # gated_residual has no CUDA C++ kernel to compare with
            assert torch.equal(h, gated_residual(x, y, gate, weight))
        assert torch.equal(n, rms_norm_modulate(h, next_weight, next_scale))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounds_once(backend, dtype):
    """Against the same raw op in fp64 from the same saved h: the sum of h's two gradients is not rounded on the way."""
    named = inputs((2, 64, 96), (dtype,) * 6)
    forward, backward = OP._gated_residual_modulate_fwd, OP._gated_residual_modulate_bwd
    h, n, rstd_y, rstd_h = forward(*named.values(), 1e-5, dtype, backend)
    exact_h, _, _, _ = forward(*in_double(named).values(), 1e-5, torch.float64, "reference")
    assert_rounded_once(h, exact_h, "h")
    assert_rounded_once(n, rms_norm_modulate(h.double(), *list(in_double(named).values())[4:]), "n")
    dh, dn = torch.randn(2, 2, 64, 96).to(dtype)
    saved = [dh, dn, named["y"], h, *list(named.values())[2:]]
    names = ("dx", "dy", "dgate", "dweight", "dnext_weight", "dnext_scale")
    ours = backward(*saved, rstd_y, rstd_h, backend)
    y, h = named["y"].double(), h.double()
    rstds = [torch.rsqrt(t.square().mean(-1) + 1e-5) for t in (y, h)]
    gold = backward(*[t.double() for t in saved], *rstds, "reference")
    for name, mine, exact in zip(names, ours, gold, strict=True):
        assert_rounded_once(mine, exact, name)


@SCALED
def test_gradcheck(scaled):
    args = [None if v is None else v.double().requires_grad_() for v in inputs((2, 3, 7), scaled=scaled).values()]
    assert torch.autograd.gradcheck(lambda *a: gated_residual_modulate(*a, eps=1e-3), args)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 6, MIXED], ids=str)
@pytest.mark.parametrize("output", [0, 1])
def test_one_of_the_two_outputs_alone(backend, dtypes, output):
    """The last block uses h alone, and some callers n alone: the other's upstream gradient is zero."""
    named, upstream = inputs((2, 5, 48), dtypes), torch.randn(2, 5, 48)

    def only(function):
        return lambda **leaves: function(**leaves)[output]

    def zeros_where_unused(**leaves):
        # the stock sequence gives next_weight no gradient at all when n is unused: add a zero that reaches it
        h, n = eager(**leaves)
        return (h, n)[output] + 0 * (h, n)[1 - output]

    with use_backend(backend):
        assert_op_contract(
            only(gated_residual_modulate),
            zeros_where_unused,
            lambda **leaves: sum(y * (i == output) for i, y in enumerate(gated_residual_modulate_ref(**leaves))),
            named,
            upstream,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(backend, dtype):
    """Slices, every other row, transposed and expanded upstream gradients: read where they lie."""
    wide = torch.randn(2, 6, 100).to(dtype)
    named = {
        "x": wide[:, ::2, 4:52],
        "y": torch.randn(2, 48, 3).to(dtype).transpose(1, 2),
        "gate": torch.randn(2, 96).to(dtype)[:, ::2],
        "weight": torch.randn(96).to(dtype)[::2],
        "next_weight": torch.randn(96).to(dtype)[1::2],
        "next_scale": torch.randn(48, 2).to(dtype).t(),
    }
    upstream = torch.randn(2, 48, 3).transpose(1, 2), torch.randn(1, 3, 1).expand(2, 3, 48)
    for pair in (upstream, upstream[::-1]):
        with use_backend(backend):
            assert_op_contract(gated_residual_modulate, eager, gated_residual_modulate_ref, named, *pair)


def test_deterministic(backend):
    with use_backend(backend):
        assert_deterministic(gated_residual_modulate, inputs((3, 21, 96)), *torch.randn(2, 3, 21, 96))


@SCALED
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 6, MIXED], ids=str)
def test_opcheck(backend, dtypes, scaled):
    named = inputs((2, 3, 16), dtypes, scaled)
    torch.library.opcheck(OP._gated_residual_modulate_fwd, (*named.values(), 1e-5, torch.bfloat16, backend))
    h = named.pop("x")
    dh, dn, rstd = torch.randn(2, 3, 16), torch.randn(2, 3, 16).bfloat16(), torch.rand(2, 3)
    y, *others = named.values()
    torch.library.opcheck(OP._gated_residual_modulate_bwd, (dh, dn, y, h, *others, rstd, rstd + 1, backend))


def test_compile_does_not_recompile_per_batch(backend):
    with use_backend(backend):
        assert_compiles_once(
            gated_residual_modulate, lambda batch: (inputs((batch, 4, 16)), torch.randn(2, batch, 4, 16).unbind())
        )


@SCALED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_narrows_the_norm_alone(backend, dtype, scaled):
    dtypes = (torch.float32, dtype, dtype, torch.float32, torch.float32, dtype)
    with torch.autocast("cpu", dtype), use_backend(backend):
        assert_op_contract(
            gated_residual_modulate,
            eager,
            gated_residual_modulate_ref,
            inputs((2, 8, 64), dtypes, scaled),
            *torch.randn(2, 2, 8, 64),
            dtypes=[torch.float32, dtype],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes_stay_finite(backend, dtype):
    """A branch of zeros, one whose square overflows fp16, one huge value; gates far in tanh's saturation."""
    x, y = torch.ones(1, 3, 64, dtype=dtype), torch.zeros(1, 3, 64, dtype=dtype)
    y[0, 1], y[0, 2, 5], x[0, 2] = 1e4, 6e4, 3e4
    ones = torch.ones(64, dtype=dtype)
    gate = torch.linspace(-100, 100, 64, dtype=dtype)[None]
    named = {"x": x, "y": y, "gate": gate, "weight": ones, "next_weight": ones, "next_scale": 0 * gate}
    with use_backend(backend):
        results = with_gradients(gated_residual_modulate, named, *torch.randn(2, 1, 3, 64))
    for name, value in results.items():
        assert value.isfinite().all(), name


@SCALED
def test_every_combination_of_needed_gradients(scaled):
    assert_needed_gradients(gated_residual_modulate, inputs((2, 3, 8), scaled=scaled), *torch.randn(2, 2, 3, 8))


def test_does_not_save_the_residual():
    named = {name: value.detach().requires_grad_() for name, value in inputs((2, 3, 8)).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        h, _ = gated_residual_modulate(**named)
    full = [t.data_ptr() for t in saved if t.shape == (2, 3, 8)]
    assert full == [named["y"].data_ptr(), h.data_ptr()]


def test_names_what_cannot_run():
    named = inputs((1, 2, 8), (torch.bfloat16,) * 6)
    for name in ("triton", "cuda"):
        message = f"backend '{name}' cannot run gated_residual_modulate: its {name} kernel takes float32, bfloat16 and"
        with use_backend(name), pytest.raises(RuntimeError, match=message):
            gated_residual_modulate(**in_double(named))
    wide = inputs((1, 1, 16392))
    with use_backend("cuda"), pytest.raises(RuntimeError, match="its cuda kernel takes rows of up to 16384, got 16392"):
        gated_residual_modulate(**wide)
    message = "its cpu kernel takes float32, bfloat16 and float16, got torch.float64"
    if _ext.C is not None:
        with use_backend("cpu"), pytest.raises(RuntimeError, match=message):
            gated_residual_modulate(**in_double(named))


def test_second_derivatives_and_transforms_are_refused():
    assert_transforms_refused(gated_residual_modulate, inputs((1, 2, 8)))


GOOD = {
    "x": torch.zeros(2, 3, 8),
    "y": torch.zeros(2, 3, 8),
    "gate": torch.zeros(2, 8),
    "weight": torch.ones(8),
    "next_weight": torch.ones(8),
    "next_scale": torch.zeros(2, 8),
}
BAD = [
    ({"x": torch.zeros(3, 8)}, "x must have 3 dimensions (B, T, D), got shape (3, 8)"),
    ({"y": torch.zeros(1, 3, 8)}, "y must have shape (B, T, D) = (2, 3, 8), got (1, 3, 8)"),
    ({"gate": torch.zeros(2, 1, 8)}, "gate must have shape (B, D) = (2, 8), got (2, 1, 8)"),
    ({"weight": None}, "weight must be a tensor of shape (D), got NoneType"),
    ({"next_weight": torch.ones(9)}, "next_weight must have shape (D) = (8), got (9,)"),
    ({"next_scale": torch.zeros(3, 8)}, "next_scale must have shape (B, D) = (2, 8), got (3, 8)"),
    ({"next_scale": torch.zeros(2, 8).int()}, "next_scale must be float32, bfloat16, float16 or float64, got"),
    ({"next_weight": torch.ones(8).double()}, "next_weight is torch.float64 and x is torch.float32"),
    ({"gate": torch.zeros(2, 8, device="meta")}, "gate must be on cpu like x, got meta"),
    ({"eps": -1.0}, "eps must be a number >= 0, got -1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_residual_modulate(**(GOOD | change))
