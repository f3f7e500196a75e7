"""The probability path's coefficients inside a kernel; the formulas stand in `blip3o_fast/ops/_flow_schedule.py`.

One coefficient multiplies a whole sample, so its error does not average out: it is put together in fp64, a few
instructions per program, rounded once. The cosine schedule goes through the half angle: alpha = cos(pi sigma / 2)^2.
Both schedules have alpha(0) = 1, alpha(1) = 0, s(0) = sigma_min and s(1) = sigma_min + span, exactly.
"""

import triton
import triton.language as tl

from blip3o_fast.kernels._philox import quarter_turns


@triton.jit
def half_angle(sigma):
    """(sin, cos) of pi sigma / 2, fp64 with fp32's accuracy or a little more, exact at 0 and 1; sigma in [0, 1]."""
    k, head, rest, versed = quarter_turns(sigma)
    near = head.to(tl.float64) + rest.to(tl.float64)
    far = 1.0 - versed.to(tl.float64)
    odd = (k & 1) != 0
    return tl.where(odd, far, near), tl.where(odd, -near, far)


@triton.jit
def path_coefficients(sigma, sigma_min, span, COSINE: tl.constexpr):
    """(alpha, s), fp32; sigma: fp32, sigma_min and span: fp64."""
    if COSINE:
        sin, cos = half_angle(sigma)
        return (cos * cos).to(tl.float32), (sigma_min + span * sin).to(tl.float32)
    else:
        return 1.0 - sigma, (sigma_min + span * sigma.to(tl.float64)).to(tl.float32)


@triton.jit
def target_coefficients(sigma, span, COSINE: tl.constexpr):
    """(alpha', s') of the velocity alpha' * data + s' * noise, fp32; sigma: fp32, span: fp64."""
    if COSINE:
        sin, cos = half_angle(sigma)
        return (-3.141592653589793 * sin * cos).to(tl.float32), (span * 1.5707963267948966 * cos).to(tl.float32)
    else:
        none = sigma.to(tl.float64) * 0.0
        return (none - 1.0).to(tl.float32), (none + span).to(tl.float32)
