"""A fused network under what moves its weights: accelerate's and diffusers' offloading, device maps, layerwise casting.

All of it on the CPU, where a weight that is offloaded is a meta tensor or lies in a file: one that is read without
being brought back gives an error or rubbish. Put on first, each is refused by name, and fusing works once it is undone.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, dispatch_model, infer_auto_device_map
from accelerate.hooks import CpuOffload, remove_hook_from_submodules
from diffusers.hooks import apply_layerwise_casting
from torch import nn

from blip3o_fast import fuse, unfuse
from blip3o_fast.models.fuse import FusedNetwork, obstacles

CPU = torch.device("cpu")
PARTS = ("patch_embedder", "time_caption_embed", "pad_token", "layers.0", "layers.1", "norm_out")


def sequential(model: Any, folder: Path) -> None:
    """What `enable_sequential_cpu_offload` does to each model of a pipeline."""
    cpu_offload(model, execution_device="cpu", offload_buffers=True)
    assert all(p.is_meta for p in model.parameters())


def whole(model: Any, folder: Path) -> None:
    """What `enable_model_cpu_offload` does."""
    _, hook = cpu_offload_with_hook(model, "cpu")
    assert isinstance(hook.hook, CpuOffload)


def device_map(model: Any, folder: Path) -> None:
    places = {**dict.fromkeys(PARTS, "cpu"), "layers.1": "disk", "norm_out": "disk"}
    dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))
    assert all(p.is_meta for p in model.layers[1].parameters())


def one_device(model: Any, folder: Path) -> None:
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def groups(level: str, blocks: int | None) -> Callable[[Any, Path], None]:
    def apply(model: Any, folder: Path) -> None:
        sizes = {"offload_type": level, "num_blocks_per_group": blocks, "offload_to_disk_path": str(folder)}
        model.enable_group_offload(onload_device=CPU, offload_device=CPU, **sizes)

    return apply


def layerwise(model: Any, folder: Path) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.layers[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn


def layerwise_everywhere(model: Any, folder: Path) -> None:
    apply_layerwise_casting(model, torch.bfloat16, torch.float32, skip_modules_pattern=("nothing",))
    assert model.layers[0].norm1.linear.weight.dtype == torch.bfloat16


def layerwise_whole(model: Any, folder: Path) -> None:
    apply_layerwise_casting(model, torch.bfloat16, torch.float32, None, None)


# What is put on; whether the blocks are then called by themselves; the name by which it is refused where it came first
# (None: it is not around the network as a whole, and fusing works).
MOVERS: dict[str, tuple[Callable[[Any, Path], None], bool, str | None]] = {
    "sequential-cpu-offload": (sequential, True, "accelerate's SequentialHook"),
    "model-cpu-offload": (whole, False, "accelerate's CpuOffload"),
    "device-map": (device_map, True, "accelerate's AlignDevicesHook"),
    "device-map-of-one": (one_device, True, "accelerate's AlignDevicesHook"),
    "group-offload-blocks": (groups("block_level", 1), True, "diffusers' .*group_offloading"),
    "group-offload-leaves": (groups("leaf_level", None), True, "diffusers' .*group_offloading"),
    "layerwise-casting": (layerwise, False, None),
    "layerwise-casting-everywhere": (layerwise_everywhere, False, None),
    "layerwise-casting-whole": (layerwise_whole, False, "diffusers' layerwise_casting"),
}


@pytest.mark.parametrize("name", MOVERS)
def test_put_on_a_fused_network(name: str, build_lumina: Any, lumina_call: Any, tmp_path: Path) -> None:
    apply, by_themselves, _ = MOVERS[name]
    stock = build_lumina().eval()
    call, fast = lumina_call(stock), fuse(copy.deepcopy(stock))
    with torch.no_grad():
        plain = stock(*call).sample
        for model, folder in ((stock, tmp_path / "stock"), (fast, tmp_path / "fast")):
            folder.mkdir()
            apply(model, folder)
        first, expected = fast(*call).sample, stock(*call).sample
        again = fast(*call).sample
    assert (first - expected).abs().max() <= 1e-5 and torch.equal(again, first)
    assert ((expected - plain).abs().max() > 1e-5) == name.startswith("layerwise")
    assert len(obstacles(fast)) == (2 if by_themselves else 0)


@pytest.mark.parametrize("name", MOVERS)
def test_put_on_before_fusing(name: str, build_lumina: Any, lumina_call: Any, tmp_path: Path) -> None:
    apply, _, refused = MOVERS[name]
    stock = build_lumina().eval()
    call = lumina_call(stock)
    apply(stock, tmp_path)
    with torch.no_grad():
        expected = stock(*call).sample
        if refused is None:
            assert (fuse(stock)(*call).sample - expected).abs().max() <= 1e-5
            return
        with pytest.raises(ValueError, match=rf"^LuminaNextDiT2DModel has a forward of its own \({refused}.*remove it"):
            fuse(stock)
        assert not isinstance(stock, FusedNetwork)
        assert torch.equal(stock(*call).sample, expected)


@pytest.mark.parametrize("name", ["sequential-cpu-offload", "model-cpu-offload", "device-map-of-one"])
def test_fusing_once_the_hooks_are_gone(name: str, build_lumina: Any, lumina_call: Any, tmp_path: Path) -> None:
    """accelerate leaves the bound forward on the module: nobody's, so it neither stops `fuse` nor hides what it did."""
    model = build_lumina().eval()
    call = lumina_call(model)
    with torch.no_grad():
        expected = model(*call).sample
        MOVERS[name][0](model, tmp_path)
        remove_hook_from_submodules(model)
        assert "forward" in model.__dict__
        fuse(model)
        assert "forward" not in model.__dict__
        out = model(*call).sample
        assert (out - expected).abs().max() <= 1e-5
        MOVERS[name][0](model, tmp_path)
        model(*call)
        with pytest.raises(ValueError, match="hooked after it was fused"):
            unfuse(model)
        remove_hook_from_submodules(model)
        assert torch.equal(unfuse(model)(*call).sample, expected)


