"""The written model: its counts against PyTorch's counter on stock diffusers, the launch report, and the networks."""

import copy
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost_model, scaling, scaling_report
from benchmarks.harness import Settings
from blip3o_fast import ops
from blip3o_fast.demo.stock import StockBLIP3o
from blip3o_fast.kernels._launch import assumed_capability, recording
from blip3o_fast.models import BLIP3oConfig, BLIP3oDiT
from blip3o_fast.models.eager import eager_forward
from blip3o_fast.models.launches import fake_model
from blip3o_fast.models.rope import kept_rope_table
from scripts.launch_report import cost

LUMINA = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "learn_sigma": True, "context_projection": False}
CONFIGS = {
    "tiny": BLIP3oConfig.preset("tiny"),
    "one key head": BLIP3oConfig.preset("tiny", num_kv_heads=1, num_layers=1, ffn_dim_multiplier=1.5),
    "lumina": BLIP3oConfig.preset("tiny", **LUMINA, num_kv_heads=1),
    "blip3o-8b": BLIP3oConfig.preset("blip3o-8b", num_layers=2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_that_pytorch_counts_on_stock_diffusers(name):
    config = CONFIGS[name]
    batch, context = 3, 5
    with torch.device("meta"):
        stock = StockBLIP3o(config)
        x = torch.empty(batch, config.in_channels, config.sample_size, config.sample_size)
        text = torch.empty(batch, context, config.cross_attention_dim)
        mask = torch.ones(batch, context, dtype=torch.bool)
    table = stock.freqs_cis.to("meta")

    def forward():
        read = stock.caption_projection(text) if config.context_projection else text
        return stock.dit(x, torch.empty(batch, device="meta"), read, mask, table, {}, return_dict=False)[0]

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    assert counter.get_total_flops() == cost_model.model_flops(config, batch, context)
    with FlopCounterMode(display=False) as counter:
        forward().sum().backward()
    assert counter.get_total_flops() == cost_model.model_flops(config, batch, context, "both")


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_the_models(name):
    with torch.device("meta"):
        model = BLIP3oDiT(CONFIGS[name])
    assert cost_model.parameters(CONFIGS[name]) == sum(p.numel() for p in model.parameters())
    assert cost_model.block_parameters(CONFIGS[name]) == sum(p.numel() for p in model.layers[0].parameters())


@pytest.mark.parametrize(
    ("provider", "mode", "size", "batch", "context"),
    [*((*key, 8, 96) for key in cost_model.PASSES), ("ours", "both", 2, 256, 64), ("eager", "forward", 2, 256, 64)],
)
def test_bytes_and_launches_are_those_of_the_launch_report(provider, mode, size, batch, context):
    dtype = {4: torch.float32, 2: torch.bfloat16}[size]
    found = []
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with recording(), fake, assumed_capability(90), ops.use_backend("triton"):
        for layers in (1, 2):
            config = BLIP3oConfig(num_layers=layers, hidden_size=512, num_attention_heads=8, in_channels=64)
            model = fake_model(config, dtype).train(mode == "both")
            x, time = torch.empty(batch, 64, 8, 8, dtype=dtype), torch.empty(batch)
            text = torch.empty(batch, context, config.cross_attention_dim, dtype=dtype)
            kept_rope_table(8, 8, config.head_dim, x.device)

            def run(model=model, x=x, time=time, text=text):
                with torch.set_grad_enabled(mode == "both"):
                    y = eager_forward(model, x, time, text) if provider == "eager" else model(x, time, text)
                    if mode == "both":
                        y.backward(torch.empty_like(y))

            found.append(cost(run))
    counted, written = found[1] - found[0], cost_model.block_cost(config, batch, context, provider, mode, size)
    # Statistics and gates are left out of the written count. Ours may finish a sum in one launch more.
    assert written.bytes == pytest.approx(counted.bytes, rel=0.02)
    assert abs(written.launches - counted.launches) <= (provider == "ours" and mode == "both")


def test_time_is_a_roofline_with_launches():
    machine = cost_model.Machine("made up", "", flops=100, bandwidth=10, launch=0.5, network=1)
    made = cost_model.Cost(flops=1000, bytes=70, weights=20, between=50, launches=4)
    assert cost_model.seconds(made, machine) == 10 + 5 + 2
    assert cost_model.seconds(made, machine, share=0.5) == 30 + 2
    heavy = cost_model.Cost(flops=1, bytes=200, weights=200, between=0, launches=0)
    assert cost_model.seconds(heavy, machine) == 20


def test_all_reduce_and_epoch():
    assert [cost_model.all_reduce_bytes(8, n) for n in (1, 2, 4)] == [0, 8, 12]
    with pytest.raises(ValueError, match="world must be at least 1, got 0"):
        cost_model.all_reduce_bytes(8, 0)
    config = BLIP3oConfig.preset("tiny")
    with pytest.raises(ValueError, match="mfu must be above 0"):
        cost_model.training_epoch(config, 100, 1, 1, 0.0)
    one = cost_model.training_epoch(config, 1001, 10, 1, 0.5)
    assert one.steps == 101 and one.communication == 0
    expected = 101 * cost_model.model_flops(config, 10, 64, "both") / (0.5 * 989e12) / 3600
    assert one.hours == one.gpu_hours == pytest.approx(expected)
    # 64 tokens of 16 channels and 64 of 24, two bytes each, ten samples a step
    assert one.data == pytest.approx(10 * 64 * 40 * 2 * 101 / (3600 * one.hours))
    assert cost_model.most_mfu(config, 8, "eager") < cost_model.most_mfu(config, 8, "ours") < 1
    many = cost_model.training_epoch(config, 1001, 10, 8, 0.5)
    assert many.steps == 13 and 0 < many.communication < 1


SETTINGS = Settings(min_rounds=1, max_rounds=1, max_time=0.001, min_time=1e-6)
SMALL = {"batch": 1, "tokens": 4, "width": 64}


@pytest.fixture(scope="module")
def measured():
    """Two small points, one of which is taken for the reference; all-reduces as two processes would have them."""
    chosen = scaling.points({"batch": (1, 2), "depth": (1,)}, SMALL)
    data = scaling.run(SETTINGS, chosen, ())
    data["rows"] += [
        {"axis": "world", "value": 2, "payload": n << 20, "sent": n << 20, "median_s": t, "p20_s": t, "p80_s": t}
        | {"status": "ok"}
        for n, t in ((1, 0.001), (2, 0.003), (4, 0.004))
    ]
    return data


def test_every_point_is_checked_and_timed(measured):
    rows = [row for row in measured["rows"] if row["axis"] != "world"]
    # The launch, two batches: forward and both; a network of one block: forward. Two providers each.
    assert len(rows) == 2 * (2 + 4 + 1) and {row["status"] for row in rows} == {"ok"}
    assert all(row["median_s"] > 0 for row in rows)


def test_the_model_is_fitted_at_one_point_and_says_so(measured, monkeypatch):
    monkeypatch.setattr(scaling_report, "REFERENCE", scaling.Point("batch", 1, **SMALL))
    made = copy.deepcopy(measured)
    for row in made["rows"]:
        if row["axis"] != "world":
            seconds = {"launch": 0.001}.get(row["axis"], 0.004 * row["value"])
            row.update(median_s=seconds, p20_s=seconds, p80_s=seconds)
    model = scaling_report.Model(made)
    for row in made["rows"]:
        if row["axis"] == "batch":
            predicted = model.seconds(scaling_report.point_of(row), (row["provider"], row["mode"]))
            # 1 ms of launches and 3 ms that at most double with the batch
            assert predicted == pytest.approx(0.004) if row["value"] == 1 else 0.004 < predicted <= 0.007
    said = scaling_report.tables(made)
    lines = [line for line in said.splitlines() if line.startswith("| 1 |")]
    assert lines[0].count("fitted") == 2  # the fitted point, forward; its errors are in no statistics
    assert "| 2 | 2 MiB | 2 MiB | 3 ms (3 ms .. 3 ms) | 0.70 | 2 ms | -33% |" in said
    assert "60,000,000 images on H100s" in said and said.count("| blip3o-8b |") in range(4, 8)


def test_a_wrong_point_is_FAILED_and_ends_with_1(measured, tmp_path, capsys):
    broken = copy.deepcopy(measured)
    row = next(r for r in broken["rows"] if r["axis"] == "batch" and r["value"] == 2 and r["provider"] == "ours")
    row.update(status="FAILED", reason="y: off", median_s=None)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(broken))
    assert scaling.main(["--read", str(path)]) == 1
    said = capsys.readouterr().out
    assert "batch 2: FAILED: y: off" in said and "| FAILED | - | - |" in said
    path.write_text(json.dumps(measured))
    figures = tmp_path / "figures"
    assert scaling.main(["--read", str(path), "--figures", str(figures)]) == 0
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- measured -->\nold\n<!-- end of measured -->\nbelow\n")
    assert scaling.main(["--read", str(path), "--page", str(page), "--figures", str(figures)]) == 0
    written = page.read_text()
    assert written.startswith("above\n<!-- measured -->\n\n- ") and written.endswith(
        "<!-- end of measured -->\nbelow\n"
    )
    assert "old" not in written and "### By batch, forward" in written
    assert "(figures/scaling_batch.png)" in written
    with pytest.raises(ValueError, match="must have one line <!-- measured -->"):
        scaling_report.write_page(measured, path)
    assert (figures / "scaling_batch.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "wrong", [["--rounds", "0"], ["--seconds", "0"], ["--read", "nowhere.json"], ["--page", "nowhere.md"]]
)
def test_bad_flags_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        scaling.main(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_two_processes_sum(tmp_path):
    rows = scaling.all_reduces(2, 1, (4096,))
    assert [row["status"] for row in rows] == ["ok"] and rows[0]["sent"] == 4096 and rows[0]["median_s"] > 0


def test_an_interrupt_keeps_what_was_measured():
    def interrupt(data):
        raise KeyboardInterrupt

    data = scaling.run(SETTINGS, scaling.points({"batch": (1,)}, SMALL), (2,), keep=interrupt)
    assert {row["axis"] for row in data["rows"]} == {"launch"} and data["ceilings"]["copy_gbps"] > 0
