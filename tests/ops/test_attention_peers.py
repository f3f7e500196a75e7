"""flash-attn and xformers by name, with stand-ins that have their signatures, their demands and nothing of their code.

A stand-in refuses what the real function refuses and computes in fp64 with PyTorch's attention. The real ones run in
tests/gpu.
"""

import functools
import importlib
import sys
import types

import pytest
import torch
from torch import Tensor

from benchmarks.cases import assert_case, module_of
from blip3o_fast.models import BLIP3oConfig, BLIP3oDiT
from blip3o_fast.ops import (
    attention_implementations,
    dual_attention,
    dual_attention_ref,
    flash_attention,
    use_attention,
)
from blip3o_fast.testing import assert_op_contract, with_gradients

ATTENTION = importlib.import_module("blip3o_fast.ops._attention")
PEERS = importlib.import_module("blip3o_fast.ops._attention_peers")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPS = ("flash_attention", "dual_attention")
# the class's own heads, a length and a head size that need padding, one key, one query
SIZES = [
    {"tokens": 5, "context": 77, "heads": 8, "key_heads": 2, "head_dim": 72},
    {"tokens": 6, "context": 9, "heads": 3, "key_heads": 1, "head_dim": 20},
    {"tokens": 7, "context": 1, "heads": 2, "head_dim": 6},
    {"tokens": 1, "context": 16, "heads": 2, "head_dim": 64},
]
VERSIONS = ("flash_attn", "flash_attn_interface", "flash_attn_interface, (out, lse)", "xformers")


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """[B, T, H, d] by PyTorch's attention in fp64, rounded once; key heads as the packages read them."""
    q64, k64, v64 = (t.double().transpose(1, 2) for t in (q, k, v))
    bias = None if bias is None else bias.double()
    out = torch.nn.functional.scaled_dot_product_attention(q64, k64, v64, bias, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).to(q.dtype)


def demand(true: bool, what: str) -> None:
    if not true:
        raise RuntimeError(f"stand-in: {what}")


# ---- flash-attn ------------------------------------------------------------------------------------------------------


def check_flash(q: Tensor, k: Tensor, v: Tensor, deterministic: bool) -> None:
    demand(q.dtype in (F16, BF16) and q.dtype == k.dtype == v.dtype, "only fp16 and bf16, all alike")
    demand(q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, "head_dim must be a multiple of 8, at most 256")
    demand(all(t.stride(-1) == 1 for t in (q, k, v)), "the last dimension must be contiguous")
    demand(q.shape[-2] % k.shape[-2] == 0, "query heads must be a multiple of key heads")
    demand(deterministic == torch.are_deterministic_algorithms_enabled(), "deterministic is PyTorch's switch")


def check_lengths(starts: Tensor, total: int, longest: int) -> list[int]:
    demand(starts.dtype == torch.int32 and starts.is_contiguous(), "cu_seqlens must be contiguous int32")
    demand(int(starts[0]) == 0 and int(starts[-1]) == total, "cu_seqlens must end at the number of rows")
    lengths: list[int] = starts.diff().tolist()
    demand(min(lengths) > 0 and max(lengths) <= longest, "max_seqlen is below a length")
    return lengths


def varlen(q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int], scale: float) -> Tensor:
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([exact(a[None], b[None], c[None], scale)[0] for a, b, c in parts])


def flash_attn_2() -> types.ModuleType:
    """flash_attn 2.7: flash_attn_func and flash_attn_varlen_func."""
    module = types.ModuleType("flash_attn")

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        check_flash(q, k, v, deterministic)
        demand(not (dropout_p or causal or return_attn_probs) and q.dim() == 4, "plain attention of [B, T, H, d]")
        return exact(q, k, v, softmax_scale)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        check_flash(q, k, v, deterministic)
        demand(not (dropout_p or causal or return_attn_probs) and q.dim() == 3, "plain attention of [rows, H, d]")
        lengths = check_lengths(cu_seqlens_q, len(q), max_seqlen_q), check_lengths(cu_seqlens_k, len(k), max_seqlen_k)
        return varlen(q, k, v, *lengths, softmax_scale)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


