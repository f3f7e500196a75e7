"""dual_attention against diffusers' attention modules and PyTorch's attention, in fp64 and by the numerics contract."""

import functools
import importlib
import itertools

import pytest
import torch
from diffusers.models.attention_processor import Attention, LuminaAttnProcessor2_0
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.cases import sum_violation
from blip3o_fast import _ext
from blip3o_fast.kernels._attention_tiles import attention_config
from blip3o_fast.kernels._launch import assumed_capability, recording
from blip3o_fast.ops import (
    _cpu,
    dual_attention,
    dual_attention_ref,
    qk_norm_rope,
    rope_table,
    use_attention,
    use_backend,
)
from blip3o_fast.testing import assert_contract

OP = importlib.import_module("blip3o_fast.ops.dual_attention")  # the module: the package's name is the function
BLOCKS = importlib.import_module("blip3o_fast.ops._softmax_blocks")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# as autocast makes them: half-precision projections, the gate an fp32 parameter
MIXED = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32)
# the context prepared outside of autocast
MIXED_CONTEXT = (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.float32)
# B, T, L, H, K, d
SHAPES = [(2, 64, 64, 4, 4, 64), (1, 6, 77, 6, 2, 72), (3, 1, 257, 3, 1, 20), (2, 7, 1, 2, 2, 6)]
NAMES = ("y", "dqkq", "dv1", "dk2", "dv2", "dgate")


CPU = [f"cpu-{isa}" for isa in _cpu.ISAS or ("auto",)]
TILE_KERNELS = ["dual_attention_tile_fwd", "dual_attention_tile_bwd", "dual_attention_bwd_gate"]
LOOP_KERNELS = [
    "dual_attention_fwd", "dual_attention_bwd_queries", "dual_attention_bwd_keys", "dual_attention_bwd_gate"
]  # fmt: skip


@pytest.fixture(params=["reference", "sdpa", "triton", "cuda", *CPU])
def implementation(request):
    """Run the test once with each implementation that works here, the kernels of csrc with each instruction set."""
    name, _, isa = request.param.partition("-")
    if name == "cpu" and _ext.C is None:
        pytest.skip(_ext.ERROR)
    with use_attention("sdpa") if name == "sdpa" else use_backend(name), _cpu.use_isa(isa or "auto"):
        yield name


def inputs(shape, dtypes=(torch.float32,) * 5) -> list[Tensor]:
    """As the model has them: v1 and v2 the last columns of wider projections."""
    batch, tokens, context, heads, key_heads, dim = shape
    qkq = torch.randn(batch, tokens, 2 * heads + key_heads, dim)
    v1 = torch.randn(batch, tokens, 2 * heads + 2 * key_heads, dim).to(dtypes[1])[:, :, -key_heads:]
    k2 = torch.randn(batch, context, key_heads, dim)
    v2 = torch.randn(batch, context, 2 * key_heads, dim).to(dtypes[3])[:, :, key_heads:]
    return [qkq.to(dtypes[0]), v1, k2.to(dtypes[2]), v2, torch.randn(heads).to(dtypes[4])]


def upstream(shape, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape[:2], shape[3] * shape[5]).to(dtype)


def one_group(shape):
    """One sample and one key head: what the interpreter has time for."""
    _, tokens, context, heads, key_heads, dim = shape
    return 1, tokens, context, heads // key_heads, 1, dim


