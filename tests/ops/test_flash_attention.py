"""flash_attention against PyTorch's scaled_dot_product_attention, in fp64 and by the numerics contract."""

import functools
import importlib
import itertools

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_fast import _ext
from blip3o_fast.kernels._attention_tiles import attention_config
from blip3o_fast.kernels._launch import assumed_capability, recording
from blip3o_fast.ops import _cpu, flash_attention, flash_attention_ref, use_attention, use_backend
from blip3o_fast.testing import assert_contract

OP = importlib.import_module("blip3o_fast.ops.flash_attention")  # the module: the package's name is the function
BLOCKS = importlib.import_module("blip3o_fast.ops._softmax_blocks")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# as autocast makes them where the context was made outside of it
MIXED = (torch.bfloat16, torch.float32, torch.bfloat16)
# B, Tq, Tk, H, K, d
SHAPES = [(2, 64, 64, 4, 4, 64), (1, 5, 77, 6, 2, 72), (3, 1, 257, 3, 1, 20), (2, 7, 1, 2, 2, 5)]
NAMES = ("y", "dq", "dk", "dv")


CPU = [f"cpu-{isa}" for isa in _cpu.ISAS or ("auto",)]
TILE_KERNELS = ["flash_attention_tile_fwd", "flash_attention_tile_bwd"]
LOOP_KERNELS = ["flash_attention_fwd", "flash_attention_bwd_queries", "flash_attention_bwd_keys"]


@pytest.fixture(params=["reference", "sdpa", "triton", *CPU])
def implementation(request):
    """Run the test once with each implementation that works here, the kernels of csrc with each instruction set."""
    name, _, isa = request.param.partition("-")
    if name == "cpu" and _ext.C is None:
        pytest.skip(_ext.ERROR)
    with use_attention("sdpa") if name == "sdpa" else use_backend(name), _cpu.use_isa(isa or "auto"):
        yield name


def inputs(shape, dtypes=(torch.float32,) * 3) -> list[Tensor]:
    batch, tokens, context, heads, key_heads, dim = shape
    return [
        torch.randn(batch, n, h, dim).to(dtype)
        for n, h, dtype in zip((tokens, context, context), (heads, key_heads, key_heads), dtypes, strict=True)
    ]


def one_group(shape):
    """One sample and one key head: what the interpreter has time for."""
    _, tokens, context, heads, key_heads, dim = shape
    return 1, tokens, context, heads // key_heads, 1, dim


def some_seen(batch: int, context: int) -> Tensor:
    """A mask that hides some tokens of every sample, never all."""
    mask = torch.rand(batch, context) < 0.7
    mask[:, context // 2] = True
    return mask


def eager(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """Stock: key heads repeated, the mask expanded to every head and query, one PyTorch call."""
    repeats, dtype = q.shape[2] // k.shape[2], torch.promote_types(q.dtype, k.dtype)
    k, v = (t.to(dtype).unsqueeze(3).repeat(1, 1, 1, repeats, 1).flatten(2, 3) for t in (k, v))
    mask = torch.ones(k.shape[:2]) if mask is None else mask
    mask = mask.bool().view(k.shape[0], 1, 1, -1).expand(-1, q.shape[2], q.shape[1], -1)
    out = torch.nn.functional.scaled_dot_product_attention(
        q.to(dtype).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2).to(q.dtype)


def run(function, args: list[Tensor], dy: Tensor, **settings) -> dict[str, Tensor]:
    """Output and the gradient of each input for the upstream gradient dy."""
    leaves = [a.detach().requires_grad_() for a in args]
    y = function(*leaves, **settings)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))), strict=True))


