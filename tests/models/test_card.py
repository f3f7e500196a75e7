"""The model card: what it says is true of the folder, its code runs, and an edited one stays."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from blip3o_fast.models import card
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.models.normalizer import FeatureNormalizers, Normalizer

TINY = BLIP3oConfig.preset("tiny")
STOCK = BLIP3oConfig.preset("tiny", context_projection=False, time_convention="lumina", num_kv_heads=1)
LOGGED = (
    {"step": 4, "eval_loss": 0.75, "eval_recall_at_1": 0.125},
    {"step": 5, "loss": 0.9},
    {"step": 8, "eval_loss": 0.25},
)


@pytest.fixture
def model() -> BLIP3oDiT:
    return BLIP3oDiT(TINY)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder as training and `evaluate` leave it, without weights."""
    embeddings = tmp_path / "elsewhere" / "birds"
    embeddings.mkdir(parents=True)
    meta = {"condition": {"name": "eva-clip", "dim": 24}, "target": {"name": "clip-vit", "dim": 16}}
    (embeddings / "meta.json").write_text(json.dumps(meta))
    folder = tmp_path / "run"
    folder.mkdir()
    values = {
        "steps": 8,
        "effective_batch": 32,
        "settings": {"embeddings_path": str(embeddings), "learning_rate": 1e-4, "condition_dropout": 0, "seed": 42},
        "data": {"train": 90, "held_out": 10},
        "versions": {"blip3o_fast": "1.2.3", "torch": "2"},
    }
    (folder / "run.json").write_text(json.dumps(values))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in LOGGED) + '{"torn": ')
    return folder


def read(folder: Path) -> str:
    return (folder / "README.md").read_text()


def rows(text: str) -> dict[str, list[str]]:
    """Every table's lines by their first cell."""
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


# ---- what it says ---------------------------------------------------------------------------------------------------


