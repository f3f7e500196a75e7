"""The step as a graph, with a tape in CUDA's place (conftest.py): the eager run's bits, and when graphs are made."""

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.model_block import as_trained
from blip3o_fast import BLIP3oConfig, BLIP3oDiT, debug_ops, sample
from blip3o_fast.flow.path import FlowPath
from blip3o_fast.flow.solvers import SOLVERS
from blip3o_fast.models.normalizer import FeatureNormalizers
from blip3o_fast.ops import use_attention
from blip3o_fast.sampling import Sampler, graphs
from blip3o_fast.sampling.capture import CudaCapture
from blip3o_fast.sampling.steps import BOTH, Call, Kept, Moment, Rules, by_pass, take_step


def network(seed: int = 0, **fields: object) -> BLIP3oDiT:
    model = BLIP3oDiT(BLIP3oConfig.preset("tiny", **({"sample_size": 2, "in_channels": 8, "num_layers": 2} | fields)))
    as_trained(model, torch.Generator().manual_seed(seed))
    return model.eval()


def conditions(samples: int = 3, tokens: int = 5) -> Tensor:
    return torch.randn(samples, tokens, 24)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sampler_on_tape(tape, model=None, max_graphs=8, **settings):
    sampler = Sampler(network() if model is None else model, **settings)
    return sampler, tape(sampler, max_graphs)


# ---- the eager run's results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "captures"),
    [
        ({}, {"euler": 1, "midpoint": 1, "heun": 1, "ab2": 2}),
        ({"guidance_scale": 1.0}, {"euler": 1, "midpoint": 1, "heun": 1, "ab2": 2}),
        ({"guidance_scale": 0.0}, {"euler": 1, "midpoint": 1, "heun": 1, "ab2": 2}),
        # sigma = 1, 0.8, 0.6, 0.4, 0.2; heun's and midpoint's second calls are at the end and in the middle of a step
        ({"guidance_start": 0.8, "guidance_end": 0.4}, {"euler": 2, "midpoint": 3, "heun": 4, "ab2": 4}),
    ],
    ids=["guided", "conditional", "null", "interval"],
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_it_is_the_eager_run(tape, solver, call, captures):
    budget = 0 if "guidance_end" in call else 1 << 28  # of modulations made before their step
    sampler, mechanism = sampler_on_tape(tape, modulation_bytes=budget)
    condition = conditions()
    call = {"num_steps": 5, "solver": solver} | call
    eager = Sampler(sampler._network.model, max_graphs=0, modulation_bytes=budget)
    for seed in (0, 1):
        given = condition + seed  # another condition through the same graph
        expected, states = eager(given, generator=seeded(seed), return_intermediates=True, **call)
        ours, ours_too = sampler(given, generator=seeded(seed), return_intermediates=True, **call)
        assert torch.equal(ours, expected) and all(torch.equal(a, b) for a, b in zip(ours_too, states, strict=True))
    assert sampler.graphs.captures == mechanism.warm_ups == captures[solver]
    assert mechanism.replays == 10 and sampler.graphs.reason is None


def test_masks_samples_per_condition_and_a_normalizer(tape):
    model = network()
    model.normalizer = FeatureNormalizers.fit(torch.randn(50, 5, 24) + 3, torch.randn(50, 4, 12), "pca:8")
    sampler, mechanism = sampler_on_tape(tape, model)
    call = {"num_steps": 3, "num_samples_per_condition": 2}
    condition, mask = conditions(), torch.ones(3, 5, dtype=torch.bool)
    for last in (5, 3, 1):
        mask[:, last:] = False
        mask[2, last - 1 :] = False  # a row of which nothing may be left
        expected = sample(model, condition, generator=seeded(), encoder_mask=mask, **call)
        assert torch.equal(sampler(condition, generator=seeded(), encoder_mask=mask, **call), expected)
    plain = sampler(condition, generator=seeded(), **call)
    assert torch.equal(plain, sample(model, condition, generator=seeded(), **call))
    assert plain.shape == (6, 4, 12) and sampler.graphs.captures == 2 and mechanism.replays == 12


