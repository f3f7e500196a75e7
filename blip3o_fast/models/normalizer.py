"""Feature normalisation that is fitted once, stored beside the weights and undone by the sampler.

A flow model adds unit noise to its data, so the data should have about unit scale. Which scale that
is belongs to the *data*, not to the weights; it is therefore kept as a pair of small statistics
(:class:`FeatureNormalizers`) in ``normalizer.safetensors`` next to ``model.safetensors``.

Four specs, applied to features ``[..., C]``:

==============  ==========================================  =======================================
spec            normalised                                  inverse
==============  ==========================================  =======================================
``none``        ``x``                                       ``y``
``standardize`` ``(x - mean) / std``, per channel           ``y * std + mean``
``l2``          ``x / max(|x|_2, 1e-8)``, per token         ``y * mean token length``
``pca:K``       ``((x - mean) @ basis) / std``, K channels  ``(y * std) @ basis.T + mean``
==============  ==========================================  =======================================

``l2`` forgets each token's length; its inverse gives the mean length of the fitted tokens. It is
the normalisation of the original training script. Its values have RMS ``C**-0.5``, far below the
noise, so ``standardize`` trains better.

``pca:K`` keeps the K directions of largest variance and whitens them (Pearson 1901; Hotelling
1933). It exists because of the network's width: a token of C channels carries C-dimensional noise
through every block, and the network has to return that noise (the velocity contains it), so a model
narrower than C cannot represent the velocity at all. A small model needs a small C. What PCA drops
is lost in the samples: the inverse returns a point of the K-dimensional subspace, and
``explained_variance`` says how much of the variance lies there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from blip3o_fast.files import replacing
from blip3o_fast.models.normalizer_fit import fit_statistics

FILE_NAME = "normalizer.safetensors"
FORMAT_VERSION = "1"
_SMALLEST_LENGTH = 1e-8  # the clamp of the original script; only an all-zero token is below it
_PARTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "standardize": ("mean", "std"),
    "l2": ("length",),
    "pca": ("mean", "std", "basis", "explained_variance"),
}


def parse_spec(spec: str) -> tuple[str, int | None]:
    """``"pca:64"`` -> ``("pca", 64)``, ``"l2"`` -> ``("l2", None)``; else ``ValueError``."""
    if isinstance(spec, str):
        if spec in ("none", "standardize", "l2"):
            return spec, None
        kind, _, count = spec.partition(":")
        if kind == "pca" and count.isascii() and count.isdigit() and int(count) >= 1:
            return "pca", int(count)
    raise ValueError(
        f"normalize: got {spec!r}; allowed are 'none', 'standardize', 'l2' and 'pca:K' "
        "with a whole number K >= 1 (for example 'pca:64')"
    )


def condition_spec(target_spec: str) -> str:
    """What the condition gets when the target gets ``target_spec``.

    PCA is for the target alone: the condition carries no noise, and its projection into the model
    already accepts any width, so whitening it away would only lose information.
    """
    kind, _ = parse_spec(target_spec)
    return "standardize" if kind == "pca" else kind


class Normalizer:
    """One invertible (``none``, ``standardize``) or best-effort invertible (``l2``, ``pca:K``) map.

    Args:
        spec: one of the four specs above.
        in_features: C of the raw features.
        statistics: the fitted fp32 tensors of that spec (:meth:`fit` makes them): ``mean`` ``[C]``;
            ``std`` ``[C]``, or ``[K]`` for PCA; ``basis`` ``[C, K]``; ``length`` and
            ``explained_variance`` 0-d.

    ``normalizer(x)`` and ``normalizer.inverse(y)`` take ``[..., in_features]`` and
    ``[..., out_features]`` of any floating dtype on any device, compute in fp32 (fp64 for fp64) and
    return the dtype they were given. Both are differentiable in their argument.
    """

    def __init__(self, spec: str, in_features: int, statistics: Mapping[str, Tensor] | None = None) -> None:
        kind, components = parse_spec(spec)
        if not isinstance(in_features, int) or in_features < 1:
            raise ValueError(f"in_features: got {in_features!r}; it must be a whole number >= 1")
        if components is not None and components > in_features:
            raise ValueError(
                f"normalize: {spec!r} asks for {components} components of features that have only "
                f"{in_features} channels; K must be 1..{in_features}"
            )
        self.spec = spec
        self.in_features = in_features
        self.out_features = in_features if components is None else components
        self._kind = kind
        self.statistics = _checked_statistics(kind, in_features, self.out_features, statistics)

    def __repr__(self) -> str:
        shape = f"{self.in_features} -> {self.out_features}"
        return f"Normalizer({self.spec!r}, {shape})"

    @property
    def explained_variance(self) -> float:
        """Share of the fitted variance that the inverse can return: 1.0 except for ``pca:K``."""
        value = self.statistics.get("explained_variance")
        return 1.0 if value is None else float(value)

    @classmethod
    def fit(cls, features: Tensor, spec: str) -> Normalizer:
        """Fit on ``[N, T, C]`` (any leading shape works); sums run in fp64, results are fp32.

        Raises ``ValueError`` for an unknown spec, for features that are not floating, empty or not
        finite, and for a K above the number of directions in which the features vary at all.
        """
        kind, components = parse_spec(spec)
        if not torch.is_tensor(features) or not features.is_floating_point():
            found = features.dtype if torch.is_tensor(features) else type(features).__name__
            raise ValueError(f"features: got {found}; a floating point tensor [N, T, C] is needed")
        if features.dim() < 2 or features.numel() == 0:
            raise ValueError(
                f"features: got shape {tuple(features.shape)}; [N, T, C] with at least one token is needed"
            )
        channels = features.shape[-1]
        if components is not None and components > channels:
            raise ValueError(
                f"normalize: {spec!r} asks for {components} components of features that have only "
                f"{channels} channels; K must be 1..{channels}"
            )
        tokens = features.detach().reshape(-1, channels)
        statistics = fit_statistics(tokens, kind, components)
        for name, value in statistics.items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"features: their {name} is not finite; look for NaN or Inf in the features")
        return cls(spec, channels, {name: value.float() for name, value in statistics.items()})

    def __call__(self, x: Tensor) -> Tensor:
        _check_features("x", x, self.in_features)
        s, work = self._prepared(x)
        with torch.autocast(x.device.type, enabled=False):  # the product below stays fp32
            if self._kind == "standardize":
                work = (work - s["mean"]) / s["std"]
            elif self._kind == "l2":
                length = torch.linalg.vector_norm(work, dim=-1, keepdim=True)
                work = work / length.clamp_min(_SMALLEST_LENGTH)
            elif self._kind == "pca":
                work = ((work - s["mean"]) @ s["basis"]) / s["std"]
        return work.to(x.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        """Back to raw features; see the table at the top for what ``l2`` and ``pca:K`` lose."""
        _check_features("y", y, self.out_features)
        s, work = self._prepared(y)
        with torch.autocast(y.device.type, enabled=False):
            if self._kind == "standardize":
                work = work * s["std"] + s["mean"]
            elif self._kind == "l2":
                work = work * s["length"]
            elif self._kind == "pca":
                work = (work * s["std"]) @ s["basis"].T + s["mean"]
        return work.to(y.dtype)

    def to(self, device: torch.device | str) -> Normalizer:
        """The same normaliser with its statistics on ``device`` (saves a copy at every call)."""
        moved = {name: value.to(device) for name, value in self.statistics.items()}
        return Normalizer(self.spec, self.in_features, moved)

    def _prepared(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        statistics = {n: v.to(x.device, dtype) for n, v in self.statistics.items()}
        return statistics, x.to(dtype)


class FeatureNormalizers:
    """The pair that belongs to one model: raw condition -> network, network -> raw target."""

    def __init__(self, condition: Normalizer, target: Normalizer) -> None:
        self.condition = condition
        self.target = target

    def __repr__(self) -> str:
        return f"FeatureNormalizers(condition={self.condition}, target={self.target})"

    @classmethod
    def fit(cls, conditions: Tensor, targets: Tensor, spec: str) -> FeatureNormalizers:
        """Fit on ``[N, L, E]`` and ``[N, T, C]``: ``spec`` is the target's, see :func:`condition_spec`."""
        return cls(Normalizer.fit(conditions, condition_spec(spec)), Normalizer.fit(targets, spec))

    def to(self, device: torch.device | str) -> FeatureNormalizers:
        return FeatureNormalizers(self.condition.to(device), self.target.to(device))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``folder/normalizer.safetensors`` (beside, then renamed); returns its path."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        header = {"format_version": FORMAT_VERSION}
        for side, normalizer in (("condition", self.condition), ("target", self.target)):
            header[side] = json.dumps({"spec": normalizer.spec, "in_features": normalizer.in_features})
            for name, value in normalizer.statistics.items():
                tensors[f"{side}.{name}"] = value.detach().cpu().float().contiguous().clone()
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            save_file(tensors, beside, metadata=header)
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> FeatureNormalizers:
        """Read what :meth:`save` wrote; ``FileNotFoundError`` or ``ValueError`` naming the file."""
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; the model has no stored normalisation")
        try:
            with safe_open(path, framework="pt") as file:
                header = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
        if header.get("format_version") != FORMAT_VERSION:
            found = header.get("format_version")
            raise ValueError(f"{path}: format_version {found!r}; this version reads '1'")
        sides: dict[str, Normalizer] = {}
        for side in ("condition", "target"):
            try:
                described = json.loads(header[side])
                spec, in_features = described["spec"], described["in_features"]
                mine = {
                    name.removeprefix(f"{side}."): value
                    for name, value in tensors.items()
                    if name.startswith(f"{side}.")
                }
                sides[side] = Normalizer(spec, in_features, mine)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: bad {side!r} normaliser: {error}") from error
        return cls(sides["condition"], sides["target"])


