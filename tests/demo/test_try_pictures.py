"""`blip3o-fast try` on a tiny run: two CLIP towers from folders, 14 pictures, an untrained network."""

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from blip3o_fast.cli import main
from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.encoders import load_encoder
from blip3o_fast.data.extract import extract
from blip3o_fast.data.images import Picture, decode, folder_pictures, picture_files, write_tars
from blip3o_fast.data.pickle_output import PICKLE
from blip3o_fast.data.splits import split_indices
from blip3o_fast.demo import try_pictures as module
from blip3o_fast.demo.gallery import find_pictures
from blip3o_fast.demo.try_pictures import TrySettings, example_command, try_pictures
from blip3o_fast.demo.try_sheet import Block, Cell, draw
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.models.normalizer import FeatureNormalizers
from blip3o_fast.ops._philox import normal_noise_at
from blip3o_fast.sampling import sample
from blip3o_fast.sampling.settings import SamplerSettings

PICTURES, E, C = 14, 16, 12


def tower(folder: Path, width: int, seed: int) -> str:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=4
    )
    CLIPVisionModel(config).save_pretrained(folder)
    return f"clip:{folder}"


def draw_picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(small).resize((50, 40)).save(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, embeddings/, tars/ and pictures/stamps/ as the demo leaves them; strange.png is in none of them."""
    run = tmp_path_factory.mktemp("try")
    stamps = run / "pictures" / "stamps"
    for i in range(PICTURES):
        path = draw_picture(stamps / f"kind_{i % 2}" / f"p{i:02d}.png", i)
        if i != 3:  # that one has no caption
            path.with_suffix(".txt").write_text(f"Costs ${i} or $\\frac{{{i}$.")
    (run / "pictures" / "whole").write_text("stamps")
    draw_picture(run / "strange.png", 99)
    write_tars(folder_pictures(stamps, picture_files(stamps), []), run / "tars", 5)
    names = tower(run / "towers" / "one", E, 1), tower(run / "towers" / "two", C, 2)
    encoders = {"condition_encoder": names[0], "target_encoder": names[1], "tower": "hidden"}
    extract(run / "tars", run / "embeddings", **encoders, format="pickle")
    shutil.move(run / "embeddings" / PICKLE, run / PICKLE)
    data = EmbeddingDataset(run / "embeddings")
    config = BLIP3oConfig.preset("tiny", in_channels=4, cross_attention_dim=E, hidden_size=16)
    model = BLIP3oDiT(config, generator=torch.Generator().manual_seed(1)).eval()
    model.normalizer = FeatureNormalizers.fit(data.conditions, data.targets, "pca:4")
    model.save_pretrained(run / "model")
    record = {"settings": {"eval_split": 0.2}, "data": {"train": 12, "held_out": 2}}
    (run / "model" / "run.json").write_text(json.dumps(record))
    return run


def settings_of(folder: Path, *pictures: Path, **changes) -> TrySettings:
    return TrySettings(tuple(pictures), **{"run": folder, "num_steps": 2, "device": "cpu"} | changes)


def stamp(run: Path, number: int) -> Path:
    return run / "pictures" / "stamps" / f"kind_{number % 2}" / f"p{number:02d}.png"


def brute_force(query: np.ndarray, gallery: np.ndarray) -> tuple[list[int], list[float]]:
    """Tokens [T, C] against [n, T, C]: rows by falling cosine of the centred token means."""
    mean = gallery.reshape(-1, gallery.shape[-1]).mean(0)
    pool, one = gallery.mean(1) - mean, query.mean(0) - mean
    cosine = [float(row @ one / np.sqrt((row @ row) * (one @ one))) for row in pool]
    order = sorted(range(len(pool)), key=lambda i: -cosine[i])
    return order, [cosine[i] for i in order]


class Drawn:
    """Stands in for drawing, which costs most of a test's time; remembers what the sheet was asked to show."""

    def __init__(self) -> None:
        self.blocks = []

    def __call__(self, blocks, headline: str) -> bytes:
        self.blocks.append(blocks)
        return b""

    @property
    def cells(self):
        return [cell for block in self.blocks[-1] for _, row in block.rows for cell in row]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    drawn = Drawn()
    monkeypatch.setattr(module, "draw", drawn)
    return drawn


def test_neighbours_are_those_of_a_brute_force(run: Path, tmp_path: Path, drawn: Drawn) -> None:
    """Both towers and the network called by hand, the similarities in numpy's float64."""
    paths = [run / "strange.png", stamp(run, 4)]
    tried = try_pictures(settings_of(run, *paths, output=tmp_path / "a.png", num_samples=2, seed=5, guidance_scale=3.0))
    meta = json.loads((run / "embeddings" / "meta.json").read_text())
    first, second = (load_encoder(meta[side]["name"], tower="hidden") for side in ("condition", "target"))
    gallery = EmbeddingDataset(run / "embeddings").targets.double().numpy()
    model = BLIP3oDiT.from_pretrained(run / "model")
    for position, (path, one) in enumerate(zip(paths, tried, strict=True)):
        condition, target = (e.encode(e.preprocess(decode(path.read_bytes()))[None]).clone() for e in (first, second))
        order, cosine = brute_force(target[0].double().numpy(), gallery)
        assert one.true == order[:5] and np.allclose(one.true_similarity, cosine[:5], atol=1e-5)
        token_cosines = []
        for number in range(2):
            noise = normal_noise_at(5 + number, torch.tensor([position]), (64, 4))
            made = sample(model, condition, num_steps=2, guidance_scale=3.0, noise=noise)[0]
            order, cosine = brute_force(made.double().numpy(), gallery)
            assert one.generated[number] == order[:5]
            assert np.allclose(one.generated_similarity[number], cosine[:5], atol=1e-4)
            assert one.rank[number] == order.index(one.true[0]) + 1
            assert one.shared[number] == len(set(order[:5]) & set(one.true))
            token_cosines.append(torch.cosine_similarity(made, target[0], dim=-1).mean().item())
        assert one.cosine == pytest.approx(np.mean(token_cosines), abs=1e-4)
    assert tried[0].own is None
    keys = EmbeddingDataset(run / "embeddings").keys
    assert keys[tried[1].own] == "kind_0/p04" and tried[1].true_similarity[0] == pytest.approx(1, abs=1e-5)


def test_what_tune_sampler_found_is_used(
    run: Path, tmp_path: Path, drawn: Drawn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(module, "sample", lambda *args, **how: asked.append(how) or sample(*args, **how))
    shutil.copytree(run / "model", tmp_path / "model")
    tuned = SamplerSettings("ab2", 3, "cosine", 1.5, guidance_start=0.9)
    file = tuned.write(tmp_path / "model")
    how = {"model": str(tmp_path / "model"), "embeddings_path": run / "embeddings", "output": tmp_path / "a.png"}
    try_pictures(settings_of(run, run / "strange.png", **how, num_steps=None))
    out = capsys.readouterr().out
    assert out.count(f"{file}: {tuned}\n") == 1 and "guidance 1.5, 3 steps; neighbours" in out
    noise = asked[0].pop("noise")
    assert len(noise) == 1 and torch.equal(asked[0].pop("sigmas"), tuned.arguments()["sigmas"])
    assert asked[0] == {name: value for name, value in tuned.arguments().items() if name != "sigmas"}
    file.write_text("{")
    with pytest.raises(ValueError, match=r"sampler\.json: not JSON"):
        try_pictures(settings_of(run, run / "strange.png", **how))


def test_the_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures of the run are told apart by the split; the sheet lies in the run."""
    train, held_out = (set(rows.tolist()) for rows in split_indices(PICTURES, 0.2))
    keys = EmbeddingDataset(run / "embeddings").keys
    trained, new = (run / "pictures/stamps" / f"{keys[min(rows)]}.png" for rows in (train, held_out))
    words = ["try", str(trained), str(new), str(run / "strange.png"), "--run", str(run), "--num_steps", "1"]
    assert main([*words, "--neighbours", "3", "--storage", "bf16"]) == 0
    out = capsys.readouterr().out
    for path, told in ((trained, "trained on"), (new, "held out from training")):
        assert f"{path}: {told}\n" in out
    assert f"{run / 'strange.png'}: not in the run's collection\n" in out
    assert out.count("generated neighbours") == 3 and "of 3 neighbours shared (by chance 0.64)" in out
    assert "by name" not in out and f"{run / 'try.png'} in " in out
    with Image.open(run / "try.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 900
    assert not list(run.glob(".try*"))


def test_the_demo_shows_a_command_with_a_picture_that_was_held_out(run: Path) -> None:
    held_out = split_indices(PICTURES, 0.2)[1].tolist()
    key = min(EmbeddingDataset(run / "embeddings").keys[i] for i in held_out)
    assert example_command(run) == f"blip3o-fast try {run}/pictures/stamps/{key}.png --run {run}"
    assert example_command(run, str(run / "pictures" / "stamps")) == example_command(run)
    assert example_command(run, str(run / "towers")) == f"blip3o-fast try PICTURE --run {run}"


def test_cells_show_their_own_pictures(run: Path, drawn: Drawn) -> None:
    one = try_pictures(settings_of(run, stamp(run, 3)))[0]
    block = drawn.blocks[0][0]
    for cell in drawn.cells:
        expected = decode((run / "pictures" / "stamps" / f"{cell.key}.png").read_bytes())
        assert cell.picture is not None and np.array_equal(np.asarray(cell.picture), np.asarray(expected))
    true, generated = ([cell.key for cell in row] for _, row in block.rows)
    assert [cell.hit for cell in drawn.cells] == [False] * 5 + [key in true for key in generated]
    assert drawn.cells[0].caption == "itself: kind_1/p03"  # it has no caption: the key instead
    assert block.lines[0][0] == "p03.png" and block.rows[1][0] == "nearest to what was generated"
    assert len(one.true) == 5


@pytest.mark.parametrize("gone", [["tars"], ["tars", "pictures"]])
def test_pictures_that_are_gone(run: Path, tmp_path: Path, gone: list[str], drawn: Drawn, capsys) -> None:
    """Without the tars the fetched pictures serve; without any, key and caption stand in the sheet."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns(*gone, "towers", "*.png" if len(gone) == 2 else "none"))
    assert main(["try", str(run / "strange.png"), "--run", str(copy), "--num_steps", "1"]) == 0
    shown = {cell.picture is None for cell in drawn.cells}
    assert shown == {len(gone) == 2}
    out = capsys.readouterr().out
    assert ("shown by name: their pictures were not found; --images FOLDER" in out) == (len(gone) == 2)
    again = ["try", str(run / "strange.png"), "--run", str(copy), "--num_steps", "1", "--images", str(run / "tars")]
    assert main(again) == 0
    assert not [cell for cell in drawn.cells if cell.picture is None]


def test_model_and_embeddings_given_apart_and_a_pickle(run: Path, tmp_path: Path, drawn: Drawn, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shards, pickled = (
        try_pictures(settings_of(Path("nowhere"), run / "strange.png", model=str(run / "model"), embeddings_path=path))
        for path in (run / "embeddings", run / PICKLE)
    )
    assert shards == pickled == try_pictures(settings_of(run, run / "strange.png", output=tmp_path / "b.png"))
    assert (tmp_path / "try.png").is_file()


def test_a_training_run_names_its_embeddings(run: Path, tmp_path: Path, drawn: Drawn) -> None:
    folder = tmp_path / "first"
    shutil.copytree(run / "model", folder)
    record = json.loads((folder / "run.json").read_text())
    record["settings"]["embeddings_path"] = str(run / "embeddings")
    (folder / "run.json").write_text(json.dumps(record))
    found = try_pictures(settings_of(folder, run / "strange.png"))
    assert found == try_pictures(settings_of(run, run / "strange.png", output=tmp_path / "b.png"))


def test_more_samples_and_pictures_change_no_other(run: Path, tmp_path: Path, drawn: Drawn) -> None:
    output = tmp_path / "a.png"
    one = try_pictures(settings_of(run, run / "strange.png", output=output, seed=3))[0]
    many = try_pictures(settings_of(run, run / "strange.png", stamp(run, 1), output=output, seed=2, num_samples=3))[0]
    assert many.generated[1] == one.generated[0] and many.generated[0] != one.generated[0]


def test_bad_arguments_are_named(run: Path, tmp_path: Path) -> None:
    picture, text = run / "strange.png", tmp_path / "text.png"
    text.write_text("not a picture")
    for paths, changes, match in (
        ([], {}, "PICTURE: none was given"),
        ([tmp_path / "gone.png"], {}, "gone.png: there is no such picture"),
        ([tmp_path], {}, "is a folder; name the pictures themselves"),
        ([text], {}, "text.png is not a picture that can be read: PNG, JPEG or WebP"),
        ([picture], {"run": tmp_path / "none"}, "--run .*none: there is no such folder\nhint: `make demo` makes a run"),
        ([picture], {"run": tmp_path}, "there is no model in it\nhint: `make demo`"),
        ([picture], {"num_samples": 0}, "--num_samples must be a whole number from 1 to 120, got 0"),
        ([picture], {"neighbours": 21}, "--neighbours must be a whole number from 1 to 20, got 21"),
        ([picture] * 50, {"num_samples": 2}, "50 pictures with --num_samples 2 make 150 rows"),
        ([picture], {"num_steps": 0}, "--num_steps"),
        ([picture], {"guidance_scale": float("nan")}, "--guidance_scale"),
        ([picture], {"storage": "int3"}, "--storage"),
        ([picture], {"device": "tpu"}, "--device"),
        ([picture], {"output": Path("a.jpg")}, "--output must be the name of a .png file, got 'a.jpg'"),
        ([picture], {"images": (tmp_path / "none",)}, "images: .*none does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            try_pictures(settings_of(run, *paths, **changes))


def test_embeddings_that_do_not_fit(run: Path, tmp_path: Path) -> None:
    """Of an unknown encoder, of an encoder that changed since, without a word of encoders, of other widths."""
    meta = json.loads((run / "embeddings" / "meta.json").read_text())

    def embeddings(name: str, **changes) -> Path:
        shutil.copytree(run / "embeddings", tmp_path / name)
        (tmp_path / name / "meta.json").write_text(json.dumps(meta | changes))
        return tmp_path / name

    unknown = embeddings("unknown", condition=meta["condition"] | {"name": "vgg"})
    changed = embeddings("changed", target=meta["target"] | {"preprocessing": "224x224"})
    other = tmp_path / "other"
    names = {"condition_encoder": meta["target"]["name"], "target_encoder": meta["condition"]["name"]}
    extract(run / "tars", other, **names, tower="hidden")
    silent = tmp_path / "silent.pkl"
    whole = pickle.loads((run / PICKLE).read_bytes())
    silent.write_bytes(pickle.dumps({k: v for k, v in whole.items() if k != "config"}, protocol=4))
    for path, match in (
        (unknown, "its condition encoder is unknown here; encoder: got 'vgg'; allowed are efficientnet-lite0"),
        (changed, "the preprocessing of its target encoder clip:.* was '224x224', here it is '32x32"),
        (silent, "it does not say which condition encoder made it"),
        (other, r"condition and target of \(12, 16\) channels; the model was trained on 64 tokens and \(16, 12\)"),
    ):
        with pytest.raises(ValueError, match=match):
            try_pictures(settings_of(run, run / "strange.png", embeddings_path=path))


def test_a_damaged_tar_is_no_reason_to_stop(run: Path, tmp_path: Path, drawn: Drawn) -> None:
    copy = tmp_path / "tars"
    shutil.copytree(run / "tars", copy)
    first = sorted(copy.iterdir())[0]
    first.write_bytes(first.read_bytes()[:700])
    try_pictures(settings_of(run, run / "strange.png", neighbours=14, images=(copy,)))
    row = drawn.cells[:14]
    assert sum(cell.picture is None for cell in row) in (4, 5) and len(row) == 14


def test_the_sheet_is_drawn_with_and_without_pictures() -> None:
    """Any caption is text: dollar signs, braces, glyphs that no font has; and a picture may be a line of pixels."""
    red, line = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (3000, 1), "blue")
    cells = [
        Cell(red, "a", "$x^{$", 0.5, True),
        Cell(None, "long/" * 30, "\U000f0000 $$", -0.25),
        Cell(line, "b", "", 1),
    ]
    pages = [
        draw([Block(picture, [("name.png", "held out"), ("$1", "{")], [("true", cells), ("made", cells)])] * count, "x")
        for picture, count in ((red, 1), (line, 2))
    ]
    sizes = [Image.open(io.BytesIO(page)).size for page in pages]
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] > 1.6 * sizes[0][1]
    colours = Image.open(io.BytesIO(pages[0])).convert("RGB").getcolors(1 << 20)
    assert {(255, 0, 0), (0, 158, 115), (0, 114, 178)} <= {colour for _, colour in colours}  # picture, hit, own frame


def test_a_key_names_a_picture_within_its_tar(tmp_path: Path) -> None:
    """Two tars use the same key: each source gets its own picture, and no source at all the first one."""
    for seed in (1, 2):
        data = draw_picture(tmp_path / f"{seed}.png", seed).read_bytes()
        write_tars(iter([Picture("same", "", data, ".png")]), tmp_path / f"tars{seed}", 1)
        shutil.copy(tmp_path / f"tars{seed}" / "00000.tar", tmp_path / f"{seed}.tar")
    wanted = [("1.tar", "same"), ("2.tar", "same"), ("", "same"), ("3.tar", "same"), ("1.tar", "other")]
    found = find_pictures([tmp_path / "nowhere", tmp_path], wanted)
    expected = {
        name: decode((tmp_path / f"{number}.png").read_bytes()).tobytes()
        for name, number in ((wanted[0], 1), (wanted[1], 2), (wanted[2], 1))
    }
    assert {name: picture.tobytes() for name, picture in found.items()} == expected
