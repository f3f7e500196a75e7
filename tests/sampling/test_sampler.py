"""The sampler that is made once: the numbers of `sample`, its memory, its threads; and the network calls of a run."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import blip3o_fast
from benchmarks.model_block import as_trained
from blip3o_fast import BLIP3oConfig, BLIP3oDiT, _ext, sample, use_backend
from blip3o_fast.flow.solvers import SOLVERS, evaluation_levels, integrate, sigma_grid
from blip3o_fast.models.step_modulations import step_bytes
from blip3o_fast.sampling import PreparedModel, Sampler, prepare, run
from blip3o_fast.sampling import sampler as sampler_module
from blip3o_fast.testing import relative_l2

needs_extension = pytest.mark.skipif(_ext.C is None, reason=_ext.ERROR or "built")


def network(seed: int = 0, **fields: object) -> BLIP3oDiT:
    """A small model as training leaves it: nothing is zero."""
    small = {"sample_size": 2, "in_channels": 8} | fields
    model = BLIP3oDiT(BLIP3oConfig.preset("tiny", **small)).eval()
    as_trained(model, torch.Generator().manual_seed(seed))
    return model


def conditions(samples: int = 3) -> Tensor:
    return torch.randn(samples, 5, 24)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the numbers of sample -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_it_is_sample_of_a_prepared_model(solver):
    model, condition = network(), conditions()
    sampler = Sampler(model)
    for scale in (3.0, 1.0):
        call = {"num_steps": 5, "solver": solver, "guidance_scale": scale}
        ours = sampler(condition, generator=seeded(), **call)
        assert torch.equal(ours, sample(prepare(model), condition, generator=seeded(), **call))
        assert relative_l2(ours, sample(model, condition, generator=seeded(), **call)) <= 1e-5
    result, states = sampler(condition, generator=seeded(), return_intermediates=True, **call)
    assert torch.equal(result, ours) and len(states) == 5


def test_a_prepared_and_a_foreign_model_are_taken_as_they_are():
    model, condition = network(), conditions()
    prepared = prepare(model)
    expected = sample(prepared, condition, num_steps=3, generator=seeded())
    assert torch.equal(Sampler(prepared)(condition, num_steps=3, generator=seeded()), expected)

    class Foreign(nn.Module):
        """Called the same way, and nothing more."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, x_t, timestep, context):
            return self.inner(x_t, timestep, context)

    sampler = Sampler(Foreign())
    assert relative_l2(sampler(condition, num_steps=3, generator=seeded()), expected) <= 1e-5
    assert sampler.memory(2) > 0


