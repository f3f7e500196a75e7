"""merged_linear against one torch.nn.functional.linear per weight, in every storage layout, with the GEMMs counted."""

import importlib
import itertools
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from blip3o_fast.ops import merged_linear, merged_linear_ref, use_backend
from blip3o_fast.ops.merged_linear import adjacent
from blip3o_fast.testing import (
    assert_compiles_once,
    assert_deterministic,
    assert_op_contract,
    assert_transforms_refused,
    with_gradients,
)

OP = importlib.import_module("blip3o_fast.ops.merged_linear")  # the module: the package's name is the function
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GEMMS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"}
LAYOUTS = ["adjacent", "apart"]
SIZES = (5, 8, 3)
LEADING = [(2, 5), (7,), (2, 3, 2), (1, 1), (0, 4), (2, 0)]


def inputs(
    leading: tuple[int, ...] = (2, 5),
    dtype: torch.dtype = torch.float32,
    layout: str = "adjacent",
    biased: bool = False,
    sizes: tuple[int, ...] = SIZES,
    width: int = 17,
) -> dict[str, Tensor]:
    named = {"x": torch.randn(*leading, width).to(dtype)}
    buffer = torch.randn(sum(sizes), width).to(dtype)
    named |= {f"w{i}": block if layout == "adjacent" else block.clone() for i, block in enumerate(buffer.split(sizes))}
    if biased:
        bias = torch.randn(sum(sizes)).to(dtype)
        named |= {f"b{i}": b if layout == "adjacent" else b.clone() for i, b in enumerate(bias.split(sizes))}
    return named


def taking_names(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(x: Tensor, **named: Tensor) -> Tensor:
        weights = [value for name, value in named.items() if name[0] == "w"]
        biases = [value for name, value in named.items() if name[0] == "b"]
        return function(x, weights, biases or None)

    return call


def one_linear_per_weight(x: Tensor, weights: list[Tensor], biases: list[Tensor] | None) -> Tensor:
    biases = biases or [None] * len(weights)
    return torch.cat([nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], dim=-1)


OURS, EAGER, REFERENCE = (taking_names(f) for f in (merged_linear, one_linear_per_weight, merged_linear_ref))


def upstream_of(named: dict[str, Tensor]) -> Tensor:
    return torch.randn(*named["x"].shape[:-1], sum(w.shape[0] for name, w in named.items() if name[0] == "w"))


def gemms_of(call: Callable[[], object]) -> int:
    """The vendor's matrix products and ours."""
    ours, real = [], OP._cpu.call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OP._cpu, "call", lambda name, *args: (ours.append(name), real(name, *args))[1])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
    return len(ours) + sum(event.count for event in profile.key_averages() if event.key in GEMMS)


