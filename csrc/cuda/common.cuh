// What the CUDA kernels share: numbers of three dtypes, eight at a time where they can be, and sums over a block.
//
// A tensor's dtype is known at run time. The branches on it are the same for all threads and cost little beside the
// memory; a kernel is compiled once and not once per combination of dtypes.
#pragma once

#include <cmath>
#include <cstdint>

#include "launch.h"
#include "view.h"

namespace blip3o_fast {

constexpr unsigned whole_warp = 0xffffffffu;

// ---- half precision as its 16 bits; to the nearest, ties to even, NaN stays NaN ----

__device__ inline float bf16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

#if defined(__CUDACC__)

__device__ inline float f16_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ inline uint16_t float_to_bf16(float value) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ inline uint16_t float_to_f16(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

#else

using emulation::f16_to_float;
using emulation::float_to_bf16;
using emulation::float_to_f16;

#endif

__device__ inline float half_to_float(uint16_t bits, Dtype dtype) {
    return dtype == Dtype::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

__device__ inline uint16_t float_to_half(float value, Dtype dtype) {
    return dtype == Dtype::bf16 ? float_to_bf16(value) : float_to_f16(value);
}

// ---- one number ----

__device__ inline float load_float(const void* data, Dtype dtype, int64_t at) {
    if (dtype == Dtype::f32) return static_cast<const float*>(data)[at];
    return half_to_float(static_cast<const uint16_t*>(data)[at], dtype);
}

__device__ inline void store_float(void* data, Dtype dtype, int64_t at, float value) {
    if (dtype == Dtype::f32)
        static_cast<float*>(data)[at] = value;
    else
        static_cast<uint16_t*>(data)[at] = float_to_half(value, dtype);
}

// ---- four and eight neighbours, of which the first `count` exist: 0 is read for the others, and they are not written.
//      16 bytes at a time where all exist and the address allows it ----

__device__ inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Eight numbers as memory has them: half precision in `low` alone.
struct Eight {
    uint4 low, high;
};

__device__ inline uint32_t pair_of(uint32_t low, uint32_t high) { return low | high << 16; }

__device__ inline Eight fetch_eight(const void* data, Dtype dtype, int64_t at, int count) {
    Eight raw = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    if (dtype == Dtype::f32) {
        const auto* from = static_cast<const uint32_t*>(data) + at;
        if (count >= 8 && is_aligned(from)) {
            raw.low = reinterpret_cast<const uint4*>(from)[0];
            raw.high = reinterpret_cast<const uint4*>(from)[1];
        } else {
            const auto get = [&](int i) { return i < count ? from[i] : 0u; };
            raw.low = {get(0), get(1), get(2), get(3)};
            raw.high = {get(4), get(5), get(6), get(7)};
        }
    } else {
        const auto* from = static_cast<const uint16_t*>(data) + at;
        if (count >= 8 && is_aligned(from)) {
            raw.low = *reinterpret_cast<const uint4*>(from);
        } else {
            const auto get = [&](int i) { return i < count ? uint32_t{from[i]} : 0u; };
            raw.low = {pair_of(get(0), get(1)), pair_of(get(2), get(3)), pair_of(get(4), get(5)),
                       pair_of(get(6), get(7))};
        }
    }
    return raw;
}

__device__ inline void unpack_pair(float& first, float& second, uint32_t pair, Dtype dtype) {
    first = half_to_float(static_cast<uint16_t>(pair), dtype);
    second = half_to_float(static_cast<uint16_t>(pair >> 16), dtype);
}

__device__ inline void unpack_eight(float (&to)[8], const Eight& raw, Dtype dtype) {
    if (dtype == Dtype::f32) {
        to[0] = __uint_as_float(raw.low.x);
        to[1] = __uint_as_float(raw.low.y);
        to[2] = __uint_as_float(raw.low.z);
        to[3] = __uint_as_float(raw.low.w);
        to[4] = __uint_as_float(raw.high.x);
        to[5] = __uint_as_float(raw.high.y);
        to[6] = __uint_as_float(raw.high.z);
        to[7] = __uint_as_float(raw.high.w);
    } else {
        unpack_pair(to[0], to[1], raw.low.x, dtype);
        unpack_pair(to[2], to[3], raw.low.y, dtype);
        unpack_pair(to[4], to[5], raw.low.z, dtype);
        unpack_pair(to[6], to[7], raw.low.w, dtype);
    }
}

// The inverse of unpack_eight, rounded.
__device__ inline Eight pack_eight(const float (&from)[8], Dtype dtype) {
    const auto word = [&](int i) { return __float_as_uint(from[i]); };
    if (dtype == Dtype::f32) return {{word(0), word(1), word(2), word(3)}, {word(4), word(5), word(6), word(7)}};
    const auto pair = [&](int i) {
        return pair_of(float_to_half(from[i], dtype), float_to_half(from[i + 1], dtype));
    };
    return {{pair(0), pair(2), pair(4), pair(6)}, {0, 0, 0, 0}};
}

__device__ inline void put_eight(const Eight& raw, void* data, Dtype dtype, int64_t at, int count) {
    if (dtype == Dtype::f32) {
        auto* to = static_cast<uint32_t*>(data) + at;
        if (count >= 8 && is_aligned(to)) {
            reinterpret_cast<uint4*>(to)[0] = raw.low;
            reinterpret_cast<uint4*>(to)[1] = raw.high;
        } else {
            const uint32_t words[8] = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
                                       raw.high.x, raw.high.y, raw.high.z, raw.high.w};
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (i < count) to[i] = words[i];
        }
    } else {
        auto* to = static_cast<uint16_t*>(data) + at;
        if (count >= 8 && is_aligned(to)) {
            *reinterpret_cast<uint4*>(to) = raw.low;
        } else {
            const uint32_t pairs[4] = {raw.low.x, raw.low.y, raw.low.z, raw.low.w};
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (i < count) to[i] = static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16));
        }
    }
}