def some_seen(batch: int, context: int) -> Tensor:
    """A mask that hides some tokens of every sample, never all."""
    mask = torch.rand(batch, context) < 0.7
    mask[:, context // 2] = True
    return mask


def eager(qkq, v1, k2, v2, gate, *, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """Stock: key heads repeated, masks expanded, two PyTorch calls, gate, sum."""
    heads, key_heads = gate.shape[0], v1.shape[2]
    q1, k1, q2 = qkq.split([heads, key_heads, heads], 2)

    def attend(q, k, v, scale, mask):
        repeats, dtype = heads // key_heads, torch.promote_types(q.dtype, k.dtype)
        k, v = (t.to(dtype).unsqueeze(3).repeat(1, 1, 1, repeats, 1).flatten(2, 3) for t in (k, v))
        mask = mask.bool().view(q.shape[0], 1, 1, -1).expand(-1, heads, q.shape[1], -1)
        q, k, v = q.to(dtype).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return out.transpose(1, 2).to(qkq.dtype)

    own = attend(q1, k1, v1, scale, torch.ones(qkq.shape[:2]))
    cross = attend(q2, k2, v2, None, torch.ones(k2.shape[:2]) if mask is None else mask)
    return (own + cross * gate.tanh().view(1, 1, -1, 1)).flatten(-2)


def run(function, args: list[Tensor], dy: Tensor, **settings) -> dict[str, Tensor]:
    """Output and the gradient of each input for the upstream gradient dy."""
    leaves = [a.detach().requires_grad_() for a in args]
    y = function(*leaves, **settings)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))), strict=True))


def check_contract(args: list[Tensor], dy: Tensor, ours: dict[str, Tensor] | None = None, **settings) -> None:
    ours = run(dual_attention, args, dy, **settings) if ours is None else ours
    stock = run(eager, args, dy, **settings)
    gold = run(dual_attention_ref, [a.double() for a in args], dy.double(), **settings)
    assert_all_keep_it(ours, stock, gold)


def assert_all_keep_it(ours: dict[str, Tensor], stock: dict[str, Tensor], gold: dict[str, Tensor]) -> None:
    """The contract. An fp32 dgate is one sum per head, of which stock's few may be exact by luck, and by the BLAS that
    it luckily has: it keeps the contract or the bound of blocked sums (Higham 2002, section 4.2)."""
    for name, value in ours.items():
        lucky = name == "dgate" and value.dtype == torch.float32
        if not lucky or sum_violation(name, value, gold[name]) is not None:
            assert_contract(value, stock[name], gold[name], name)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_reference_is_two_pytorch_attentions(masked, scale):
    args = [a.double() for a in inputs((3, 5, 7, 6, 2, 8))]
    mask = some_seen(3, 7) if masked else None
    ours, stock = (f(*args, scale=scale, mask=mask) for f in (dual_attention_ref, eager))
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("base_sequence_length", [None, 2])
def test_is_diffusers_block(implementation, heads, key_heads, base_sequence_length):
    """The mixed attention of LuminaNextDiTBlock.forward, its modules and parameters, with GQA and the scale rule."""
    dim, head_dim = 8 * heads, 8
    own, cross = (
        Attention(
            query_dim=dim, cross_attention_dim=width, dim_head=head_dim, qk_norm="layer_norm_across_heads",
            heads=heads, kv_heads=key_heads, eps=1e-5, bias=False, out_bias=False, processor=LuminaAttnProcessor2_0(),
        )
        for width in (None, 24)
    )  # fmt: skip
    own.to_out = torch.nn.Identity()
    x, context, gate = torch.randn(3, 6, dim), torch.randn(3, 5, 24), torch.randn(heads)
    mask, rope = some_seen(3, 5), rope_table(2, 3, head_dim)
    freqs = torch.view_as_complex(rope)[None]
    more = {} if base_sequence_length is None else {"base_sequence_length": base_sequence_length}
    stock = own(x, encoder_hidden_states=x, attention_mask=torch.ones(3, 6), query_rotary_emb=freqs,
                key_rotary_emb=freqs, **more)  # fmt: skip
    other = cross(x, encoder_hidden_states=context, attention_mask=mask, query_rotary_emb=freqs, **more)
    stock = (stock + other * gate.tanh().view(1, 1, -1, 1)).flatten(-2)

    norms = (own.norm_q, own.norm_k, cross.norm_q)
    qkq = qk_norm_rope(
        torch.cat((own.to_q(x), own.to_k(x), cross.to_q(x)), -1),
        [n.weight for n in norms], [n.bias for n in norms], rope, heads=(heads, key_heads, heads), head_dim=head_dim,
    )  # fmt: skip
    k2 = qk_norm_rope(
        cross.to_k(context), [cross.norm_k.weight], [cross.norm_k.bias], None, heads=(key_heads,), head_dim=head_dim
    )
    v1, v2 = (t.unflatten(-1, (key_heads, head_dim)) for t in (own.to_v(x), cross.to_v(context)))
    scale = None
    if base_sequence_length is not None:
        scale = (
            head_dim**-0.5 * (torch.tensor(6.0).log() / torch.tensor(float(base_sequence_length)).log()).sqrt().item()
        )
    ours = dual_attention(qkq, v1, k2, v2, gate, scale=scale, mask=mask)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtypes", [*[(d,) * 5 for d in DTYPES], MIXED, MIXED_CONTEXT], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(implementation, shape, dtypes, masked):
    shape = one_group(shape) if implementation == "triton" else shape
    args, dy = inputs(shape, dtypes), upstream(shape, dtypes[0])
    mask = some_seen(shape[0], shape[2]) if masked else None
    ours = run(dual_attention, args, dy, mask=mask, scale=0.2)
    for value, dtype in zip(ours.values(), (dtypes[0], *dtypes), strict=True):
        assert value.dtype == dtype
    check_contract(args, dy, ours, mask=mask, scale=0.2)