def test_device_maps_by_name(build_lumina: Any, lumina_call: Any, tmp_path: Path) -> None:
    """Stock's class refuses "auto" by name; a map is made by accelerate, with the blocks left whole."""
    model = fuse(build_lumina()).eval()
    call = lumina_call(model)
    model.save_pretrained(tmp_path)
    for cls in (type(model), type(model)._stock_class):
        with pytest.raises(ValueError, match=r"does not support `device_map='auto'`.*_no_split_modules"):
            cls.from_pretrained(tmp_path, device_map="auto")
    with torch.no_grad():
        expected = model(*call).sample
        loaded = type(model)._stock_class.from_pretrained(tmp_path, device_map={"": "cpu"})
        assert (fuse(loaded)(*call).sample - expected).abs().max() <= 1e-5
    total = sum(p.nbytes for p in model.parameters())
    places = infer_auto_device_map(model, {"cpu": int(0.8 * total)}, no_split_module_classes=["LuminaNextDiTBlock"])
    assert "disk" in places.values() and not any(name.startswith("layers.0.") for name in places)
    dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path / "disk"))
    with torch.no_grad():
        assert (model(*call).sample - expected).abs().max() <= 1e-5


def test_lora_under_layerwise_casting(build_lumina: Any, lumina_call: Any, tmp_path: Path) -> None:
    """Two of them together: the adapters stay in fp32, what they adapt is stored in eight bits."""
    from peft import LoraConfig, inject_adapter_in_model

    stock = build_lumina()
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q", "linear_1"], init_lora_weights=False), stock)
    fast, call = copy.deepcopy(stock), lumina_call(stock)
    for model in (stock, fast):
        layerwise_of: Any = model.layers[0].attn1.to_q
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert isinstance(layerwise_of.lora_A["default"], nn.Linear)
    with torch.no_grad():
        assert (fuse(fast)(*call).sample - stock(*call).sample).abs().max() <= 1e-5
    assert obstacles(fast) == {}
