"""The settings nest, survive errors, and are seen by graphs that were compiled under another value."""

import pytest
import torch

from blip3o_fast.ops import rms_norm_modulate, use_attention, use_backend


def test_blocks_nest_and_end():
    with use_backend("reference"):
        with use_backend("cpu"):
            assert use_backend.state.active == "cpu"
        assert use_backend.state.active == "reference"
        with pytest.raises(KeyError), use_backend("cpu"):
            raise KeyError
        assert use_backend.state.active == "reference"
    assert use_backend.state.active == "auto"
    assert use_attention.state.active == "auto", "each setting has a value of its own"


def test_a_compiled_graph_is_not_reused_under_another_value():
    x, weight = torch.randn(2, 3, 8).double(), torch.randn(8).double()  # which the CUDA kernels do not take
    torch._dynamo.reset()
    compiled = torch.compile(rms_norm_modulate, backend="aot_eager", fullgraph=True)
    with use_backend("reference"):
        expected = compiled(x, weight)
    with use_backend("cuda"), pytest.raises(Exception, match="backend 'cuda' cannot run rms_norm_modulate"):
        compiled(x, weight)
    with use_backend("reference"):
        assert torch.equal(compiled(x, weight), expected)
