// What the kernels' host parts refuse beside a wrong shape or dtype.
#pragma once

#include "view.h"

namespace blip3o_fast {

// A tensor of this shape whose rows can be walked by address.
inline void check_rows(const View& view, std::initializer_list<int64_t> sizes) {
    check_shape(view, sizes);
    check_float(view);
    if (view.numel() > 0 && view.size[view.rank - 1] > 1 && view.last_stride != 1) refuse(view, "of unit last stride");
}

// A tensor of this shape that a kernel fills, or reads as if it had no strides.
inline void check_whole(const View& view, std::initializer_list<int64_t> sizes) {
    check_rows(view, sizes);
    check_contiguous(view);
}

}  // namespace blip3o_fast
