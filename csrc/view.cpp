#include "view.h"

namespace blip3o_fast {

const char* dtype_name(Dtype dtype) {
    constexpr const char* names[dtype_count] = {"float32", "bfloat16", "float16", "int64", "uint8", "int8", "int32"};
    return names[static_cast<int>(dtype)];
}

std::string shape_text(const View& view) {
    std::string text = "(";
    for (int i = 0; i < view.rank; ++i) text += (i ? ", " : "") + std::to_string(view.size[i]);
    return text + ")";
}

std::string shape_text(std::initializer_list<int64_t> sizes) {
    std::string text = "(";
    for (int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + ")";
}

void refuse(const View& view, const std::string& needed) {
    const std::string given =
        view.present() ? std::string(dtype_name(view.dtype)) + " of shape " + shape_text(view) : "None";
    throw std::invalid_argument(std::string(view.name) + " must be " + needed + ", got " + given);
}

void check_shape(const View& view, std::initializer_list<int64_t> sizes) {
    bool same = view.rank == static_cast<int>(sizes.size());
    int i = 0;
    for (int64_t size : sizes) same = same && view.size[i++] == size;
    if (!same) refuse(view, "of shape " + shape_text(sizes));
}

void check_rank(const View& view, int rank) {
    if (view.rank != rank) refuse(view, "a tensor of " + std::to_string(rank) + " dimensions");
}

void check_float(const View& view) {
    if (!view.is_float()) refuse(view, "float32, bfloat16 or float16");
}

void check_dtype(const View& view, Dtype dtype) {
    if (view.dtype != dtype) refuse(view, dtype_name(dtype));
}

void check_contiguous(const View& view) {
    int64_t expected = 1;
    for (int i = view.rank - 1; i >= 0; --i) {
        if (view.size[i] != 1 && view.stride[i] != expected && view.numel() > 0) refuse(view, "contiguous");
        expected *= view.size[i];
    }
}

}  // namespace blip3o_fast
