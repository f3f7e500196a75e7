"""A trained run tried on any picture: its condition, samples from it, and whose features they are near to.

The run's embeddings say which encoders made them. The picture's condition goes into the model; its *target* features
are what the model should have generated. The nearest pictures of the run's collection to either are put side by side.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from torch import Tensor

from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.encoders import Encoder, encoder_info, load_encoder
from blip3o_fast.data.images import MAX_PICTURE_BYTES, DamagedPictureError, decode, find_sources, picture_files
from blip3o_fast.data.shards import EncoderInfo, read_index
from blip3o_fast.demo import fetch
from blip3o_fast.demo.gallery import find_pictures
from blip3o_fast.demo.try_neighbours import Tried, block, collect, compare, describe, training_rows
from blip3o_fast.demo.try_sheet import draw
from blip3o_fast.evaluation.samples import load_model
from blip3o_fast.evaluation.settings import SamplingSettings, device_named
from blip3o_fast.files import replacing
from blip3o_fast.ops._philox import normal_noise_at
from blip3o_fast.sampling import prepare, sample
from blip3o_fast.training.checkpoints import read_run

if TYPE_CHECKING:
    from PIL.Image import Image

    from blip3o_fast.models.nextdit import BLIP3oDiT

MAX_ROWS, MAX_NEIGHBOURS = 120, 20  # of one sheet: a PNG can be 65535 pixels high, and nobody looks at more


@dataclass(frozen=True)
class TrySettings:
    """What `blip3o-fast try` is told.

    pictures: PNG, JPEG or WebP files.
    run: a demo's folder (``model`` and ``embeddings`` in it), or a training run's.
    model, embeddings_path: instead of the run's.
    images: where the collection's pictures are; (): ``tars`` or ``pictures`` beside the embeddings.
    output: the sheet; None: ``try.png`` in the run, or in the current folder where model and embeddings are given.
    num_samples: generations of each picture; the noise of number s is that of seed + s.
    num_steps, guidance_scale: None: as sampler.json beside the weights says, else as in `blip3o-fast sample`.
    """

    pictures: tuple[Path, ...]
    run: Path = Path("runs/demo")
    model: str | None = None
    embeddings_path: Path | None = None
    images: tuple[Path, ...] = ()
    output: Path | None = None
    num_samples: int = 1
    neighbours: int = 5
    num_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    device: str = "auto"
    storage: str = "auto"
    trust_remote_code: bool = False

    def check(self) -> None:
        """ValueError or FileNotFoundError naming the flag, before anything is loaded."""
        if not self.pictures:
            raise ValueError("PICTURE: none was given; at least one file is needed")
        for name, most in (("num_samples", MAX_ROWS), ("neighbours", MAX_NEIGHBOURS)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"--{name} must be a whole number from 1 to {most}, got {value!r}")
        rows = len(self.pictures) * (1 + self.num_samples)
        if rows > MAX_ROWS:
            raise ValueError(f"{len(self.pictures)} pictures with --num_samples {self.num_samples} make {rows} rows; "
                             f"one sheet has at most {MAX_ROWS}")  # fmt: skip
        self.sampling("").check()
        if self.images:
            find_sources(list(self.images))
        output = self.sheet
        if output.is_dir() or output.suffix.lower() != ".png":
            raise ValueError(f"--output must be the name of a .png file, got {str(output)!r}")

    def sampling(self, model: str | Path) -> SamplingSettings:
        return SamplingSettings(
            model, "", num_steps=self.num_steps, guidance_scale=self.guidance_scale, seed=self.seed,
            device=self.device, storage=self.storage,
        )  # fmt: skip

    @property
    def sheet(self) -> Path:
        if self.output is not None:
            return self.output
        return Path("try.png") if self.model and self.embeddings_path else self.run / "try.png"


def try_pictures(settings: TrySettings, encoders: tuple[Encoder, Encoder] | None = None) -> list[Tried]:
    """Write the sheet, print what is on it, and return it.

    encoders: (condition, target), already loaded, instead of those that the embeddings name.

    Raises ValueError, FileNotFoundError or ModuleNotFoundError naming the flag or file, before any work.
    """
    import matplotlib  # noqa: F401  # a missing one should not be found out at the end

    start = time.perf_counter()
    settings.check()
    pictures = [read_picture(path) for path in settings.pictures]
    model_path, embeddings = places(settings)
    run = settings.sampling(model_path).run()
    model = load_model(model_path, device_named(settings.device))
    dataset = EmbeddingDataset(embeddings)
    if encoders is None:
        encoders = recorded_encoders(embeddings, dataset.config, settings.trust_remote_code, settings.device)
    _check_widths(model, dataset, embeddings)
    collection = collect(embeddings, dataset, model_path)
    given = f"{len(pictures)} picture{'' if len(pictures) == 1 else 's'}"
    typer.echo(
        f"{given}: {encoders[0].name} -> {encoders[1].name}, guidance {run['guidance_scale']:g}, "
        f"{run['num_steps']} steps; neighbours among {len(collection.names)} pictures"
    )

    condition, target = (_features(encoder, pictures) for encoder in encoders)
    generated = _generate(model, condition, settings, run)
    tried = [
        compare(path, target[i], generated[:, i], collection, settings.neighbours)
        for i, path in enumerate(settings.pictures)
    ]
    shown = {row for one in tried for row in (*one.true, *sum(one.generated, []))}
    found = find_pictures(settings.images or picture_places(embeddings), {collection.names[row] for row in shown})
    blocks = [block(one, picture, collection, found) for one, picture in zip(tried, pictures, strict=True)]
    _write(settings.sheet, draw(blocks, f"{encoders[0].name} -> generated {encoders[1].name}"))

    for one in tried:
        typer.echo("\n".join(describe(one, collection)))
    lost = sum(collection.names[row] not in found for row in shown)
    if lost:
        typer.echo(f"{lost} of {len(shown)} neighbours are shown by name: their pictures were not found; "
                   "--images FOLDER says where they are")  # fmt: skip
    typer.echo(f"{settings.sheet} in {time.perf_counter() - start:.1f} s")
    return tried


# ---- what is needed -------------------------------------------------------------------------------------------------


def read_picture(path: Path) -> Image:
    """The decoded picture; FileNotFoundError or ValueError naming it."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the pictures themselves, as in {path}/*.png")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such picture")
    if path.stat().st_size > MAX_PICTURE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {MAX_PICTURE_BYTES} are read")
    try:
        return decode(path.read_bytes())
    except DamagedPictureError as error:
        raise ValueError(f"{path} is not a picture that can be read: PNG, JPEG or WebP ({error})") from error


