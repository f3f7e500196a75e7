"""Training on a folder that memory does not hold: stored rows to the device, everything else there.

`SideView` stands where otherwise a tensor of all conditions or targets stands. The loader takes its ``stored`` rows
(bf16 stays bf16, int8 keeps its scales) and `to_network` widens and normalises them on the device, inside the step.
What looks at a few pictures only (validation, yardstick) indexes it like a tensor and gets them normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blip3o_fast import env
from blip3o_fast.data.block_shuffle import BlockOrder
from blip3o_fast.data.block_stream import check_enough
from blip3o_fast.data.mapped import MappedShards
from blip3o_fast.data.shards import iter_index
from blip3o_fast.data.splits import default_rule, is_large, split_rows
from blip3o_fast.data.statistics import read_side, stored_or_fitted
from blip3o_fast.data.stored import TENSORS, scale_name
from blip3o_fast.models.normalizer import FeatureNormalizers, Normalizer
from blip3o_fast.training.stream import BatchStream, SampleOrder

if TYPE_CHECKING:
    from blip3o_fast.training.arguments import TrainSettings

_MEAN_PICTURES = 4096  # the raw targets' mean, a centre for retrieval, is taken over so many


class SideView:
    """Conditions or targets of some rows of a folder. ``view[rows]`` is normalised float32 ``[n, T, channels]``.

    shape, dtype: of what indexing gives. ``identity`` as normaliser gives the raw features.
    """

    dtype = torch.float32

    def __init__(self, shards: MappedShards, side: str, rows: Tensor, normalizer: Normalizer | None = None) -> None:
        self.shards, self.side, self.rows, self.normalizer = shards, side, rows, normalizer
        width = shards.widths[side] if normalizer is None else normalizer.out_features
        self.shape = torch.Size((len(rows), shards.meta.tokens, width))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, pictures: Tensor | slice) -> Tensor:
        rows = self.rows[pictures].long()
        if not len(rows):
            return torch.empty(0, *self.shape[1:])
        raw = read_side(self.shards.gather(rows), self.side).float()
        return raw if self.normalizer is None else self.normalizer(raw)


class ShardBatches(BatchStream):
    """Item k is the micro-batch k of one rank in the stored dtype; the reading of the next ones is asked for."""

    def __init__(self, *arguments: Any, ahead: int, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.ahead = ahead

    def _rows(self, micro_batch: int) -> Tensor:
        start = (micro_batch * self.world_size + self.rank) * self.batch_size
        view: Any = self.conditions
        return view.rows[self.order.pictures(start, self.batch_size)].long()

    def __getitem__(self, micro_batch: int) -> dict[str, Any]:
        shards: MappedShards = self.conditions.shards  # type: ignore[attr-defined]
        # Asked for in this order: the window's permutation is kept for one window only.
        shards.prefetch(self._rows(micro_batch + self.ahead))
        before = shards.replaced
        part = shards.gather(self._rows(micro_batch))
        batch: dict[str, Any] = {"encoder_hidden_states": part[TENSORS["condition"]], "target": part[TENSORS["target"]]}
        for key, side in (("condition_scale", "condition"), ("target_scale", "target")):
            if (scale := part.get(scale_name(TENSORS[side]))) is not None:
                batch[key] = scale
        batch["sample_index"] = (micro_batch * self.world_size + self.rank) * self.batch_size
        batch["replaced"] = shards.replaced - before
        return batch


def order_for(conditions: Tensor | SideView, seed: int) -> Any:
    """A full shuffle of what lies in memory, the block shuffle of what lies on a disk."""
    return (BlockOrder if isinstance(conditions, SideView) else SampleOrder)(len(conditions), seed)


def batches(
    conditions: Any, targets: Any, order: Any, batch_size: int, *, rank: int, world_size: int, workers: int
) -> BatchStream:
    """The micro-batches of one rank; ValueError where there is too little data for so many ranks."""
    if not isinstance(conditions, SideView):
        return BatchStream(conditions, targets, order, batch_size, rank=rank, world_size=world_size)
    check_enough(conditions.shards, order, batch_size, world_size)
    return ShardBatches(
        conditions, targets, order, batch_size, rank=rank, world_size=world_size, ahead=max(1, 2 * workers)
    )


def to_network(inputs: dict[str, Any], conditions: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """(target, condition) of a batch as the network sees them: widened and normalised where the batch lies."""
    condition, target = inputs["encoder_hidden_states"], inputs["target"]
    if isinstance(conditions, SideView):
        condition = _ready(condition, inputs.get("condition_scale"), conditions)
        target = _ready(target, inputs.get("target_scale"), targets)
    return target, condition


def _ready(stored: Tensor, scale: Tensor | None, view: SideView) -> Tensor:
    from blip3o_fast.data.stored import to_float

    wide = to_float(stored, scale).float()
    if view.normalizer is None:
        return wide
    if any(value.device != wide.device for value in view.normalizer.statistics.values()):
        view.normalizer = view.normalizer.to(wide.device)  # once
    return view.normalizer(wide)


def is_streamed(settings: TrainSettings) -> bool:
    """Whether the settings and the folder mean streaming: asked for, or too large to be taken into memory."""
    folder = Path(settings.embeddings_path)
    if not folder.is_dir():
        if settings.loading == "stream":
            raise ValueError(f"--loading stream: {folder} is not a folder of shards; convert it, or use memory")
        return False
    if settings.loading != "auto":
        return settings.loading == "stream"
    return is_large(folder)


def tell_other_rule(settings: TrainSettings) -> None:
    """Say so where --split is not what the set says: sample and evaluate would hold out other pictures."""
    if (theirs := default_rule(settings.embeddings_path)) == settings.split_rule():
        return
    text = f"note: --split {settings.split}, but the set's own rule is {theirs}, by which sample and evaluate split"
    if Path(settings.embeddings_path).is_dir():
        text += f'; {settings.embeddings_path}/split.json with {{"rule": "{settings.split}"}} changes it for all'
    print(text)


def rows_of(shards: MappedShards, rule: str, eval_split: float) -> tuple[Tensor, Tensor]:
    """Rows of the train and of the eval split, ascending (neighbours on the disk stay neighbours), as int32."""
    keys = (row.key for row in iter_index(shards.folder))
    train, held_out = split_rows(keys, shards.count, eval_split, rule)
    return train.sort().values.int(), held_out.sort().values.int()


def load(settings: TrainSettings, normalizer: FeatureNormalizers | None) -> dict[str, Any]:
    """The fields of `prepare.Data` that differ: views instead of tensors, and what was estimated from them."""
    shards = MappedShards(settings.embeddings_path, on_bad_shard=settings.on_bad_shard)
    train, held_out = rows_of(shards, settings.split_rule(), settings.eval_split)
    if not len(train):
        raise ValueError(f"{settings.embeddings_path}: no training pictures with --eval_split {settings.eval_split}")
    if normalizer is None:
        split: dict[str, object] = {"rule": settings.split_rule(), "eval_split": settings.eval_split}
        first = (env.read("RANK") or "0") == "0"
        normalizer = stored_or_fitted(shards, train.long(), settings.normalize, split, write=first)
    raw_targets = SideView(shards, "target", train)
    kept = train[_subset(settings, len(train))]
    return {
        "conditions": SideView(shards, "condition", kept, normalizer.condition),
        "targets": SideView(shards, "target", kept, normalizer.target),
        "held_out_conditions": SideView(shards, "condition", held_out, normalizer.condition),
        "held_out_targets": SideView(shards, "target", held_out, normalizer.target),
        "raw": (SideView(shards, "condition", held_out), SideView(shards, "target", held_out)),
        "raw_train": (SideView(shards, "condition", kept), SideView(shards, "target", kept)),
        "raw_mean": _mean(raw_targets),
        "normalizer": normalizer,
    }


def name_of(key: str, caption: str) -> str:
    """A picture's name for a reader."""
    return key if caption in ("", key) else f"{caption} ({key})"


