// The register tile under every matrix product of this folder: up to six rows of A times one panel of B.
//
// B is a panel: for each step along K, kPanelColumns words of 32 bits, one per column. What a word holds, and what A
// must hold to match, is the arithmetic's business:
//   Fp32          one float                                       A: floats
//   Bf16AsFp32    two bf16, of k and k + 1 (low half first)       A: floats
//   Bf16Pairs     the same                                        A: words of two bf16
//   Int8          four int8, of k .. k + 3 (lowest byte first)    A: see Int8 below
// A is read by broadcasting one element at a time, so its strides are free and it is never packed for the tile's sake.
// Every element of C is one chain of additions along a block of K; its value does not depend on which tile it is in.
#pragma once
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace blip3o_fast {
namespace BLIP3O_ISA {

typedef float FloatVector __attribute__((vector_size(BLIP3O_VECTOR_BYTES)));
typedef int32_t IntVector __attribute__((vector_size(BLIP3O_VECTOR_BYTES)));
typedef uint32_t WordVector __attribute__((vector_size(BLIP3O_VECTOR_BYTES)));
// The same in memory, where nothing promises alignment or the element type.
typedef float FloatVectorInMemory __attribute__((vector_size(BLIP3O_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t IntVectorInMemory __attribute__((vector_size(BLIP3O_VECTOR_BYTES), aligned(4), may_alias));
typedef uint32_t WordVectorInMemory __attribute__((vector_size(BLIP3O_VECTOR_BYTES), aligned(4), may_alias));

// 6 x 4 accumulators of the 32 AVX-512 registers, or 6 x 2 of the 16 that the others have, leave room for B's vectors
// and a broadcast, and are enough independent chains to hide the latency of an FMA.
constexpr int64_t kLanes = BLIP3O_VECTOR_BYTES / 4;
constexpr int kPanelVectors = BLIP3O_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int64_t kPanelColumns = kLanes * kPanelVectors;
constexpr int64_t kTileRows = 6;

// Keeps GCC from putting an addition off until its sum is needed: what is to be added would take registers, and spill.
template <class Vector>
inline Vector settled(Vector sum) {
#if defined(__AVX512F__)
    asm("" : "+v"(sum));
#elif defined(__AVX2__)
    asm("" : "+x"(sum));
#endif
    return sum;
}

// ---- the arithmetics ------------------------------------------------------------------------------------------------
// One step takes kParts elements of A in turn; weights(words, part) are the values of B that meet the part-th.

struct Fp32 {
    using Element = float;
    using Vector = FloatVector;
    using VectorInMemory = FloatVectorInMemory;
    static constexpr int kParts = 1;
    static FloatVector weights(WordVector words, int) { return (FloatVector)words; }
    static FloatVector broadcast(float a) { return a - FloatVector{}; }  // x - 0 is x, -0 too
    static FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector c) { return a * b + c; }
};

struct Bf16AsFp32 : Fp32 {
    static constexpr int kParts = 2;
    static FloatVector weights(WordVector words, int part) {
        return part == 0 ? (FloatVector)(words << 16) : (FloatVector)(words & 0xffff0000u);
    }
    static FloatVector multiply_add(FloatVector a, FloatVector b, FloatVector c) { return settled(a * b + c); }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
    using Element = uint32_t;
    using Vector = FloatVector;
    using VectorInMemory = FloatVectorInMemory;
    static constexpr int kParts = 1;
    static WordVector weights(WordVector words, int) { return words; }
    static WordVector broadcast(uint32_t a) { return WordVector{} + a; }
    static FloatVector multiply_add(WordVector a, WordVector b, FloatVector c) {
        return (FloatVector)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
    }
};
#endif

// A is quantised to -127 .. 127. VNNI wants it unsigned: +128, which the caller takes back with the sums of B's
// columns; four values fill a word. pmaddwd wants int16 pairs: (k, k + 2), then (k + 1, k + 3), two words a step,
// because that is how int16 lanes fall out of a word of B. Plain integers take one value a word. All are exact.
struct Int8 {
    using Element = uint32_t;
    using Vector = IntVector;
    using VectorInMemory = IntVectorInMemory;
#if defined(__AVX512VNNI__)
    static constexpr int kParts = 1;
    static WordVector weights(WordVector words, int) { return words; }
    static IntVector multiply_add(WordVector a, WordVector b, IntVector c) {
        return (IntVector)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
    }
#elif defined(__AVX512BW__)
    static constexpr int kParts = 2;
    static WordVector weights(WordVector words, int part) {
        const __m512i odd = (__m512i)words;
        return (WordVector)_mm512_srai_epi16(part == 0 ? _mm512_slli_epi16(odd, 8) : odd, 8);
    }
    static IntVector multiply_add(WordVector a, WordVector b, IntVector c) {
        return settled(c + (IntVector)_mm512_madd_epi16((__m512i)a, (__m512i)b));
    }
#elif defined(__AVX2__)
    static constexpr int kParts = 2;
    static WordVector weights(WordVector words, int part) {
        const __m256i odd = (__m256i)words;
        return (WordVector)_mm256_srai_epi16(part == 0 ? _mm256_slli_epi16(odd, 8) : odd, 8);
    }
    static IntVector multiply_add(WordVector a, WordVector b, IntVector c) {
        return settled(c + (IntVector)_mm256_madd_epi16((__m256i)a, (__m256i)b));
    }
#else
    static constexpr int kParts = 4;
    static WordVector weights(WordVector words, int part) {
        return (WordVector)((IntVector)(words << (24 - 8 * part)) >> 24);
    }
    static IntVector multiply_add(WordVector a, WordVector b, IntVector c) { return settled(c + (IntVector)(a * b)); }
#endif
    static WordVector broadcast(uint32_t a) { return WordVector{} + a; }
};

// ---- the tile -------------------------------------------------------------------------------------------------------

// Strides in elements. Tiles of six rows stand tile_stride apart: 6 * row_stride, unless A is packed by tiles.
template <class Element>
struct TileRows {
    const Element* data;
    int64_t row_stride, column_stride, tile_stride;
};

// What the caller wants in cache next: every step touches `ahead` and moves it on by `step` bytes.
struct Prefetch {
    const char* ahead;
    int64_t step;
};

// C[kRows, kPanelColumns] (+)= A[kRows, steps * kParts] B[steps, kPanelColumns]; strides in elements (words for B).
// Never inlined: alone in its function, it has all registers to itself.
template <class Arithmetic, int kRows>
__attribute__((noinline)) void tile(int64_t steps, const typename Arithmetic::Element* a, int64_t row_stride,
                                    int64_t column_stride, const void* b, int64_t b_stride, void* c, int64_t c_stride,
                                    bool accumulate, Prefetch prefetch) {
    using Vector = typename Arithmetic::Vector;
    using VectorInMemory = typename Arithmetic::VectorInMemory;
    Vector sums[kRows][kPanelVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < kPanelVectors; ++j) sums[r][j] = Vector{};
    const char* panel = static_cast<const char*>(b);
    for (int64_t step = 0; step < steps; ++step) {
        const WordVectorInMemory* words = reinterpret_cast<const WordVectorInMemory*>(panel);
        __builtin_prefetch(prefetch.ahead, 0, 2);
#pragma GCC unroll 4
        for (int part = 0; part < Arithmetic::kParts; ++part) {
            decltype(Arithmetic::weights(WordVector{}, 0)) weights[kPanelVectors];
#pragma GCC unroll 4
            for (int j = 0; j < kPanelVectors; ++j) weights[j] = Arithmetic::weights(words[j], part);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                const auto value = Arithmetic::broadcast(a[r * row_stride]);
#pragma GCC unroll 4
                for (int j = 0; j < kPanelVectors; ++j)
                    sums[r][j] = Arithmetic::multiply_add(value, weights[j], sums[r][j]);
            }
            a += column_stride;
        }
        panel += 4 * b_stride;
        prefetch.ahead += prefetch.step;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
        auto* out = reinterpret_cast<VectorInMemory*>(static_cast<char*>(c) + 4 * r * c_stride);
        // Added last: the rounding errors of a long sum grow with the length of its chains, here one block's.
#pragma GCC unroll 4
        for (int j = 0; j < kPanelVectors; ++j) {
            if (accumulate) sums[r][j] += out[j];
            out[j] = sums[r][j];
        }
    }
}

// The same for any number of rows, tile after tile.
template <class Arithmetic>
inline void tiles(int64_t rows, int64_t steps, TileRows<typename Arithmetic::Element> a, const void* b,
                  int64_t b_stride, void* c, int64_t c_stride, bool accumulate, Prefetch prefetch) {
    char* out = static_cast<char*>(c);
    const auto* left = a.data;
    for (; rows >= kTileRows; rows -= kTileRows) {
        tile<Arithmetic, kTileRows>(steps, left, a.row_stride, a.column_stride, b, b_stride, out, c_stride,
                                    accumulate, prefetch);
        left += a.tile_stride;
        out += 4 * kTileRows * c_stride;
        prefetch.ahead += steps * prefetch.step;
    }
#define BLIP3O_LAST_TILE(count)                                                                                     \
    case count:                                                                                                     \
        tile<Arithmetic, count>(steps, left, a.row_stride, a.column_stride, b, b_stride, out, c_stride, accumulate, \
                                prefetch);                                                                          \
        break;
    switch (rows) {
        BLIP3O_LAST_TILE(5)
        BLIP3O_LAST_TILE(4)
        BLIP3O_LAST_TILE(3)
        BLIP3O_LAST_TILE(2)
        BLIP3O_LAST_TILE(1)
        default: break;
    }
#undef BLIP3O_LAST_TILE
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