@pytest.fixture(autouse=True)
def ours_at_every_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test asks for the cpu backend, its kernel also runs the products that it leaves to the vendor."""
    if hasattr(request.node, "callspec") and request.node.callspec.params.get("backend") == "cpu":
        monkeypatch.setattr(OP, "_MIN_ROWS", 1)


@pytest.mark.parametrize("biased", [False, True])
def test_reference_is_linear(biased):
    named = {name: value.double() for name, value in inputs(biased=biased, layout="apart").items()}
    torch.testing.assert_close(REFERENCE(**named), EAGER(**named), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(OURS(**named), EAGER(**named), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_contract(backend, leading, dtype, layout, biased):
    with use_backend(backend):
        named = inputs(leading, dtype, layout, biased)
        assert_op_contract(OURS, EAGER, REFERENCE, named, upstream_of(named))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_at_model_width(backend, dtype, layout):
    with use_backend(backend):
        named = inputs((1, 8), dtype, layout, sizes=(64, 32, 64, 32), width=1792)
        assert_op_contract(OURS, EAGER, REFERENCE, named, upstream_of(named))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("biased", [False, True])
def test_gradcheck(layout, biased):
    named = inputs((2, 3), torch.float64, layout, biased, sizes=(2, 3), width=4)
    leaves = [value.detach().requires_grad_() for value in named.values()]
    assert torch.autograd.gradcheck(lambda *a: OURS(**dict(zip(named, a, strict=True))), leaves)


def test_adjacent():
    w0, w1, w2 = buffer = list(torch.randn(9, 4).split([2, 3, 4]))
    assert adjacent(buffer) and adjacent([w0]) and adjacent([w1, w2])
    assert not adjacent([w1, w0]), "another order"
    assert not adjacent([w0, w2]), "a gap"
    assert not adjacent([w0, w1.clone()]), "another storage"
    assert not adjacent([w0, torch.randn(9, 4)[2:5]]), "another storage, at the very offset that would follow"
    assert not adjacent([w0, w0]), "twice the same"
    assert not adjacent([torch.randn(4, 2).t(), w1]), "transposed"
    wide = torch.randn(6, 8)[:, :4]
    assert not adjacent([wide[:3], wide[3:]]), "rows that do not touch"
    assert adjacent([w.detach().requires_grad_() for w in buffer]) and adjacent([nn.Parameter(w) for w in buffer])
    halves = torch.randn(4, 4)
    assert not adjacent([halves[:2], halves.view(torch.bfloat16).view(8, 4)[4:6]]), "another dtype"


@pytest.mark.parametrize("biased", [False, True])
def test_adjacent_weights_are_one_gemm(backend, biased):
    """Forward 1, dx 1, dweight 1, whatever the number of weights; apart: one forward and one dx GEMM each."""
    with use_backend(backend):
        for layout, forward, both in (("adjacent", 1, 3), ("apart", 3, 3 + 3 + 1)):
            named = inputs(layout=layout, biased=biased)
            assert gemms_of(lambda named=named: OURS(**named)) == forward, layout
            dy = upstream_of(named)
            assert gemms_of(lambda named=named, dy=dy: with_gradients(OURS, named, dy)) == both, layout
        # under autocast the weights are copied to be cast, so that they may as well be copied side by side
        for layout in LAYOUTS:
            named = inputs(layout=layout)
            with torch.autocast("cpu", torch.bfloat16):
                assert gemms_of(lambda named=named: with_gradients(OURS, named, upstream_of(named))) == 3


def test_adjacent_weights_are_not_copied(monkeypatch):
    named = inputs()
    seen = []
    real = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b: seen.append(w) or real(x, w, b))
    with use_backend("reference"):
        y = OURS(**named)
    assert [w.data_ptr() for w in seen] == [named["w0"].data_ptr()]
    assert torch.equal(y, real(named["x"], torch.cat([named[f"w{i}"] for i in range(3)])))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_gradients_are_row_blocks_of_one_buffer(backend, layout):
    with use_backend(backend):
        named = inputs(layout=layout)
        results = with_gradients(OURS, named, upstream_of(named))
        assert adjacent([results[f"dw{i}"] for i in range(3)])
        weights = [nn.Parameter(named[f"w{i}"].detach()) for i in range(3)]
        merged_linear(named["x"], weights).backward(upstream_of(named))
        assert adjacent([w.grad for w in weights]), "AccumulateGrad takes the blocks over without a copy"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("biased", [False, True])
def test_gemms_that_nobody_needs_are_not_run(layout, biased):
    named = inputs(layout=layout, biased=biased)
    dy = upstream_of(named)
    full = with_gradients(OURS, named, dy)
    for wanted in itertools.product([False, True], repeat=len(named)):
        needed = dict(zip(named, wanted, strict=True))
        leaves = {name: value.detach().requires_grad_(needed[name]) for name, value in named.items()}
        y = OURS(**leaves)
        assert y.requires_grad == any(wanted)
        if not any(wanted):
            continue
        y.backward(dy)
        for name, leaf in leaves.items():
            if not needed[name]:
                assert leaf.grad is None, name
            else:
                torch.testing.assert_close(leaf.grad, full[f"d{name}"], rtol=1e-5, atol=1e-5)
    counts = {}
    for frozen in ("x", "w", "b", "xw", "w1"):
        leaves = {
            name: v.detach().requires_grad_(name[0] not in frozen and name != frozen) for name, v in named.items()
        }
        if frozen == "w1":
            leaves = {name: value.detach().requires_grad_(name != "w1") for name, value in named.items()}
        y = OURS(**leaves)
        counts[frozen] = gemms_of(lambda y=y: y.backward(dy)) if y.requires_grad else 0
    dx = 1 if layout == "adjacent" else 3
    assert counts == {"x": 1, "w": dx, "b": dx + 1, "xw": 0, "w1": dx + 2}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(backend, layout, dtype):
    """A column slice, a transpose, an expanded row; upstream gradients likewise; a transposed weight among others."""
    with use_backend(backend):
        named = inputs(layout=layout, dtype=dtype)
        wide = torch.randn(2, 6, 40).to(dtype)
        for x in (
            wide[:, ::2, 3:20],
            torch.randn(2, 17, 3).to(dtype).transpose(1, 2),
            wide[:1, :1, :17].expand(2, 3, 17),
        ):
            for dy in (
                torch.randn(2, 16, 3).transpose(1, 2),
                torch.randn(2, 3, 40)[..., 7:23],
                torch.ones(1, 1, 1).expand(2, 3, 16),
            ):
                assert_op_contract(OURS, EAGER, REFERENCE, named | {"x": x}, dy)
        transposed = named | {"w1": torch.randn(17, 8).to(dtype).t(), "w2": torch.randn(6, 34).to(dtype)[::2, ::2]}
        assert_op_contract(OURS, EAGER, REFERENCE, transposed, torch.randn(2, 5, 16))
        alone = {"x": named["x"], "w0": transposed["w1"]}
        assert_op_contract(OURS, EAGER, REFERENCE, alone, torch.randn(2, 5, 8))


def test_both_layouts_and_one_weight_agree():
    """The layout is a matter of speed, never of meaning: also where a parameter's data is replaced later."""
    named = inputs()
    weights = [nn.Parameter(named[f"w{i}"]) for i in range(3)]
    before = merged_linear(named["x"], weights)
    weights[1].data = weights[1].data.clone()
    assert not adjacent(weights)
    torch.testing.assert_close(merged_linear(named["x"], weights), before, rtol=1e-6, atol=1e-6)
    single = torch.cat([merged_linear(named["x"], [w]) for w in weights], dim=-1)
    torch.testing.assert_close(single, before, rtol=1e-6, atol=1e-6)


