// The CUDA execution model on the CPU, for the tests: the kernels of csrc/cuda are compiled as C++ with this file
// included first. A CUDA thread is a fiber; blocks run one after the other, the threads of a block in turns that change
// at barriers and at what warps do together. emulation.cpp tells what is checked.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// ---- vector types ----

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- the machine ----

namespace emulation {

extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

enum class Collective : int { shuffle, vote, sync, matrices, multiply };

constexpr int slot_bytes = 32;
struct Slots {
    alignas(32) unsigned char lane[32][slot_bytes];
};

// Gives `size` bytes to the warp and waits for its 32 lanes, all of which must be in the same kind of collective.
const Slots& exchange(Collective kind, unsigned mask, const void* value, size_t size);
void barrier();
void started();  // the kernel waits for its predecessor on the stream
void* dynamic_shared();

// A variable of a block. build.py writes one where a kernel declares `__shared__ T name[n];`.
struct SharedPlace {
    unsigned char* place = nullptr;
    uint64_t block = 0;

    void* of_block(size_t bytes);  // NaN when the block first comes here
};

[[noreturn]] void fail(const char* problem);
int lane();

// A copy of 16 bytes that lands when it is waited for.
void copy_later(void* shared, const void* global);
void commit_copies();
void wait_for_copies(int pending);

// The emulation's own arithmetic, compiled without the checks of the kernels' memory accesses.
float f16_to_float(uint16_t bits);
uint16_t float_to_f16(float value);
uint16_t float_to_bf16(float value);
void multiply_fragments(float* d, const Slots& a_and_b, bool is_bf16);

using Body = void (*)(const void* arguments);
void run(Body body, const void* arguments, int64_t blocks, int threads, size_t shared_bytes);

template <class... P>
void launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared_bytes, P... arguments) {
    using Call = std::pair<void (*)(P...), std::tuple<P...>>;
    const Call call(kernel, std::tuple<P...>(arguments...));
    run([](const void* c) { std::apply(static_cast<const Call*>(c)->first, static_cast<const Call*>(c)->second); },
        &call, blocks, threads, shared_bytes);
}

template <class T>
T& shared(SharedPlace& place) {
    return *static_cast<T*>(place.of_block(sizeof(T)));
}

template <class T>
T of_lane(const Slots& slots, int lane) {
    T value;
    std::memcpy(&value, slots.lane[lane], sizeof(T));
    return value;
}

template <class T>
const Slots& shuffle_slots(unsigned mask, const T& value, int width) {
    static_assert(sizeof(T) <= slot_bytes);
    if (width != 32) fail("a shuffle of less than a warp");
    return exchange(Collective::shuffle, mask, &value, sizeof(T));
}

inline unsigned vote(unsigned mask, bool given) {
    const Slots& slots = exchange(Collective::vote, mask, &given, sizeof(given));
    unsigned ballot = 0;
    for (int i = 0; i < 32; ++i) ballot |= (of_lane<bool>(slots, i) ? 1u : 0u) << i;
    return ballot;
}

}  // namespace emulation

#define threadIdx (::emulation::thread_index)
#define blockIdx (::emulation::block_index)
#define blockDim (::emulation::block_size)
#define gridDim (::emulation::grid_size)

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulation::exchange(emulation::Collective::sync, mask, nullptr, 0);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return emulation::of_lane<T>(emulation::shuffle_slots(mask, value, width), source & 31);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flipped, int width = 32) {
    return emulation::of_lane<T>(emulation::shuffle_slots(mask, value, width), (emulation::lane() ^ flipped) & 31);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int source = emulation::lane() - static_cast<int>(delta);
    const T given = emulation::of_lane<T>(emulation::shuffle_slots(mask, value, width), source < 0 ? 0 : source);
    return source < 0 ? value : given;
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int source = emulation::lane() + static_cast<int>(delta);
    const T given = emulation::of_lane<T>(emulation::shuffle_slots(mask, value, width), source > 31 ? 31 : source);
    return source > 31 ? value : given;
}

inline unsigned __ballot_sync(unsigned mask, int given) { return emulation::vote(mask, given != 0); }
inline int __any_sync(unsigned mask, int given) { return emulation::vote(mask, given != 0) != 0; }
inline int __all_sync(unsigned mask, int given) { return emulation::vote(mask, given != 0) == 0xffffffffu; }

// ---- arithmetic ----

template <class T>
T min(T x, T y) {
    return y < x ? y : x;
}

template <class T>
T max(T x, T y) {
    return x < y ? y : x;
}

template <class T>
T __ldg(const T* address) {
    return *address;
}

namespace emulation {
template <class To, class From>
To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}
}  // namespace emulation

inline float __uint_as_float(unsigned bits) { return emulation::bits_of<float>(bits); }
inline float __int_as_float(int bits) { return emulation::bits_of<float>(bits); }
inline unsigned __float_as_uint(float value) { return emulation::bits_of<unsigned>(value); }
inline int __float_as_int(float value) { return emulation::bits_of<int>(value); }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(uint64_t{x} * y >> 32); }