def test_front_matter_and_sizes(model: BLIP3oDiT, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.to_dict() == {
        "library_name": "blip3o_fast",
        "tags": ["flow-matching", "diffusion-transformer", "blip3-o"],
    }, "the licence is the user's to give"
    table = rows(loaded.text)
    assert table["parameters"] == [f"{sum(p.numel() for p in model.parameters()):,}"]
    assert (table["layers"], table["width"], table["heads"]) == (["2"], ["64"], ["2 of 32"])
    assert (table["feed-forward width"], table["tokens"]) == (["192"], ["64, patch size 1"])
    assert (table["channels of a token"], table["channels of the context"]) == (["16"], ["24"])
    assert "given 1000 * sigma and predicts noise - data" in loaded.text
    assert "normalisation: none" in loaded.text and loaded.text.count("Not recorded.") == 2


def test_the_other_network(tmp_path: Path) -> None:
    BLIP3oDiT(STOCK).bfloat16().save_pretrained(tmp_path)
    text = read(tmp_path)
    assert "given 1 - sigma and predicts data - noise" in text and "LuminaNextDiT2DModel" in text
    assert rows(text)["heads"] == ["2 of 32 (1 for keys and values)"] and rows(text)["weights"] == ["bfloat16"]


def test_training_and_numbers_come_from_the_runs_folder(model: BLIP3oDiT, run: Path) -> None:
    evaluation = {"token_cosine": 0.5, "token_cosine_ridge": 0.25, "recall_at_1": 1 / 3, "recall_at_1_ridge": 0.1}
    (run / "evaluation.json").write_text(json.dumps(evaluation | {"pictures": 10.0, "guidance_scale": 2.0}))
    model.save_pretrained(run)
    text = read(run)
    table = rows(text)
    assert (table["condition encoder"], table["target encoder"]) == (["eva-clip"], ["clip-vit"])
    assert "64 feature tokens of 16 channels of clip-vit from feature tokens of 24 channels of eva-clip" in text
    assert table["embeddings"] == ["birds"] and str(run.parent) not in text, "a machine's paths are nobody's business"
    assert (table["train pictures"], table["held out pictures"], table["steps"]) == (["90"], ["10"], ["8"])
    assert table["token_cosine"] == ["0.5", "0.25"] and table["recall_at_1"] == ["0.3333", "0.1"]
    assert "(held-out pictures 10, guidance 2)" in text
    assert table["eval_loss"] == ["0.25"] and "at step 8" in text and "eval_recall_at_1" not in table
    assert "guidance_scale=1.0" in text, "trained without empty conditions"


def test_a_checkpoint_within_the_run_has_its_own_numbers(model: BLIP3oDiT, run: Path) -> None:
    model.save_pretrained(run / "checkpoint-5")
    table = rows(read(run / "checkpoint-5"))
    assert table["eval_loss"] == ["0.75"] and table["steps"] == ["8"]


def test_saved_elsewhere_it_says_whose_numbers_they_are(model: BLIP3oDiT, run: Path, tmp_path: Path) -> None:
    model.save_pretrained(run)
    assert "loaded from" not in read(run)
    BLIP3oDiT.from_pretrained(run).save_pretrained(tmp_path / "copy")
    text = read(tmp_path / "copy")
    assert text.count("Of the checkpoint that the weights were loaded from.") == 2
    assert rows(text)["eval_loss"] == ["0.25"]


def test_broken_records_do_not_stop_a_save(model: BLIP3oDiT, run: Path) -> None:
    (run / "run.json").write_text("[1]")
    (run / "metrics.jsonl").write_bytes(b"\xff\n3\n")
    (run / "evaluation.json").write_text("{")
    model.save_pretrained(run)
    assert read(run).count("Not recorded.") == 2


def test_what_the_caller_knows(model: BLIP3oDiT, tmp_path: Path) -> None:
    given = {"license": "mit", "datasets": ["me/birds"], "training": {"pictures": 7}, "metrics": {"cosine": 0.123456}}
    model.save_pretrained(tmp_path, model_card_kwargs=given)
    loaded = ModelCard.load(tmp_path / "README.md")
    assert (loaded.data.license, loaded.data.datasets) == ("mit", ["me/birds"])
    assert rows(loaded.text)["pictures"] == ["7"] and rows(loaded.text)["cosine"] == ["0.1235"]
    assert "Not recorded" not in loaded.text and "adds `license:`" not in loaded.text


def test_the_hub_gets_the_card_of_the_run(model: BLIP3oDiT, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.hub_mixin as mixin

    cards = []

    class Api:
        def __init__(self, **_: Any) -> None:
            pass

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path: Path, **_: Any) -> str:
            cards.append(ModelCard.load(folder_path / "README.md"))
            return "url"

    monkeypatch.setattr(mixin, "HfApi", Api)
    model.save_pretrained(run)
    BLIP3oDiT.from_pretrained(run).push_to_hub("someone/model", model_card_kwargs={"license": "mit"})
    assert cards[0].data.license == "mit"
    assert rows(cards[0].text)["target encoder"] == ["clip-vit"]


# ---- its code -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, STOCK], ids=["blip3o", "stock"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_code_runs(
    config: BLIP3oConfig, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BLIP3oDiT(config).to(dtype)
    width = 16
    if config is TINY:
        model.normalizer = FeatureNormalizers(
            condition=Normalizer.fit(torch.randn(50, 4, 24), "standardize"),
            target=Normalizer.fit(torch.randn(50, 4, 20), "pca:16"),
        )
        width = 20
    model.save_pretrained(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", read(tmp_path), re.DOTALL)
    assert "num_steps=30" in code
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(compile(code.replace("num_steps=30", "num_steps=2"), "the card", "exec"), scope)
    assert scope["features"].shape == (2, 64, width) and scope["features"].isfinite().all()
    assert f"# [2, 64, {width}]" in code


# ---- whose it is ----------------------------------------------------------------------------------------------------


def test_a_generated_card_is_renewed_and_an_edited_one_stays(model: BLIP3oDiT, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    BLIP3oDiT(STOCK).save_pretrained(tmp_path)
    assert "LuminaNextDiT2DModel" in read(tmp_path), "a card of the weights that were there before"
    edited = read(tmp_path).replace("tags:", "license: mit\ntags:")
    (tmp_path / "README.md").write_text(edited)
    model.save_pretrained(tmp_path)
    assert read(tmp_path) == edited
    for content in (b"mine", edited.encode() + b"More.\n", b"\xff no text"):
        (tmp_path / "README.md").write_bytes(content)
        model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_bytes() == content


def test_a_card_with_other_line_ends_is_still_generated(model: BLIP3oDiT, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_bytes(read(tmp_path).replace("\n", "\r\n").encode())
    card.forget(tmp_path)
    assert not (tmp_path / "README.md").exists()
