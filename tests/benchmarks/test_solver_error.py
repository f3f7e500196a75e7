"""The evaluations-versus-error study on a small network: its table, its picture, and what it refuses."""

import re

import pytest
import torch

from benchmarks import solver_error
from blip3o_fast.data.shards import EncoderInfo, Meta, ShardWriter
from blip3o_fast.models import BLIP3oConfig, BLIP3oDiT


def test_a_table_and_a_picture(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    condition, target = (torch.randn(10, 4, width, generator=generator) for width in (10, 4))
    names = [str(i) for i in range(10)]
    meta = Meta(EncoderInfo("c", 10), EncoderInfo("t", 4), tokens=4)
    ShardWriter(tmp_path / "embeddings", meta).write(0, condition, target, names, names, "made up")
    config = BLIP3oConfig.preset(
        "tiny", in_channels=4, cross_attention_dim=10, sample_size=2, hidden_size=16, num_layers=1
    )
    model = BLIP3oDiT(config, generator=generator)
    with torch.no_grad():
        model.norm_out.linear_2.weight.normal_(generator=generator)  # untrained it answers zero
    model.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--embeddings_path", str(tmp_path / "embeddings")]
    picture = tmp_path / "new" / "errors.png"
    more = ["--eval_split", "0.3", "--reference_steps", "200", "--evaluations", "16", "4", "--plot", str(picture)]
    assert solver_error.main([*arguments, *more]) == 0
    said = capsys.readouterr().out
    assert "3 held-out conditions, guidance 2, against 200 Euler steps, whose own error is about" in said
    assert "| solver | grid | 4 | 16 |\n|---|---|---|---|\n" in said
    rows = re.findall(r"^\| (\w+) \| (linear|cosine|shifted by \S+) \| (\S+) \| (\S+) \|$", said, re.MULTILINE)
    assert len(rows) == 16 and said.count("**") >= 4
    for solver, grid, few, many in rows:
        assert 0 < float(many.strip("*")) < float(few.strip("*")), (solver, grid)
    assert picture.read_bytes().startswith(b"\x89PNG")
    for wrong in (["--evaluations", "3"], ["--num_samples", "0"]):
        with pytest.raises(SystemExit):
            solver_error.main([*arguments, *wrong])
