"""`EmbeddingDataset`: extracted features as (condition, target) pairs for training and evaluation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from blip3o_fast.models.normalizer import FeatureNormalizers, parse_spec

from .safe_pickle import safe_load
from .shards import META, Features, read_shards
from .splits import check_rule, default_rule, split_rows

SPLITS = ("all", "train", "eval")
_CONDITION, _TARGET = "eva_blip3o_embeddings", "clip_blip3o_embeddings"  # the original project's names


class EmbeddingDataset(Dataset[dict[str, Any]]):
    """Features of one folder of shards, or of the original project's pickle, in memory.

    Args:
        path: a folder made by ``blip3o-fast extract``, or a ``.pkl`` with ``eva_blip3o_embeddings``
            ``[N, T, E]`` (the condition) and ``clip_blip3o_embeddings`` ``[N, T, C]`` (the target), numpy or
            torch, optionally ``captions``, ``keys`` and ``config``. The pickle is read by `safe_load`, which
            runs nothing.
        split: ``"train"`` is the first ``N - int(N * eval_split)`` of a random order (`torch.randperm` with a
            generator seeded by ``seed``), ``"eval"`` the rest, ``"all"`` everything in the file's order. With
            the default seed this is the split of the original script.
        eval_split: the share held out, in [0, 1).
        normalize: ``"none"``, ``"standardize"``, ``"l2"`` or ``"pca:K"``, applied to the target; the condition
            gets ``standardize`` with ``standardize`` and ``pca:K``, and the same as the target otherwise.
            Statistics come from the whole train split, whichever split and subset is asked for, so nothing
            held out leaks into them and every split gets the same. A `FeatureNormalizers` (a trained
            model's, say) is used as it is.
        subset: keep this many of the split, chosen by a second random order of the same seed.
        seed: of both random orders.
        split_by: ``"random"`` (as above), ``"hash"`` (of each picture's key: stable when data is added), or None: what
            the set says, `splits.default_rule`; for a pickle that is ``"random"``.

    ``pca:K`` exists because a token of C channels carries C-dimensional noise through every block, and the
    network must return that noise as part of the velocity: a DiT narrower than C cannot represent it. A small
    model therefore needs targets of few channels, at the price of what the dropped directions held.

    Attributes:
        conditions, targets: float32 ``[n, T, E]`` and ``[n, T, C]`` (C is K after ``pca:K``), normalised.
        normalizer: the `FeatureNormalizers` in use; the trainer stores it with the model.
        indices: int64 ``[n]``, the rows of the file that this split and subset hold, in order.
        keys, captions: lists of str.
        config: what the file says about its features (meta.json, or the pickle's ``config``).

    Raises ``FileNotFoundError`` or ``ValueError`` naming the file or argument, what was found, what is allowed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        split: str = "all",
        eval_split: float = 0.1,
        normalize: str | FeatureNormalizers = "none",
        subset: int | None = None,
        seed: int = 42,
        split_by: str | None = None,
    ) -> None:
        check_arguments(split, eval_split, normalize, subset)
        loaded = _load(path)
        splits = _splits(path, loaded, eval_split, split_by, seed)
        self._fill(path, loaded, split, splits, eval_split, normalize, subset, seed)

    @classmethod
    def splits(
        cls,
        path: str | os.PathLike[str],
        *,
        eval_split: float = 0.1,
        normalize: str | FeatureNormalizers = "none",
        subset: int | None = None,
        seed: int = 42,
        split_by: str | None = None,
    ) -> tuple[EmbeddingDataset, EmbeddingDataset | None]:
        """The train and the eval split, reading and fitting once; eval is None where it would be empty.

        ``subset`` counts for the train split only.
        """
        check_arguments("train", eval_split, normalize, subset)
        loaded = _load(path)
        train, held_out = cls.__new__(cls), cls.__new__(cls)
        splits = _splits(path, loaded, eval_split, split_by, seed)
        train._fill(path, loaded, "train", splits, eval_split, normalize, subset, seed)
        if len(splits[1]) == 0:
            return train, None
        held_out._fill(path, loaded, "eval", splits, eval_split, train.normalizer, None, seed)
        return train, held_out

    def _fill(
        self,
        path: str | os.PathLike[str],
        loaded: _Loaded,
        split: str,
        splits: tuple[Tensor, Tensor],
        eval_split: float,
        normalize: str | FeatureNormalizers,
        subset: int | None,
        seed: int,
    ) -> None:
        train, held_out = splits
        rows = {"train": train, "eval": held_out, "all": torch.arange(len(loaded.keys))}[split]
        if len(rows) == 0:
            raise ValueError(
                f"split: {split!r} of the {len(loaded.keys)} pictures in {path} is empty with eval_split={eval_split}"
            )
        if subset is not None:
            if subset > len(rows):
                raise ValueError(f"subset: got {subset}; the {split!r} split of {path} has only {len(rows)} pictures")
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:subset]]
        if isinstance(normalize, FeatureNormalizers):
            widths = (loaded.condition.shape[-1], loaded.target.shape[-1])
            wanted = (normalize.condition.in_features, normalize.target.in_features)
            if widths != wanted:
                raise ValueError(f"normalize: made for features of {wanted} channels; {path} has {widths}")
            self.normalizer = normalize
        elif parse_spec(normalize)[0] == "none":  # nothing to estimate: no copy of the train split
            self.normalizer = FeatureNormalizers.fit(loaded.condition[:1], loaded.target[:1], "none")
        else:
            self.normalizer = FeatureNormalizers.fit(loaded.condition[train], loaded.target[train], normalize)
        self.path, self.split, self.config = Path(path), split, loaded.config
        self.indices = rows
        self.conditions = self.normalizer.condition(loaded.condition[rows])
        self.targets = self.normalizer.target(loaded.target[rows])
        self.keys = [loaded.keys[i] for i in rows.tolist()]
        self.captions = [loaded.captions[i] for i in rows.tolist()]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """``encoder_hidden_states [T, E]``, ``target [T, C]``, ``index`` (the row in the file), key, caption."""
        return {
            "encoder_hidden_states": self.conditions[position],
            "target": self.targets[position],
            "index": int(self.indices[position]),
            "key": self.keys[position],
            "caption": self.captions[position],
        }

    def __repr__(self) -> str:
        shapes = f"condition {list(self.conditions.shape)}, target {list(self.targets.shape)}"
        return f"EmbeddingDataset({str(self.path)!r}, split={self.split!r}: {shapes}, {self.normalizer.target})"


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch: features stacked ``[B, T, *]``, ``index`` int64 ``[B]``, keys and captions as lists."""
    if not items:
        raise ValueError("items: got none; a batch has at least one")
    return {
        "encoder_hidden_states": torch.stack([item["encoder_hidden_states"] for item in items]),
        "target": torch.stack([item["target"] for item in items]),
        "index": torch.tensor([item["index"] for item in items], dtype=torch.int64),
        "key": [item["key"] for item in items],
        "caption": [item["caption"] for item in items],
    }


def _splits(
    path: str | os.PathLike[str], loaded: _Loaded, eval_split: float, split_by: str | None, seed: int
) -> tuple[Tensor, Tensor]:
    rule = default_rule(path) if split_by is None else check_rule(split_by, "split_by")
    return split_rows(loaded.keys, len(loaded.keys), eval_split, rule, seed)


class _Loaded:
    """What either kind of file gives: float32 features and their names."""

    def __init__(self, condition: Tensor, target: Tensor, keys: list[str], captions: list[str], config: Any) -> None:
        self.condition, self.target, self.keys, self.captions, self.config = condition, target, keys, captions, config


def _load(path: str | os.PathLike[str]) -> _Loaded:
    found = Path(path)
    if found.is_dir():
        if not (found / META).is_file():
            names = ", ".join(sorted(p.name for p in found.iterdir())[:5]) or "nothing"
            raise FileNotFoundError(
                f"{found}: a folder without {META} (it holds {names}); allowed are a folder made by "
                "'blip3o-fast extract' or a .pkl file"
            )
        features: Features = read_shards(found)
        config = {"condition": vars(features.meta.condition), "target": vars(features.meta.target)}
        return _Loaded(features.condition, features.target, features.keys, features.captions, config)
    if not found.is_file():
        raise FileNotFoundError(
            f"{found}: no such file or folder; allowed are a folder made by 'blip3o-fast extract' or a .pkl file"
        )
    return _load_pickle(found)


def _load_pickle(path: Path) -> _Loaded:
    condition, target, keys, captions, config = _read_pickle(path)
    return _Loaded(condition, target, keys, captions, config)


def features_of_pickle(path: Path) -> tuple[Tensor, Tensor, list[str], list[str]]:
    """float32 condition [N, T, E] and target [N, T, C], keys and captions of a pickle of the original project."""
    return _read_pickle(path)[:4]


def _read_pickle(path: Path) -> tuple[Tensor, Tensor, list[str], list[str], Any]:
    data = safe_load(path)
    if not isinstance(data, dict) or _CONDITION not in data or _TARGET not in data:
        keys = sorted(map(str, data)) if isinstance(data, dict) else f"a {type(data).__name__}"
        raise ValueError(f"{path}: holds {keys}; a dict with {_CONDITION!r} and {_TARGET!r} is needed")
    condition, target = (_features(path, name, data[name]) for name in (_CONDITION, _TARGET))
    if condition.shape[0] != target.shape[0]:
        counts = f"{condition.shape[0]} conditions and {target.shape[0]} targets"
        raise ValueError(f"{path}: {counts}; they must be as many")
    count = len(condition)
    captions = _strings(path, "captions", data.get("captions"), count, "sample")
    keys = _strings(path, "keys", data.get("keys"), count, "key")
    return condition, target, keys, captions, data.get("config")


def _features(path: Path, name: str, value: Any) -> Tensor:
    import numpy

    if isinstance(value, numpy.ndarray) and value.dtype.kind in "fiu":
        # a copy: the array may be a read-only view of the file's bytes
        tensor = torch.from_numpy(numpy.array(value, dtype=numpy.float32))
    elif isinstance(value, Tensor) and not value.is_complex():
        tensor = value.float()
    else:
        kind = f"array of {value.dtype}" if isinstance(value, numpy.ndarray) else type(value).__name__
        raise ValueError(f"{path}: {name} is a {kind}; a numpy array or torch tensor of numbers is needed")
    if tensor.dim() != 3 or tensor.numel() == 0:
        raise ValueError(f"{path}: {name} has the shape {tuple(tensor.shape)}; [N, tokens, channels] is needed")
    finite = torch.isfinite(tensor).flatten(1).all(dim=1)
    if not bool(finite.all()):
        raise ValueError(f"{path}: {name} has NaN or Inf in row {int((~finite).nonzero()[0])}")
    return tensor


def _strings(path: Path, name: str, value: Any, count: int, fallback: str) -> list[str]:
    if value is None:
        return [f"{fallback}_{i}" for i in range(count)]
    listed = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(listed, (list, tuple)) or len(listed) != count:
        found = f"{len(listed)} entries" if isinstance(listed, (list, tuple)) else f"a {type(value).__name__}"
        raise ValueError(f"{path}: {name} has {found}; a list of {count} is needed")
    for item in listed:
        # not str() of anything: a few hundred bytes of nested lists that share their parts print as terabytes
        if not isinstance(item, (str, int, float, type(None))):
            raise ValueError(f"{path}: {name} holds a {type(item).__name__}; text or numbers are needed")
    return [str(item) for item in listed]


def check_arguments(split: str, eval_split: float, normalize: str | FeatureNormalizers, subset: int | None) -> None:
    """Before a large file is read."""
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}; allowed are {', '.join(map(repr, SPLITS))}")
    if isinstance(eval_split, bool) or not isinstance(eval_split, (int, float)) or not 0 <= eval_split < 1:
        raise ValueError(f"eval_split: got {eval_split!r}; a share in [0, 1) is needed")
    if not isinstance(normalize, FeatureNormalizers):
        parse_spec(normalize)
    if subset is not None and (type(subset) is not int or subset < 1):
        raise ValueError(f"subset: got {subset!r}; a whole number >= 1 or None is needed")
