// A tensor as the kernels see it: memory that Python owns, its dtype, shape and strides. Nothing here allocates.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace blip3o_fast {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, i64 = 3, u8 = 4, i8 = 5, i32 = 6 };
constexpr int dtype_count = 7;

inline int64_t item_size(Dtype dtype) {
    switch (dtype) {
        case Dtype::f32:
        case Dtype::i32: return 4;
        case Dtype::bf16:
        case Dtype::f16: return 2;
        case Dtype::i64: return 8;
        default: return 1;
    }
}

inline const char* dtype_name(Dtype dtype) {
    constexpr const char* names[dtype_count] = {"float32", "bfloat16", "float16", "int64", "uint8", "int8", "int32"};
    return names[static_cast<int>(dtype)];
}

constexpr int max_rank = 6;

struct View {
    void* data = nullptr;
    Dtype dtype = Dtype::f32;
    int rank = -1;  // -1: an optional tensor that was not given
    int64_t size[max_rank] = {};
    int64_t stride[max_rank] = {};  // in elements
    int64_t last_stride = 1;        // of the last dimension
    const char* name = "";

    bool present() const { return rank >= 0; }

    int64_t numel() const {
        int64_t n = 1;
        for (int i = 0; i < rank; ++i) n *= size[i];
        return n;
    }

    bool is_float() const { return dtype == Dtype::f32 || dtype == Dtype::bf16 || dtype == Dtype::f16; }

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }

    // Address of an element, for dtypes known at run time.
    char* at(int64_t offset) const { return static_cast<char*>(data) + offset * item_size(dtype); }
};

// ---- checks: the message names the argument, what was given and what is allowed ----

inline std::string shape_text(const View& view) {
    std::string text = "(";
    for (int i = 0; i < view.rank; ++i) text += (i ? ", " : "") + std::to_string(view.size[i]);
    return text + ")";
}

[[noreturn]] inline void refuse(const View& view, const std::string& needed) {
    const std::string given =
        view.present() ? std::string(dtype_name(view.dtype)) + " of shape " + shape_text(view) : "None";
    throw std::invalid_argument(std::string(view.name) + " must be " + needed + ", got " + given);
}

inline std::string shape_text(std::initializer_list<int64_t> sizes) {
    std::string text = "(";
    for (int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + ")";
}

// A given tensor of exactly this shape.
inline void check_shape(const View& view, std::initializer_list<int64_t> sizes) {
    bool same = view.rank == static_cast<int>(sizes.size());
    int i = 0;
    for (int64_t size : sizes) same = same && view.size[i++] == size;
    if (!same) refuse(view, "of shape " + shape_text(sizes));
}

inline void check_rank(const View& view, int rank) {
    if (view.rank != rank) refuse(view, "a tensor of " + std::to_string(rank) + " dimensions");
}

inline void check_float(const View& view) {
    if (!view.is_float()) refuse(view, "float32, bfloat16 or float16");
}

inline void check_dtype(const View& view, Dtype dtype) {
    if (view.dtype != dtype) refuse(view, dtype_name(dtype));
}

// An output: rows are written whole, so none may share memory with another.
inline void check_contiguous(const View& view) {
    int64_t expected = 1;
    for (int i = view.rank - 1; i >= 0; --i) {
        if (view.size[i] != 1 && view.stride[i] != expected && view.numel() > 0) refuse(view, "contiguous");
        expected *= view.size[i];
    }
}

}  // namespace blip3o_fast