@pytest.mark.parametrize(
    ("fields", "call", "dtype"),
    [
        ({"prediction_type": "epsilon"}, {"solver": "heun"}, torch.float32),
        ({"prediction_type": "epsilon", "schedule": "cosine"}, {"guidance_scale": 1.0}, torch.float32),
        ({"time_convention": "lumina"}, {"solver": "ab2"}, torch.float32),
        ({"learn_sigma": True}, {}, torch.float32),
        ({}, {"truncate_time": True}, torch.bfloat16),
        ({}, {"solver": "midpoint"}, torch.float64),
    ],
    ids=str,
)
def test_every_kind_of_network(tape, fields, call, dtype):
    model = network(**fields).to(dtype)
    sampler, mechanism = sampler_on_tape(tape, model)
    condition = conditions()
    ours = sampler(condition, generator=seeded(), num_steps=4, **call)
    assert torch.equal(ours, sample(model, condition, generator=seeded(), num_steps=4, **call))
    assert mechanism.replays == 4


def test_another_guidance_scale_and_other_steps_are_the_same_graph(tape):
    model = network()
    sampler, _ = sampler_on_tape(tape, model)
    condition = conditions()
    for call in ({"guidance_scale": 1.5, "num_steps": 3}, {"guidance_scale": 7.0, "num_steps": 6}):
        ours = sampler(condition, generator=seeded(), **call)
        assert torch.equal(ours, sample(model, condition, generator=seeded(), **call))
    assert sampler.graphs.captures == 1


def test_results_are_the_callers_own(tape):
    sampler, _ = sampler_on_tape(tape)
    first, states = sampler(conditions(), num_steps=3, solver="ab2", return_intermediates=True)
    kept = [x.clone() for x in (first, *states)]
    sampler(conditions(), num_steps=3, solver="ab2")
    assert all(torch.equal(a, b) for a, b in zip((first, *states), kept, strict=True))
    assert all(x.isfinite().all() for x in kept) and not torch.equal(states[0], states[1])


def test_threads_get_the_serial_results(tape):
    sampler, mechanism = sampler_on_tape(tape, max_graphs=2)
    calls = [(conditions(1 + i % 3), {"guidance_scale": 1.0 + i % 2, "num_steps": 2}) for i in range(8)]

    def draw(i: int) -> Tensor:
        return sampler(calls[i][0], generator=seeded(i), **calls[i][1])

    eager = Sampler(sampler._network.model, max_graphs=0)
    serial = [eager(calls[i][0], generator=seeded(i), **calls[i][1]) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(draw, range(8)))
    assert all(torch.equal(a, b) for a, b in zip(serial, together, strict=True)) and mechanism.replays == 16


@pytest.mark.parametrize("inside_first", [True, False])
def test_inside_and_outside_of_inference_mode(tape, inside_first):
    sampler, _ = sampler_on_tape(tape)
    condition, results = conditions(), []
    for inside in (inside_first, not inside_first):
        with torch.inference_mode(inside):
            results.append(sampler(condition, num_steps=2, solver="ab2", generator=seeded()))
    assert torch.equal(*results) and sampler.graphs.captures == 2 and sampler.graphs.reason is None


# ---- how many --------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_shape_is_dropped(tape):
    sampler, _ = sampler_on_tape(tape, max_graphs=2)
    for samples, captures in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4), (3, 5)):
        sampler(conditions(samples), num_steps=1)
        assert sampler.graphs.captures == captures, samples
    assert sampler.graphs.describe().startswith("2 CUDA graphs of 2 shapes, ")


