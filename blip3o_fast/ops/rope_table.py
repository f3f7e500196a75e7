"""The rotation angles of Lumina's two-dimensional rotary position embedding, as the table that `qk_norm_rope` reads.

A head of d channels is d/2 pairs of neighbouring channels. With d/4 frequencies

    omega_k = (theta * ntk_factor)^(-4k / d) / linear_factor        k = 0 .. d/4 - 1

pair 2k turns by row * omega_k and pair 2k + 1 by column * omega_k: rows and columns alternate pair by pair.

Source: `get_2d_rotary_pos_embed_lumina` of diffusers; rotary embeddings are Su et al. 2021,
https://arxiv.org/abs/2104.09864; the two factors are the linear and the NTK-aware context extension.
"""

import torch
from torch import Tensor


def rope_table(
    height: int,
    width: int,
    head_dim: int,
    *,
    theta: float = 10000.0,
    linear_factor: float = 1.0,
    ntk_factor: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """cos and sin of every angle of a height x width grid of tokens in row-major order.

    Returns fp32 [T, d/2, 2] with T = height * width; [..., 0] is the cosine, [..., 1] the sine.
    Bitwise equal to the top left corner of the complex table that diffusers makes, since each angle depends on its own
    row and column alone. Raises ValueError for a size below 1, a head_dim that 4 does not divide, a factor <= 0.
    """
    for name, size in (("height", height), ("width", width)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1 token, got {size}")
    if head_dim < 4 or head_dim % 4 != 0:
        raise ValueError(
            f"head_dim must be a positive multiple of 4 (half the pairs turn by row, half by column), got {head_dim}"
        )
    for name, factor in (("theta", theta), ("linear_factor", linear_factor), ("ntk_factor", ntk_factor)):
        if not factor > 0:
            raise ValueError(f"{name} must be > 0, got {factor}")
    half = head_dim // 2
    # fp32 in exactly this order: the angles of far tokens differ visibly between roundings of omega
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
    omega = 1.0 / ((theta * ntk_factor) ** exponents) / linear_factor
    rows = torch.outer(torch.arange(height, device=device), omega)[:, None].expand(height, width, -1)
    columns = torch.outer(torch.arange(width, device=device), omega)[None].expand(height, width, -1)
    angles = torch.stack((rows, columns), dim=-1).reshape(height * width, half)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))
