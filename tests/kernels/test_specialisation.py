"""One compiled kernel serves every batch size: Triton's own key of each launch, for batches 1 to 256."""

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.kernels._compile import specialisation
from blip3o_fast.kernels._launch import recording

D, H, T, F, C = 1792, 28, 64, 4864, 768


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def modulation(batch: int) -> tuple[Tensor, ...]:
    return empty(batch, 4 * D).chunk(4, dim=1)


def noisy(batch: int) -> dict[str, Tensor]:
    return {
        "data": empty(batch, T, C, dtype=torch.float32, grad=False),
        "sigma": empty(batch, dtype=torch.float32, grad=False),
        "seed": empty(2, dtype=torch.int64, grad=False),
    }


def dual_attention(batch: int, masked: bool) -> Tensor:
    packed = empty(batch, T, 4 * H * 64)
    qkq, v1 = packed[..., : 3 * H * 64].unflatten(-1, (3 * H, 64)), packed[..., 3 * H * 64 :].unflatten(-1, (H, 64))
    context = empty(batch, T, 2 * H * 64)
    k2, v2 = (t.unflatten(-1, (H, 64)) for t in context.chunk(2, dim=-1))
    mask = empty(batch, T, dtype=torch.bool, grad=False) if masked else None
    return ops.dual_attention(qkq, v1, k2, v2, empty(H), mask=mask)


def qk_norm_rope(batch: int) -> Tensor:
    x = empty(batch, T, 4 * D)[..., : 3 * D]
    affine = [[empty(D) for _ in range(3)] for _ in range(2)]
    rope = empty(T, 32, 2, dtype=torch.float32, grad=False)
    return ops.qk_norm_rope(x, *affine, rope, heads=(H, H, H), head_dim=64)


def ode_step(batch: int) -> Tensor:
    v, number = empty(2 * batch, T, C), empty(dtype=torch.float32, grad=False)
    return ops.ode_step(empty(batch, T, C, dtype=torch.float32), v[batch:], v[:batch], number, number)


# As the model calls them: slices of packed projections, chunks of one modulation tensor.
CALLS: dict[str, Callable[[int], Tensor | tuple[Tensor, ...]]] = {
    "rms_norm_modulate": lambda b: ops.rms_norm_modulate(empty(b, T, D), empty(D), modulation(b)[2]),
    "rms_norm_modulate plain": lambda b: ops.rms_norm_modulate(empty(b, T, D), empty(D)),
    "gated_residual": lambda b: ops.gated_residual(empty(b, T, D), empty(b, T, D), modulation(b)[1], empty(D)),
    "gated_residual_modulate": lambda b: ops.gated_residual_modulate(
        empty(b, T, D), empty(b, T, D), modulation(b)[1], empty(D), empty(D), modulation(b)[2]
    ),
    "layer_norm_modulate": lambda b: ops.layer_norm_modulate(empty(b, T, D), empty(b, D)),
    "qk_norm_rope": qk_norm_rope,
    "dual_attention": lambda b: dual_attention(b, masked=False),
    "dual_attention masked": lambda b: dual_attention(b, masked=True),
    "flash_attention": lambda b: ops.flash_attention(empty(b, T, H, 64), empty(b, T, H, 64), empty(b, T, H, 64)),
    "flash_attention long": lambda b: ops.flash_attention(
        empty(b, 300, 4, 72), empty(b, 300, 2, 72), empty(b, 300, 2, 72)
    ),
    "swiglu": lambda b: ops.swiglu(empty(b, T, 2 * F)),
    "flow_interpolate": lambda b: ops.flow_interpolate(**noisy(b)),
    "flow_matching_loss": lambda b: ops.flow_matching_loss(empty(b, T, C), **noisy(b))[0],
    "ode_step": ode_step,
}


@pytest.mark.parametrize("name", CALLS)
def test_no_kernel_is_compiled_twice_for_another_batch(name):
    keys = defaultdict(set)
    for batch in range(1, 257):
        with recording() as launches, ops.use_backend("triton"):
            result = CALLS[name](batch)
            outputs = [y for y in (result if isinstance(result, tuple) else (result,)) if y.requires_grad]
            if outputs:
                torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
        assert launches, "nothing was launched"
        for launch in launches:
            keys[launch.name].add(specialisation(launch))
    assert {kernel: len(found) for kernel, found in keys.items()} == dict.fromkeys(keys, 1)


def test_the_key_sees_what_triton_specialises_on():
    """The test above would pass with a key that sees nothing: another width, dtype or alignment is another kernel."""

    def key(x: Tensor) -> str:
        with recording() as launches, ops.use_backend("triton"):
            ops.rms_norm_modulate(x, torch.empty(x.shape[-1], dtype=x.dtype, device="meta"))
        return specialisation(launches[0])

    keys = {
        key(torch.empty(2, 8, width, dtype=dtype, device="meta"))
        for width in (64, 66)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(keys) == 4
    assert key(torch.empty(2, 8, 65, device="meta")[..., :64]) not in keys, "a row stride that 16 does not divide"
