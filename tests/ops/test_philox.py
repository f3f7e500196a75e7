"""The counter-based noise: Random123's known answers, exact integer arithmetic, and scipy's tests of the normals.

The second half is the same noise inside the kernels (`kernels/_philox.py`, `csrc/cpu/philox.h`).
"""

import math

import numpy
import pytest
import torch
import triton
import triton.language as tl
from scipy import stats

from blip3o_fast import _ext
from blip3o_fast.kernels import _philox as kernels
from blip3o_fast.ops import _cpu, flow_interpolate, flow_matching_loss, use_backend
from blip3o_fast.ops._philox import (
    PER_SAMPLE,
    box_muller,
    normal_noise,
    normal_noise_at,
    per_sample_uniform,
    philox_4x32_10,
    seed_tensor,
    split_words,
    uniform,
)

# Salmon et al. 2011, Random123's kat_vectors: counter, key, answer of philox4x32-10.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[torch.Tensor]:
    return [torch.tensor(int(word, 16)) for word in text.split()]


def exact_philox(counter: list[int], key: list[int]) -> list[int]:
    """The paper's round function in Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & 0xFFFFFFFF, (first >> 32) ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert [f"{int(word):08x}" for word in philox_4x32_10(words(counter), words(key))] == answer.split()


def test_every_word_is_exact():
    counter, key = torch.randint(2**32, (4, 200)), torch.randint(2**32, (2, 200))
    ours = torch.stack(philox_4x32_10(list(counter), list(key)))
    for column in range(200):
        expected = exact_philox(counter[:, column].tolist(), key[:, column].tolist())
        assert ours[:, column].tolist() == expected


def test_the_compiled_words_are_the_same():
    """Inductor generates its own integer code; the products that pass 2^63 must wrap there too."""
    counter, key = torch.randint(2**32, (4, 64)), torch.randint(2**32, (2, 64))
    compiled = torch.compile(lambda c, k: torch.stack(philox_4x32_10(list(c), list(k))), backend="aot_eager")
    assert torch.equal(compiled(counter, key), torch.stack(philox_4x32_10(list(counter), list(key))))


@pytest.mark.parametrize("value", [0, 1, 2**32 - 1, 2**32, 2**62 + 7, -1, -(2**63)])
def test_split_words_reads_negative_seeds_as_64_bits(value):
    low, high = split_words(torch.tensor(value))
    assert int(low) + (int(high) << 32) == value % 2**64


def test_uniform_never_gives_zero():
    ends = uniform(torch.tensor([0, 1, 2**31, 2**32 - 1]))
    assert ends.dtype == torch.float32
    assert ends[0] == 2.0**-33 and ends[2] == pytest.approx(0.5) and ends[3] == 1.0
    assert box_muller(tuple(torch.tensor([0, 2**32 - 1]) for _ in range(4))).isfinite().all()


def test_normals_follow_the_written_layout():
    """Counter, key and order as documented, computed element by element in exact integers and fp64."""
    seed, offset, shape = -(2**40) + 11, 2**33 + 5, (3, 2, 5)
    ours = normal_noise(torch.tensor([seed, offset]), shape)
    key = [seed % 2**64 % 2**32, seed % 2**64 >> 32]
    for row in range(3):
        sample = offset + row
        for element in range(10):
            quad, position = element // 4, element % 4
            w = exact_philox([quad % 2**32, quad >> 32, sample % 2**32, sample >> 32], key)
            a, b = (w[0], w[1]) if position < 2 else (w[2], w[3])
            radius = math.sqrt(-2 * math.log(a * 2.0**-32 + 2.0**-33))
            angle = 2 * math.pi * (b * 2.0**-32 + 2.0**-33)
            expected = radius * (math.cos(angle) if position % 2 == 0 else math.sin(angle))
            error = abs(float(ours[row].flatten()[element]) - expected)
            # near 2 pi, fp32's spacing of the angle is 5e-7
            assert not error > 2e-6 * max(1.0, radius)


def test_normals_are_standard_normal():
    noise = normal_noise(torch.tensor([7, 0]), (64, 64, 64)).double().flatten().numpy()
    assert stats.kstest(noise[:100_000], "norm").pvalue > 1e-3
    count = noise.size
    # mean, variance, skewness, kurtosis: within 4.5 standard errors of 0, 1, 0, 3
    for moment, expected, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs((noise**moment).mean() - expected) <= 4.5 * deviation / count**0.5
    assert numpy.abs(noise).max() > 4.5, "262144 normals must have a tail"


def test_neighbours_are_uncorrelated():
    noise = normal_noise(torch.tensor([7, 0]), (64, 64, 64)).double()
    flat = noise.flatten()
    for lag in (1, 2, 3, 4, 64):  # inside a quadruple, between quadruples, between tokens
        assert abs(float((flat[:-lag] * flat[lag:]).mean())) <= 4.5 / flat.numel() ** 0.5
        # squares too: Box-Muller pairs share their radius only in an independent way
        squares = (flat[:-lag] ** 2 - 1) * (flat[lag:] ** 2 - 1)
        assert abs(float(squares.mean())) <= 4.5 * 2 / flat.numel() ** 0.5
    rows = noise.reshape(64, -1)
    correlation = rows @ rows.T / rows.shape[1] - torch.eye(64)
    assert float(correlation.abs().max()) <= 0.13
    other = normal_noise(torch.tensor([8, 0]), (64, 64, 64)).double().flatten()
    assert abs(float((flat * other).mean())) <= 4.5 / flat.numel() ** 0.5


def test_a_batch_may_be_cut_anywhere():
    whole = normal_noise(torch.tensor([3, 100]), (6, 3, 7))
    for start, stop in ((0, 2), (2, 6), (5, 6), (3, 3)):
        part = normal_noise(torch.tensor([3, 100 + start]), (stop - start, 3, 7))
        assert torch.equal(part, whole[start:stop])
    shuffled = torch.tensor([4, 0, 5])
    assert torch.equal(normal_noise_at(3, 100 + shuffled, (3, 7)), whole[shuffled])
    # the first elements do not depend on how many follow
    assert torch.equal(normal_noise(torch.tensor([3, 100]), (6, 2, 7)).flatten(1), whole.flatten(1)[:, :14])


def test_the_seed_tensor():
    for seed, offset in ((3, 100), (-(2**63), 2**63 - 1)):
        assert torch.equal(seed_tensor(seed, offset, torch.device("cpu")), torch.tensor([seed, offset]))


def test_empty_shapes():
    assert normal_noise(torch.tensor([3, 0]), (0, 4, 8)).shape == (0, 4, 8)
    assert normal_noise(torch.tensor([3, 0]), (2, 0, 8)).shape == (2, 0, 8)


def test_per_sample_draws_have_streams_of_their_own():
    index = torch.arange(20_000)
    first, second = per_sample_uniform(5, index, 0), per_sample_uniform(5, index, 1)
    assert stats.kstest(first.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(second.numpy(), "uniform").pvalue > 1e-3
    assert abs(numpy.corrcoef(first.numpy(), second.numpy())[0, 1]) <= 4.5 / 20_000**0.5
    # written out: counter (purpose, PER_SAMPLE, sample), which no element of a sample reaches
    word = exact_philox([1, PER_SAMPLE, 7, 0], [5, 0])[0]
    assert float(second[7]) == pytest.approx(word * 2.0**-32 + 2.0**-33, rel=1e-6)


# ---- inside a kernel -----------------------------------------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def words_kernel(counter_ptr, key_ptr, words_ptr, N: tl.constexpr):
    """words [4, N] of counter [4, N] and key [2, N], int32 tensors that hold uint32."""
    at = tl.arange(0, N)
    c0 = tl.load(counter_ptr + at).to(tl.uint32, bitcast=True)
    c1 = tl.load(counter_ptr + N + at).to(tl.uint32, bitcast=True)
    c2 = tl.load(counter_ptr + 2 * N + at).to(tl.uint32, bitcast=True)
    c3 = tl.load(counter_ptr + 3 * N + at).to(tl.uint32, bitcast=True)
    k0 = tl.load(key_ptr + at).to(tl.uint32, bitcast=True)
    k1 = tl.load(key_ptr + N + at).to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = kernels.philox(c0, c1, c2, c3, k0, k1)
    tl.store(words_ptr + at, w0.to(tl.int32, bitcast=True))
    tl.store(words_ptr + N + at, w1.to(tl.int32, bitcast=True))
    tl.store(words_ptr + 2 * N + at, w2.to(tl.int32, bitcast=True))
    tl.store(words_ptr + 3 * N + at, w3.to(tl.int32, bitcast=True))


@triton.jit
def box_muller_kernel(word_a_ptr, word_b_ptr, normals_ptr, N: tl.constexpr):
    """normals [2, N]."""
    at = tl.arange(0, N)
    word_a = tl.load(word_a_ptr + at).to(tl.uint32, bitcast=True)
    word_b = tl.load(word_b_ptr + at).to(tl.uint32, bitcast=True)
    first, second = kernels.box_muller(word_a, word_b)
    tl.store(normals_ptr + at, first)
    tl.store(normals_ptr + N + at, second)


@triton.jit
def normals_kernel(seed_ptr, first_ptr, normals_ptr, N: tl.constexpr):
    """normals [3, N] of the elements from first [1] on, the three ways there are to make them."""
    at = tl.arange(0, N)
    s_low, s_high, k_low, k_high = kernels.sample_stream(seed_ptr, 1)
    first = tl.load(first_ptr)
    tl.store(normals_ptr + at, kernels.normals(first >> 2, s_low, s_high, k_low, k_high, N, 1))
    tl.store(normals_ptr + N + at, kernels.normals(first >> 2, s_low, s_high, k_low, k_high, N, 2))
    tl.store(normals_ptr + 2 * N + at, kernels.normals_at(first + at, s_low, s_high, k_low, k_high))


def as_int32(word: torch.Tensor) -> torch.Tensor:
    return word.to(torch.int32).to(DEVICE)  # wraps: the 32 bits stay


def test_the_words_of_the_kernel_are_the_same():
    counter, key = torch.randint(2**32, (4, 512)), torch.randint(2**32, (2, 512))
    for column, (c, k, _) in enumerate(KNOWN):
        counter[:, column], key[:, column] = torch.stack(words(c)), torch.stack(words(k))
    found = torch.empty(4, 512, dtype=torch.int32, device=DEVICE)
    words_kernel[(1,)](as_int32(counter), as_int32(key), found, N=512)
    assert torch.equal(found.cpu(), as_int32(torch.stack(philox_4x32_10(list(counter), list(key)))).cpu())
    assert [f"{int(word) % 2**32:08x}" for word in found[:, 2]] == KNOWN[2][2].split()


def exact_box_muller(word_a: torch.Tensor, word_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """r cos and r sin of two words in fp64, from their uniforms in fp32 on."""
    radius = torch.sqrt(-2 * torch.log(uniform(word_a).double()))
    # The quarter turns are taken off first: pi of fp64 is not exact enough for a sine near its zeros.
    turns = uniform(word_b).double()
    quarter = torch.round(4 * turns)
    rest, quarter = 2 * math.pi * (turns - quarter / 4), quarter.long() % 4
    sin, cos = rest.sin(), rest.cos()
    circles = ((cos, -sin, -cos, sin), (sin, cos, -sin, -cos))
    cos, sin = (radius * torch.stack(circle).gather(0, quarter[None])[0] for circle in circles)
    return cos, sin


def exact_noise(seed: int, sample: int, elements: int) -> torch.Tensor:
    """The normals of one sample, fp64."""
    quad = torch.arange((elements + 3) // 4)
    counter = (*split_words(quad), *split_words(torch.full_like(quad, sample)))
    w = philox_4x32_10(counter, split_words(torch.full_like(quad, seed)))
    normals = torch.stack([*exact_box_muller(w[0], w[1]), *exact_box_muller(w[2], w[3])], dim=-1)
    return normals.flatten()[:elements]


def ulps(value: torch.Tensor, gold: torch.Tensor) -> float:
    """The largest distance to gold, in units of the last place that fp32 has there."""
    spacing = torch.from_numpy(numpy.spacing(gold.abs().float().numpy())).double()
    return ((value.cpu().double() - gold).abs() / spacing).max().item()


def test_the_normals_of_the_kernel_are_within_2_ulp():
    """Of the formula in fp64; ends and right angles, the logarithm near 1 and its seams included."""
    count = 2**18
    word_a, word_b = torch.randint(2**32, (2, count))
    near, scales = count // 4, torch.randint(32, (count // 4,))
    word_a[:near] >>= scales  # small
    word_a[near : 2 * near] = 2**32 - 1 - (word_a[near : 2 * near] >> scales)  # near 1
    word_b[:near] >>= torch.randint(32, (near,))
    word_b[near : 2 * near] = (torch.randint(9, (near,)) * 2**29 + torch.randint(-300, 300, (near,))) % 2**32
    word_a[:3], word_b[:4] = torch.tensor([0, 2**32 - 1, 2**31]), torch.tensor([0, 2**32 - 1, 2**30, 2**31])
    ours = torch.empty(2, count, device=DEVICE)
    box_muller_kernel[(1,)](as_int32(word_a), as_int32(word_b), ours, N=count)
    for value, gold in zip(ours, exact_box_muller(word_a, word_b), strict=True):
        assert ulps(value, gold) <= 2.0
    assert ours.isfinite().all() and not ours[:, 1].any()  # u = 1: the radius is 0


@pytest.mark.parametrize("first", [0, 4 * 96, 2**34 - 4 * 96, 2**36 + 8 * 5])
def test_the_kernel_has_one_noise_in_three_ways(first):
    """Also where the number of a quadruple passes 2^32."""
    seed, offset = -(2**40) + 11, 2**33 + 5
    ours = torch.empty(3, 64, device=DEVICE)
    seeds = torch.tensor([seed, offset], device=DEVICE)
    normals_kernel[(1,)](seeds, torch.tensor([first], device=DEVICE), ours, N=64)
    quad = first // 4 + torch.arange(16)
    key = split_words(torch.full((16,), seed))
    expected = box_muller(
        philox_4x32_10((*split_words(quad), *split_words(torch.full((16,), offset + 1))), key)
    ).flatten()  # fmt: skip
    for way in ours.cpu():
        torch.testing.assert_close(way, expected, rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(way, ours[0].cpu(), rtol=3e-7, atol=0)


def drawn(seed: int, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The noise that the kernel of flow_interpolate draws: data is 0 and sigma 1."""
    with use_backend("triton"):
        pair = torch.tensor([seed, offset], device=DEVICE)
        return flow_interpolate(torch.zeros(shape, device=DEVICE), torch.ones(shape[0], device=DEVICE), seed=pair).cpu()


