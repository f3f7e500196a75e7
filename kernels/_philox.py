"""Counter-based normals inside a kernel: Philox-4x32-10 and Box-Muller, as `blip3o_fast/ops/_philox.py` specifies them.

The words are that module's bit for bit; a normal is within 2 ulp of the formula's exact value. The logarithm, sine and
cosine are written out, because those of `tl` are approximate on a GPU (a logarithm near 1 loses all its digits) or
reduce their argument through local memory. Nothing here counts on a fused multiply-add, which the interpreter has not:
where a product must be exact, its factors have few enough bits. The polynomials are minimax fits; relative to their
functions they err by 2.3e-8 (the logarithm, halved by the root), 5.4e-9 (sine) and 1e-10 (cosine).
"""

import triton
import triton.language as tl

# 1.5 * 2^23: adding it rounds a small number to an integer, which then stands in the sum's lowest bits.
_ROUNDS = tl.constexpr(12582912.0)
_SIGN = tl.constexpr(-0x80000000)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """The four uint32 words of counter (c0, c1, c2, c3) and key (k0, k1), uint32 tensors that broadcast."""
    for _ in tl.static_range(10):
        # 64-bit products of 32-bit words: one instruction gives both halves.
        first, second = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (second >> 32).to(tl.uint32) ^ c1 ^ k0, (first >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = second.to(tl.uint32), first.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(word, UNIT: tl.constexpr):
    """UNIT times the fp32 in (0, 1] of a uint32 word; UNIT is a power of two, so it costs and rounds nothing."""
    return word.to(tl.float32) * (UNIT * 2.0**-32) + UNIT * 2.0**-33


@triton.jit
def leading(x, BITS: tl.constexpr):
    """x without the bits below its BITS leading ones."""
    return (x.to(tl.int32, bitcast=True) & -(1 << (24 - BITS))).to(tl.float32, bitcast=True)


@triton.jit
def minus_two_log(u):
    """-2 ln(u) of a positive normal fp32 as high + rest, |rest| < high / 4: closer than one fp32 can say.

    u = m * 2^e with m in [2/3, 4/3), g = 2 - 2m (exact), and -2 ln(m) = g + g^2 / 4 + g^3 * q(g).
    """
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000
    m = (bits - exponent).to(tl.float32, bitcast=True)
    e = exponent.to(tl.float32)  # times 2^23
    g = 2.0 - 2.0 * m
    q = 5.8712764e-4 * g + 1.1914487e-3
    q = q * g + 2.1488252e-3
    q = q * g + 5.1406375e-3
    q = q * g + 1.2518656e-2
    q = q * g + 3.125645e-2
    q = q * g + 8.333188e-2
    square = g * g
    # -2 ln 2 in two parts, of which the first has 9 bits: its multiples are exact.
    high = e * (-1.38671875 * 2.0**-23) + g
    rest = square * 0.25 + ((square * g) * q + e * (4.2438888e-4 * 2.0**-23))
    return high, rest


@triton.jit
def quarter_turns(x):
    """x right angles as (k, head, rest, versed): k is the nearest integer, of which the two lowest bits count.

    What is left of x, in [-1/2, 1/2] and exact below 2^22, has the sine head + rest, where head has 12 bits, and the
    cosine 1 - versed, all fp32.
    """
    shifted = x + _ROUNDS
    left = x - (shifted - _ROUNDS)
    z = left * left
    p = -4.5920415e-3 * z + 7.9676785e-2
    p = p * z - 6.459632e-1
    p = p * z + 7.079632e-2
    # pi / 2 = 1.5 + p(0), and 1.5 has 2 bits
    first = leading(left, 10)
    rest = (left - first) * 1.5 + left * p
    q = -9.0353604e-4 * z + 2.086012e-2
    q = q * z - 2.5366923e-1
    q = q * z + 2.3370054e-1
    return shifted.to(tl.int32, bitcast=True), first * 1.5, rest, z * q + z


@triton.jit
def turned(k, sin, cos):
    """(sin, cos) of the angle that is k right angles further."""
    odd = (k & 1) != 0
    s, c = tl.where(odd, cos, sin), tl.where(odd, sin, cos)
    s = (s.to(tl.int32, bitcast=True) ^ ((k << 30) & _SIGN)).to(tl.float32, bitcast=True)
    c = (c.to(tl.int32, bitcast=True) ^ (((k + 1) << 30) & _SIGN)).to(tl.float32, bitcast=True)
    return s, c


@triton.jit
def box_muller(word_a, word_b):
    """Two standard normals of two words: r cos(2 pi u_b) and r sin(2 pi u_b), r = sqrt(-2 ln u_a)."""
    high, rest = minus_two_log(uniform(word_a, 1))
    # One step of Newton's from the approximate root, r = root + more: root's square is exact, and neither r nor r^2 is
    # ever rounded to one fp32. u = 1 gives r = 0.
    square = high + rest
    inverse = tl.rsqrt(tl.maximum(square, 1e-30))
    root, half = leading(square * inverse, 12), inverse * 0.5
    more = ((high - root * root) + rest) * half
    more += more * (more * half)
    r = root + more
    k, sin_head, sin_rest, versed = quarter_turns(uniform(word_b, 4))
    cos = root + (more - r * versed)
    sin = root * sin_head + (r * sin_rest + more * sin_head)
    sin, cos = turned(k, sin, cos)
    return cos, sin


@triton.jit
def sample_stream(seed_ptr, row):
    """(s lo, s hi, key lo, key hi) of one row of a batch, read from the device: seed is int64 [2] = (seed, offset)."""
    seed, sample = tl.load(seed_ptr), tl.load(seed_ptr + 1) + row
    return sample.to(tl.uint32), (sample >> 32).to(tl.uint32), seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def quad_normals(first_quad, lanes, s_low, s_high, k_low, k_high):
    """The normals of elements 4q ... 4q + 3 for q = first_quad + lanes, four tensors of lanes' shape.

    first_quad: an int64 scalar whose low word does not overflow within lanes, which is int32.
    """
    c0 = first_quad.to(tl.uint32) + lanes.to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, (first_quad >> 32).to(tl.uint32), s_low, s_high, k_low, k_high)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def normals(first_quad, s_low, s_high, k_low, k_high, N: tl.constexpr, QUADS: tl.constexpr):
    """[N] normals of the N elements from 4 * first_quad on; first_quad: int64.

    A lane makes 4 * QUADS neighbours: QUADS = 2 is what a 128-bit access of half precision holds, 1 of fp32, so that no
    value has to change lanes between here and the store.
    """
    lanes = tl.arange(0, N // (4 * QUADS)) * QUADS
    n0, n1, n2, n3 = quad_normals(first_quad, lanes, s_low, s_high, k_low, k_high)
    even, odd = tl.join(n0, n2), tl.join(n1, n3)
    if QUADS == 2:
        n4, n5, n6, n7 = quad_normals(first_quad, lanes + 1, s_low, s_high, k_low, k_high)
        even, odd = tl.join(even, tl.join(n4, n6)), tl.join(odd, tl.join(n5, n7))
        # [lane, half of a quad, quad] to [lane, quad, half of a quad]
        even, odd = tl.permute(even, (0, 2, 1)), tl.permute(odd, (0, 2, 1))
    return tl.reshape(tl.join(even, odd), (N,))


@triton.jit
def normals_at(element, s_low, s_high, k_low, k_high):
    """The normals of any int64 elements of a sample: a draw of four for each element, one of them used."""
    quad = element >> 2
    w0, w1, w2, w3 = philox(quad.to(tl.uint32), (quad >> 32).to(tl.uint32), s_low, s_high, k_low, k_high)
    second = (element & 2) != 0
    cos, sin = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1))
    return tl.where((element & 1) != 0, sin, cos)
