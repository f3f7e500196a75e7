"""The benchmarks of data and of first calls, small and without timing: providers agree, wrong ones fail."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

from benchmarks import compile_time, data
from benchmarks.harness import Settings, measure
from benchmarks.work import Absent, Work
from blip3o_fast.data.encoders import Encoder
from blip3o_fast.data.preprocessing import Preprocessing
from blip3o_fast.data.shards import EncoderInfo


def checked(work: Work) -> dict[str, dict]:
    return {row["provider"]: row for rows, _ in measure(work, Settings(timed=False)) for row in rows}


def spoiled(work: Work, name: str) -> dict:
    """The row of a provider whose answer was made wrong, a little."""
    right = work.providers[name]
    wrong = functools.partial(lambda run: 1.01 * run() + 0.01, right)
    return checked(dataclasses.replace(work, providers={**work.providers, name: wrong}))[name]


# ---- data ----------------------------------------------------------------------------------------------------------


def test_shards_are_read_alike(tmp_path):
    work = data.shards_work(tmp_path, rows=10, width=8, per_shard=4)
    rows = checked(work)
    assert set(rows) == {"safetensors", "read_shards", "EmbeddingDataset", "open_conditions"}
    assert all(row["status"] == "ok" and row["errors"] == {"y": 0.0} for row in rows.values())
    assert rows["safetensors"]["items"] == 10 and rows["safetensors"]["item"] == "rows"
    assert spoiled(work, "open_conditions")["status"] == "FAILED"


def test_pictures_are_decoded_without_loss():
    work = data.decode_work(2, 24)
    assert {name: (row["status"], row["errors"]["y"]) for name, row in checked(work).items()} == {
        "Pillow": ("ok", 0.0), "ours": ("ok", 0.0),
    }  # fmt: skip
    assert spoiled(work, "ours")["status"] == "FAILED"


def test_extraction_gives_the_features_of_a_plain_loop(tmp_path):
    torch.manual_seed(0)
    preprocess = Preprocessing(32, (127.0,) * 3, (64.0,) * 3, crop=False)
    encoder = Encoder(EncoderInfo("patches", 6), preprocess, nn.Conv2d(3, 6, 4, 4), lambda model, x: model(x))
    work = data.extract_work(tmp_path, encoder, count=5, side=40)
    assert {name: row["status"] for name, row in checked(work).items()} == {"plain loop": "ok", "ours": "ok"}
    assert spoiled(work, "ours")["status"] == "FAILED"


def test_without_an_encoder_extraction_is_absent(tmp_path):
    rows = checked(data.extract_work(tmp_path, Absent("no weights here")))
    assert {(row["status"], row["reason"]) for row in rows.values()} == {("absent", "no weights here")}


# ---- first calls ---------------------------------------------------------------------------------------------------


def test_imports_are_processes_that_may_fail():
    work = compile_time.import_work()
    assert list(work.providers)[:2] == ["import torch", "import blip3o_fast"]
    ours = work.providers["import blip3o_fast"]
    nothing = compile_time.in_process("import no_such_module\nprint([1.0])")
    rows = checked(dataclasses.replace(work, providers={"ours": ours, "nothing": nothing}))
    assert rows["ours"]["status"] == "ok" and rows["ours"]["first_call_s"] > 0
    assert rows["nothing"]["status"] == "error"
    assert "ModuleNotFoundError: No module named 'no_such_module'" in rows["nothing"]["reason"]


@pytest.mark.parametrize("first", list(compile_time.FIRSTS))
def test_first_results_are_right_by_fp64(first):
    """The code of the processes, run in this one; what compiles takes long, and differs by `torch.compile(...)`."""
    work = compile_time.work(first, "tiny")
    codes = compile_time.FIRSTS[first]
    run = {}
    for name in ("eager", "ours"):
        names: dict = {}
        exec(compile_time.PREAMBLE.format(preset="tiny") + codes[name], names)
        run[name] = functools.partial(lambda result: result.flatten(), names["result"])
    rows = checked(dataclasses.replace(work, providers=run))
    assert {name: row["status"] for name, row in rows.items()} == {"eager": "ok", "ours": "ok"}, rows
    assert spoiled(dataclasses.replace(work, providers=run), "ours")["status"] == "FAILED"
    assert {name.replace("compile", "eager").replace("ours, eager", "ours") for name in codes} == {"eager", "ours"}