@pytest.mark.parametrize("implementation", ["reference", "sdpa"], indirect=True)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(implementation, masked):
    args = [a.double().requires_grad_() for a in inputs((2, 3, 4, 4, 2, 2))]
    mask = torch.tensor([[True, False, True, True], [False] * 4]) if masked else None
    assert torch.autograd.gradcheck(lambda *a: dual_attention(*a, scale=0.9, mask=mask), args)


def test_gradients_at_a_closed_gate(implementation):
    """Stock starts with every gate at zero: no context gets through, and the gate itself must still learn."""
    shape = (2, 5, 6, 4, 2, 8)
    args, dy = inputs(shape), upstream(shape)
    args[-1] = torch.zeros(4)
    ours = run(dual_attention, args, dy)
    check_contract(args, dy, ours)
    assert ours["dgate"].abs().min() > 0
    for value in (ours["dk2"], ours["dv2"], ours["dqkq"][:, :, 6:]):
        assert torch.equal(value, torch.zeros_like(value))


def test_a_sample_without_context_gets_none(implementation):
    # many heads: dgate has one number for each, and stock's error of a few numbers may be zero by luck
    shape = (3, 4, 6, 16, 8, 8)
    args, dy, mask = inputs(shape), upstream(shape), some_seen(3, 6)
    mask[1] = False
    ours = run(dual_attention, args, dy, mask=mask)
    alone = [a[1:2] for a in args[:-1]]
    closed = run(dual_attention, [*alone, torch.zeros(16)], dy[1:2])
    assert torch.equal(ours["y"][1], closed["y"][0])
    assert torch.equal(ours["dqkq"][1, :, :24], closed["dqkq"][0, :, :24])
    for value in (ours["dqkq"][1, :, 24:], ours["dk2"][1], ours["dv2"][1]):
        assert torch.equal(value, torch.zeros_like(value))
    check_contract(
        [*(a[[0, 2]] for a in args[:-1]), args[-1]],
        dy[[0, 2]],
        {n: t if n == "dgate" else t[[0, 2]] for n, t in ours.items()},
        mask=mask[[0, 2]],
    )
    nothing = run(dual_attention, args, dy, mask=torch.zeros_like(mask))
    assert torch.equal(nothing["dgate"], torch.zeros(16))


def test_a_mask_that_hides_nothing_changes_nothing():
    shape = (2, 5, 6, 2, 2, 8)
    args, dy = inputs(shape), upstream(shape)
    with use_backend("reference"):
        plain, masked = (run(dual_attention, args, dy, mask=m) for m in (None, torch.ones(2, 6, dtype=torch.bool)))
    for name, value in plain.items():
        assert torch.equal(value, masked[name]), name