def flash_attn_3(with_lse: bool) -> types.ModuleType:
    """flash_attn_interface, whose arguments come in another order and whose first betas return (out, lse)."""
    module = types.ModuleType("flash_attn_interface")

    def result(out):
        return (out, torch.zeros(1)) if with_lse else out

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0,
    ):  # fmt: skip
        check_flash(q, k, v, deterministic)
        demand(causal is False and qv is None and q.dim() == 4, "plain attention of [B, T, H, d]")
        return result(exact(q, k, v, softmax_scale))

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0,
    ):  # fmt: skip
        check_flash(q, k, v, deterministic)
        demand(seqused_q is None and seqused_k is None and causal is False, "plain attention of [rows, H, d]")
        lengths = check_lengths(cu_seqlens_q, len(q), max_seqlen_q), check_lengths(cu_seqlens_k, len(k), max_seqlen_k)
        return result(varlen(q, k, v, *lengths, softmax_scale))

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


# ---- xformers --------------------------------------------------------------------------------------------------------


def xformers_ops() -> types.ModuleType:
    """xformers.ops 0.0.35, with the demands of its CUTLASS kernels."""
    module = types.ModuleType("xformers.ops")

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        demand(query.dtype == key.dtype == value.dtype and query.dtype in (F32, F16, BF16), "one dtype of three")
        demand(query.shape[2] == key.shape[2] == value.shape[2], "as many key heads as query heads")
        alignment = 128 // torch.finfo(query.dtype).bits
        for t in (query, key, value):
            demand(t.shape[-1] % alignment == 0 and t.stride(-1) == 1, "head_dim must be aligned")
            demand(t.stride(-2) % alignment == 0, "rows must be aligned")
        if attn_bias is not None:
            batch, tokens, heads, _ = query.shape
            demand(attn_bias.shape == (batch, heads, tokens, key.shape[1]), "bias must be [B, H, Tq, Tk]")
            demand(attn_bias.dtype == query.dtype and attn_bias.stride(-1) <= 1, "bias in the dtype of q, in rows")
            demand(not any(s % alignment for s in attn_bias.stride()[:-1]), "the strides of the bias must be aligned")
        demand(p == 0.0, "no dropout")
        return exact(query, key, value, scale, attn_bias)

    module.memory_efficient_attention = memory_efficient_attention
    return module


MODULES = {
    "flash_attn": ("flash-attn", flash_attn_2),
    "flash_attn_interface": ("flash-attn", functools.partial(flash_attn_3, False)),
    "flash_attn_interface, (out, lse)": ("flash-attn", functools.partial(flash_attn_3, True)),
    "xformers": ("xformers", xformers_ops),
}


@pytest.fixture(autouse=True)
def nothing_is_installed(monkeypatch):
    """What a machine happens to have must not run here."""
    for name in ("flash_attn", "flash_attn_interface", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(PEERS, "_loaded", {})


@pytest.fixture
def install(monkeypatch):
    def put(version: str) -> str:
        """Install a stand-in; returns the name of `use_attention`. CPU tensors count as CUDA's."""
        name, make = MODULES[version]
        module = make()
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if name == "xformers":
            monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
        monkeypatch.setattr(PEERS, "_DEVICES", ("cuda", "cpu"))
        return name

    return put


def dtypes_of(version: str) -> tuple[torch.dtype, ...]:
    return (F32, BF16, F16) if version == "xformers" else (BF16, F16)


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: " ".join(map(str, s.values())))
@pytest.mark.parametrize("op", OPS)
def test_contract_against_the_fp64_gold(install, version, op, sizes, masked):
    """Output and every gradient, by the op tests' own contract."""
    with use_attention(install(version)):
        for dtype in dtypes_of(version):
            assert_case(module_of(op).case(2, dtype, "cpu", **sizes, masked=masked))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_a_wrong_result_breaks_the_contract(install, version, monkeypatch, masked):
    """The test above must see what the package computes: here with another scale."""
    name, right = install(version), exact
    monkeypatch.setitem(globals(), "exact", lambda q, k, v, scale, *bias: right(q, k, v, 1.5 * scale, *bias))
    with use_attention(name), pytest.raises(AssertionError, match="relative L2|max abs"):
        assert_case(module_of("dual_attention").case(2, BF16, "cpu", **SIZES[0], masked=masked))


