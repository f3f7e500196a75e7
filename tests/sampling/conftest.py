"""A set of embeddings in several shards and a network for them, as files."""

from pathlib import Path

import pytest
import torch

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