def test_each_of_these_is_a_shape(tape):
    sampler, _ = sampler_on_tape(tape)
    mask = torch.ones(2, 5, dtype=torch.bool)
    calls = [
        (conditions(2), {}),
        (conditions(2, tokens=6), {}),
        (conditions(4), {}),
        (conditions(2), {"encoder_mask": mask}),
        (conditions(2), {"solver": "heun"}),
        (conditions(4), {"guidance_scale": 1.0}),  # as many rows as the first
        (conditions(4), {"guidance_scale": 0.0}),
        (conditions(2), {"truncate_time": True}),
    ]
    for number, (condition, call) in enumerate(2 * calls):
        sampler(condition, num_steps=1, **call)
        assert sampler.graphs.captures == min(number + 1, 8)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_after_warmup_no_request_captures(tape, solver, scale):
    sampler, mechanism = sampler_on_tape(tape)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    made = sampler.warmup((1, 3), num_steps=6, guidance_scale=scale, solver=solver, context_tokens=5)
    assert made is None and torch.equal(torch.get_rng_state(), before)
    captures = sampler.graphs.captures
    assert captures == (4 if solver == "ab2" else 2)
    for samples in (3, 1):
        sampler(conditions(samples), num_steps=6, guidance_scale=4.0 if scale == 3.0 else scale, solver=solver)
    assert sampler.graphs.captures == mechanism.warm_ups == captures


def test_warmup_on_a_cpu(capsys):
    """It packs and allocates, also for a model with a normalizer, and prints nothing."""
    model = network()
    model.normalizer = FeatureNormalizers.fit(torch.randn(50, 5, 24), torch.randn(50, 4, 12), "pca:8")
    sampler = Sampler(model)
    sampler.warmup(batch_sizes=[2], context_tokens=5)
    after = sampler._network.nbytes
    sampler(conditions(2), num_steps=2)
    assert sampler._network.nbytes == after and capsys.readouterr() == ("", "")
    assert sampler.graphs.reason == "CUDA graphs need a model on a CUDA device, got cpu"


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_memory_counts_the_static_tensors(tape, solver, scale):
    model = network()
    call = {"num_steps": 2, "guidance_scale": scale, "solver": solver}
    for budget in (1 << 28, 0):
        plain = Sampler(model, max_graphs=0, modulation_bytes=budget).memory(3, context_tokens=5, **call)
        sampler, _ = sampler_on_tape(tape, model, modulation_bytes=budget)
        stated = sampler.memory(3, context_tokens=5, **call) - plain
        sampler(conditions(), **call)
        assert 1 / 1.1 <= stated / sampler.graphs.nbytes <= 1.1


# ---- a weight changed ------------------------------------------------------------------------------------------------


def change_in_place(model: BLIP3oDiT) -> BLIP3oDiT:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    return model


def through_data(model: BLIP3oDiT) -> BLIP3oDiT:
    model.layers[0].feed_forward.linear_2.weight.data.mul_(-1.0)  # no version counts this
    return model


def load(model: BLIP3oDiT) -> BLIP3oDiT:
    model.load_state_dict(network(1).state_dict())
    return model


def assign(model: BLIP3oDiT) -> BLIP3oDiT:
    model.load_state_dict(network(1).state_dict(), assign=True)
    return model


def move_one(model: BLIP3oDiT) -> BLIP3oDiT:
    linear = model.layers[1].feed_forward.linear_2
    linear.weight = nn.Parameter(-linear.weight.detach())
    return model


def new_data(model: BLIP3oDiT) -> BLIP3oDiT:
    weight = model.layers[1].attn2.to_out[0].weight
    weight.data = -weight.data
    return model


CHANGES = [
    (change_in_place, 1),
    (through_data, 1),
    (load, 1),
    (assign, 2),
    (move_one, 2),
    (new_data, 2),
    (lambda model: model.to(torch.bfloat16), 2),
]


