// A tensor as the kernels see it: memory that Python owns, its dtype, shape and strides. Nothing here allocates.
#pragma once

#include <cstdint>
#include <initializer_list>
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

const char* dtype_name(Dtype dtype);

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
// Compiled once, in view.cpp: of an inline function that every instruction set compiles, the linker keeps any one.

std::string shape_text(const View& view);
std::string shape_text(std::initializer_list<int64_t> sizes);

// "<name> must be <needed>, got <dtype> of shape <shape>"
[[noreturn]] void refuse(const View& view, const std::string& needed);

// A given tensor of exactly this shape.
void check_shape(const View& view, std::initializer_list<int64_t> sizes);
void check_rank(const View& view, int rank);
void check_float(const View& view);
void check_dtype(const View& view, Dtype dtype);

// An output: rows are written whole, so none may share memory with another.
void check_contiguous(const View& view);

}  // namespace blip3o_fast