def places(settings: TrySettings) -> tuple[str | Path, Path]:
    """The model and the embeddings; ValueError with what to do where the run has none."""
    run = settings.run
    model: str | Path | None = settings.model
    hint = "\nhint: `make demo` makes a run; or give --model and --embeddings_path"
    if model is None:
        model = run if (run / "config.json").is_file() else run / "model"
        if not Path(model).is_dir():
            what = "there is no such folder" if not run.is_dir() else "there is no model in it"
            raise ValueError(f"--run {run}: {what}{hint}")
    embeddings = settings.embeddings_path or run / "embeddings"
    if settings.embeddings_path is None and not embeddings.exists():
        record = read_run(Path(model)) or {}
        embeddings = Path(record.get("settings", {}).get("embeddings_path") or embeddings)
        if not embeddings.exists():
            raise ValueError(f"--run {run}: there are no embeddings in it{hint}")
    return model, embeddings


def picture_places(embeddings: Path) -> list[Path]:
    """Where a demo keeps the pictures: the tars that were extracted, else those that were fetched."""
    folder = embeddings.parent
    return [folder / "tars", fetch.fetched(folder / "pictures") or folder / "pictures"]


def example_command(run: Path, images: str = "") -> str:
    """The command line that tries a demo's run on a picture which it was not trained on.

    images: the folder that the demo was given; "": the pictures were fetched.
    """
    rows = read_index(run / "embeddings")
    trained = training_rows(run / "model", len(rows)) or set()
    held_out = sorted(row.key for i, row in enumerate(rows) if i not in trained)
    folder = Path(images) if images else fetch.fetched(run / "pictures")
    files = [] if folder is None else picture_files(folder)
    by_key = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}  # type: ignore[arg-type]
    found = next((by_key[key] for key in held_out if key in by_key), "PICTURE")
    return f"blip3o-fast try {shlex.quote(str(found))} --run {shlex.quote(str(run))}"


