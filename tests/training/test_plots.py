"""The loss curve is drawn, with and without everything that may be missing."""

import pytest

from blip3o_fast.training.plots import plot_loss

ENTRIES = [{"step": s, "loss": 2 / (1 + s)} for s in range(1, 30)] + [{"step": 20, "eval_loss": 0.4}]
YARDSTICK = {
    name: {"overall": value}
    for name, value in (("zero", 2.0), ("mean", 1.8), ("linear_unconditional", 1.0), ("linear_conditional", 0.7))
}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_is_written(tmp_path, suffix):
    path = plot_loss(ENTRIES, tmp_path / f"loss{suffix}", yardstick=YARDSTICK, reference=ENTRIES)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    if suffix == ".svg":
        # matplotlib keeps each text as a comment beside its glyphs.
        assert b"best linear, no condition: 1.000" in content and b"held-out loss" in content


def test_plot_needs_only_training_losses(tmp_path):
    assert plot_loss(ENTRIES[:1], tmp_path / "one.png").is_file()
    with pytest.raises(ValueError, match="no training loss"):
        plot_loss([{"step": 1, "eval_loss": 1.0}], tmp_path / "none.png")