@pytest.mark.parametrize(("change", "captures"), CHANGES, ids=[*(c.__name__ for c, _ in CHANGES[:-1]), "to_bfloat16"])
def test_graphs_follow_the_weights(tape, change, captures):
    """What changes in place is read by the same graph; what moved is captured again, once."""
    model, condition = network(), conditions()
    sampler, _ = sampler_on_tape(tape, model)
    before = sampler(condition, num_steps=3, generator=seeded())
    change(model)
    for _ in range(2):
        after = sampler(condition, num_steps=3, generator=seeded())
        assert torch.equal(after, sample(model, condition, num_steps=3, generator=seeded()))
    assert (after - before).abs().max() > 1e-3 and sampler.graphs.captures == captures


def test_without_renewal_a_moved_weight_is_not_seen(tape, monkeypatch):
    """The test above can fail: the tape reads the weights where they were."""
    model, condition = network(), conditions()
    sampler, _ = sampler_on_tape(tape, model)
    sampler(condition, num_steps=3)
    monkeypatch.setattr(graphs.Graphs, "_renew", lambda self: None)
    move_one(model)
    stale = sampler(condition, num_steps=3, generator=seeded())
    assert not torch.equal(stale, sample(model, condition, num_steps=3, generator=seeded()))


# ---- no graph --------------------------------------------------------------------------------------------------------


def test_a_failed_capture_is_said_once_and_not_tried_again_with_these_weights(tape, caplog):
    model, condition = network(), conditions()
    sampler, mechanism = sampler_on_tape(tape, model)
    mechanism.fails = RuntimeError("out of luck")
    expected = sample(model, condition, num_steps=3, solver="ab2", generator=seeded())
    with caplog.at_level(logging.INFO, logger="blip3o_fast"):
        for _ in range(3):
            assert torch.equal(sampler(condition, num_steps=3, solver="ab2", generator=seeded()), expected)
            assert sampler.graphs.reason == "the capture failed: RuntimeError: out of luck"
    assert mechanism.warm_ups == 1 and sampler.graphs.captures == 0 and sampler.graphs.nbytes == 0
    assert [r.getMessage() for r in caplog.records] == [
        "steps are made without CUDA graphs: the capture failed: RuntimeError: out of luck"
    ]
    assert "the last run had none: the capture failed" in sampler.graphs.describe()
    mechanism.fails = None
    sampler(condition[:1], num_steps=1)  # another shape
    assert sampler.graphs.captures == 1 and sampler.graphs.reason is None
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # the weights move
    sampler(condition, num_steps=3, solver="ab2", generator=seeded())
    assert sampler.graphs.captures == 3 and sampler.graphs.reason is None


def test_a_capture_that_fails_amid_a_run(tape):
    """The second kind of step, after guidance has ended, cannot be captured: the run goes on from where it is."""
    model, condition = network(), conditions()
    sampler, mechanism = sampler_on_tape(tape, model)
    real = type(mechanism).__call__

    class Once(type(mechanism)):
        def __call__(self, step, device):
            self.fails = RuntimeError("no") if self.warm_ups else None
            return real(self, step, device)

    sampler.graphs.capture = Once()
    call = {"num_steps": 5, "guidance_end": 0.5}
    ours = sampler(condition, generator=seeded(), **call)
    assert torch.equal(ours, sample(model, condition, generator=seeded(), **call))
    assert sampler.graphs.captures == 1 and sampler.graphs.reason == "the capture failed: RuntimeError: no"


def test_no_memory_for_the_static_tensors(tape, monkeypatch):
    sampler, _ = sampler_on_tape(tape)
    condition = conditions()
    expected = sample(sampler._network.model, condition, num_steps=2, generator=seeded())

    def full(*args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(graphs, "Shape", full)
    assert torch.equal(sampler(condition, num_steps=2, generator=seeded()), expected)
    assert sampler.graphs.reason == "the capture failed: OutOfMemoryError: full"


def hooked(model: BLIP3oDiT) -> BLIP3oDiT:
    model.layers[1].attn2.register_forward_hook(lambda *args: None)
    return model


def meta(model: BLIP3oDiT) -> BLIP3oDiT:
    model.layers[0].feed_forward.to("meta")
    return model


class Foreign(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config


class Sharded(nn.Parameter):
    pass


def sharded(model: BLIP3oDiT) -> BLIP3oDiT:
    weight = model.layers[0].feed_forward.linear_2.weight
    model.layers[0].feed_forward.linear_2._parameters["weight"] = Sharded(weight.detach())
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "layers.1.attn2 has a hook or a forward of its own, which a graph would not call"),
        (meta, "the weights are not all on cpu: layers.0.feed_forward.linear_1.weight is on meta"),
        (sharded, "the weights are sharded or packed: layers.0.feed_forward.linear_2.weight is a Sharded"),
        (Foreign, "only a BLIP3oDiT is known to do the same at every call, got Foreign"),
    ],
)
def test_models_without_graphs(tape, change, reason):
    sampler, _ = sampler_on_tape(tape, change(network()))
    assert sampler.graphs.refusal(torch.device("cpu"), 2) == reason