@pytest.mark.parametrize("guidance", [3.0, 1.0, 0.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_modulations_made_before_change_nothing(solver, guidance):
    """Whatever the chunk: all at once, two steps at a time, none."""
    model, condition = network(), conditions()
    rows = 6 if guidance == 3.0 else 3
    budgets = (1 << 28, 2 * step_bytes(model.config, rows, torch.float32), 0)
    runs = [
        Sampler(model, modulation_bytes=budget)(
            condition, num_steps=5, solver=solver, guidance_scale=guidance, generator=seeded()
        )
        for budget in budgets
    ]
    for ours in runs[:2]:
        assert relative_l2(ours, runs[2]) <= 2e-6


@pytest.mark.parametrize(("steps_at_once", "expected"), [(7, [7]), (3, [3, 3, 1]), (1, [1] * 7), (0, [])])
def test_chunks_of_the_budget(monkeypatch, steps_at_once, expected):
    model, made = network(), []
    real = BLIP3oDiT.prepare_modulations
    monkeypatch.setattr(
        BLIP3oDiT, "prepare_modulations", lambda self, c, times: made.append(len(times)) or real(self, c, times)
    )
    budget = steps_at_once * step_bytes(model.config, 6, torch.float32) + 100
    run.draw(model, conditions(), run.Arguments(num_steps=7), budget)
    assert made == expected


def test_a_hooked_time_embedding_is_called_at_every_step():
    model, condition, calls = network(), conditions(), []
    expected = sample(model, condition, num_steps=4, generator=seeded())
    model.time_caption_embed.timestep_embedder.register_forward_hook(lambda *args: None)
    model.time_caption_embed.caption_embedder[1].register_forward_hook(lambda m, a, o: calls.append(len(o)))
    assert relative_l2(sample(model, condition, num_steps=4, generator=seeded()), expected) <= 1e-6
    assert calls == [6] * 4


# ---- network calls and steps -----------------------------------------------------------------------------------------


def counted(model: nn.Module) -> list[int]:
    rows: list[int] = []
    model.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    return rows


@pytest.mark.parametrize(
    ("interval", "solver", "scale", "rows"),
    [
        # sigma = 1, 0.8, 0.6, 0.4, 0.2
        ((1.0, 0.0), "euler", 3.0, [6, 6, 6, 6, 6]),
        ((0.8, 0.4), "euler", 3.0, [3, 6, 6, 6, 3]),
        ((0.79, 0.41), "euler", 3.0, [3, 3, 6, 3, 3]),
        ((0.5, 0.5), "euler", 3.0, [3, 3, 3, 3, 3]),
        ((0.8, 0.4), "euler", 1.0, [3, 3, 3, 3, 3]),
        ((0.8, 0.4), "euler", 0.0, [3, 3, 3, 3, 3]),
        ((0.8, 0.4), "ab2", 3.0, [3, 6, 6, 6, 3]),
        ((0.8, 0.4), "heun", 3.0, [3, 6, 6, 6, 6, 6, 6, 3, 3, 3]),
        ((0.8, 0.45), "midpoint", 3.0, [3, 3, 6, 6, 6, 6, 3, 3, 3, 3]),
    ],
)
def test_only_the_interval_is_guided(interval, solver, scale, rows):
    """Outside of it a call has the condition alone, for half the work; a bound that is a level is inside."""
    model, condition, noise = network(), conditions(), torch.randn(3, 4, 8)
    start, end = interval

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        t = (1000 * sigma).expand(3)
        null, conditional = model(x, t, torch.zeros_like(condition)), model(x, t, condition)
        guided = end - 1e-6 <= float(sigma) <= start + 1e-6
        return null + scale * (conditional - null) if guided else conditional

    with torch.no_grad():
        expected = integrate(velocity, noise, sigma_grid(5), solver=solver)
    seen = counted(model)
    ours = sample(
        model, condition, noise=noise, num_steps=5, solver=solver, guidance_scale=scale, guidance_start=start,
        guidance_end=end,
    )  # fmt: skip
    assert seen == rows
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    packed = Sampler(model)(
        condition, noise=noise, num_steps=5, solver=solver, guidance_scale=scale, guidance_start=start, guidance_end=end
    )
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)


def test_an_interval_with_masks_and_a_foreign_model():
    model, condition, noise = network(), conditions(), torch.randn(3, 4, 8)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[:, 3:] = False
    other = condition.clone()
    other[:, 3:] = 100.0
    call = {"noise": noise, "num_steps": 4, "guidance_start": 0.6, "encoder_mask": mask}

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, x_t, timestep, context, encoder_mask):
            return self.inner(x_t, timestep, context, encoder_mask)

    ours = sample(model, condition, **call)
    torch.testing.assert_close(sample(model, other, **call), ours, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sample(Foreign(), condition, **call), ours, rtol=1e-5, atol=1e-6)
    assert relative_l2(sample(model, condition, **(call | {"guidance_start": 1.0})), ours) > 1e-3


@pytest.mark.parametrize(("solver", "passes"), [("euler", 3), ("midpoint", 6), ("heun", 9), ("ab2", 5)])
def test_every_solver_steps_through_the_op(monkeypatch, solver, passes):
    calls, real = [], blip3o_fast.ops.ode_step
    monkeypatch.setattr(blip3o_fast.ops, "ode_step", lambda *args: calls.append(args[2] is None) or real(*args))
    sample(network(), conditions(), num_steps=3, solver=solver, guidance_start=0.9)
    assert len(calls) == passes and set(calls) == {True, False}


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_levels_are_those_of_integrate(solver):
    sigmas, visited = sigma_grid(7, "shifted", shift=3.0), []
    integrate(lambda x, sigma: visited.append(sigma) or x, torch.ones(1), sigmas, solver=solver)
    assert torch.equal(evaluation_levels(sigmas, solver), torch.stack(visited))