@pytest.mark.parametrize("budget", [1, 40, 300])
@pytest.mark.parametrize("per_sample", [True, False])
def test_blocks_cover_everything(monkeypatch, budget, per_sample):
    """Blocks of single rows, of some rows, of some heads; of one sample (CPU) and of several (other devices)."""
    monkeypatch.setattr(BLOCKS, "_CPU_BLOCK", budget)
    if not per_sample:
        monkeypatch.setattr(BLOCKS, "_DEVICE_BLOCK", 4 * budget)
        monkeypatch.setattr(BLOCKS, "_reads_in_place", lambda tensor: False)
    shape = (5, 7, 9, 6, 3, 4)
    args, dy, mask = inputs(shape), upstream(shape), some_seen(5, 9)
    with use_backend("reference"):
        for given in (None, mask):
            check_contract(args, dy, mask=given)


def test_strided_inputs(implementation):
    """Every other token, strided gate and mask, a transposed upstream gradient."""
    args = inputs((2, 10, 12, 4, 2, 8))
    args = [*(a[:, ::2] for a in args[:-1]), torch.randn(8)[::2]]
    mask = some_seen(6, 2).T
    mask[:, 3] = True
    check_contract(args, torch.randn(2, 32, 5).transpose(1, 2), mask=mask)
    # no unit stride anywhere
    args = [torch.randn(8, h, n, 2).permute(3, 2, 1, 0) for h, n in ((10, 5), (2, 5), (2, 6), (2, 6))]
    check_contract([*args, torch.randn(4)], torch.randn(2, 5, 64)[..., ::2])


def test_no_samples(implementation):
    shape = (0, 3, 4, 2, 1, 8)
    args = inputs(shape)
    ours = run(dual_attention, args, upstream(shape), mask=torch.ones(0, 4, dtype=torch.bool))
    assert ours["y"].shape == (0, 3, 16)
    for name, like in zip(NAMES[1:], args, strict=True):
        assert torch.equal(ours[name], torch.zeros_like(like))


def test_deterministic(implementation):
    shape = (1, 33, 65, 2, 1, 16) if implementation == "triton" else (3, 33, 65, 4, 2, 16)
    args, dy, mask = inputs(shape), upstream(shape), some_seen(shape[0], 65)
    for given in (None, mask):
        first, second = (run(dual_attention, args, dy, mask=given) for _ in range(2))
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(backend, masked):
    args, mask = inputs((2, 3, 4, 4, 2, 8)), some_seen(2, 4) if masked else None
    torch.library.opcheck(OP._dual_attention_fwd, (*args, mask, 0.3, torch.bfloat16, backend))
    torch.library.opcheck(OP._dual_attention_bwd, (torch.randn(2, 3, 32), *args, mask, 0.3, backend))


