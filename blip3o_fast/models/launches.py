"""Which Triton kernels a model launches, recorded on a machine without a GPU: for reports, tests and `warmup`.

The model runs on fake tensors, which have shapes, strides and dtypes and no data. Every launch that it would make is
recorded with its arguments; nothing is computed. They are fake CPU tensors, because a CPU build of PyTorch cannot
differentiate others; so autocast is the CPU's, which treats every layer of this network as the GPU's does.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from blip3o_fast import ops
from blip3o_fast.kernels._launch import Call, Launch, assumed_capability, recording_calls
from blip3o_fast.models.config import BLIP3oConfig
from blip3o_fast.models.nextdit import BLIP3oDiT

# How a model may run: the dtype of its weights, and that of autocast or None. "autocast" is the HuggingFace Trainer's
# bf16 training.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "float32": (torch.float32, None),
    "autocast": (torch.float32, torch.bfloat16),
}


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def _tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def fake_model(config: BLIP3oConfig, dtype: torch.dtype) -> BLIP3oDiT:
    """A model of fake tensors, made inside a FakeTensorMode; weights that lie side by side still do."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = BLIP3oDiT(config).to(dtype)
    storages: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            storage = parameter.untyped_storage()
            if storage._cdata not in storages:
                storages[storage._cdata] = _tensor(storage.nbytes() // parameter.element_size(), dtype=dtype)
            view = storages[storage._cdata].as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())
            module._parameters[name] = nn.Parameter(view, parameter.requires_grad)
    return model


def _train(
    model: BLIP3oDiT, batch: int, context: int, masked: bool, autocast: torch.dtype | None, dtype: torch.dtype
) -> None:
    config = model.config
    # As the trainer has them: features in fp32, the condition in the weights' dtype.
    data = _tensor(batch, config.sample_size**2, config.in_channels, dtype=torch.float32)
    condition = _tensor(batch, context, config.cross_attention_dim, dtype=dtype)
    mask = _tensor(batch, context, dtype=torch.bool) if masked else None
    sigma, seed = _tensor(batch, dtype=torch.float32), _tensor(2, dtype=torch.int64)
    x_t = ops.flow_interpolate(data, sigma, seed=seed)
    with _autocast(autocast):
        prediction = model(x_t if autocast else x_t.to(dtype), 1000 * sigma, condition, mask)
    loss, _ = ops.flow_matching_loss(prediction[..., : config.in_channels], data, sigma, seed=seed)
    loss.backward()


def _sample(
    model: BLIP3oDiT, batch: int, context: int, masked: bool, autocast: torch.dtype | None, dtype: torch.dtype
) -> None:
    config = model.config
    x = _tensor(batch, config.sample_size**2, config.in_channels, dtype=torch.float32)
    condition = _tensor(2 * batch, context, config.cross_attention_dim, dtype=dtype)
    mask = _tensor(2 * batch, context, dtype=torch.bool) if masked else None
    number = _tensor(dtype=torch.float32)
    with torch.no_grad(), _autocast(autocast):
        prepared = model.prepare_condition(condition, mask)
        both = torch.cat([x, x])
        v = model(both if autocast else both.to(dtype), number.expand(2 * batch), prepared)[..., : config.in_channels]
        ops.ode_step(x, v[batch:], v[:batch], number, number)
        ops.ode_step(x, v[batch:], None, None, number)


def model_calls(
    config: BLIP3oConfig,
    *,
    batch: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    autocast: torch.dtype | None = None,
    uses: Sequence[str] = ("train", "sample"),
    masked: bool = False,
    capability: int = 90,
    context_tokens: int = 0,
) -> list[Call]:
    """Every call of an op, with its launches: a training step (forward, loss, backward) and a guided sampling step.

    config: of the model; two of its layers are run, since all have the same kernels. dtype: of the weights; autocast: a
    dtype under which the model is called, or None. masked: with a context mask. capability: 90 is sm_90.
    context_tokens: L, or 0 for as many as there are tokens.
    """
    config = BLIP3oConfig.from_dict(config.to_dict() | {"num_layers": min(2, config.num_layers)})
    runs = {"train": _train, "sample": _sample}
    # a rotary table that was made before is a real tensor
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, recording_calls() as calls, assumed_capability(capability), ops.use_backend("triton"):
        model = fake_model(config, dtype)
        for use in uses:
            model.train(use == "train")
            runs[use](model, batch, context_tokens or config.num_tokens, masked, autocast, dtype)
    return calls


def distinct(calls: Sequence[Call], capability: int) -> dict[str, Launch]:
    """One launch per compiled kernel, by Triton's specialisation key."""
    from blip3o_fast.kernels._compile import specialisation

    found: dict[str, Launch] = {}
    for launch in (launch for call in calls for launch in call.launches):
        found.setdefault(specialisation(launch, capability), launch)
    return found


def compile_all(launches: Iterable[Launch], capability: int) -> None:
    """Compile launches for sm_<capability> into Triton's cache, and load them where there is such a GPU."""
    from blip3o_fast.kernels._compile import compile_launch

    for launch in launches:
        compiled = compile_launch(launch, capability)
        if torch.cuda.is_available() and torch.cuda.get_device_capability() == divmod(capability, 10):
            compiled._init_handles()  # builds Triton's launcher too, which needs a driver