@pytest.mark.parametrize("solver", SOLVERS)
def test_states_are_as_exact_as_those_of_integrate(solver):
    """Sums of steps in fp32 round no worse than the textbook's formula in fp32; the gold is the same run in fp64."""
    model, condition, noise = network(), conditions(), torch.randn(3, 4, 8)

    def velocity_of(net: BLIP3oDiT, context: Tensor):
        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            t, both = (1000 * sigma).expand(6), torch.cat([torch.zeros_like(context), context])
            null, conditional = net(torch.cat([x, x]), t, both).chunk(2)
            return null + 2.5 * (conditional - null)

        return velocity

    call = {"num_steps": 6, "solver": solver, "guidance_scale": 2.5}
    with torch.no_grad():
        textbook = integrate(velocity_of(model, condition), noise, sigma_grid(6), solver=solver)
        ours = sample(model, condition, noise=noise, **call)
        double = model.double()
        levels = sigma_grid(6).double()
        gold = integrate(velocity_of(double, condition.double()), noise.double(), levels, solver=solver)
        wide = sample(double, condition.double(), noise=noise.double(), **call)
    assert relative_l2(wide, gold) <= 1e-12
    assert relative_l2(ours, gold) <= 2 * relative_l2(textbook, gold) + torch.finfo(torch.float32).eps / 4


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_a_row_draws_from_its_own_generator(monkeypatch):
    """Its noise is the same bit for bit whatever the batch around it and wherever the row stands."""
    model, condition = network(), conditions(4)
    starts: list[Tensor] = []
    real = run.Run.solve
    monkeypatch.setattr(run.Run, "solve", lambda self, x, *args: starts.append(x) or real(self, x, *args))
    sample(model, condition, num_steps=1, generator=[seeded(10 + i) for i in range(4)])
    sample(model, condition[2:], num_steps=1, generator=[seeded(13), seeded(12)])
    sample(model, condition[:1], num_steps=1, generator=(seeded(12),))
    sample(model, condition[:1], num_steps=1, num_samples_per_condition=2, generator=[seeded(12), seeded(13)])
    whole, swapped, alone, each = starts
    assert torch.equal(whole[2:], swapped.flip(0)) and torch.equal(whole[2:3], alone) and torch.equal(whole[2:], each)
    assert not torch.allclose(whole[0], whole[1])
    assert torch.equal(alone[0], torch.randn(4, 8, generator=seeded(12)))


# ---- a sampler in use ------------------------------------------------------------------------------------------------


def test_threads_get_the_serial_results():
    sampler = Sampler(network())
    calls = [(conditions(1 + i % 3), {"guidance_scale": 1.0 + i % 2, "num_steps": 2 + i % 3}) for i in range(8)]

    def draw(i: int) -> Tensor:
        condition, arguments = calls[i]
        return sampler(condition, generator=seeded(i), **arguments)

    serial = [draw(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            together = list(pool.map(draw, range(8)))
            assert all(torch.equal(a, b) for a, b in zip(serial, together, strict=True))


def test_one_run_at_a_time(monkeypatch):
    """What `memory` says is enough for any number of threads."""
    sampler, condition, running, most = Sampler(network()), conditions(), [], []

    def watched(*args):
        running.append(None)
        most.append(len(running))
        time.sleep(0.005)
        result = run.draw(*args)
        running.pop()
        return result

    monkeypatch.setattr(sampler_module, "draw", watched)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: sampler(condition, num_steps=1), range(8)))
    assert most == [1] * 8


def test_it_follows_the_weights():
    model, condition = network(), conditions()
    sampler = Sampler(model)
    before = sampler(condition, num_steps=3, generator=seeded())
    kept = before.clone()
    model.load_state_dict(network(1).state_dict())
    after = sampler(condition, num_steps=3, generator=seeded())
    assert torch.equal(before, kept)  # the caller's own
    assert relative_l2(after, sample(model, condition, num_steps=3, generator=seeded())) <= 1e-5
    assert relative_l2(after, before) > 1e-2
    model.double()
    assert sampler(condition.double(), num_steps=3, generator=seeded()).dtype == torch.float64