@pytest.mark.parametrize("masked", [False, True])
def test_compile_does_not_recompile_per_batch(implementation, masked):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(dual_attention, fullgraph=True, backend=counter)
    torch._dynamo.reset()
    for batch in (2, 3, 4, 5):
        shape = (batch, 4, 5, 1, 1, 8) if implementation == "triton" else (batch, 4, 5, 4, 2, 8)
        args, dy, mask = inputs(shape), upstream(shape), some_seen(batch, 5) if masked else None
        ours, plain = (run(f, args, dy, mask=mask) for f in (compiled, dual_attention))
        for name, value in ours.items():
            torch.testing.assert_close(value, plain[name], rtol=0, atol=1e-6 if implementation == "sdpa" else 0)
    assert counter.frame_count <= 2, "one static and one dynamic graph"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_autocast_returns_its_dtype(implementation, dtype, masked):
    shape = (2, 8, 9, 4, 2, 16)
    args, dy, mask = inputs(shape), upstream(shape, dtype), some_seen(2, 9) if masked else None
    with torch.autocast("cpu", dtype):
        ours, stock = (run(f, args, dy, mask=mask) for f in (dual_attention, eager))
    gold = run(dual_attention_ref, [a.double() for a in args], dy.double(), mask=mask)
    assert ours["y"].dtype == dtype
    assert_contract(ours["y"], stock["y"].to(dtype), gold["y"])
    for name in NAMES[1:]:
        assert ours[name].dtype == torch.float32
        assert_contract(ours[name], stock[name], gold[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_stay_finite(implementation, dtype):
    """Scores far beyond where exp overflows, of both signs, gates where tanh is flat."""
    shape = (2, 5, 6, 2, 2, 16)
    args = [a.to(dtype) for a in inputs(shape)]
    args = [30 * args[0], args[1], 30 * args[2], args[3], torch.tensor([1e4, -1e4]).to(dtype)]
    dy = upstream(shape, dtype)
    ours = run(dual_attention, args, dy)
    for name, value in ours.items():
        assert value.isfinite().all(), name
    gold = run(dual_attention_ref, [a.double() for a in args], dy.double())
    assert_contract(ours["y"], run(eager, args, dy)["y"], gold["y"])
    assert torch.equal(ours["dgate"], torch.zeros(2, dtype=dtype))


def test_names_what_cannot_run():
    args = inputs((1, 2, 2, 1, 1, 4))
    for name in ("triton", "cuda"):
        with use_backend(name):
            with pytest.raises(
                RuntimeError, match=f"its {name} kernel takes float32, bfloat16 and float16, got torch.float64"
            ):
                dual_attention(*(a.double() for a in args))
            with pytest.raises(RuntimeError, match=f"its {name} kernel takes heads of up to 128, got 136"):
                dual_attention(*inputs((1, 2, 2, 1, 1, 136)))


def test_second_derivatives_and_transforms_are_refused():
    qkq, *others = inputs((1, 2, 2, 1, 1, 4))
    with use_backend("reference"):
        y = dual_attention(qkq.requires_grad_(), *others)
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(y, qkq, torch.randn_like(y), create_graph=True)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda a: dual_attention(a[None], *others))(qkq.detach())
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        dual_attention(qkq, *others)


def test_every_combination_of_needed_gradients():
    shape = (2, 3, 4, 2, 1, 8)
    args, dy = inputs(shape), upstream(shape)
    full = run(dual_attention, args, dy)
    for wanted in itertools.product([False, True], repeat=5):
        leaves = [t.detach().clone().requires_grad_(w) for t, w in zip(args, wanted, strict=True)]
        y = dual_attention(*leaves)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(dy)
        for leaf, name in zip(leaves, NAMES[1:], strict=True):
            assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, full[name])


def ours_stock_gold(backend: str, shape, dtypes, masked: bool, gate: Tensor | None = None):
    """The results of a backend, of stock, and of the reference in fp64."""
    args, dy = inputs(shape, dtypes), upstream(shape, dtypes[0])
    args[-1] = args[-1] if gate is None else gate.to(dtypes[-1])
    settings = {"mask": some_seen(shape[0], shape[2]) if masked else None, "scale": 0.2}
    with use_backend(backend):
        ours = run(dual_attention, args, dy, **settings)
    gold = run(dual_attention_ref, [a.double() for a in args], dy.double(), **settings)
    return ours, run(eager, args, dy, **settings), gold


# ---- cpu: what only its kernels have ---------------------------------------------------------------------------------


def test_cpu_kernels_are_called(cpu_calls):
    shape = (1, 2, 3, 2, 1, 4)
    run(dual_attention, inputs(shape), upstream(shape))
    assert cpu_calls == ["dual_attention_fwd", "dual_attention_bwd"]


def test_threads_change_no_bit(threads_agree):
    """Several blocks of rows, samples and groups of heads, which the threads share out in other ways each time."""
    shape = (3, 130, 37, 4, 2, 8)
    named = dict(zip(("qkq", "v1", "k2", "v2", "gate"), inputs(shape), strict=True))
    for mask in (None, some_seen(3, 37)):
        threads_agree(functools.partial(dual_attention, mask=mask), named, upstream(shape))