def check_contract(args: list[Tensor], dy: Tensor, ours: dict[str, Tensor] | None = None, **settings) -> None:
    ours = run(flash_attention, args, dy, **settings) if ours is None else ours
    stock = run(eager, args, dy, **settings)
    gold = run(flash_attention_ref, [a.double() for a in args], dy.double(), **settings)
    for name, value in ours.items():
        assert_contract(value, stock[name], gold[name], name)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_reference_is_pytorchs(masked, scale):
    args = [a.double() for a in inputs((3, 5, 7, 6, 2, 8))]
    mask = some_seen(3, 7) if masked else None
    ours, stock = (f(*args, scale=scale, mask=mask) for f in (flash_attention_ref, eager))
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)
    q, k, v = (a.transpose(1, 2) for a in args)
    visible = None if mask is None else mask[:, None, None]
    grouped = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True)
    torch.testing.assert_close(ours, grouped.transpose(1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtypes", [*[(d,) * 3 for d in DTYPES], MIXED], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(implementation, shape, dtypes, masked):
    shape = one_group(shape) if implementation == "triton" else shape
    args, dy = inputs(shape, dtypes), torch.randn(*shape[:2], shape[3], shape[5]).to(dtypes[0])
    mask = some_seen(shape[0], shape[2]) if masked else None
    ours = run(flash_attention, args, dy, mask=mask)
    for value, dtype in zip(ours.values(), (dtypes[0], *dtypes), strict=True):
        assert value.dtype == dtype
    check_contract(args, dy, ours, mask=mask)


@pytest.mark.parametrize("implementation", ["reference", "sdpa"], indirect=True)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(implementation, masked):
    args = [a.double().requires_grad_() for a in inputs((2, 3, 4, 4, 2, 3))]
    mask = torch.tensor([[True, False, True, True], [False] * 4]) if masked else None
    assert torch.autograd.gradcheck(lambda *a: flash_attention(*a, scale=0.9, mask=mask), args)


def test_a_sample_that_sees_nothing_gets_zero(implementation):
    args, dy = inputs((3, 4, 6, 4, 2, 8)), torch.randn(3, 4, 4, 8)
    mask = some_seen(3, 6)
    mask[1] = False
    ours = run(flash_attention, args, dy, mask=mask)
    for name, value in ours.items():
        assert torch.equal(value[1], torch.zeros_like(value[1])), name
    others = [0, 2]
    check_contract([a[others] for a in args], dy[others], {n: t[others] for n, t in ours.items()}, mask=mask[others])
    nothing = run(flash_attention, args, dy, mask=torch.zeros_like(mask))
    assert all(torch.equal(value, torch.zeros_like(value)) for value in nothing.values())


def test_a_mask_that_hides_nothing_changes_nothing():
    args, dy = inputs((2, 5, 6, 2, 2, 8)), torch.randn(2, 5, 2, 8)
    with use_backend("reference"):
        plain, masked = (run(flash_attention, args, dy, mask=m) for m in (None, torch.ones(2, 6, dtype=torch.bool)))
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
    args, dy, mask = inputs((5, 7, 9, 6, 3, 4)), torch.randn(5, 7, 6, 4), some_seen(5, 9)
    with use_backend("reference"):
        for given in (None, mask):
            check_contract(args, dy, mask=given)


def test_memory_stays_bounded(monkeypatch):
    """No tensor of the size of all probabilities is ever made, forward or backward."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            # a lifted op hands its results through here again; only what aten makes counts
            for tensor in torch.utils._pytree.tree_leaves(out):
                largest = max(largest, tensor.untyped_storage().nbytes() if isinstance(tensor, Tensor) else 0)
            return out

    monkeypatch.setattr(BLOCKS, "_CPU_BLOCK", 1 << 16)
    args = inputs((1, 512, 512, 8, 8, 16))
    with Watch():
        out = OP._forward_reference(*args, None, 0.25, torch.float32)
        OP._backward_reference(torch.randn_like(out), *args, None, 0.25)
    assert 0 < largest <= 4 * (1 << 16), "beside a block only tensors of the inputs' size"


def test_strided_inputs(implementation):
    """Slices of packed tensors, every other token, a transposed upstream gradient, a strided mask."""
    packed = torch.randn(2, 10, 9, 8)
    args = [packed[:, ::2, :4], packed[:, :, 4:6], packed[:, :, 7:]]
    mask = some_seen(10, 2).T
    mask[:, 3] = True
    check_contract(args, torch.randn(2, 8, 4, 5).transpose(1, 3), mask=mask)
    # no unit stride anywhere
    args = [torch.randn(8, h, n, 2).permute(3, 2, 1, 0) for h, n in ((4, 5), (2, 10), (2, 10))]
    check_contract(args, torch.randn(2, 5, 4, 16)[..., ::2])


def test_no_samples_and_no_queries(implementation):
    for shape in ((0, 3, 4, 2, 2, 8), (2, 0, 4, 2, 1, 8)):
        args = inputs(shape)
        ours = run(flash_attention, args, torch.randn(shape[0], shape[1], shape[3], shape[5]))
        for value, like in zip(ours.values(), (args[0], *args), strict=True):
            assert torch.equal(value, torch.zeros_like(like))


def test_deterministic(implementation):
    batch, heads = (1, 2) if implementation == "triton" else (3, 4)
    args, dy = inputs((batch, 33, 65, heads, heads // 2, 16)), torch.randn(batch, 33, heads, 16)
    mask = some_seen(batch, 65)
    for given in (None, mask):
        first, second = (run(flash_attention, args, dy, mask=given) for _ in range(2))
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(backend, masked):
    args, mask = inputs((2, 3, 4, 4, 2, 8)), some_seen(2, 4) if masked else None
    torch.library.opcheck(OP._flash_attention_fwd, (*args, mask, 0.3, torch.bfloat16, backend))
    torch.library.opcheck(OP._flash_attention_bwd, (torch.randn(2, 3, 4, 8), *args, mask, 0.3, backend))


@pytest.mark.parametrize("masked", [False, True])
def test_compile_does_not_recompile_per_batch(implementation, masked):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flash_attention, fullgraph=True, backend=counter)
    torch._dynamo.reset()
    for batch in (2, 3, 4, 5):
        heads, key_heads = (1, 1) if implementation == "triton" else (4, 2)
        args, dy = inputs((batch, 4, 5, heads, key_heads, 8)), torch.randn(batch, 4, heads, 8)
        mask = some_seen(batch, 5) if masked else None
        ours, plain = (run(f, args, dy, mask=mask) for f in (compiled, flash_attention))
        for name, value in ours.items():
            torch.testing.assert_close(value, plain[name], rtol=0, atol=1e-6 if implementation == "sdpa" else 0)
    assert counter.frame_count <= 2, "one static and one dynamic graph"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_autocast_returns_its_dtype(implementation, dtype, masked):
    args, dy = inputs((2, 8, 9, 4, 2, 16)), torch.randn(2, 8, 4, 16).to(dtype)
    mask = some_seen(2, 9) if masked else None
    with torch.autocast("cpu", dtype):
        ours, stock = (run(f, args, dy, mask=mask) for f in (flash_attention, eager))
    gold = run(flash_attention_ref, [a.double() for a in args], dy.double(), mask=mask)
    assert ours["y"].dtype == dtype
    assert_contract(ours["y"], stock["y"].to(dtype), gold["y"])
    for name in NAMES[1:]:
        assert ours[name].dtype == torch.float32
        assert_contract(ours[name], stock[name], gold[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_stay_finite(implementation, dtype):
    """Scores far beyond where exp overflows, of both signs, and values near the dtype's largest."""
    q, k, v = (a.to(dtype) for a in inputs((2, 5, 6, 2, 2, 16)))
    q, k, v = 30 * q, 30 * k, v.clamp(-2, 2) * (1e4 if dtype == torch.float16 else 1e30)
    with torch.no_grad():
        ours, stock = flash_attention(q, k, v), eager(q, k, v)
    gold = flash_attention_ref(q.double(), k.double(), v.double())
    assert ours.isfinite().all()
    assert_contract(ours, stock, gold)
    for value in run(flash_attention, [q, k, v / v.abs().max()], torch.randn(q.shape).to(dtype)).values():
        assert value.isfinite().all()


def test_names_what_cannot_run():
    args = inputs((1, 2, 2, 1, 1, 4))
    with (
        use_backend("cuda"),
        pytest.raises(RuntimeError, match="cannot run flash_attention: it has no cuda kernel yet"),
    ):
        flash_attention(*args)
    with use_backend("triton"):
        with pytest.raises(
            RuntimeError, match="its triton kernel takes float32, bfloat16 and float16, got torch.float64"
        ):
            flash_attention(*(a.double() for a in args))
        with pytest.raises(RuntimeError, match="its triton kernel takes heads of up to 128, got 136"):
            flash_attention(*inputs((1, 2, 2, 1, 1, 136)))


def test_second_derivatives_and_transforms_are_refused():
    q, k, v = inputs((1, 2, 2, 1, 1, 4))
    with use_backend("reference"):
        y = flash_attention(q.requires_grad_(), k, v)
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(y, q, torch.randn_like(y), create_graph=True)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda a: flash_attention(a[None], k, v))(q.detach())
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        flash_attention(q, k, v)


def test_every_combination_of_needed_gradients(implementation):
    args, dy = inputs((2, 3, 4, 2, 1, 8)), torch.randn(2, 3, 2, 8)
    full = run(flash_attention, args, dy)
    for wanted in itertools.product([False, True], repeat=3):
        leaves = [t.detach().clone().requires_grad_(w) for t, w in zip(args, wanted, strict=True)]
        y = flash_attention(*leaves)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(dy)
        for leaf, name in zip(leaves, NAMES[1:], strict=True):
            assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, full[name])