@needs_extension
@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8"])
def test_storage_is_that_of_prepare(storage):
    model, condition = network(), conditions()
    sampler = Sampler(model, storage=storage)
    expected = sample(prepare(model, storage=storage), condition, num_steps=3, generator=seeded())
    assert torch.equal(sampler(condition, num_steps=3, generator=seeded()), expected)


def allocated_at_the_height(function) -> int:
    """Bytes that PyTorch had allocated at most since the call, by its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    height = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        height = max(height, now)
    return height


@pytest.mark.parametrize(
    ("fields", "dtype", "batch", "context", "call"),
    [
        ({}, torch.float32, 1, 64, {"num_steps": 4}),
        ({}, torch.float32, 6, 64, {"num_steps": 12, "guidance_scale": 2.0}),
        ({}, torch.float32, 6, 16, {"num_steps": 3, "guidance_scale": 1.0, "solver": "heun"}),
        ({"context_projection": False}, torch.float32, 4, 200, {"num_steps": 3, "solver": "ab2"}),
        ({"num_kv_heads": 1}, torch.float32, 4, 64, {"num_steps": 3, "solver": "midpoint"}),
        ({}, torch.bfloat16, 4, 64, {"num_steps": 5}),
        ({}, torch.float64, 4, 64, {"num_steps": 5}),  # nothing is packed
    ],
)
def test_memory_is_what_is_allocated(fields, dtype, batch, context, call):
    sizes = {"sample_size": 8, "in_channels": 64, "hidden_size": 256, "num_layers": 3, "num_attention_heads": 4}
    model = network(**(sizes | {"cross_attention_dim": 96} | fields)).to(dtype)
    condition = torch.randn(batch, context, 96, dtype=dtype)
    made: list[Sampler] = []

    def whole_run() -> None:
        made.append(Sampler(model))
        made[0](condition, **call)

    height = allocated_at_the_height(whole_run)
    stated = made[0].memory(batch, context_tokens=context, **call)
    assert 1 / 1.1 <= stated / height <= 1.1, stated / height


def test_memory_of_a_budget():
    """More steps need more modulations, up to the budget; without one, none."""
    model = network()
    one = step_bytes(model.config, 4, torch.float32)
    few, many = (Sampler(model, modulation_bytes=3 * one + 1).memory(2, num_steps=s) for s in (2, 50))
    none = Sampler(model, modulation_bytes=0).memory(2, num_steps=50)
    assert (few - none, many - none) == (2 * one, 3 * one)


def test_a_backend_by_name_reaches_the_ops():
    with use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        Sampler(network())(conditions(), num_steps=2)


BAD = [
    ({"model": nn.Linear(2, 2)}, "model must have a config (BLIP3oDiT has one), got Linear without"),
    ({"storage": "int4"}, "storage must be one of auto, fp32, bf16, int8, got 'int4'"),
    ({"modulation_bytes": -1}, "modulation_bytes must be an integer >= 0, got -1"),
    ({"modulation_bytes": 1.5}, "modulation_bytes must be an integer >= 0, got 1.5"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_samplers_are_named(change, message):
    call = {"model": network()} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampler(call.pop("model"), **call)


def test_bad_calls_are_named():
    model = network()
    sampler = Sampler(model)
    assert isinstance(sampler._network, PreparedModel)
    with pytest.raises(
        ValueError, match="storage must be 'auto' where a PreparedModel is not prepared here, got 'bf16'"
    ):
        Sampler(prepare(model), storage="bf16")
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidance'"):
        sampler(conditions(), guidance=2.0)
    for call, message in (
        ({"batch": 0}, "batch must be an integer >= 1, got 0"),
        ({"batch": 1, "num_steps": 0}, "num_steps must be an integer >= 1, got 0"),
        ({"batch": 1, "context_tokens": 0.5}, "context_tokens must be an integer >= 1, got 0.5"),
        ({"batch": 1, "solver": "dopri5"}, "solver must be one of"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            sampler.memory(**call)
