"""Counter-based randomness in plain torch integer arithmetic: Philox-4x32-10 and Box-Muller.

A draw is a pure function of (seed, sample, element): it does not depend on the number of ranks, the
batch size, the launch grid or the device, and the loss can regenerate the noise of the interpolation
instead of storing it. Philox-4x32-10 is Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011); its known-answer vectors are in the tests. Every backend must give the same integers bit for
bit, and the normals to 2 ulp.

Words are uint32 values held in int64 tensors, because torch has no arithmetic on uint32.

    key     = (seed lo32, seed hi32)
    counter = (q lo32, q hi32, s lo32, s hi32)      s = global sample index, q = element // 4
    words   = philox(counter, key)                  four words, for elements 4q, 4q+1, 4q+2, 4q+3
    u       = float32(w) * 2^-32 + 2^-33            in (0, 1]
    normals = r cos(2 pi u_b), r sin(2 pi u_b),  r = sqrt(-2 ln u_a),  for (a, b) = (w0, w1), (w2, w3)

Elements are counted inside one sample, row-major. The draws that are one number per sample (sigma,
condition dropout) use counters whose second word is `PER_SAMPLE`, which no element ever reaches.
"""

import math
from collections.abc import Sequence

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

PER_SAMPLE = 0xFFFFFFFF
"""Second counter word of per-sample draws: as an element index it would mean element 2**66."""

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _high_low(multiplier: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The 64-bit product may pass 2^63, where int64 wraps. Two's complement keeps all 64 bits, so the
    # arithmetic shift followed by the mask still reads the upper word.
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD


def philox_4x32_10(counter: Sequence[torch.Tensor], key: Sequence[torch.Tensor]) -> Words:
    """Philox-4x32-10. counter: four, key: two int64 tensors with values in [0, 2^32), broadcastable.

    Returns four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for step in range(_ROUNDS):
        if step:
            k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
        high0, low0 = _high_low(_MULTIPLIERS[0], c0)
        high1, low1 = _high_low(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def split_words(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper 32 bits of int64 values, each in [0, 2^32)."""
    return value & _WORD, (value >> 32) & _WORD


def uniform(word: torch.Tensor) -> torch.Tensor:
    """float32 in (0, 1] from a 32-bit word. 0 is impossible (its logarithm is taken); 1 is not."""
    return word.to(torch.float32) * 2.0**-32 + 2.0**-33


def box_muller(words: Words) -> torch.Tensor:
    """Four standard normals from four words; float32, stacked in a new last dimension."""
    normals = []
    for word_a, word_b in (words[:2], words[2:]):
        radius = torch.sqrt(-2.0 * torch.log(uniform(word_a)))
        angle = (2.0 * math.pi) * uniform(word_b)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normals, dim=-1)


def normal_noise_at(seed: torch.Tensor | int, sample_index: torch.Tensor, sample_shape: Sequence[int]) -> torch.Tensor:
    """Standard normals `[B, *sample_shape]`, float32, for the global sample indices int64 `[B]`."""
    key, sample = split_words(_as_key(seed, sample_index)), split_words(sample_index[:, None])
    elements = math.prod(sample_shape)
    quad = torch.arange((elements + 3) // 4, device=sample_index.device)[None, :]
    normals = box_muller(philox_4x32_10((*split_words(quad), *sample), key))  # [B, quads, 4]
    batch = sample_index.shape[0]
    # Not reshape(B, -1): with B = 0 the -1 would be ambiguous.
    flat = normals.reshape(batch, normals.shape[1] * 4)[:, :elements]
    return flat.reshape(batch, *sample_shape)


def normal_noise(seed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Standard normals of `shape` = `[B, ...]`, float32, on seed's device.

    seed: int64 `[2]` = (seed, offset); row b is the sample with the global index `offset + b`.
    """
    rows = torch.arange(shape[0], device=seed.device) + seed[1]
    return normal_noise_at(seed[0], rows, shape[1:])


def seed_tensor(seed: int, offset: int, device: torch.device) -> torch.Tensor:
    """int64 `[2]` = (seed, offset) for `normal_noise` and the flow ops, made without a copy from the host."""
    pair = torch.full((2,), seed, dtype=torch.int64, device=device)
    pair[1].fill_(offset)
    return pair


def per_sample_uniform(seed: int, sample_index: torch.Tensor, purpose: int) -> torch.Tensor:
    """One float32 in (0, 1] per global sample index; `purpose` separates independent draws."""
    zero = torch.zeros_like(sample_index)
    counter = (zero + purpose, zero + PER_SAMPLE, *split_words(sample_index))
    return uniform(philox_4x32_10(counter, split_words(_as_key(seed, sample_index)))[0])


def _as_key(seed: torch.Tensor | int, like: torch.Tensor) -> torch.Tensor:
    if isinstance(seed, torch.Tensor):
        return seed
    # Not torch.tensor(seed): a copy from the host would make it wait for the device; a fill does not.
    return torch.full((), seed, dtype=torch.int64, device=like.device)