# ---- cpu: what only its kernels have ---------------------------------------------------------------------------------


def test_cpu_kernels_are_called(cpu_calls):
    run(flash_attention, inputs((1, 2, 3, 2, 1, 4)), torch.randn(1, 2, 2, 4))
    assert cpu_calls == ["flash_attention_fwd", "flash_attention_bwd"]


def test_threads_change_no_bit(threads_agree):
    """Several blocks of rows, samples and groups of heads, which the threads share out in other ways each time."""
    named = dict(zip("qkv", inputs((3, 130, 37, 4, 2, 8)), strict=True))
    for mask in (None, some_seen(3, 37)):
        threads_agree(functools.partial(flash_attention, mask=mask), named, torch.randn(3, 130, 4, 8))


@pytest.mark.parametrize("implementation", CPU, indirect=True)
@pytest.mark.parametrize("shape", [(2, 130, 300, 2, 1, 24), (1, 40, 4100, 1, 1, 8), (1, 3, 5, 1, 1, 300)], ids=str)
def test_cpu_lengths(implementation, shape):
    """Several blocks of query rows, also smaller ones; several chains of additions along keys and head."""
    check_contract(inputs(shape), torch.randn(*shape[:2], shape[3], shape[5]), mask=some_seen(shape[0], shape[2]))