def test_the_normals_of_the_kernel_are_standard_normal():
    noise = drawn(11, 3, (2, 16384)).double()
    flat = noise.flatten().numpy()
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    for moment, expected, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs((flat**moment).mean() - expected) <= 4.5 * deviation / flat.size**0.5
    assert numpy.abs(flat).max() > 3.7, "32768 normals must have a tail"
    for lag in (1, 2, 3, 4, 8, 64):
        assert abs((flat[:-lag] * flat[lag:]).mean()) <= 4.5 / flat.size**0.5
        assert abs(((flat[:-lag] ** 2 - 1) * (flat[lag:] ** 2 - 1)).mean()) <= 4.5 * 2 / flat.size**0.5
    assert abs(numpy.corrcoef(noise)[0, 1]) <= 4.5 / 16384**0.5


def test_the_batch_of_the_kernel_may_be_cut_anywhere():
    whole = drawn(3, 100, (4, 3, 7))
    for start, stop in ((0, 2), (2, 4), (3, 4), (3, 3)):
        assert torch.equal(drawn(3, 100 + start, (stop - start, 3, 7)), whole[start:stop])
    assert torch.equal(drawn(3, 100, (4, 2, 7)).flatten(1), whole.flatten(1)[:, :14])
    assert not torch.equal(drawn(4, 100, (4, 3, 7)), whole)


