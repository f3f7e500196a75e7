"""A set of embeddings and a network as files, and what stands in for a CUDA graph where there is no GPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blip3o_fast.sampling.graphs import Graphs

E, C, TOKENS, PICTURES, SHARDS = 10, 6, 16, 60, 5


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """embeddings/ (60 pictures in 5 shards) and model/ (nothing in it is zero; normalised by pca:4)."""
    from benchmarks.model_block import as_trained
    from blip3o_fast import BLIP3oConfig, BLIP3oDiT
    from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter
    from blip3o_fast.models.normalizer import FeatureNormalizers

    folder = tmp_path_factory.mktemp("served")
    generator = torch.Generator().manual_seed(0)
    condition = 1 + torch.randn(PICTURES, TOKENS, E, generator=generator)
    target = condition @ torch.randn(E, C, generator=generator)
    writer = ShardWriter(folder / "embeddings", Meta(EncoderInfo("c", E), EncoderInfo("t", C), tokens=TOKENS))
    for number, rows in enumerate(torch.arange(PICTURES).chunk(SHARDS)):
        names = [f"picture {i}" for i in rows.tolist()]
        writer.write(number, condition[rows], target[rows], names, names, "made up")
    config = BLIP3oConfig.preset(
        "tiny", in_channels=4, cross_attention_dim=E, sample_size=4, hidden_size=16, num_layers=2
    )
    model = BLIP3oDiT(config).eval()
    as_trained(model, torch.Generator().manual_seed(1))
    model.normalizer = FeatureNormalizers.fit(condition, target, "pca:4")
    model.save_pretrained(folder / "model")
    return folder


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recorder(TorchDispatchMode):
    """Every operation with its arguments and results. What waits for the device or copies between devices is refused,
    as a capture refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::equal"):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.name()}")
        result = func(*args, **kwargs)
        devices = {t.device for t in tensors((args, kwargs, result)) if t.dim() > 0 or t.device.type != "cpu"}
        moved = {t.device.type for t in tensors((args, kwargs))} | {t.device.type for t in tensors(result)}
        if len(devices) > 1 or (len(moved) > 1 and ("copy" in func.name() or func.name() == "aten::_to_copy")):
            raise RuntimeError(f"a copy between devices is not permitted: {func.name()}")
        self.calls.append((func, args, kwargs, tensors(result)))
        return result


class Tape:
    """A `Capture` for the CPU with what makes a CUDA graph treacherous.

    No Python of the step runs in a replay: the operations alone are repeated on the very memory of the recording, so a
    number that was read on the host is frozen and a weight that has moved is not seen. Before a replay what it writes
    is NaN, and after it everything in between is: another graph may use the pool.
    """

    def __init__(self) -> None:
        self.fails: Exception | None = None
        self.warm_ups = self.replays = 0

    def refusal(self, device: torch.device) -> str | None:
        return None

    def __call__(self, step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        step()
        self.warm_ups += 1
        if self.fails is not None:
            raise self.fails
        with Recorder() as recorder:
            step()
        calls = recorder.calls
        made: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        inside: dict[int, Tensor] = {}
        written: dict[int, Tensor] = {}
        for func, args, kwargs, results in calls:
            given = {storage(t) for t in tensors((args, kwargs))}
            fresh = [r for r in results if storage(r) not in given]
            inside |= {storage(r): r for r in fresh}
            if "copy_" in func.name():
                targets = tensors(args[0])
                written |= {storage(t): t for t in targets if storage(t) not in inside}
            made.append((func, args, kwargs, results if fresh else []))

        def poison(some: dict[int, Tensor]) -> None:
            for tensor in some.values():
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))

        def replay() -> None:
            self.replays += 1
            poison(written)
            poison(inside)
            with torch.no_grad():
                for func, args, kwargs, results in made:
                    again = tensors(func(*args, **kwargs))
                    for old, new in zip(results, again, strict=False):
                        old.copy_(new)
            poison(inside)

        return replay


@pytest.fixture
def tape() -> Iterator[Callable[..., Tape]]:
    """`tape(sampler)` gives a sampler graphs on the CPU, by a tape that it returns. Operations are the reference's,
    since the C++ kernels for packed weights are not seen by a tape."""
    from blip3o_fast.ops import use_backend

    def give(sampler: Any, max_graphs: int = 8) -> Tape:
        made = Tape()
        sampler.graphs = Graphs(sampler._network, max_graphs, made)
        return made

    with use_backend("reference"):
        yield give


@pytest.fixture
def recorder() -> type[Recorder]:
    return Recorder