__device__ inline void load_eight(float (&to)[8], const void* data, Dtype dtype, int64_t at, int count) {
    unpack_eight(to, fetch_eight(data, dtype, at, count), dtype);
}

__device__ inline void store_eight(const float (&from)[8], void* data, Dtype dtype, int64_t at, int count) {
    put_eight(pack_eight(from, dtype), data, dtype, at, count);
}

__device__ inline float4 load_four(const void* data, Dtype dtype, int64_t at, int count) {
    const void* from = static_cast<const char*>(data) + at * (dtype == Dtype::f32 ? 4 : 2);
    if (dtype == Dtype::f32 && count >= 4 && is_aligned(from)) return *static_cast<const float4*>(from);
    if (dtype != Dtype::f32 && count >= 4 && reinterpret_cast<uintptr_t>(from) % 8 == 0) {
        const uint2 raw = *static_cast<const uint2*>(from);
        float4 to;
        unpack_pair(to.x, to.y, raw.x, dtype);
        unpack_pair(to.z, to.w, raw.y, dtype);
        return to;
    }
    const auto get = [&](int i) { return i < count ? load_float(data, dtype, at + i) : 0.0f; };
    return {get(0), get(1), get(2), get(3)};
}

__device__ inline void store_four(void* data, Dtype dtype, int64_t at, float4 value, int count) {
    void* to = static_cast<char*>(data) + at * (dtype == Dtype::f32 ? 4 : 2);
    if (dtype == Dtype::f32 && count >= 4 && is_aligned(to)) {
        *static_cast<float4*>(to) = value;
    } else if (dtype != Dtype::f32 && count >= 4 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
        *static_cast<uint2*>(to) = {pair_of(float_to_half(value.x, dtype), float_to_half(value.y, dtype)),
                                    pair_of(float_to_half(value.z, dtype), float_to_half(value.w, dtype))};
    } else {
        if (count > 0) store_float(data, dtype, at, value.x);
        if (count > 1) store_float(data, dtype, at + 1, value.y);
        if (count > 2) store_float(data, dtype, at + 2, value.z);
        if (count > 3) store_float(data, dtype, at + 3, value.w);
    }
}

// ---- sums, always in the same order ----

// Each of the sums over the warp, in every lane.
template <int count>
__device__ inline void warp_sums(float (&sums)[count]) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
#pragma unroll
        for (int i = 0; i < count; ++i) sums[i] += __shfl_xor_sync(whole_warp, sums[i], step);
}

// The sum over the block, in every thread. `scratch` may be used again after the next barrier but one, so two of them
// in turn need no other barrier.
__device__ inline float block_sum(float value, float (&scratch)[32]) {
    float sums[1] = {value};
    warp_sums(sums);
    const int warps = blockDim.x / 32;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sums[0];
    __syncthreads();
    sums[0] = static_cast<int>(threadIdx.x) % 32 < warps ? scratch[threadIdx.x % 32] : 0.0f;
    warp_sums(sums);
    return sums[0];
}

}  // namespace blip3o_fast