@pytest.mark.parametrize("implementation", CPU, indirect=True)
@pytest.mark.parametrize(("shape", "scale"), [((2, 130, 300, 2, 1, 24), -0.3), ((1, 40, 4100, 1, 1, 8), None)], ids=str)
def test_cpu_lengths(implementation, shape, scale):
    """Several blocks of query rows, also smaller ones; several chains of additions along the keys."""
    check_contract(inputs(shape), upstream(shape), mask=some_seen(shape[0], shape[2]), scale=scale)


@pytest.mark.parametrize("implementation", CPU, indirect=True)
@pytest.mark.parametrize(("tokens", "context"), [(1, 5), (5, 1), (1, 1)])
def test_cpu_with_one_key(implementation, tokens, context):
    """As `test_triton_with_one_key`."""
    shape = (2, tokens, context, 2, 1, 8)
    args, dy = inputs(shape), upstream(shape)
    ours = run(dual_attention, args, dy)
    zeros = [ours["dqkq"][:, :, :3]] if tokens == 1 else []
    zeros += [ours["dqkq"][:, :, 3:], ours["dk2"]] if context == 1 else []
    for value in zeros:
        assert torch.equal(value, torch.zeros_like(value))
    check_contract(args, dy, ours)


# ---- triton: every path of its kernels, each told by the kernels that were launched ---------------------------------


def triton_stock_gold(shape, dtypes, masked: bool, kernels: list[str], gate: Tensor | None = None):
    """As `ours_stock_gold`; the launched kernels are asserted."""
    with recording() as launches:
        results = ours_stock_gold("triton", shape, dtypes, masked, gate)
    assert [launch.name for launch in launches] == kernels
    return results


def check_triton(*case) -> dict[str, Tensor]:
    ours, stock, gold = triton_stock_gold(*case)
    assert_all_keep_it(ours, stock, gold)
    return ours


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("masked", "dim"), [(False, 16), (True, 64), (False, 128)])
def test_triton_tile(capability, dtype, masked, dim):
    """64 tokens and 64 of context, whole tiles and 16 rows at a time, with groups of two query heads."""
    with assumed_capability(capability):
        check_triton((1, 64, 64, 4, 2, dim), (dtype,) * 5, masked, TILE_KERNELS)


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_tile_in_full_precision(monkeypatch, capability):
    """What half precision would round away: fp32 takes small tiles, so its way into the large one is forced."""
    module = importlib.import_module("blip3o_fast.kernels.dual_attention")
    monkeypatch.setattr(module, "is_tile", lambda tokens, context, dim, *dtypes: True)
    half = attention_config("tile.backward", head_dim=32, full_precision=False, capability=capability)
    monkeypatch.setattr(module, "attention_config", lambda *args, **settings: half)
    check_triton((1, 64, 64, 2, 1, 32), (torch.float32,) * 5, True, TILE_KERNELS)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_triton_head_sizes(dtype):
    gates = []
    for dim in (6, 32, 48, 64, 72, 80, 96, 128):
        results = triton_stock_gold((1, 17, 35, 2, 1, dim), (dtype,) * 5, True, LOOP_KERNELS)
        # one number per head: stock's error of two of them may be zero by luck, so those of all sizes are judged as one
        gates.append([result.pop("dgate") for result in results])
        for name, value in results[0].items():
            assert_contract(value, *(other[name] for other in results[1:]), f"{name} of heads of {dim}")
    assert_contract(*(torch.cat(gate) for gate in zip(*gates, strict=True)), "dgate")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "tokens", "context"), [(torch.bfloat16, 130, 77), (torch.float32, 33, 65)], ids=str)