def test_a_weight_used_twice_gets_both_gradients():
    w, x, dy = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), torch.randn(5, 6)
    merged_linear(x, [w, w]).backward(dy)
    torch.testing.assert_close(w.grad, dy[:, :3].t() @ x + dy[:, 3:].t() @ x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deterministic(backend, layout):
    with use_backend(backend):
        named = inputs((3, 64), layout=layout, biased=True, sizes=(32, 48), width=96)
        assert_deterministic(OURS, named, upstream_of(named))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, layout, dtype):
    with use_backend(backend):
        x, *tensors = inputs(layout=layout, biased=True).values()
        weights, biases = tensors[:3], tensors[3:]
        torch.library.opcheck(OP._merged_linear_fwd, (x, weights, biases, dtype, backend))
        torch.library.opcheck(OP._merged_linear_fwd, (x, weights, [], dtype, backend))
        dy = torch.randn(2, 5, 16).to(dtype)
        for need_x, need_weights, bias_dtype in (
            (True, [True] * 3, torch.float32),
            (False, [True, False, True], None),
            (True, [False] * 3, dtype),
        ):
            torch.library.opcheck(OP._merged_linear_bwd, (dy, x, weights, need_x, need_weights, bias_dtype, backend))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile_does_not_recompile_per_batch(backend, layout):
    with use_backend(backend):

        def make(batch: int) -> tuple[dict[str, Tensor], list[Tensor]]:
            named = inputs((batch, 4), layout=layout, biased=True)
            return named, [upstream_of(named)]

        assert_compiles_once(OURS, make)


def test_compiled_adjacent_weights_are_one_gemm():
    named = inputs()
    compiled = torch.compile(OURS, fullgraph=True, backend="aot_eager")
    with_gradients(compiled, named, upstream_of(named))
    assert gemms_of(lambda: with_gradients(compiled, named, upstream_of(named))) == 3


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", [torch.float32, None], ids=["fp32 x", "x as cast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_in_its_dtype(backend, dtype, given, layout, biased):
    with use_backend(backend):
        named = inputs((4, 16), layout=layout, biased=biased, width=64)
        named["x"] = named["x"].to(given or dtype)
        with torch.autocast("cpu", dtype):
            assert_op_contract(OURS, EAGER, REFERENCE, named, upstream_of(named), dtypes=[dtype])
    with torch.autocast("cpu", dtype):
        assert OURS(**{name: value.double() for name, value in named.items()}).dtype == torch.float64


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_without_autocast_x_decides(backend, dtypes, layout):
    """Stock linear refuses mixed dtypes; here the weights are cast to x's. Each gradient has its input's dtype."""
    with use_backend(backend):
        named = inputs((4, 16), dtypes[1], layout, biased=True)
        named["x"] = named["x"].to(dtypes[0])

        def cast_first(x: Tensor, **others: Tensor) -> Tensor:
            return EAGER(x, **{name: value.to(x.dtype) for name, value in others.items()})

        assert_op_contract(OURS, cast_first, REFERENCE, named, upstream_of(named))
        mixed = named | {"w1": named["w1"].to(torch.float16), "b2": named["b2"].to(torch.float16)}
        assert_op_contract(OURS, cast_first, REFERENCE, mixed, upstream_of(named))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_weights_apart_do_not_round_between(backend, dtype):
    """dx sums over the weights in fp32: with sixteen of them it stays as exact as that of one GEMM."""
    with use_backend(backend):
        sizes = (8,) * 16
        together = inputs((2, 9), dtype, sizes=sizes)
        apart = {name: value.clone() for name, value in together.items()}
        dy = upstream_of(together)
        first, second = (with_gradients(OURS, named, dy.to(dtype))["dx"] for named in (together, apart))
        gold = with_gradients(REFERENCE, {name: value.double() for name, value in apart.items()}, dy.to(dtype))["dx"]
        for dx in (first, second):
            assert (dx.double() - gold).abs().max() <= torch.finfo(dtype).eps * gold.abs().max()


