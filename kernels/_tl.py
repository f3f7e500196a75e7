"""Functions that several kernels call: activations in fp32 that the compiler and the interpreter both understand.

`libdevice` and inline assembly run only on a GPU, so nothing here uses them.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of fp32; 0 and 1 far out, never NaN."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """tanh of fp32, accurate relative to its own size also near 0, where gates start.

    Cephes' tanhf: an odd polynomial below 0.625 (relative error 1.3e-7 there), 1 - 2 / (exp(2|x|) + 1) above.
    """
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, x + x * z * p, tl.where(x < 0, -far, far))
