"""Samples of a trained model for a split of embeddings, and the file or folder that holds them.

``samples.safetensors`` has ``generated``, ``target`` and ``condition`` (float32 ``[n, T, *]``, raw feature space) and
``index`` (int64 ``[n]``, rows of the embeddings), a row per sample; how they were made is in its metadata. A folder
(`sampling.result_shards`) leaves out targets and conditions, which the embeddings have.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.reader import fingerprint
from blip3o_fast.evaluation.settings import OUTPUT, SampleSettings, SamplingSettings, device_named
from blip3o_fast.files import replacing
from blip3o_fast.models.nextdit import BLIP3oDiT
from blip3o_fast.models.reading import AVERAGED_WEIGHTS
from blip3o_fast.sampling import generate_from_dataset, prepare, sample
from blip3o_fast.sampling.generate import noise_of
from blip3o_fast.sampling.progress import bar
from blip3o_fast.sampling.ranks import Rank
from blip3o_fast.sampling.result_shards import read_results


@dataclass
class Samples:
    """The content of a samples file."""

    generated: Tensor
    target: Tensor
    condition: Tensor
    index: Tensor
    metadata: dict[str, str]


def load_model(path: str | Path, device: torch.device) -> BLIP3oDiT:
    """The model in eval mode; from a training checkpoint with its averaged weights."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        whole = [p for p in folder.glob("checkpoint-*") if (p / "config.json").is_file()]
        last = max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
        hint = f"; the run is not finished, its last checkpoint is {last}" if last else ""
        raise ValueError(f"--model {folder}: there is no config.json in it{hint}")
    model = BLIP3oDiT.from_pretrained(path)
    if (folder / AVERAGED_WEIGHTS).is_file():
        from safetensors.torch import load_file

        model.load_state_dict(load_file(folder / AVERAGED_WEIGHTS), strict=True)
    return model.to(device).eval()


def generate(
    model: BLIP3oDiT, dataset: EmbeddingDataset, settings: SamplingSettings, *, progress: bool = True
) -> Tensor:
    """float32 ``[n, T, C]`` on the CPU, raw features, of the pictures of a raw (un-normalised) dataset in its order."""
    device = next(model.parameters()).device
    check_width(model, dataset, settings)
    count = len(dataset) if settings.num_samples is None else min(settings.num_samples, len(dataset))
    each = getattr(settings, "num_samples_per_condition", 1)
    prepared = prepare(model, storage=settings.storage)
    arguments = settings.run()
    parts = []
    with bar(progress, total=count * each, desc="sample", unit="sample") as shown:
        step = max(1, settings.batch_size // each)
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            shape = (model.config.sample_size**2, model.config.in_channels)
            noise = noise_of(settings.seed, dataset.indices[rows], each, shape)
            generated = sample(
                prepared,
                dataset.conditions[rows].to(device),
                noise=noise.to(device),
                num_samples_per_condition=each,
                **arguments,
            )
            parts.append(generated.float().cpu())
            shown.update(len(parts[-1]))
    return torch.cat(parts)


def check_width(model: BLIP3oDiT, dataset: EmbeddingDataset, settings: SamplingSettings) -> None:
    width = model.config.cross_attention_dim if model.normalizer is None else model.normalizer.condition.in_features
    if dataset.conditions.shape[2] != width:
        raise ValueError(
            f"--embeddings_path {settings.embeddings_path}: conditions have {dataset.conditions.shape[2]} channels, "
            f"the model was trained on {width}"
        )


def run_sample(settings: SampleSettings) -> Path:
    """`sample_to_folder` where a folder is asked for, else `sample_to_file`."""
    return sample_to_file(settings) if settings.output_dir is None else sample_to_folder(settings)


def sample_to_file(settings: SampleSettings) -> Path:
    """Generate for every picture of the split and write the file; returns its path.

    Raises ValueError or FileNotFoundError naming the flag or file, what was found and what is allowed.
    """
    settings.check()
    output = Path(OUTPUT if settings.output is None else settings.output)
    world = Rank.here().world
    if world > 1:
        raise ValueError(
            f"--output {output} is one file, which {world} processes cannot share; use --output_dir FOLDER, which "
            "`evaluate --samples` takes as well"
        )
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; give the name of a file, or use --output_dir")
    settings = settings.resolved()
    dataset = EmbeddingDataset(settings.embeddings_path, split=settings.split, eval_split=settings.eval_split)
    model = load_model(settings.model, device_named(settings.device))
    samples = Samples(generate(model, dataset, settings), *_truth(dataset, settings), describe(settings))
    write_samples(output, samples)
    print(f"{len(samples.generated)} samples, {_in_words(settings)}: {output}")
    return output


def sample_to_folder(settings: SampleSettings) -> Path:
    """Generate this process's share of the split into the folder; returns its path.

    Raises ValueError or FileNotFoundError naming the flag or file, what was found and what is allowed.
    """
    settings.check()
    settings = settings.resolved()
    assert settings.output_dir is not None
    told = {name: str(getattr(settings, name)) for name in ("model", "embeddings_path", "split", "eval_split")}
    given = {f.name: getattr(settings, f.name) for f in fields(settings)} | settings.run()
    for name in ("model", "embeddings_path", "output", "output_dir", "device"):
        del given[name]
    done = generate_from_dataset(
        load_model(settings.model, device_named(settings.device)),
        settings.embeddings_path,
        settings.output_dir,
        told=told,
        **given,
    )
    rank = Rank.here()
    if rank.speaks:
        kept = f", {done.there - done.written} of them kept" if rank.world == 1 and done.there > done.written else ""
        others = "" if done.there == done.shards else "; other processes are still at work, or were stopped"
        print(f"{done.samples} samples, {_in_words(settings)}: {done.folder}")
        print(f"{done.there} of {done.shards} result shards are there{kept}{others}")
        if done.shards < rank.world:
            print(
                f"note: {done.shards} shards for {rank.world} processes; a smaller --samples_per_shard shares the work"
            )
    return done.folder


def _in_words(settings: SamplingSettings) -> str:
    run = settings.run()
    return f"guidance {run['guidance_scale']:g}, {run['num_steps']} steps"


def _truth(dataset: EmbeddingDataset, settings: SampleSettings) -> tuple[Tensor, Tensor, Tensor]:
    count, each = settings.num_samples, settings.num_samples_per_condition
    target, condition, index = (
        part[:count].repeat_interleave(each, 0) for part in (dataset.targets, dataset.conditions, dataset.indices)
    )
    return target, condition, index


def describe(settings: SampleSettings) -> dict[str, str]:
    """What a samples file says about how it was made."""
    names = ("model", "embeddings_path", "split", "eval_split", "seed", "num_samples_per_condition")
    return settings.metadata() | {name: str(getattr(settings, name)) for name in names}


def write_samples(path: Path, samples: Samples) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "generated": samples.generated.float().contiguous(),
        "target": samples.target.float().contiguous(),
        "condition": samples.condition.float().contiguous(),
        "index": samples.index.contiguous(),
    }
    with replacing(path) as beside:
        save_file(tensors, beside, metadata=samples.metadata)


