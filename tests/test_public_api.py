"""The public names: exactly these, each importable, each documented."""

import inspect
import types

import pytest

import blip3o_fast

TOP = {
    "BLIP3oConfig",
    "BLIP3oDiT",
    "__version__",
    "compare",
    "data",
    "debug_ops",
    "evaluation",
    "flow",
    "fuse",
    "models",
    "ops",
    "sample",
    "sampling",
    "training",
    "unfuse",
    "use_backend",
}
OPS = {
    "dual_attention",
    "flash_attention",
    "flow_interpolate",
    "flow_matching_loss",
    "gated_residual",
    "gated_residual_modulate",
    "layer_norm_modulate",
    "merged_linear",
    "ode_step",
    "packed_linear",
    "qk_norm_rope",
    "rms_norm_modulate",
    "swiglu",
}


def test_the_top_level_names_are_pinned() -> None:
    assert set(blip3o_fast.__all__) == TOP
    assert set(blip3o_fast.__all__) <= set(dir(blip3o_fast))


@pytest.mark.parametrize("name", sorted(TOP))
def test_every_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(blip3o_fast, name)
    assert getattr(blip3o_fast, name) is value
    if name == "__version__":
        assert value.count(".") == 2
    else:
        assert inspect.getdoc(value)


def test_the_ops_are_pinned() -> None:
    ops = blip3o_fast.ops
    functions = {n for n in ops.__all__ if isinstance(getattr(ops, n), types.FunctionType)}
    assert functions >= {f"{name}_ref" for name in OPS}
    assert {n for n in functions if hasattr(ops, f"{n}_ref")} == OPS


@pytest.mark.parametrize("name", sorted(OPS))
def test_an_op_and_its_reference_take_the_same_arguments(name: str) -> None:
    op, ref = getattr(blip3o_fast.ops, name), getattr(blip3o_fast.ops, f"{name}_ref")
    assert inspect.signature(op).parameters.keys() == inspect.signature(ref).parameters.keys()
    assert inspect.getdoc(op)


def test_data_offers_the_dataset() -> None:
    from blip3o_fast.data import EmbeddingDataset

    names = list(inspect.signature(EmbeddingDataset).parameters)
    assert names[:2] == ["path", "split"]
    assert {"eval_split", "normalize", "subset"} <= set(names)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'blip3o_fast' has no attribute 'fues'"):
        _ = blip3o_fast.fues
    assert not hasattr(blip3o_fast, "kernel")


def test_the_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert version("blip3o_fast") == blip3o_fast.__version__