def names_of(view: SideView, pictures: Tensor) -> list[str]:
    """Names of some pictures of a view, by one pass over the index."""
    wanted = {row: place for place, row in enumerate(view.rows[pictures].tolist())}
    found = [""] * len(wanted)
    for number, row in enumerate(iter_index(view.shards.folder)):
        if (place := wanted.get(number)) is not None:
            found[place] = name_of(row.key, row.caption)
    return found


def _subset(settings: TrainSettings, count: int) -> Tensor:
    """Places (ascending) of the training rows that --subset_size keeps."""
    wanted = settings.subset_size
    if wanted is None or wanted == count or (settings.debug and wanted > count):
        return torch.arange(count)
    if wanted > count:
        raise ValueError(f"--subset_size {wanted}: {settings.embeddings_path} has only {count} training pictures")
    return torch.randperm(count, generator=torch.Generator().manual_seed(42))[:wanted].sort().values


def _mean(targets: SideView) -> Tensor:
    """float32 ``[C]``: the mean token of evenly spaced raw targets, read in chunks."""
    step = max(1, len(targets) // _MEAN_PICTURES)
    places: Sequence[Tensor] = torch.arange(0, len(targets), step).split(256)
    total = sum(targets[some].double().sum((0, 1)) for some in places)
    count = sum(len(some) for some in places) * targets.shape[1]
    return torch.as_tensor(total / count).float()
