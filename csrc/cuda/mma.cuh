// Tensor cores and what feeds them, one instruction per function (compute capability 8.0 or newer).
//
// A warp multiplies a 16x16 by a 16x8 matrix of half-precision numbers and adds the product to a 16x8 matrix of fp32.
// Each thread holds a fragment of every matrix; with row = lane / 4 and pair = 2 * (lane % 4) they are
//     a   4 registers of 2 numbers:  (row, pair), (row + 8, pair), (row, pair + 8), (row + 8, pair + 8), each with its
//         right neighbour in the upper half
//     b   2 registers: (pair, row), (pair + 8, row), and the neighbours below in the upper halves
//     d   4 numbers:   (row, pair), (row, pair + 1), (row + 8, pair), (row + 8, pair + 1)
#pragma once

#include <cstdint>

#include "common.cuh"

#if !defined(__CUDACC__)
#include "mma_emulation.h"  // the same functions for the tests' host emulation
#else

namespace blip3o_fast {

// Two numbers rounded to the nearest, the first in the lower half.
template <Dtype T>
__device__ inline uint32_t pack(float low, float high) {
    uint32_t packed;
    if constexpr (T == Dtype::bf16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

template <Dtype T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (T == Dtype::bf16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of half-precision numbers. Lane i gives the address (in shared memory) of row i % 8, 16 bytes, of
// matrix i / 8, and receives of each matrix the numbers (row, pair) and (row, pair + 1).
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// The same, and each lane receives (pair, row) and (pair + 1, row): of the transposed matrices.
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Starts a copy of 16 aligned bytes into shared memory that does not wait for the bytes.
__device__ inline void copy_16_bytes(void* shared, const void* global) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

// Ends a batch of copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` batches of this thread are under way.
template <int pending>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace blip3o_fast

#endif