@pytest.mark.parametrize("implementation", CPU, indirect=True)
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_cpu_scales_that_do_not_keep_the_order(implementation, scale):
    shape = (2, 9, 21, 4, 2, 16)
    check_contract(inputs(shape), torch.randn(2, 9, 4, 16), scale=scale)


@pytest.mark.parametrize("implementation", CPU, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_with_one_key(implementation, dtype):
    """The softmax of one score is 1: dq and dk are zero and not the rounding of zero."""
    args, dy = inputs((2, 70, 1, 2, 1, 8), (dtype,) * 3), torch.randn(2, 70, 2, 8).to(dtype)
    ours = run(flash_attention, args, dy)
    assert torch.equal(ours["y"], args[2].expand(2, 70, 2, 8))
    for name in ("dq", "dk"):
        assert torch.equal(ours[name], torch.zeros_like(ours[name])), name
    check_contract(args, dy, ours)


@pytest.mark.parametrize("implementation", CPU, indirect=True)
def test_cpu_leaves_out_what_the_mask_hides(implementation):
    """Whatever stands there, numbers or not."""
    args, dy, mask = inputs((2, 5, 9, 4, 2, 8)), torch.randn(2, 5, 4, 8), some_seen(2, 9)
    plain = run(flash_attention, args, dy, mask=mask)
    for hidden in args[1:]:
        hidden[~mask] = torch.nan
    for name, value in run(flash_attention, args, dy, mask=mask).items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("implementation", CPU, indirect=True)
def test_cpu_keeps_nan(implementation):
    """In the row, the head and the sample that have one, and nowhere else."""
    q, k, v = inputs((2, 5, 9, 2, 1, 8))
    q[1, 3, 1, 2] = torch.nan
    y = flash_attention(q, k, v)
    assert y[1, 3, 1].isnan().all() and y.isnan().sum() == 8
    k[0, 4, 0, 0] = torch.nan
    assert flash_attention(q, k, v)[0].isnan().all()


# ---- triton: every path of its kernels, each told by the kernels that were launched ---------------------------------


def check_triton(shape, dtypes, masked: bool, kernels: list[str]) -> None:
    args, dy = inputs(shape, dtypes), torch.randn(*shape[:2], shape[3], shape[5]).to(dtypes[0])
    mask = some_seen(shape[0], shape[2]) if masked else None
    with use_backend("triton"), recording() as launches:
        ours = run(flash_attention, args, dy, mask=mask)
    assert [launch.name for launch in launches] == kernels
    check_contract(args, dy, ours, mask=mask)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("masked", "dim"), [(False, 16), (True, 64), (False, 128)])
