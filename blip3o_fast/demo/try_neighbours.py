"""One picture's features against the run's collection: its neighbours, what they say, and how that is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.shards import read_index
from blip3o_fast.data.splits import split_indices
from blip3o_fast.demo.gallery import Name, directions, nearest
from blip3o_fast.demo.try_sheet import Block, Cell
from blip3o_fast.evaluation.metrics import token_cosine
from blip3o_fast.training.checkpoints import read_run

if TYPE_CHECKING:
    from PIL.Image import Image

# Features of the same picture differ by the dtype on disk (bfloat16: 0.4 %); of similar pictures by 30 % and more.
_SAME = 0.01


@dataclass
class Collection:
    """The run's pictures: raw features, names, and which were trained on (None where that is not known)."""

    targets: Tensor  # [n, T, C]
    mean: Tensor  # [C]
    gallery: Tensor  # [n, C], directions of the targets
    names: list[Name]
    captions: list[str]
    trained: set[int] | None


@dataclass
class Tried:
    """One picture: rows of the collection nearest to its true features and to what was generated, best first.

    similarities go with them. rank: by sample, the place of the first true neighbour in the generated order, from 1.
    cosine: mean over tokens and samples of generated and true; mean_cosine: that of the collection's mean token, which
    knows nothing of the picture.
    """

    path: Path
    own: int | None  # its row, where it is in the collection
    true: list[int]
    true_similarity: list[float]
    generated: list[list[int]]  # by sample
    generated_similarity: list[list[float]]
    rank: list[int]
    cosine: float
    mean_cosine: float

    @property
    def shared(self) -> list[int]:
        """By sample: how many of the generated feature's neighbours are true ones."""
        return [len(set(rows) & set(self.true)) for rows in self.generated]


def collect(path: Path, dataset: EmbeddingDataset, model_path: str | Path) -> Collection:
    """The collection with its names, and the training split where the model's run.json tells it."""
    # The shards know each picture's tar; a pickle knows only keys.
    sources = [row.source for row in read_index(path)] if path.is_dir() else [""] * len(dataset)
    mean = dataset.targets.mean((0, 1))
    names = list(zip(sources, dataset.keys, strict=True))
    trained = training_rows(model_path, len(dataset))
    return Collection(dataset.targets, mean, directions(dataset.targets, mean), names, dataset.captions, trained)


def training_rows(model: str | Path, count: int) -> set[int] | None:
    """Which of ``count`` pictures were trained on, by the model's run.json; None where it does not tell."""
    record = (read_run(Path(model)) if Path(model).is_dir() else None) or {}
    train, held_out = split_indices(count, record.get("settings", {}).get("eval_split", 0.0))
    found = record.get("data", {})
    # Other counts: trained on a subset, or on other embeddings.
    same = (found.get("train"), found.get("held_out")) == (len(train), len(held_out))
    return set(train.tolist()) if same else None


def compare(path: Path, target: Tensor, generated: Tensor, collection: Collection, count: int) -> Tried:
    """One picture's ``target`` ``[T, C]`` and ``generated`` ``[S, T, C]`` against the collection."""
    target = target.clone()  # of an inference tensor
    queries = directions(torch.cat([target[None], generated]), collection.mean)
    rows, similarities = nearest(queries, collection.gallery, len(collection.names))
    first = int(rows[0, 0])
    rank = (rows[1:] == first).int().argmax(1) + 1
    rows, similarities = rows[:, :count], similarities[:, :count]
    itself = (collection.targets[first] - target).norm() <= _SAME * target.norm()
    mean = collection.mean.expand_as(target)
    return Tried(
        path=path,
        own=first if itself else None,
        true=rows[0].tolist(),
        true_similarity=similarities[0].tolist(),
        generated=rows[1:].tolist(),
        generated_similarity=similarities[1:].tolist(),
        rank=rank.tolist(),
        cosine=token_cosine(generated, target.expand_as(generated)),
        mean_cosine=token_cosine(mean[None], target[None]),
    )


# ---- what is told ---------------------------------------------------------------------------------------------------


def _label(collection: Collection, row: int) -> str:
    """A caption, else the key."""
    return _plain(collection.captions[row] or collection.names[row][1])


def _plain(text: str) -> str:
    """Without what a terminal or a figure would take for more than text; captions are anybody's."""
    return "".join(character if character.isprintable() else " " for character in text)


def _membership(one: Tried, collection: Collection) -> str:
    if one.own is None:
        return "not in the run's collection"
    if collection.trained is None:
        return "in the run's collection"
    return "trained on" if one.own in collection.trained else "held out from training"


def _facts(one: Tried, collection: Collection) -> list[tuple[str, str]]:
    """Does it work? Numbers, each with what knowing nothing of the picture would give."""
    count, total = len(one.true), len(collection.names)
    shared, rank = (" and ".join(map(str, numbers)) for numbers in (one.shared, one.rank))
    first = "the picture itself" if one.own is not None else "the first true neighbour"
    return [
        (f"{shared} of {count} neighbours shared", f"by chance {count * count / total:.2g}"),
        (f"{first} ranks {rank}", f"of {total}, by chance {(total + 1) // 2}"),
        (f"token cosine {one.cosine:.3f}", f"of the collection's mean token {one.mean_cosine:.3f}"),
    ]


def describe(one: Tried, collection: Collection) -> list[str]:
    """The lines about one picture on stdout."""

    def listed(rows: list[int], similarities: list[float]) -> str:
        parts = [f"{s:.2f} {_label(collection, row)[:40]}" for row, s in zip(rows, similarities, strict=True)]
        return " | ".join(parts)

    lines = [f"{one.path}: {_membership(one, collection)}"]
    lines.append(f"  true neighbours       {listed(one.true, one.true_similarity)}")
    for rows, similarities in zip(one.generated, one.generated_similarity, strict=True):
        lines.append(f"  generated neighbours  {listed(rows, similarities)}")
    return lines + [f"  {fact} ({beside})" for fact, beside in _facts(one, collection)]


def block(one: Tried, picture: Image, collection: Collection, found: dict[Name, Image]) -> Block:
    """The picture's part of the sheet."""

    def cells(rows: list[int], similarities: list[float], hits: set[int]) -> list[Cell]:
        row_of_cells = []
        for row, similarity in zip(rows, similarities, strict=True):
            name, label = collection.names[row], _label(collection, row)
            text = f"itself: {label}" if row == one.own else label
            row_of_cells.append(Cell(found.get(name), _plain(name[1]), text, similarity, row in hits))
        return row_of_cells

    lines = [(one.path.name, _membership(one, collection)), *_facts(one, collection)]
    made = Block(picture, lines, [("nearest to its true features", cells(one.true, one.true_similarity, set()))])
    for number, (rows, similarities) in enumerate(zip(one.generated, one.generated_similarity, strict=True), 1):
        which = "" if len(one.generated) == 1 else f", sample {number} of {len(one.generated)}"
        made.rows.append((f"nearest to what was generated{which}", cells(rows, similarities, set(one.true))))
    return made
