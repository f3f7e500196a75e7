"""qk_norm_rope against nn.LayerNorm and diffusers' rotary embedding, in fp64 and by the numerics contract."""

import importlib
import itertools
import re

import pytest
import torch
from diffusers.models.attention_processor import Attention, LuminaAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_fast import _ext
from blip3o_fast.kernels._launch import recording
from blip3o_fast.ops import qk_norm_rope, qk_norm_rope_ref, rope_table, use_backend
from blip3o_fast.testing import assert_contract, assert_rounded_once

OP = importlib.import_module("blip3o_fast.ops.qk_norm_rope")  # the module: the package's name is the function
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# as autocast makes them: half-precision projection, fp32 norm parameters
MIXED = (torch.bfloat16, torch.float32, torch.float32)
# B, (height, width), heads, head_dim; few tokens, for the interpreter takes each group of each of them in turn
SHAPES = [
    (3, (1, 1), (3, 1, 3), 72),
    (1, (1, 1), (5,), 4),
    (3, (1, 2), (4, 2, 4), 20),
]
ON_CPU = pytest.param("cpu", marks=pytest.mark.skipif(_ext.C is None, reason=str(_ext.ERROR)))
MANY_TOKENS = [(2, (8, 8), (28, 28, 28), 64), (3, (3, 5), (3, 1, 3), 72)]


class Case:
    """A call's tensors and settings; `run` gives its output and every gradient."""

    def __init__(self, shape, dtypes=(torch.float32,) * 3, normed=(True, True, True), rotated=True):
        self.batch, grid, self.heads, self.head_dim = shape
        self.tokens, self.columns = grid[0] * grid[1], sum(self.heads) * self.head_dim
        # a column slice of a wider projection, as in the model
        wide = 0.5 + 2 * torch.randn(self.batch, self.tokens, self.columns + 4 * self.head_dim)
        self.x = wide.to(dtypes[0])[..., : self.columns]
        on = [n for n, _ in zip(itertools.cycle(normed), self.heads, strict=False)]
        sizes = [h * self.head_dim for h in self.heads]
        self.weights = [(1 + 0.1 * torch.randn(s)).to(dtypes[1]) if n else None for s, n in zip(sizes, on, strict=True)]
        self.biases = [(0.1 * torch.randn(s)).to(dtypes[2]) if n else None for s, n in zip(sizes, on, strict=True)]
        self.rope = rope_table(*grid, self.head_dim) if rotated else None
        self.dy = torch.randn(self.batch, self.tokens, sum(self.heads), self.head_dim).to(dtypes[0])

    def double(self) -> "Case":
        gold = Case.__new__(Case)
        gold.__dict__ = dict(self.__dict__)
        gold.x, gold.dy = self.x.double(), self.dy.double()
        gold.weights, gold.biases = (
            [None if t is None else t.double() for t in g] for g in (self.weights, self.biases)
        )
        return gold

    def call(self, function, x=None):
        x = self.x if x is None else x
        return function(x, self.weights, self.biases, self.rope, heads=self.heads, head_dim=self.head_dim)

    def run(self, function) -> dict[str, Tensor]:
        x = self.x.detach().requires_grad_()
        weights, biases = ([None if t is None else t.detach().requires_grad_() for t in g]
                           for g in (self.weights, self.biases))  # fmt: skip
        y = function(x, weights, biases, self.rope, heads=self.heads, head_dim=self.head_dim)
        wanted = {"dx": x}
        for name, group in (("dweight", weights), ("dbias", biases)):
            wanted |= {f"{name}{i}": t for i, t in enumerate(group) if t is not None}
        grads = torch.autograd.grad(y, list(wanted.values()), self.dy.to(y.dtype))
        return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def eager(x, weights, biases, rope, *, heads, head_dim, eps=1e-5) -> Tensor:
    """Stock: LayerNorm, view as heads, complex rotation, cast back."""
    out = []
    for z, weight, bias in zip(x.split([h * head_dim for h in heads], -1), weights, biases, strict=True):
        normed = z if weight is None else torch.nn.functional.layer_norm(z, z.shape[-1:], weight, bias, eps)
        group = normed.unflatten(-1, (-1, head_dim))
        if rope is not None:
            group = apply_rotary_emb(group, torch.view_as_complex(rope)[None], use_real=False)
        out.append(group.to(x.dtype))
    return torch.cat(out, 2)


