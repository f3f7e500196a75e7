"""`sampler.json`: what is written is read, what is wrong is named, and what the caller gives wins."""

import json
import re

import pytest
import torch

from blip3o_fast import BLIP3oConfig, BLIP3oDiT, sample
from blip3o_fast.flow.solvers import sigma_grid
from blip3o_fast.sampling.settings import FILLED, SamplerSettings, fill

TUNED = SamplerSettings(
    "ab2", 9, "shifted", 2.0, shift=1.5, guidance_start=0.9, guidance_end=0.1, error=0.008, reference_steps=1000,
    evaluations=9, passes=16,
)  # fmt: skip


def test_written_and_read(tmp_path):
    (tmp_path / "sampler.json").write_text("something older")
    assert TUNED.write(tmp_path) == tmp_path / "sampler.json"
    assert SamplerSettings.read(tmp_path) == TUNED
    assert [p.name for p in tmp_path.iterdir()] == ["sampler.json"], "nothing is left beside it"


def test_a_file_written_by_hand_needs_no_measurements(tmp_path):
    (tmp_path / "sampler.json").write_text('{"solver": "heun", "num_steps": 4, "grid": "cosine", "guidance_scale": 3}')
    assert SamplerSettings.read(tmp_path) == SamplerSettings("heun", 4, "cosine", 3)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    TUNED.write(tmp_path)

    def full(*paths):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        SamplerSettings("euler", 30, "linear", 2.0).write(tmp_path)
    assert SamplerSettings.read(tmp_path) == TUNED and len(list(tmp_path.iterdir())) == 1


def test_arguments_are_those_of_sample():
    model = BLIP3oDiT(BLIP3oConfig.preset("tiny", sample_size=2, in_channels=8)).eval()
    condition, noise = torch.randn(2, 5, 24), torch.randn(2, 4, 8)
    arguments = TUNED.arguments()
    assert tuple(sorted(arguments)) == tuple(sorted(FILLED))
    assert torch.equal(arguments["sigmas"], sigma_grid(9, "shifted", shift=1.5))
    ours = sample(model, condition, noise=noise, **arguments)
    spelled = sample(
        model, condition, noise=noise, solver="ab2", num_steps=9, sigmas=sigma_grid(9, "shifted", shift=1.5),
        guidance_scale=2.0, guidance_start=0.9, guidance_end=0.1,
    )  # fmt: skip
    assert torch.equal(ours, spelled)
    assert SamplerSettings("euler", 5, "linear", 1.0, start=0.999).arguments()["sigmas"][0] == torch.tensor(0.999)


GOOD = {"solver": "ab2", "num_steps": 9, "grid": "linear", "guidance_scale": 2.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "must hold an object, got list"),
        (GOOD | {"stepz": 3}, "unknown stepz; known are solver, num_steps"),
        ({"solver": "ab2"}, "num_steps, grid, guidance_scale missing"),
        (GOOD | {"solver": "rk4"}, "solver must be one of euler, midpoint, heun, ab2, got 'rk4'"),
        (GOOD | {"num_steps": 2.0}, "num_steps must be a whole number >= 1, got 2.0"),
        (GOOD | {"num_steps": True}, "num_steps must be a whole number >= 1, got True"),
        (GOOD | {"num_steps": None}, "num_steps must be a whole number >= 1, got None"),
        (GOOD | {"grid": "karras"}, "kind must be one of linear, shifted"),
        (GOOD | {"shift": 2.0}, "shift = 2.0 needs kind='shifted'"),
        (GOOD | {"shift": "2"}, "shift must be a finite number >= 0, got '2'"),
        (GOOD | {"guidance_scale": "2"}, "guidance_scale must be a finite number, got '2'"),
        (GOOD | {"guidance_start": 0.1, "guidance_end": 0.2}, "guidance_start must be at least guidance_end"),
        (GOOD | {"guidance_end": 7}, "guidance_end must be a noise level between 0 and 1, got 7"),
        (GOOD | {"error": -1}, "error must be a finite number >= 0, got -1"),
        (GOOD | {"passes": 0}, "passes must be a whole number >= 1, got 0"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(content, message, tmp_path):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "sampler.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "sampler.json")) + ".*" + re.escape(message)):
        SamplerSettings.read(tmp_path)


def test_no_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="sampler.json: no such file; `blip3o-fast tune-sampler` writes one"):
        SamplerSettings.read(tmp_path)


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


UNSET = dict.fromkeys(FILLED)


def test_without_a_file_nothing_is_filled_in_or_said(tmp_path):
    said = []
    assert fill(UNSET | {"num_steps": 5, "seed": None}, tmp_path, said.append) == {"num_steps": 5, "seed": None}
    assert fill(UNSET, "a/hub-name", said.append) == {} and said == []


def test_what_is_not_given_comes_from_the_file(tmp_path):
    TUNED.write(tmp_path)
    said = []
    same(fill(UNSET | {"seed": None}, tmp_path, said.append), {"seed": None} | TUNED.arguments())
    same(fill({}, tmp_path, said.append), TUNED.arguments())
    assert (
        said
        == [f"{tmp_path / 'sampler.json'}: ab2, 9 steps, shifted grid by 1.5, guidance 2 where 0.1 <= sigma <= 0.9"] * 2
    )


def test_what_is_given_wins(tmp_path):
    TUNED.write(tmp_path)
    said = []
    filled = fill({"num_steps": 20, "solver": "heun"}, tmp_path, said.append)
    grid = sigma_grid(20, "shifted", shift=1.5)
    same(filled, TUNED.arguments() | {"num_steps": 20, "solver": "heun", "sigmas": grid})
    assert said[0].endswith("heun, 20 steps, shifted grid by 1.5, guidance 2 where 0.1 <= sigma <= 0.9 "
                            "(given: solver, num_steps; the file has ab2, 9 steps)")  # fmt: skip
    own = torch.tensor([1.0, 0.5, 0.0])
    same(fill({"sigmas": own}, tmp_path, said.append), TUNED.arguments() | {"num_steps": 2, "sigmas": own})


def test_the_interval_belongs_to_its_guidance_scale(tmp_path):
    """Where another scale is given, even 0, guidance is everywhere; given bounds still win."""
    TUNED.write(tmp_path)
    for scale in (0.0, 3.0):
        filled = fill({"guidance_scale": scale}, tmp_path, lambda line: None)
        same(filled, TUNED.arguments() | {"guidance_scale": scale, "guidance_start": 1.0, "guidance_end": 0.0})
    same(fill({"guidance_scale": 2.0}, tmp_path, lambda line: None), TUNED.arguments())
    filled = fill({"guidance_scale": 3.0, "guidance_end": 0.3}, tmp_path, lambda line: None)
    assert (filled["guidance_start"], filled["guidance_end"]) == (1.0, 0.3)


def test_what_does_not_go_with_the_file_names_both(tmp_path):
    TUNED.write(tmp_path)
    with pytest.raises(ValueError, match=r"sampler\.json with guidance_start 0\.05: guidance_start must be at least"):
        fill({"guidance_start": 0.05}, tmp_path)


def test_a_broken_file_is_no_silent_default(tmp_path):
    (tmp_path / "sampler.json").write_text("{}")
    with pytest.raises(ValueError, match="missing"):
        fill(UNSET, tmp_path)