def read_samples(path: str | Path, dataset: EmbeddingDataset) -> Samples:
    """Read and check a samples file or folder; of several samples of a picture the first.

    dataset: the split that they are of; a folder's rows come in its order and with its targets and conditions.
    Raises FileNotFoundError or ValueError naming the file or folder.
    """
    path = Path(path)
    samples = _read_folder(path, dataset) if path.is_dir() else _read_file(path)
    each = samples.metadata.get("num_samples_per_condition", "1")
    if each == "1":
        return samples
    if not each.isdigit() or len(samples.index) % max(1, int(each)):
        raise ValueError(f"--samples {path}: {len(samples.index)} rows are not {each!r} for each picture")
    print(f"note: the samples are {each} of each picture; the first of them is judged")
    first = slice(None, None, int(each))
    return Samples(
        samples.generated[first],
        samples.target[first],
        samples.condition[first],
        samples.index[first],
        samples.metadata,
    )


def _read_folder(path: Path, dataset: EmbeddingDataset) -> Samples:
    results = read_results(path)
    made, told = results.made, results.told
    each, index = made["num_samples_per_condition"], results.index
    count = len(index) // each
    order = index[::each].argsort()
    mine = dataset.indices[:count]
    if made.get("embeddings") != fingerprint(dataset.path) or not torch.equal(index[::each][order], mine.sort().values):
        raise ValueError(
            f"--samples {path}: made of other embeddings or another split than the eval split of {dataset.path}; "
            + ", ".join(f"{name} {told.get(name)}" for name in ("embeddings_path", "split", "eval_split"))
        )
    # The folder is in the order of the file, the split is not: row k of the split is the rank[k]-th of the folder.
    rank = torch.searchsorted(index[::each].contiguous(), mine)
    rows = (rank[:, None] * each + torch.arange(each)).flatten()
    target, condition = (part[:count].repeat_interleave(each, 0) for part in (dataset.targets, dataset.conditions))
    metadata = {name: str(value) for name, value in (told | made).items()}
    return Samples(results.generated[rows], target, condition, index[rows], metadata)


def _read_file(path: Path) -> Samples:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"--samples {path}: no such file; `blip3o-fast sample` writes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"--samples {path}: not a whole safetensors file ({error})") from error
    missing = {"generated", "target", "condition", "index"} - set(tensors)
    if missing:
        raise ValueError(f"--samples {path}: has no {', '.join(sorted(missing))}, it holds {sorted(tensors)}")
    counts = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(counts.values())) != 1 or tensors["generated"].shape != tensors["target"].shape:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"--samples {path}: the tensors do not belong together: {shapes}")
    return Samples(tensors["generated"], tensors["target"], tensors["condition"], tensors["index"], metadata)