@pytest.mark.parametrize("op", OPS)
def test_a_sample_that_sees_nothing_gets_zero(install, version, op):
    case = module_of(op).case(3, BF16, "cpu", **SIZES[0], masked=True)
    case.given["mask"][1] = False
    with use_attention(install(version)):
        results = with_gradients(case.bound(case.ours), case.inputs, *case.upstream)
    for name in {"flash_attention": ("y", "dq", "dk", "dv"), "dual_attention": ("dk2", "dv2")}[op]:
        assert results[name][1].count_nonzero() == 0 and results[name][2].count_nonzero() > 0, name
    assert all(value.isfinite().all() for value in results.values())


def test_the_scale_of_proportional_attention(install, version):
    """The self-attention's alone; the judge is PyTorch's attention with the same scale."""
    case = module_of("dual_attention").case(2, BF16, "cpu", **SIZES[0], masked=True)
    mask = case.given["mask"]

    def by(name):
        def run(qkq, v1, k2, v2, gate):
            with use_attention(name):
                return dual_attention(qkq, v1, k2, v2, gate, scale=0.31, mask=mask)

        return run

    name = install(version)
    gold = functools.partial(dual_attention_ref, scale=0.31, mask=mask)
    assert_op_contract(by(name), by("sdpa"), gold, case.inputs, *case.upstream)


def test_autocast_makes_what_they_take(install, version):
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    with use_attention(install(version)), torch.autocast("cpu", BF16):
        out = flash_attention(q, k, v)
    assert out.dtype == BF16
    with use_attention("sdpa"), torch.autocast("cpu", BF16):
        torch.testing.assert_close(out, flash_attention(q, k, v), rtol=2e-2, atol=2e-2)


def test_an_empty_batch(install, version):
    case = module_of("dual_attention").case(0, BF16, "cpu", **SIZES[0], masked=True)
    with use_attention(install(version)):
        results = with_gradients(case.bound(case.ours), case.inputs, *case.upstream)
    assert results["y"].shape == (0, 5, 8 * 72) and results["dgate"].count_nonzero() == 0


@pytest.mark.parametrize("name", ["flash-attn", "xformers"])
def test_the_whole_network(install, name):
    """Grouped key heads, a masked context and proportional attention; the judge is PyTorch's attention."""
    config = BLIP3oConfig(
        num_layers=1,
        hidden_size=64,
        in_channels=16,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        cross_attention_dim=32,
    )
    model = BLIP3oDiT(config, generator=torch.Generator().manual_seed(0)).bfloat16()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, config.num_tokens, config.in_channels, dtype=BF16)
    context, mask = torch.randn(2, 9, 32, dtype=BF16), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    results = {}
    for attention in (install({"flash-attn": "flash_attn", "xformers": "xformers"}[name]), "sdpa"):
        with use_attention(attention), torch.no_grad():
            results[attention] = model(x, torch.full((2,), 300.0), context, mask, base_sequence_length=16)
    torch.testing.assert_close(results[name], results["sdpa"], rtol=5e-2, atol=5e-2)


# ---- what cannot run says why ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module", "install_by"),
    [
        ("flash-attn", "flash_attn", "pip install flash-attn --no-build-isolation"),
        ("xformers", "xformers", r'pip install "blip3o_fast\[attention\]"'),
    ],
)
def test_what_is_not_installed_is_refused_at_the_door(name, module, install_by):
    before = use_attention.state.active
    with pytest.raises(
        ImportError, match=f"'{name}' is not available: .*{module}.*{install_by}.*here work: auto, sdpa$"
    ):
        use_attention(name)
    assert use_attention.state.active == before
    assert module in attention_implementations()[name]