def test_bias_gradients_keep_fp32_under_autocast():
    """Stock autocast rounds them to half precision on their way; a sum over all rows deserves better."""
    named = inputs((2, 300), biased=True)
    dy = upstream_of(named).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        results = with_gradients(OURS, named, dy)
    ours = torch.cat([results[f"db{i}"] for i in range(3)])
    torch.testing.assert_close(ours.double(), dy.double().sum((0, 1)), rtol=1e-6, atol=1e-6)


def test_saves_only_the_inputs():
    named = {name: value.detach().requires_grad_() for name, value in inputs(biased=True).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        OURS(**named)
        with torch.autocast("cpu", torch.bfloat16):
            OURS(**named)
    assert [t.data_ptr() for t in saved] == [named[name].data_ptr() for name in ("x", "w0", "w1", "w2")] * 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export(layout):
    class TwoLayers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(17, 5), nn.Linear(17, 8)
            named = inputs(layout=layout)
            self.first.weight.data, self.second.weight.data = named["w0"], named["w1"]

        def forward(self, x: Tensor) -> Tensor:
            return merged_linear(x, [self.first.weight, self.second.weight], [self.first.bias, self.second.bias])

    model, x = TwoLayers(), torch.randn(6, 17)
    exported = torch.export.export(model, (x[:3],), dynamic_shapes={"x": {0: torch.export.Dim("rows")}})
    torch.testing.assert_close(exported.module()(x), model(x))


def test_meta_tensors_have_shapes_and_gradients():
    leaves = {name: value.to("meta").requires_grad_() for name, value in inputs(biased=True).items()}
    y = OURS(**leaves)
    assert y.device.type == "meta" and y.shape == (2, 5, 16)
    y.backward(torch.empty_like(y))
    assert all(leaf.grad.shape == leaf.shape and leaf.grad.device == leaf.device for leaf in leaves.values())


def test_inference_mode_and_no_grad():
    named = inputs()
    expected = OURS(**named)
    named["w0"].requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = OURS(**named)
        assert not y.requires_grad and torch.equal(y, expected)


def test_cpu_runs_all_products_but_of_one_row(cpu_calls):
    """A matrix-vector product stays with the vendor library."""
    named = inputs((2, 1))
    with_gradients(OURS, named, upstream_of(named))
    assert cpu_calls == ["linear"] * 3
    del cpu_calls[:]
    named = inputs((1, 1), sizes=(64, 64))
    OURS(**named)
    assert cpu_calls == []


def test_threads_change_no_bit(threads_agree):
    named = inputs((3, 37), layout="apart", sizes=(64, 40), width=96)
    threads_agree(OURS, named, upstream_of(named))


def test_second_derivatives_and_transforms_are_refused():
    assert_transforms_refused(OURS, inputs())


X, W, U = torch.zeros(2, 3, 8), torch.zeros(4, 8), torch.zeros(5, 8)
BAD = [
    ((X[0, 0], [W]), "x must be a tensor of shape (..., K) with at least 2 dimensions, got shape (8,)"),
    (("x", [W]), "x must be a tensor of shape (..., K) with at least 2 dimensions, got str"),
    ((X, W), "weights must be a list or tuple of at least one tensor, got Tensor"),
    ((X, []), "weights must be a list or tuple of at least one tensor, got an empty one"),
    ((X, [W, None]), "weights[1] must be a tensor of shape (N, K), got NoneType"),
    ((X, [W, W[0]]), "weights[1] must have 2 dimensions (N, K), got shape (8,)"),
    ((X, [W, torch.zeros(4, 7)]), "weights[1] must have shape (N, K) = (4, 8), got (4, 7)"),
    ((X, [W, U.double()]), "weights[1] is torch.float64 and x is torch.float32"),
    ((X, [W.long()]), "weights[0] must be float32, bfloat16, float16 or float64, got torch.int64"),
    ((X, [W.to("meta")]), "weights[0] must be on cpu like x, got meta"),
    ((X, [W, U], [W[:, 0]]), "biases must be None or one per weight = 2, got 1"),
    ((X, [W, U], W[:, 0]), "biases must be a list or tuple of at least one tensor, got Tensor"),
    ((X, [W, U], [W[:, 0], None]), "biases[1] must be a tensor of shape (N), got NoneType"),
    ((X, [W, U], [W[:, 0], W[:, 0]]), "biases[1] must have shape (N) = (5), got (4,)"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        merged_linear(*args)