def test_triton_lengths(capability, dtype, tokens, context):
    """Several tiles of queries and of keys, the last of each cut off, two samples and groups of two."""
    with assumed_capability(capability):
        check_triton((2, tokens, context, 2, 1, 16), (dtype,) * 5, True, LOOP_KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_triton_long(dtype):
    tokens = 4096 if dtype == torch.bfloat16 else 1024
    check_triton((1, tokens, 257, 1, 1, 32), (dtype,) * 5, False, LOOP_KERNELS)


@pytest.mark.parametrize(("tokens", "kernels"), [(64, TILE_KERNELS), (20, LOOP_KERNELS)])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_triton_gates_of_a_group(dtype, tokens, kernels):
    """A small gate beside a large one, and a group whose gates are all too small for products in half precision."""
    gate = torch.tensor([2.0, -1e-3, 1e-6, -2e-6, 0.0, 0.0])
    ours = check_triton((1, tokens, tokens, 6, 3, 16), (dtype,) * 4 + (torch.float32,), False, kernels, gate)
    for value in (ours["dk2"][:, :, 2], ours["dv2"][:, :, 2], ours["dqkq"][:, :, 13:]):
        assert torch.equal(value, torch.zeros_like(value))
    if dtype == torch.bfloat16:
        assert (ours["dv2"][:, :, 1] != 0).float().mean() > 0.99


@pytest.mark.parametrize("masked_sample", [0, 1])
def test_triton_tile_without_context(masked_sample):
    shape, dtype = (2, 64, 64, 2, 1, 16), torch.bfloat16
    args, dy, mask = inputs(shape, (dtype,) * 5), upstream(shape, dtype), some_seen(2, 64)
    mask[masked_sample] = False
    with use_backend("triton"), recording() as launches:
        ours = run(dual_attention, args, dy, mask=mask)
        closed = run(dual_attention, [*args[:-1], torch.zeros(2, dtype=dtype)], dy)
    assert [launch.name for launch in launches] == 2 * TILE_KERNELS
    assert torch.equal(ours["y"][masked_sample], closed["y"][masked_sample])
    for value in (ours["dqkq"][:, :, 3:], ours["dk2"], ours["dv2"]):
        assert torch.equal(value[masked_sample], torch.zeros_like(value[masked_sample]))
    check_contract(
        [*(a[[1 - masked_sample]] for a in args[:-1]), args[-1]],
        dy[[1 - masked_sample]],
        {n: t if n == "dgate" else t[[1 - masked_sample]] for n, t in ours.items()},
        mask=mask[[1 - masked_sample]],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "context"), [(1, 5), (5, 1), (1, 1)])
def test_triton_with_one_key(dtype, tokens, context):
    """The softmax of one score is 1: the gradients of its queries and keys are zero, not the rounding of zero."""
    shape = (2, tokens, context, 2, 1, 8)
    args, dy = inputs(shape, (dtype,) * 5), upstream(shape, dtype)
    with use_backend("triton"):
        ours = run(dual_attention, args, dy)
    zeros = []
    if tokens == 1:
        zeros += [ours["dqkq"][:, :, :3]]
    if context == 1:
        zeros += [ours["dqkq"][:, :, 3:], ours["dk2"]]
    for value in zeros:
        assert torch.equal(value, torch.zeros_like(value))
    check_contract(args, dy, ours)


def test_triton_gate_sums_of_many_samples():
    """More partial sums than one step of the finalising kernel takes: only that kernel, its sums given."""
    kernels = importlib.import_module("blip3o_fast.kernels.dual_attention")
    sums, gate, dgate = torch.randn(600, 5), torch.randn(5), torch.empty(5)
    kernels.finish_gate(sums, gate, dgate)
    torch.testing.assert_close(dgate, sums.sum(0) * (1 - gate.tanh() ** 2), rtol=1e-5, atol=1e-5)


# ---- cuda: the kernels for one tile and the kernels for any length, by the emulation ---------------------------------