@pytest.mark.parametrize("normed", [(True,), (True, False), (False,)])
@pytest.mark.parametrize("rotated", [True, False])
def test_reference_is_layer_norm_and_diffusers_rotation(normed, rotated):
    case = Case((2, (3, 4), (4, 2, 4), 8), normed=normed, rotated=rotated).double()
    # diffusers rotates in fp32 also for fp64 inputs, so fp32 resolution is what can be asked
    tolerance = 1e-6 if rotated else 1e-13
    torch.testing.assert_close(case.call(qk_norm_rope_ref), case.call(eager), rtol=tolerance, atol=tolerance)


def test_is_what_diffusers_processor_gives_to_attention(monkeypatch):
    """The queries and keys that LuminaAttnProcessor2_0 hands to PyTorch, from the same projections."""
    attn = Attention(
        query_dim=32, dim_head=8, heads=4, kv_heads=2, qk_norm="layer_norm_across_heads", eps=1e-5, bias=False,
        out_bias=False, processor=LuminaAttnProcessor2_0(),
    )  # fmt: skip
    for p in (*attn.norm_q.parameters(), *attn.norm_k.parameters()):
        torch.nn.init.normal_(p)
    x, rope, seen = torch.randn(2, 6, 32), rope_table(2, 3, 8), []
    stock = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        seen.extend((q, k))
        return stock(q, k, v, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    freqs = torch.view_as_complex(rope)[None]
    attn.processor(attn, x, x, torch.ones(2, 6), query_rotary_emb=freqs, key_rotary_emb=freqs)
    ours = qk_norm_rope(
        torch.cat((attn.to_q(x), attn.to_k(x)), -1),
        [attn.norm_q.weight, attn.norm_k.weight],
        [attn.norm_q.bias, attn.norm_k.bias],
        rope,
        heads=(4, 2),
        head_dim=8,
    )
    q, k = ours.split((4, 2), 2)
    torch.testing.assert_close(q.transpose(1, 2), seen[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(k.repeat_interleave(2, 2).transpose(1, 2), seen[1], rtol=1e-5, atol=1e-5)


def check_contract(case, backend):
    with use_backend(backend):
        ours = case.run(qk_norm_rope)
    stock, gold = case.run(eager), case.double().run(qk_norm_rope_ref)
    for name, value in ours.items():
        assert_contract(value, stock[name], gold[name], f"{name} on {backend}")
    assert ours["y"].is_contiguous()
    assert ours["y"].dtype == ours["dx"].dtype == case.x.dtype
    for name, group in (("dweight", case.weights), ("dbias", case.biases)):
        assert all(t is None or ours[f"{name}{i}"].dtype == t.dtype for i, t in enumerate(group))


@pytest.mark.parametrize("normed", [(True,), (False, True)])
@pytest.mark.parametrize("dtypes", [*[(d,) * 3 for d in DTYPES], MIXED], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(backend, shape, dtypes, normed):
    check_contract(Case(shape, dtypes, normed), backend)


@pytest.mark.parametrize("dtypes", [*[(d,) * 3 for d in DTYPES], MIXED], ids=str)
def test_contract_at_full_width(backend, dtypes):
    check_contract(Case((1, (1, 1), (28, 1), 64), dtypes), backend)


@pytest.mark.parametrize("normed", [(True,), (False, True)])
@pytest.mark.parametrize("dtypes", [*[(d,) * 3 for d in DTYPES], MIXED], ids=str)
@pytest.mark.parametrize("shape", MANY_TOKENS, ids=str)
@pytest.mark.parametrize("on", ["reference", pytest.param("triton", marks=pytest.mark.slow), "cuda", ON_CPU])
def test_contract_of_many_tokens(on, shape, dtypes, normed):
    check_contract(Case(shape, dtypes, normed), on)


@pytest.mark.parametrize("rotated", [True, False])
def test_contract_without_norms(backend, rotated):
    check_contract(Case((2, (1, 2), (2, 1), 8), normed=(False,), rotated=rotated), backend)


def test_any_number_of_groups(backend):
    """More than one launch of the kernels holds, of unlike sizes, not all with a norm."""
    check_contract(Case((2, (1, 2), (2, 5, 1, 3, 1, 1, 2), 8), normed=(True, False, True, True)), backend)


def test_parameters_of_unlike_dtypes(backend):
    """Stock refuses them: it gets the same numbers in fp32, and its gradients are rounded to the parameters' dtypes."""
    case = Case((2, (1, 2), (2, 1, 2), 8))
    case.weights[1], case.biases[2] = case.weights[1].bfloat16(), case.biases[2].half()
    with use_backend(backend):
        ours = case.run(qk_norm_rope)
    gold = case.double().run(qk_norm_rope_ref)
    case.weights, case.biases = ([t.float() for t in g] for g in (case.weights, case.biases))
    stock = case.run(eager)
    for name, value in ours.items():
        assert value.dtype == {"dweight1": torch.bfloat16, "dbias2": torch.float16}.get(name, torch.float32)
        assert_contract(value, stock[name].to(value.dtype), gold[name], name)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounds_once(backend, dtype):
    case = Case((3, (1, 3), (3, 2), 16), (dtype,) * 3)
    with use_backend(backend):
        ours = case.run(qk_norm_rope)
    gold = case.double().run(qk_norm_rope_ref)
    for name, value in ours.items():
        assert_rounded_once(value, gold[name], name)


@pytest.mark.parametrize(("heads", "calls"), [((2, 1, 2), 1), ((2, 1, 2, 1), 2)])
def test_cpu_kernels_are_called(cpu_calls, heads, calls):
    Case((2, (1, 2), heads, 8)).run(qk_norm_rope)
    assert cpu_calls == ["qk_norm_rope_fwd"] * calls + ["qk_norm_rope_bwd"] * calls


def test_threads_change_no_bit(threads_agree):
    """Several chunks of rows, of which the last is not full."""
    case = Case((3, (3, 13), (3, 1, 3), 8), normed=(True, False, True))
    named = {"x": case.x} | {f"affine{i}": t for i, t in enumerate((*case.weights, *case.biases))}

    def op(x: Tensor, **affine: Tensor | None) -> Tensor:
        weights, biases = (list(affine.values())[i : i + 3] for i in (0, 3))
        return qk_norm_rope(x, weights, biases, case.rope, heads=case.heads, head_dim=8)

    threads_agree(op, named, case.dy)


@pytest.mark.parametrize("normed", [(True,), (False,)])
def test_triton_kernels_are_launched(normed):
    with use_backend("triton"), recording() as launches:
        Case((2, (1, 2), (2, 1, 2), 8), normed=normed).run(qk_norm_rope)
    sums = ["sample_sums_kernel"] if normed[0] else []
    assert [launch.name for launch in launches] == ["qk_norm_rope_fwd", "qk_norm_rope_bwd", *sums]


@pytest.mark.parametrize("dtypes", [*[(d,) * 3 for d in DTYPES], MIXED], ids=str)
@pytest.mark.parametrize("heads", [(64, 1), (65, 64), (128,)])
def test_cuda_widths(heads, dtypes):
    """As many columns as threads of eight hold, and those for which a thread holds two and four times as many."""
    check_contract(Case((1, (1, 2), heads, 32 if heads == (64, 1) else 64), dtypes), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_chunks_of_tokens(dtype):
    """So many tokens that a block of the backward takes three, in one group with and one without a norm."""
    check_contract(Case((3, (14, 15), (9, 2), 32), (dtype,) * 3, normed=(True, False)), "cuda")


def test_cuda_rows_that_are_not_aligned():
    """Rows, weights and biases of which no eight can be read at once, in groups that end in the middle of eight."""
    case = Case((2, (1, 3), (5, 2, 1), 10), rotated=False)
    case.x, case.rope = torch.randn(2, 3, 87)[..., 3:83], torch.randn(3, 5, 2)
    case.weights, case.biases = ([torch.randn(len(t) + 1)[1:] for t in g] for g in (case.weights, case.biases))
    check_contract(case, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_is_one_op_and_views(backend, dtype):
    """The gradients of six parameters leave the raw op in their dtype: no cast, no copy, which would be launches."""
    names = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    case = Case((2, (1, 2), (2, 1, 2), 8), (torch.bfloat16, dtype, dtype))
    leaves = [t.requires_grad_() for t in (case.x, *case.weights, *case.biases)]
    with use_backend(backend):
        y = case.call(qk_norm_rope)
        with Spy():
            torch.autograd.grad(y, leaves, case.dy)
    assert names[0] == "blip3o_fast.qk_norm_rope_bwd.default"
    assert set(names[1:]) <= {"aten.view.default", "aten.split_with_sizes.default", "aten.detach.default"}


@pytest.mark.parametrize(("batch", "tokens"), [(0, (8, 8)), (2, (0, 0))])
def test_no_samples(backend, batch, tokens):
    """An empty batch, which stock cannot reshape: empty results, and zeros for what sums over samples."""
    case = Case((batch, tokens, (2, 1, 2), 8), rotated=batch == 0)
    with use_backend(backend):
        ours = case.run(qk_norm_rope)
    assert ours["y"].shape == (batch, tokens[0] * tokens[1], 5, 8)
    assert ours["dx"].shape == (batch, tokens[0] * tokens[1], 40)
    for i, h in enumerate((2, 1, 2)):
        assert torch.equal(ours[f"dweight{i}"], torch.zeros(8 * h))
        assert torch.equal(ours[f"dbias{i}"], torch.zeros(8 * h))


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("normed", [(True,), (True, False)])
def test_gradcheck(normed, rotated):
    case = Case((2, (1, 3), (2, 1), 4), normed=normed, rotated=rotated).double()
    tensors = [t for t in (case.x.contiguous(), *case.weights, *case.biases) if t is not None]

    def function(*given):
        given = iter(given)
        x = next(given)
        weights, biases = ([None if t is None else next(given) for t in g] for g in (case.weights, case.biases))
        return qk_norm_rope(x, weights, biases, case.rope, heads=case.heads, head_dim=4, eps=1e-3)

    with use_backend("reference"):
        assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors])


def test_chunks_of_samples_change_nothing(monkeypatch):
    """The reference in chunks of one sample, of three (the last one short), of all."""
    case, results = Case((8, (2, 2), (2, 1), 8)), []
    for size in (1, 3 * 4 * 16, 1 << 20):
        monkeypatch.setattr(OP.reference, "_CHUNK", size)
        with use_backend("reference"):
            results.append(case.run(qk_norm_rope))
    stock, gold = case.run(eager), case.double().run(qk_norm_rope_ref)
    for result in results:
        assert torch.equal(result["y"], results[0]["y"])
        for name, value in result.items():
            assert_contract(value, stock[name], gold[name], name)


@pytest.mark.parametrize("first", [0, 1])
def test_strided_inputs(backend, first):
    """Every other token of a slice at an even and at an odd place, strided weights, a transposed upstream gradient."""
    case = Case((2, (2, 3), (2, 1), 64))  # sums of many columns: of a few, stock's may be exact by luck
    case.x = torch.randn(2, 12, 240)[:, ::2, first : first + 192]
    case.weights, case.biases = ([torch.randn(2 * len(t))[::2] for t in g] for g in (case.weights, case.biases))
    case.dy = torch.randn(2, 64, 3, 6).transpose(1, 3)
    with use_backend(backend):
        ours = case.run(qk_norm_rope)
    stock, gold = case.run(eager), case.double().run(qk_norm_rope_ref)
    for name, value in ours.items():
        assert_contract(value, stock[name], gold[name], name)


def test_deterministic(backend):
    case = Case((3, (2, 2), (6, 2, 6), 16))
    with use_backend(backend):
        first, second = case.run(qk_norm_rope), case.run(qk_norm_rope)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("normed", [(True,), (False, True), (False,)])
def test_opcheck(backend, normed):
    case = Case((2, (1, 1), (2, 1), 4), normed=normed)
    heads, size = list(case.heads), (2, 1, 2)
    torch.library.opcheck(
        OP._qk_norm_rope_fwd,
        (case.x, case.weights, case.biases, case.rope, heads, 4, 1e-5, torch.bfloat16, backend),
    )
    torch.library.opcheck(
        OP._qk_norm_rope_bwd,
        (
            case.dy,
            case.x,
            case.weights,
            case.rope,
            torch.randn(size),
            torch.rand(size),
            heads,
            4,
            torch.float16,
            backend,
        ),
    )


def test_compile_does_not_recompile_per_batch(backend):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend=counter)
    torch._dynamo.reset()
    with use_backend(backend):
        for batch in (2, 3, 4, 5, 6):
            case = Case((batch, (1, 1), (2, 1), 4), normed=(True, False))
            ours, plain = case.run(compiled), case.run(qk_norm_rope)
            for name, value in ours.items():
                assert torch.equal(value, plain[name]), name
    assert counter.frame_count <= 2, "one static and one dynamic graph"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, None], ids=["fp32 x", "half x"])
def test_autocast_returns_its_dtype(backend, dtype, given):
    case = Case((2, (1, 3), (3, 3), 16), (given or dtype, torch.float32, torch.float32))
    case.dy = case.dy.to(dtype)
    with torch.autocast("cpu", dtype), use_backend(backend):
        ours, stock = case.run(qk_norm_rope), case.run(eager)
    gold = case.double().run(qk_norm_rope_ref)
    assert ours["y"].dtype == dtype
    assert_contract(ours.pop("y"), stock.pop("y").to(dtype), gold["y"])
    for name, value in ours.items():
        assert value.dtype == (case.x.dtype if name == "dx" else torch.float32)
        assert_contract(value, stock[name], gold[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extremes_stay_finite(backend, dtype):
    """Constant rows (no variance), a single large value, a large common offset."""
    case = Case((1, (1, 3), (2,), 16), (dtype,) * 3)
    case.x = torch.zeros(1, 3, 32, dtype=dtype)
    case.x[0, 0], case.x[0, 1, 5] = 3e4, 6e4
    case.x[0, 2] = (1000 + torch.randn(32)).to(dtype)
    with use_backend(backend):
        ours = case.run(qk_norm_rope)
    stock, gold = case.run(eager), case.double().run(qk_norm_rope_ref)
    for name, value in ours.items():
        assert value.isfinite().all(), name
        assert_contract(value, stock[name], gold[name], name)


def test_names_what_cannot_run():
    case = Case((1, (1, 2), (1,), 4))
    for name in ("triton", "cuda"):
        message = f"backend '{name}' cannot run qk_norm_rope: its {name} kernel takes float32, bfloat16 and float16"
        with use_backend(name), pytest.raises(RuntimeError, match=message):
            case.double().call(qk_norm_rope)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="normalises up to 8192 columns at once, got 8200"):
        Case((1, (1, 1), (1025,), 8)).call(qk_norm_rope)


def test_second_derivatives_and_transforms_are_refused():
    case = Case((1, (1, 2), (1,), 4))
    x = case.x.detach().requires_grad_()
    y = case.call(qk_norm_rope, x)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda a: case.call(qk_norm_rope, a[None]))(case.x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        case.call(qk_norm_rope)


GOOD = {
    "x": torch.zeros(2, 3, 24),
    "weights": (torch.ones(16), torch.ones(8)),
    "biases": (torch.zeros(16), torch.zeros(8)),
    "rope": torch.zeros(3, 4, 2),
    "heads": (2, 1),
    "head_dim": 8,
    "eps": 1e-5,
}
BAD = [
    ({"x": torch.zeros(3, 24)}, "x must have 3 dimensions (B, T, sum(heads)*head_dim), got shape (3, 24)"),
    ({"x": None}, "x must be a tensor of shape (B, T, sum(heads)*head_dim), got NoneType"),
    ({"x": torch.zeros(2, 3, 32)}, "x must have shape (B, T, sum(heads)*head_dim) = (2, 3, 24), got (2, 3, 32)"),
    ({"x": torch.zeros(2, 3, 24).long()}, "x must be float32, bfloat16, float16 or float64, got torch.int64"),
    ({"heads": ()}, "heads must be the number of heads of each group, each at least 1, got ()"),
    ({"heads": (3, 0)}, "heads must be the number of heads of each group, each at least 1, got (3, 0)"),
    ({"head_dim": 3}, "head_dim must be a positive even number, got 3"),
    ({"head_dim": 0}, "head_dim must be a positive even number, got 0"),
    ({"weights": (torch.ones(16),)}, "weights must have one entry per group of heads (2), got 1"),
    ({"biases": (None,) * 3}, "biases must have one entry per group of heads (2), got 3"),
    ({"biases": (torch.zeros(16), None)}, "biases[1] is None and weights[1] is not: give both (norm) or neither"),
    ({"weights": (None, torch.ones(8))}, "weights[0] is None and biases[0] is not: give both (norm) or neither"),
    ({"weights": (torch.ones(8), torch.ones(8))}, "weights[0] must have shape (heads[i]*head_dim) = (16), got (8,)"),
    (
        {"biases": (torch.zeros(16), torch.zeros(1, 8))},
        "biases[1] must have shape (heads[i]*head_dim) = (8), got (1, 8)",
    ),
    ({"weights": (torch.ones(16).double(), torch.ones(8))}, "weights[0] is torch.float64 and x is torch.float32"),
    ({"biases": (torch.zeros(16, device="meta"), torch.zeros(8))}, "biases[0] must be on cpu like x, got meta"),
    ({"rope": torch.zeros(3, 8)}, "rope must have shape (T, head_dim/2, 2) = (3, 4, 2), got (3, 8)"),
    ({"rope": torch.zeros(3, 4, dtype=torch.complex64)}, "rope must have shape (T, head_dim/2, 2) = (3, 4, 2)"),
    ({"rope": torch.zeros(3, 4, 2).double()}, "rope must be float32 (cos, sin), got torch.float64"),
    ({"rope": torch.zeros(3, 4, 2, device="meta")}, "rope must be on cpu like x, got meta"),
    ({"rope": torch.zeros(3, 4, 2, requires_grad=True)}, "rope must not require grad"),
    ({"eps": -1.0}, "eps must be a number >= 0, got -1.0"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(change, message):
    call = GOOD | change
    with pytest.raises(ValueError, match=re.escape(message)):
        qk_norm_rope(**call)


def test_every_combination_of_needed_gradients():
    case = Case((2, (1, 3), (2,), 4))
    full = case.run(qk_norm_rope)
    for wanted in itertools.product([False, True], repeat=3):
        given = (case.x, case.weights[0], case.biases[0])
        x, weight, bias = (t.detach().clone().requires_grad_(w) for t, w in zip(given, wanted, strict=True))
        y = qk_norm_rope(x, [weight], [bias], case.rope, heads=(2,), head_dim=4)
        assert y.requires_grad == any(wanted)
        assert torch.equal(y, full["y"])
        if any(wanted):
            y.backward(case.dy)
        for leaf, name in ((x, "dx"), (weight, "dweight0"), (bias, "dbias0")):
            assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, full[name])
