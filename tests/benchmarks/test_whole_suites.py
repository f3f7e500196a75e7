"""The benchmarks of whole steps and runs with tiny sizes, without timing: all providers agree, a wrong one fails."""

import dataclasses
import functools

import pytest
import torch

from benchmarks import sample, train_step
from benchmarks.harness import Settings, measure
from benchmarks.work import Absent, Work
from blip3o_fast import _ext
from blip3o_fast.models import BLIP3oConfig

TINY = BLIP3oConfig.preset("tiny")


def checked(work: Work) -> dict[str, dict]:
    return {row["provider"]: row for rows, _ in measure(work, Settings(timed=False)) for row in rows}


def replaced(work: Work, **providers) -> Work:
    return dataclasses.replace(work, providers={**work.providers, **providers})


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step() -> Work:
    return train_step.work(2, TINY, compile=False)


def test_a_training_step_is_right_by_fp64(step):
    rows = checked(step)
    assert {name: row["status"] for name, row in rows.items()} == {
        "eager": "ok", "compile": "absent", "ours": "ok", "ours, checkpointing": "ok",
        "ours, selective": "ok",
    }  # fmt: skip
    for name in ("eager", "ours", "ours, checkpointing", "ours, selective"):
        assert {"loss", "dlayers.0.attn1.to_q.weight", "dcaption_projection.linear_1.weight"} <= set(
            rows[name]["errors"]
        )
    saved = {name: float(row["detail"].split()[1]) for name, row in rows.items() if row["detail"]}
    assert saved["ours, checkpointing"] < 0.5 * saved["ours"] < saved["ours"] < saved["eager"]


class Halved(torch.optim.AdamW):
    """An optimizer that is wrong."""

    def step(self):
        for group in self.param_groups:
            group["lr"] *= 0.5
        super().step()


@pytest.mark.parametrize(
    ("what", "reason"), [("loss", "loss: off by"), ("gradient", "d"), ("optimizer", "the update is off by")]
)
def test_a_wrong_training_step_fails(step, monkeypatch, what, reason):
    ours = step.providers["ours"]
    right = ours.loss
    losses = {
        "loss": lambda *batch: 1.001 * right(*batch),
        # the same value, another derivative
        "gradient": lambda *batch: right(*batch).detach() + 1.001 * (loss := right(*batch)) - 1.001 * loss.detach(),
        "optimizer": right,
    }
    with monkeypatch.context() as patch:
        if what == "optimizer":
            patch.setattr(torch.optim, "AdamW", Halved)
        broken = train_step.Step(losses[what], ours.parameters, ours.initial)
    for provider in step.providers.values():
        if not isinstance(provider, Absent):
            provider.first = True  # as before their checked call
    rows = checked(replaced(step, ours=broken))
    row = rows["ours"]
    assert rows["eager"]["status"] == rows["ours, checkpointing"]["status"] == "ok"
    assert row["status"] == "FAILED" and reason in row["reason"], row


def test_a_step_trains(step):
    provider = step.providers["ours"]
    batch = step.inputs().args
    losses = []
    with torch.no_grad():  # as the harness calls it
        provider(*batch)
        losses = [provider(*batch).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


# ---- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampling_is_right_by_fp64(dtype):
    work = sample.work(2, dtype, TINY, compile=False, num_steps=2)
    rows = checked(work)
    storages = ("fp32", "bf16") if dtype == torch.float32 else ("bf16", "int8")
    assert set(rows) == {"eager", "compile", "ours", *(f"Sampler, {storage}" for storage in storages)}
    here = "ok" if _ext.C is not None else "absent"
    expected = {"compile": "absent", **{f"Sampler, {storage}": here for storage in storages}}
    assert all(row["status"] == expected.get(name, "ok") for name, row in rows.items()), rows
    assert rows["eager"]["items"] == 2 and rows["eager"]["item"] == "samples"


def test_wrong_samples_fail():
    work = sample.work(1, torch.float32, TINY, compile=False, num_steps=2)
    unguided = sample.work(1, torch.float32, TINY, compile=False, num_steps=2, guidance_scale=1.0).providers["ours"]
    slightly = functools.partial(lambda run, *args: run(*args) * (1 + 1e-4), work.providers["ours"])
    wrong = checked(replaced(work, ours=slightly, compile=unguided))
    assert wrong["ours"]["status"] == "FAILED" and "> " in wrong["ours"]["reason"]
    # a peer may be less exact, but not another sample
    assert wrong["compile"]["status"] == "FAILED" and "relative L2 error" in wrong["compile"]["reason"]


def test_the_memory_of_a_training_step_falls_from_mode_to_mode(capsys):
    from benchmarks import train_memory

    train_memory.main(["--preset", "tiny", "--batch_size", "8", "--repeats", "1", "--precisions", "fp32", "bf16"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[2].strip() for row in rows] == ["none", "selective", "block"] * 2
    for first in (0, 3):
        none, selective, block = (int(row[3]) for row in rows[first : first + 3])
        assert none >= selective >= block > 0
