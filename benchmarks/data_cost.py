"""What a data set costs: bytes on disk, bytes a second to feed GPUs, hours to extract it and to train an epoch.

A written model; nothing here is measured. Assumptions:

- a sample is 64 tokens of 1280 + 768 channels (EVA-CLIP-8B and CLIP ViT-L/14, projected); int8 has one fp32 scale per
  token and side; captions, keys and the index add about 200 bytes a sample;
- both encoders see 257 tokens of a 224 px picture, two FLOPs a weight and token: 7.53 G and 0.30 G weights (their
  published vision towers); attention's own products, a few percent, are left out;
- training is the default network (1792 wide, 24 layers), forward and backward, FLOPs as in `cost_model`;
- both run at given shares of the H100's 989 TFLOP/s in bf16; decoding pictures and reading shards are hidden.
"""

import argparse
import sys
from dataclasses import dataclass

from benchmarks.cost_model import H100, model_flops
from blip3o_fast.models.config import BLIP3oConfig

TOKENS, CONDITION, TARGET = 64, 1280, 768
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
TEXT_BYTES = 200
ENCODER_WEIGHTS = 7.53e9 + 0.30e9
PICTURE_TOKENS = 257
SAMPLES, GPUS = 60_000_000, 8


@dataclass(frozen=True)
class Costs:
    """Of a whole set. feed: bytes a second for all GPUs, in the given dtype; ratio: extraction over an epoch."""

    sample_bytes: float
    disk_bytes: float
    samples_per_second: float  # of one GPU in training
    feed: float
    extraction_hours: float
    epoch_hours: float

    @property
    def ratio(self) -> float:
        return self.extraction_hours / self.epoch_hours


def sample_bytes(dtype: str) -> int:
    """Of one sample's features."""
    return TOKENS * (CONDITION + TARGET) * BYTES[dtype] + (2 * TOKENS * 4 if dtype == "int8" else 0)


def costs(samples: int, gpus: int, dtype: str, mfu: float, encoder_mfu: float) -> Costs:
    config = BLIP3oConfig(in_channels=TARGET, cross_attention_dim=CONDITION)
    each = mfu * H100.flops / model_flops(config, 1, TOKENS, "both")
    pictures = encoder_mfu * H100.flops / (2 * ENCODER_WEIGHTS * PICTURE_TOKENS)
    size = sample_bytes(dtype)
    return Costs(
        size,
        samples * (size + TEXT_BYTES),
        each,
        gpus * each * size,
        samples / (gpus * pictures) / 3600,
        samples / (gpus * each) / 3600,
    )


def table(samples: int, gpus: int, mfu: float, encoder_mfu: float) -> list[str]:
    """Markdown: a row per dtype, then the hours."""
    lines = ["| dtype | kB a sample | TB on disk | GB/s into all GPUs | MB/s into one |", "|---|---|---|---|---|"]
    for dtype in BYTES:
        c = costs(samples, gpus, dtype, mfu, encoder_mfu)
        lines.append(
            f"| {dtype} | {c.sample_bytes / 1e3:.0f} | {c.disk_bytes / 1e12:.1f} | {c.feed / 1e9:.2f} | "
            f"{c.feed / gpus / 1e6:.0f} |"
        )
    c = costs(samples, gpus, "bf16", mfu, encoder_mfu)
    return [
        *lines,
        "",
        f"{samples:,} samples on {gpus} H100s: extraction {c.extraction_hours:.1f} hours (MFU {encoder_mfu:.0%}), a "
        f"training epoch {c.epoch_hours:.1f} hours (MFU {mfu:.0%}, {c.samples_per_second:,.0f} samples/s a GPU): "
        f"extraction costs {c.ratio:.1f} times an epoch, so it is done once and kept.",
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_cost", description=__doc__)
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"of the set ({SAMPLES})")
    parser.add_argument("--gpus", type=int, default=GPUS, help=f"H100s ({GPUS})")
    parser.add_argument("--mfu", type=float, default=0.55, help="of training (0.55)")
    parser.add_argument("--encoder_mfu", type=float, default=0.5, help="of extraction (0.5)")
    options = parser.parse_args(arguments)
    if options.samples < 1 or options.gpus < 1 or not (0 < options.mfu <= 1 and 0 < options.encoder_mfu <= 1):
        parser.error("--samples and --gpus must be at least 1, --mfu and --encoder_mfu above 0 and at most 1")
    print("\n".join(table(options.samples, options.gpus, options.mfu, options.encoder_mfu)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
