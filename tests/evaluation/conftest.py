"""A set of embeddings in several shards and a network for them, as files."""

from pathlib import Path

import pytest
import torch

E, C, TOKENS, PICTURES = 10, 6, 16, 40


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """embeddings/ (40 pictures in 3 shards) and model/ (nothing in it is zero)."""
    from benchmarks.model_block import as_trained
    from blip3o_fast import BLIP3oConfig, BLIP3oDiT
    from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter

    folder = tmp_path_factory.mktemp("trained")
    generator = torch.Generator().manual_seed(0)
    condition = 1 + torch.randn(PICTURES, TOKENS, E, generator=generator)
    target = condition @ torch.randn(E, C, generator=generator)
    writer = ShardWriter(folder / "embeddings", Meta(EncoderInfo("c", E), EncoderInfo("t", C), tokens=TOKENS))
    for number, rows in enumerate(torch.arange(PICTURES).chunk(3)):
        names = [f"picture {i}" for i in rows.tolist()]
        writer.write(number, condition[rows], target[rows], names, names, "made up")
    config = BLIP3oConfig.preset(
        "tiny", in_channels=C, cross_attention_dim=E, sample_size=4, hidden_size=16, num_layers=2
    )
    model = BLIP3oDiT(config).eval()
    as_trained(model, torch.Generator().manual_seed(1))
    model.save_pretrained(folder / "model")
    return folder