def test_triton_tile(capability, dtype, masked, dim):
    """64 tokens, whole tiles and 16 rows at a time, with groups of two query heads."""
    with assumed_capability(capability):
        check_triton((2, 64, 64, 4, 2, dim), (dtype,) * 3, masked, TILE_KERNELS)


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_tile_in_full_precision(monkeypatch, capability):
    """What half precision would round away: fp32 takes small tiles, so its way into the large one is forced."""
    module = importlib.import_module("blip3o_fast.kernels.flash_attention")
    monkeypatch.setattr(module, "is_tile", lambda tokens, context, dim, *dtypes: True)
    half = attention_config("tile.backward", head_dim=32, full_precision=False, capability=capability)
    monkeypatch.setattr(module, "attention_config", lambda *args, **settings: half)
    check_triton((1, 64, 64, 2, 1, 32), (torch.float32,) * 3, True, TILE_KERNELS)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("dim", [6, 32, 48, 64, 72, 80, 96, 128])
def test_triton_head_sizes(dtype, dim):
    check_triton((1, 17, 35, 2, 1, dim), (dtype,) * 3, True, LOOP_KERNELS)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "tokens", "context"), [(torch.bfloat16, 130, 257), (torch.float32, 33, 77)], ids=str)
def test_triton_lengths(capability, dtype, tokens, context):
    """Several tiles of queries and of keys, the last of each cut off, two samples and groups of two."""
    with assumed_capability(capability):
        check_triton((2, tokens, context, 2, 1, 16), (dtype,) * 3, True, LOOP_KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_triton_long(dtype):
    tokens = 4096 if dtype == torch.bfloat16 else 1024
    check_triton((1, tokens, tokens, 1, 1, 32), (dtype,) * 3, False, LOOP_KERNELS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_with_one_key(dtype):
    """The softmax of one score is 1: dq and dk are zero and not the rounding of zero."""
    args, dy = inputs((2, 70, 1, 2, 1, 8), (dtype,) * 3), torch.randn(2, 70, 2, 8).to(dtype)
    with use_backend("triton"):
        ours = run(flash_attention, args, dy)
    assert torch.equal(ours["y"], args[2].expand(2, 70, 2, 8))
    for name in ("dq", "dk"):
        assert torch.equal(ours[name], torch.zeros_like(ours[name])), name
    check_contract(args, dy, ours)


def test_triton_reads_packed_heads_and_others_alike():
    """Heads side by side, whose distance is known when compiling, and heads at any distance: the same bits."""
    q, k, v = inputs((2, 9, 9, 4, 2, 16))
    apart = [torch.cat((a, a), -1)[..., :16] for a in (q, k, v)]
    dy = torch.randn(2, 9, 4, 16)
    with use_backend("triton"), recording() as launches:
        first, second = run(flash_attention, [q, k, v], dy), run(flash_attention, apart, dy)
    assert [launch.constants["PACKED"] for launch in launches] == [True] * 3 + [False] * 3
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("kernel", ["tile.forward", "tile.backward", "forward", "query_gradients", "key_gradients"])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("head_dim", [6, 16, 64, 72, 128])
def test_attention_config(kernel, capability, head_dim):
    for full_precision in (False, True):
        config = attention_config(kernel, head_dim=head_dim, full_precision=full_precision, capability=capability)
        assert config.num_warps in (4, 8)
        assert {config.queries, config.keys} <= {16, 32, 64}, "a product takes 16 rows at least"
        # both operands of a tile of keys, staged, and those of the queries
        held = (
            (2 * config.num_stages * config.keys + 2 * config.queries)
            * max(16, head_dim)
            * (4 if full_precision else 2)
        )
        assert held <= (99 if capability < 100 or capability >= 120 else 227) * 1024
        if full_precision:
            assert max(config.queries, config.keys) < 64, "from 64 rows on sm_100 may multiply fp32 in TF32"
    tile = attention_config("tile.backward", head_dim=64, full_precision=False, capability=capability)
    assert tile.queries == (64 if capability in (90, 100, 103) else 16)