def test_a_hook_set_later_is_called(tape):
    sampler, mechanism = sampler_on_tape(tape)
    sampler(conditions(), num_steps=2)
    calls = []
    sampler._network.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    sampler(conditions(), num_steps=2)
    assert len(calls) == 2 and mechanism.replays == 2 and "layers.0 has a hook" in sampler.graphs.reason


def test_switched_off(tape, monkeypatch):
    sampler, mechanism = sampler_on_tape(tape, max_graphs=0)
    sampler(conditions(), num_steps=1)
    assert mechanism.warm_ups == 0 and sampler.graphs.reason == "switched off by max_graphs=0"
    sampler, mechanism = sampler_on_tape(tape)
    with debug_ops():
        assert sampler.graphs.refusal(torch.device("cpu"), 1) == "debug_ops looks at every result"
    with torch.autocast("cpu", torch.bfloat16):
        assert "torch.autocast" in sampler.graphs.refusal(torch.device("cpu"), 1)
    monkeypatch.setattr(graphs, "most_tokens", lambda config: 24)
    sampler(conditions(3), num_steps=1)
    sampler(conditions(4), num_steps=1)
    assert mechanism.warm_ups == 1
    assert sampler.graphs.reason == (
        "a graph is estimated to save nothing for more than 24 tokens in a network call, got 32"
    )
    assert CudaCapture().refusal(torch.device("cuda", 1)) is None


def test_the_threshold_of_the_default_network():
    """8 guided samples of 64 tokens still have a graph; a network of a tenth of the work has one for more."""
    config = BLIP3oConfig()
    assert 16 * 64 < graphs.most_tokens(config) < 18 * 64
    assert graphs.most_tokens(BLIP3oConfig.preset("small")) > 2000


def test_attention_by_another_name_has_a_graph_of_its_own(tape):
    sampler, _ = sampler_on_tape(tape)
    sampler(conditions(1), num_steps=1)
    with use_attention("sdpa"):
        sampler(conditions(1), num_steps=1)
    sampler(conditions(1), num_steps=1)
    assert sampler.graphs.captures == 2


