// The Python door to the native kernels: pointers arrive as integers, results are written into given memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "cpu/rms_norm_modulate.h"

namespace py = pybind11;
using blip3o_fast::Rows;

namespace {

using Pointer = std::uintptr_t;

float* floats(Pointer address) { return reinterpret_cast<float*>(address); }

Rows rows(const std::array<int64_t, 3>& shape, const std::array<int64_t, 2>& strides) {
    return {shape[0], shape[1], shape[2], strides[0], strides[1]};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.attr("source_hash") = BLIP3O_FAST_SOURCE_HASH;
    m.def(
        "rms_norm_modulate_fwd",
        [](Pointer x, Pointer weight, Pointer scale, Pointer y, Pointer rstd, std::array<int64_t, 3> shape,
           std::array<int64_t, 2> strides, int64_t scale_stride, float eps) {
            blip3o_fast::rms_norm_modulate_fwd(floats(x), floats(weight), floats(scale), floats(y), floats(rstd),
                                               rows(shape, strides), scale_stride, eps);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "rms_norm_modulate_bwd",
        [](Pointer dy, Pointer x, Pointer weight, Pointer scale, Pointer rstd, Pointer dx, Pointer dweight,
           Pointer dscale, std::array<int64_t, 3> shape, std::array<int64_t, 2> dy_strides,
           std::array<int64_t, 2> x_strides, int64_t scale_stride) {
            blip3o_fast::rms_norm_modulate_bwd(floats(dy), floats(x), floats(weight), floats(scale), floats(rstd),
                                               floats(dx), floats(dweight), floats(dscale), rows(shape, dy_strides),
                                               rows(shape, x_strides), scale_stride);
        },
        py::call_guard<py::gil_scoped_release>());
}