def check_cuda(*case) -> dict[str, Tensor]:
    ours, stock, gold = ours_stock_gold("cuda", *case)
    assert_all_keep_it(ours, stock, gold)
    return ours


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("heads", "key_heads", "masked"), [(3, 3, True), (4, 2, True), (3, 1, False)])
def test_cuda_tile(dtype, heads, key_heads, masked):
    check_cuda((2, 64, 64, heads, key_heads, 64), (dtype,) * 4 + (torch.float32,), masked)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_cuda_head_sizes(dtype):
    gates = []
    for dim in (2, 5, 32, 64, 80, 100, 128):
        results = ours_stock_gold("cuda", (1, 17, 35, 2, 1, dim), (dtype,) * 5, True)
        # judged as one, as in `test_triton_head_sizes`
        gates.append([result.pop("dgate") for result in results])
        for name, value in results[0].items():
            assert_contract(value, *(other[name] for other in results[1:]), f"{name} of heads of {dim}")
    assert_contract(*(torch.cat(gate) for gate in zip(*gates, strict=True)), "dgate")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "context"), [(130, 77), (33, 65), (64, 63)])
def test_cuda_lengths(dtype, tokens, context):
    """Several blocks of queries and of keys, the last of each cut off, two samples and groups of two."""
    check_cuda((2, tokens, context, 2, 1, 16), (dtype,) * 5, True)


# 20 seconds: five million scores, made four times, one thread after the other
@pytest.mark.slow
def test_cuda_long():
    check_cuda((1, 2048, 257, 1, 1, 32), (torch.float32,) * 5, False)


@pytest.mark.parametrize(("tokens", "dim"), [(64, 64), (20, 16)])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_cuda_gates_of_a_group(dtype, tokens, dim):
    """As `test_triton_gates_of_a_group`."""
    gate = torch.tensor([2.0, -1e-3, 1e-6, -2e-6, 0.0, 0.0])
    ours = check_cuda((1, tokens, tokens, 6, 3, dim), (dtype,) * 4 + (torch.float32,), False, gate)
    for value in (ours["dk2"][:, :, 2], ours["dv2"][:, :, 2], ours["dqkq"][:, :, 13:]):
        assert torch.equal(value, torch.zeros_like(value))
    if dtype == torch.bfloat16:
        assert (ours["dv2"][:, :, 1] != 0).float().mean() > 0.99


def test_cuda_tile_without_context():
    shape, dtype = (2, 64, 64, 2, 1, 64), torch.bfloat16
    args, dy, mask = inputs(shape, (dtype,) * 5), upstream(shape, dtype), some_seen(2, 64)
    mask[0] = False
    with use_backend("cuda"):
        ours = run(dual_attention, args, dy, mask=mask)
        closed = run(dual_attention, [*args[:-1], torch.zeros(2, dtype=dtype)], dy)
    assert torch.equal(ours["y"][0], closed["y"][0])
    for value in (ours["dqkq"][:, :, 3:], ours["dk2"], ours["dv2"]):
        assert torch.equal(value[0], torch.zeros_like(value[0]))
    check_contract(
        [*(a[1:] for a in args[:-1]), args[-1]],
        dy[1:],
        {n: t if n == "dgate" else t[1:] for n, t in ours.items()},
        mask=mask[1:],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "context"), [(1, 5), (5, 1), (1, 1)])
def test_cuda_with_one_key(dtype, tokens, context):
    """As `test_triton_with_one_key`."""
    ours = check_cuda((2, tokens, context, 2, 1, 8), (dtype,) * 5, False)
    for value in (ours["dqkq"][:, :, :3] if tokens == 1 else None, ours["dk2"] if context == 1 else None):
        assert value is None or torch.equal(value, torch.zeros_like(value))


def test_cuda_rows_that_are_not_aligned():
    """What cannot be read 16 bytes at a time goes to the kernels for any length, which round P nowhere."""
    shape, dtype = (1, 64, 64, 2, 1, 64), torch.bfloat16
    args, dy = inputs(shape, (dtype,) * 5), upstream(shape, dtype)
    moved = [torch.cat([a[..., :1], a], -1)[..., 1:] for a in args[:-1]] + [args[-1]]
    with use_backend("cuda"):
        aligned, ours = run(dual_attention, args, dy), run(dual_attention, moved, dy)
    assert not torch.equal(aligned["y"], ours["y"])
    check_contract(moved, dy, ours)