def _check_features(name: str, value: Tensor, features: int) -> None:
    if not value.is_floating_point():
        raise ValueError(f"{name}: got dtype {value.dtype}; a floating point tensor is needed")
    if value.dim() < 1 or value.shape[-1] != features:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; the last dimension must be {features}")


def _checked_statistics(
    kind: str, in_features: int, out_features: int, given: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The statistics a spec needs, exactly: names, shapes, dtype, finite and positive scales."""
    shapes = {
        "mean": (in_features,),
        "std": (out_features,),
        "basis": (in_features, out_features),
        "length": (),
        "explained_variance": (),
    }
    given = {} if given is None else dict(given)
    wanted = _PARTS[kind]
    if set(given) != set(wanted):
        raise ValueError(f"statistics: got {sorted(given)}; {kind!r} needs exactly {sorted(wanted)}")
    for name in wanted:
        value = given[name]
        if value.dtype != torch.float32 or tuple(value.shape) != shapes[name]:
            raise ValueError(
                f"statistics: {name!r} is {value.dtype} {tuple(value.shape)}; float32 {shapes[name]} is needed"
            )
        if not value.is_meta:
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"statistics: {name!r} has NaN or Inf in it")
            if name == "std" and not bool((value > 0).all()):
                raise ValueError("statistics: 'std' has values <= 0; it divides the features")
    return {name: given[name].detach() for name in wanted}
