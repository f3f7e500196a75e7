// The arithmetic ceiling of one core, measured: independent chains of fused multiply-adds that never leave the
// registers. Built by machine.py for the CPU at hand (-march=native), never installed.
#define _POSIX_C_SOURCE 199309L
#include <time.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));

// Latency times throughput of today's cores is 8 to 10 chains; 12 also fit the 16 registers of AVX2.
#define CHAINS 12

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int lanes(void) { return LANES; }

// GFLOP/s of one core over `iterations` rounds of CHAINS vector FMAs (two flops per lane).
double fma_probe(long iterations) {
    vec acc[CHAINS], factor, term;
    for (int lane = 0; lane < LANES; ++lane) {
        factor[lane] = 0.999f;  // the chains converge to 1: neither denormals nor infinities, which are slow
        term[lane] = 0.001f;
        for (int c = 0; c < CHAINS; ++c) acc[c][lane] = 0.5f + 0.01f * (float)c;
    }
    double start = seconds();
    for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; ++c) acc[c] = acc[c] * factor + term;
    }
    double elapsed = seconds() - start;
    float sum = 0;
    for (int c = 0; c < CHAINS; ++c)
        for (int lane = 0; lane < LANES; ++lane) sum += acc[c][lane];
    volatile float keep = sum;  // the work must have a use, or the compiler removes it
    (void)keep;
    return 2.0 * LANES * CHAINS * (double)iterations / elapsed * 1e-9;
}

// The same for products of bfloat16 summed in fp32 (a lane multiplies two pairs); 0 where the CPU has no such instruction.
double bf16_probe(long iterations) {
#if defined(__AVX512BF16__)
    __m512 acc[CHAINS];
    const __m512bh zero = (__m512bh)_mm512_setzero_si512(), one = (__m512bh)_mm512_set1_epi16(0x3f80);
#pragma GCC unroll 12
    for (int c = 0; c < CHAINS; ++c) acc[c] = _mm512_set1_ps(0.5f + 0.01f * (float)c);
    double start = seconds();
    for (long i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; ++c) {
            acc[c] = _mm512_dpbf16_ps(acc[c], zero, one);
            __asm__ volatile("" : "+v"(acc[c]));  // no round is to be left out, and no accumulator to leave its register
        }
    }
    double elapsed = seconds() - start;
    float sum = 0;
#pragma GCC unroll 12
    for (int c = 0; c < CHAINS; ++c) sum += _mm512_reduce_add_ps(acc[c]);
    volatile float keep = sum;
    (void)keep;
    return 4.0 * 16 * CHAINS * (double)iterations / elapsed * 1e-9;
#else
    (void)iterations;
    return 0.0;
#endif
}