def recorded_encoders(path: Path, config: Any, trust_remote_code: bool, device: str) -> tuple[Encoder, Encoder]:
    """The encoders that the embeddings name, loaded; ValueError where they are unknown or no longer the same."""
    infos = []
    for side in ("condition", "target"):
        try:
            info = EncoderInfo(**config[side])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"--embeddings_path {path}: it does not say which {side} encoder made it; "
                "a folder made by 'blip3o-fast extract' does"
            ) from error
        _, at, revision = info.revision.rpartition("@")
        revision = revision if at and revision != "main" else ""
        try:
            here = encoder_info(info.name, tower=info.tower, revision=revision)
        except ValueError as error:
            raise ValueError(f"--embeddings_path {path}: its {side} encoder is unknown here; {error}") from error
        for field in fields(EncoderInfo):
            was, now = getattr(info, field.name), getattr(here, field.name)
            if was != now:
                raise ValueError(f"--embeddings_path {path}: the {field.name} of its {side} encoder {info.name} was "
                                 f"{was!r}, here it is {now!r}; extract again")  # fmt: skip
        infos.append((info.name, info.tower, revision))
    where = device_named(device)
    first, second = (
        load_encoder(name, tower=tower, device=where, revision=revision, trust_remote_code=trust_remote_code)
        for name, tower, revision in infos
    )
    return first, second


def _check_widths(model: BLIP3oDiT, dataset: EmbeddingDataset, path: Path) -> None:
    config, normalizer = model.config, model.normalizer
    widths = (config.cross_attention_dim, config.in_channels)
    if normalizer is not None:
        widths = (normalizer.condition.in_features, normalizer.target.in_features)
    found = (dataset.conditions.shape[2], dataset.targets.shape[2])
    if found != widths or dataset.targets.shape[1] != config.num_tokens:
        raise ValueError(
            f"--embeddings_path {path}: {dataset.targets.shape[1]} tokens, condition and target of {found} channels; "
            f"the model was trained on {config.num_tokens} tokens and {widths} channels"
        )


# ---- the work -------------------------------------------------------------------------------------------------------


def _features(encoder: Encoder, pictures: list[Image]) -> Tensor:
    """float32 ``[P, T, dim]`` on the CPU."""
    inputs = [encoder.preprocess(picture)[None] for picture in pictures]
    return torch.cat([encoder.encode(one).cpu() for one in inputs])


def _generate(model: BLIP3oDiT, condition: Tensor, settings: TrySettings, run: dict[str, Any]) -> Tensor:
    """``[S, P, T, C]``, raw features; another picture or sample changes no other's noise. run: of `sample`."""
    device, config = next(model.parameters()).device, model.config
    prepared = prepare(model, storage=settings.storage)
    samples = []
    for number in range(settings.num_samples):
        shape = (config.sample_size**2, config.in_channels)
        noise = normal_noise_at(settings.seed + number, torch.arange(len(condition)), shape)
        generated = sample(prepared, condition.clone().to(device), noise=noise.to(device), **run)
        samples.append(generated.float().cpu())
    return torch.stack(samples)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_bytes(data)