@pytest.mark.parametrize("isa", _cpu.ISAS or [pytest.param("", marks=pytest.mark.skip(reason=str(_ext.ERROR)))])
def test_the_normals_of_the_cpu_are_within_2_ulp(isa):
    """And so their words are the same, at every place of a quadruple, of a register and of a block."""
    seed, offset, elements = -(2**40) + 11, 2**33 + 5, 2**16 + 7
    with use_backend("cpu"), _cpu.use_isa(isa):
        ours = flow_interpolate(torch.zeros(2, elements), torch.ones(2), seed=torch.tensor([seed, offset]))
    for row in range(2):
        assert ulps(ours[row], exact_noise(seed, offset + row, elements)) <= 2.0


@pytest.mark.parametrize("channels", [64, 2])
def test_the_normals_of_cuda_are_within_2_ulp(channels, emulated_cuda):
    """By quadruples and one by one: of a zero prediction, and of a power of two of elements, the gradient is -noise."""
    if emulated_cuda is not None:
        pytest.skip(emulated_cuda)
    seed, offset, shape = -(2**40) + 11, 2**33 + 5, (2, 2**16 // channels, channels)
    pred, seeds = torch.zeros(shape, requires_grad=True), torch.tensor([seed, offset])
    with use_backend("cuda"):
        loss, _ = flow_matching_loss(pred, pred.detach(), torch.ones(2), seed=seeds, prediction_type="epsilon")
        (dpred,) = torch.autograd.grad(loss, pred, torch.tensor(pred.numel() / 2))
    for row in range(2):
        assert ulps(-dpred[row].flatten(), exact_noise(seed, offset + row, 2**16)) <= 2.0