BAD_WARMUPS = [
    ({"batch_sizes": ()}, "batch_sizes must be a sequence of integers >= 1, got ()"),
    ({"batch_sizes": 2}, "batch_sizes must be a sequence of integers >= 1, got 2"),
    ({"batch_sizes": (1, 0)}, "batch_sizes must be an integer >= 1, got 0"),
    ({"num_steps": 0}, "num_steps must be an integer >= 1, got 0"),
    ({"solver": "dopri5"}, "solver must be one of"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
    ({"context_tokens": 0}, "context_tokens must be an integer >= 1, got 0"),
]


@pytest.mark.parametrize(("call", "message"), BAD_WARMUPS, ids=[m for _, m in BAD_WARMUPS])
def test_bad_warmups_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampler(network()).warmup(**call)


def test_bad_max_graphs_are_named():
    for value in (-1, 1.5, True):
        with pytest.raises(ValueError, match=re.escape(f"max_graphs must be an integer >= 0, got {value!r}")):
            Sampler(network(), max_graphs=value)


# ---- nothing waits for the host --------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("made_before", [True, False])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@torch.no_grad()
def test_a_step_neither_waits_nor_copies_from_the_host(recorder, solver, made_before, prediction_type):
    """On meta tensors a value cannot be read at all, and the CPU is another device: a copy from it is seen."""
    model = network(prediction_type=prediction_type).to("meta")
    number = torch.empty((), device="meta")
    mask = torch.ones(6, 5, dtype=torch.bool, device="meta")
    made = model.prepare_condition(torch.empty(6, 5, 24, device="meta"), mask)
    modulations = model.prepare_modulations(made, torch.empty(1, device="meta"))[0] if made_before else None
    rules = Rules(model, FlowPath(), solver, torch.float32, False)
    kept = Kept(number, by_pass(BOTH, made, None))
    x = torch.empty(3, 4, 8, device="meta")
    calls = (Call(BOTH, number, modulations), Call("conditional", number, None))
    moment = Moment(x, number, calls, (x, x), number) if solver == "ab2" else Moment(x, number, calls)
    take_step(rules, kept, moment)  # the rotary table comes to the device once
    with recorder() as seen:
        after, _ = take_step(rules, kept, moment)
    assert after.shape == x.shape and after.device.type == "meta"
    assert len(seen.calls) > 20


def test_the_recorder_sees_both(recorder):
    x = torch.ones(3)
    with recorder(), pytest.raises(RuntimeError, match="_local_scalar_dense"):
        x.sum().item()
    with recorder(), pytest.raises(RuntimeError, match="a copy between devices"):
        x.to("meta")
    with recorder(), pytest.raises(RuntimeError, match="a copy between devices"):
        torch.tensor(1.0).to("meta")


# ---- CUDA's own mechanism, with torch.cuda in its place recorded -----------------------------------------------------


class FakeCuda:
    """What `CudaCapture` calls of torch.cuda, written down."""

    def __init__(self, monkeypatch) -> None:
        self.said: list[str] = []
        self.current, self.pools = SimpleNamespace(name="current"), 0
        self.current.wait_stream = lambda other: self.said.append(f"current waits for {other.name}")
        for name in ("device", "Stream", "current_stream", "stream", "set_stream", "graph_pool_handle", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.said.append("replay")))

    def device(self, device):
        return nullcontext()

    def Stream(self, device):
        side = SimpleNamespace(name="side")
        side.wait_stream = lambda other: self.said.append(f"side waits for {other.name}")
        return side

    def current_stream(self, device):
        return self.current

    def set_stream(self, stream):
        self.said.append(f"back on {stream.name}")

    def graph_pool_handle(self):
        self.pools += 1
        return self.pools

    @contextmanager
    def stream(self, stream):
        self.said.append(f"on {stream.name}")
        yield

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.said.append(f"capture on {stream.name}, pool {pool}, {capture_error_mode}")
        yield


def test_a_capture_warms_up_on_a_side_stream(monkeypatch):
    cuda, device = FakeCuda(monkeypatch), torch.device("cuda", 0)
    replay = CudaCapture()(lambda: cuda.said.append("step"), device)
    replay()
    assert cuda.said == [
        "side waits for current", "on side", "step", "step", "step", "current waits for side",
        "capture on side, pool 1, thread_local", "step", "back on current", "replay",
    ]  # fmt: skip


def test_living_graphs_share_a_pool(monkeypatch):
    cuda, device = FakeCuda(monkeypatch), torch.device("cuda", 0)
    capture = CudaCapture()
    kept = [capture(lambda: None, device) for _ in range(2)]
    assert cuda.pools == 1
    kept.clear()
    kept.append(capture(lambda: None, device))
    assert cuda.pools == 2


def test_a_capture_that_fails_gives_the_stream_back(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    calls = []

    def step() -> None:
        calls.append(1)
        if len(calls) == 4:  # after the warm-up
            raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaCapture()(step, torch.device("cuda", 0))
    assert cuda.said[-1] == "back on current"
