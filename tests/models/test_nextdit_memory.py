"""What the backward keeps: gradient checkpointing, and the estimate of the memory."""

from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn

from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.nextdit import BLIP3oDiT

TINY = BLIP3oConfig.preset("tiny")


@pytest.fixture
def model() -> BLIP3oDiT:
    net = BLIP3oDiT(TINY)
    with torch.no_grad():
        for block in net.layers:
            block.gate.normal_()
    return net


def arguments(batch: int = 2, context: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, 64, 16, dtype=dtype),
        torch.rand(batch) * 1000,
        torch.randn(batch, context, 24, dtype=dtype),
    )


def assert_gradients_close(grads: Any, expected: Any) -> None:
    largest = max(grad.norm().item() for grad in expected)
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert (grad - expected_grad).norm().item() <= 1e-4 * expected_grad.norm().item() + 1e-6 * largest


# ---- gradient checkpointing -----------------------------------------------------------------------------------------


class _Saved:
    """Bytes of the tensors that autograd keeps, each storage once."""

    def __init__(self, net: nn.Module) -> None:
        self.known = {p.untyped_storage().data_ptr() for p in net.parameters()}
        self.sizes: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


@pytest.mark.parametrize(
    "enable, disable",
    [
        ("gradient_checkpointing_enable", "gradient_checkpointing_disable"),
        ("activation_checkpointing_enable", "activation_checkpointing_disable"),
        ("enable_gradient_checkpointing", "disable_gradient_checkpointing"),
    ],
)
def test_checkpointing_saves_memory_and_changes_nothing(enable: str, disable: str) -> None:
    net = BLIP3oDiT(BLIP3oConfig.preset("tiny", num_layers=4))
    call = arguments()
    upstream = torch.randn(2, 64, 16)

    def run() -> tuple[int, Tensor, list[Tensor]]:
        saved = _Saved(net)
        with saved.hooks:
            out = net(*call)
        return saved.total, out.detach(), list(torch.autograd.grad(out, list(net.parameters()), upstream))

    all_bytes, expected, expected_grads = run()
    getattr(net, enable)()
    assert net.is_gradient_checkpointing
    few_bytes, out, grads = run()
    assert few_bytes < all_bytes / 3
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    assert_gradients_close(grads, expected_grads)
    net.eval()
    assert run()[0] == all_bytes, "in training mode only"
    net.train()
    getattr(net, disable)()
    assert run()[0] == all_bytes


@pytest.mark.parametrize("autocast", [False, True])
def test_selective_checkpointing_repeats_no_product_and_changes_no_gradient(autocast: bool) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        """Counts the forward products and attentions that are run."""

        count = 0

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += op.name() in ("blip3o_fast::merged_linear_fwd", "blip3o_fast::dual_attention_fwd")
            return op(*args, **(kwargs or {}))

    net = BLIP3oDiT(BLIP3oConfig.preset("tiny", num_layers=4))
    with torch.no_grad():
        for block in net.layers:
            block.gate.normal_()
    call, upstream = arguments(), torch.randn(2, 64, 16)

    def run() -> tuple[int, int, list[Tensor]]:
        saved = _Saved(net)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), saved.hooks, Products() as products:
            out = net(*call)
        ahead = products.count
        with products:
            grads = torch.autograd.grad(out, list(net.parameters()), upstream.to(out.dtype))
        return saved.total, products.count - ahead, list(grads)

    _, repeated, expected = run()
    assert repeated == 0
    net.gradient_checkpointing_enable()
    block_bytes, repeated, of_blocks = run()
    assert repeated > 0
    net.gradient_checkpointing_enable({"mode": "selective"})
    selective_bytes, repeated, grads = run()
    assert repeated == 0
    assert selective_bytes == block_bytes  # the products' results are kept aside, not by autograd
    assert all(torch.equal(grad, same) for grad, same in zip(grads, of_blocks, strict=True))
    if not autocast:
        assert_gradients_close(grads, expected)


def test_selective_checkpointing_lies_between_in_peak_memory() -> None:
    from blip3o_fast.models.peak import peak_bytes

    net = BLIP3oDiT(BLIP3oConfig.preset("tiny", num_layers=4, hidden_size=128))
    call, peaks, estimates = arguments(batch=8, context=64), [], []
    for mode in (None, "selective", "block"):
        net.gradient_checkpointing_disable()
        if mode:
            net.gradient_checkpointing_enable({"mode": mode})
        peaks.append(peak_bytes(lambda: net(*call).sum().backward(), torch.device("cpu")) or 0)
        estimates.append(net.memory(8, training=True))
        net.zero_grad()
    assert peaks[0] > 1.2 * peaks[1] > 1.44 * peaks[2]
    assert estimates[0] > estimates[1] > estimates[2]


def test_checkpointing_arguments(model: BLIP3oDiT) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    assert torch.isfinite(model(*arguments())).all()
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="mode must be one of block, selective, got 'some'"):
        model.gradient_checkpointing_enable({"mode": "some"})
    with pytest.raises(ValueError, match="every_n_layers must be 1"):
        model.activation_checkpointing_enable(every_n_layers=2)
    with pytest.raises(ValueError, match="offload must be False"):
        model.activation_checkpointing_enable(offload=True)


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("projection", [False, True])
def test_memory_is_what_autograd_keeps(projection: bool, checkpointing: bool) -> None:
    config = BLIP3oConfig.preset("tiny", hidden_size=128, num_layers=6, context_projection=projection)
    net = BLIP3oDiT(config)
    saved = _Saved(net)
    with saved.hooks:
        net(*arguments(batch=4, context=64))
    if checkpointing:
        net.gradient_checkpointing_enable()
    trainable = net.num_parameters(only_trainable=True)
    activations = net.memory(4, training=True) - 4 * (net.num_parameters() + 3 * trainable)
    if checkpointing:
        assert activations < saved.total / 3
    else:
        assert 0.9 * saved.total <= activations <= 1.15 * saved.total


def test_memory_of_other_dtypes_and_batches(model: BLIP3oDiT) -> None:
    assert model.memory(0) == 4 * model.num_parameters()
    assert model.memory(8, dtype=torch.bfloat16) == model.memory(8) // 2 == model.memory(8, dtype="float16")
    assert model.memory(8, training=True) > model.memory(8) > model.memory(4)
    with pytest.raises(ValueError, match="batch must be a whole number of samples, got -1"):
        model.memory(-1)
    with pytest.raises(ValueError, match="torch_dtype must be a floating dtype or its name, got 'bf17'"):
        model.memory(1, dtype="bf17")