def test_a_broken_build_is_told(monkeypatch):
    def broken(name):
        raise OSError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(PEERS.importlib, "import_module", broken)
    with pytest.raises(ImportError, match="OSError: undefined symbol"):
        use_attention("flash-attn")


def test_without_a_gpu_it_is_said_before_and_at_the_call(install, version, monkeypatch):
    name = install(version)
    monkeypatch.setattr(PEERS, "_DEVICES", ("cuda",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attention_implementations()[name] == "it needs cuda tensors, and PyTorch sees no CUDA device"
    q = torch.randn(1, 2, 3, 8, dtype=BF16)
    message = f"attention implementation '{name}' cannot run flash_attention: it needs cuda tensors, got cpu"
    with use_attention(name), pytest.raises(RuntimeError, match=message):
        flash_attention(q, q, q)


def test_installed_and_usable_is_said_to_work(install, version):
    name = install(version)
    assert attention_implementations()[name] is None


@pytest.mark.parametrize(
    ("version", "dtype", "head_dim", "reason"),
    [
        ("flash_attn", F32, 8, "it takes float16 and bfloat16, got float32"),
        ("flash_attn_interface", torch.float64, 8, "it takes float16 and bfloat16, got float64"),
        ("flash_attn", BF16, 264, "it takes heads of up to 256, got 264"),
        ("xformers", torch.float64, 8, "it takes float32 and float16 and bfloat16, got float64"),
    ],
)
def test_what_they_do_not_take_is_refused_by_name(install, version, dtype, head_dim, reason):
    q, gate = torch.randn(1, 2, 3, head_dim, dtype=dtype), torch.randn(1, dtype=dtype)
    with use_attention(install(version)):
        with pytest.raises(RuntimeError, match=f"cannot run flash_attention: {reason}"):
            flash_attention(q, q, q)
        with pytest.raises(RuntimeError, match=f"cannot run dual_attention: {reason}"):
            dual_attention(q, q[:, :, :1], q[:, :, :1], q[:, :, :1], gate)


def test_the_widest_dtype_decides(install):
    """A context in fp32 makes the cross-attention fp32, which flash-attn does not take."""
    case = module_of("dual_attention").case(1, BF16, "cpu", **SIZES[0])
    inputs = {**case.inputs, "k2": case.inputs["k2"].float()}
    with use_attention(install("flash_attn")), pytest.raises(RuntimeError, match="got float32"):
        dual_attention(**inputs)


@pytest.mark.parametrize(
    ("capability", "installed", "chosen"),
    [
        ((9, 0), ("flash_attn", "flash_attn_interface"), "flash_attn_interface"),
        ((8, 6), ("flash_attn", "flash_attn_interface"), "flash_attn"),
        ((9, 0), ("flash_attn",), "flash_attn"),
        ((8, 6), ("flash_attn_interface",), None),
        ((7, 5), ("flash_attn",), None),
    ],
)
def test_the_version_for_a_device(install, monkeypatch, capability, installed, chosen):
    for version in installed:
        install(version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert PEERS.load("flash-attn") is None
    module = PEERS._flash_module(torch.device("cuda"))
    assert (module and module.__name__) == chosen


def test_a_mask_that_hides_nothing_is_not_handed_over(install, monkeypatch):
    """On the CPU, where looking costs nothing: SDPA too runs without it."""
    given = []
    monkeypatch.setattr(PEERS, "attend", lambda name, q, k, v, scale, mask: given.append(mask) or q)
    q = torch.randn(2, 5, 4, 8, dtype=BF16)
    with use_attention(install("flash_attn")):
        flash_attention(q, q, q, mask=torch.ones(2, 5, dtype=torch.bool))
    assert given == [None]
