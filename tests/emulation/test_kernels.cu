// Kernels that test the emulation: right ones, and ones that are wrong in one way each.
#include "common.cuh"
#include "mma.cuh"

namespace blip3o_fast {

namespace {

__global__ void sum_blocks(const float* x, float* sums, float* largest) {
    pdl_wait();
    __shared__ float scratch[32];
    const float value = x[blockIdx.x * blockDim.x + threadIdx.x];
    const float sum = block_sum(value, scratch);
    float most = value;
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(whole_warp, most, step));
    sums[blockIdx.x * blockDim.x + threadIdx.x] = sum;
    if (threadIdx.x % 32 == 0) largest[(blockIdx.x * blockDim.x + threadIdx.x) / 32] = most;
}

// Reverses a block by way of shared memory.
template <bool with_barrier>
__global__ void reverse(const float* x, float* y) {
    pdl_wait();
    auto* shared = dynamic_shared<float>();
    shared[threadIdx.x] = x[threadIdx.x];
    if (with_barrier) __syncthreads();
    y[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// Reverses a warp; shuffles do not order memory, __syncwarp does.
template <bool ordered>
__global__ void reverse_warp(const float* x, float* y) {
    pdl_wait();
    __shared__ float shared[32];
    shared[threadIdx.x] = x[threadIdx.x];
    if (ordered)
        __syncwarp();
    else
        __any_sync(whole_warp, 1);
    y[threadIdx.x] = shared[31 - threadIdx.x];
}

__global__ void never_written(const float*, float* y) {
    pdl_wait();
    __shared__ float shared[32];
    y[threadIdx.x] = shared[threadIdx.x];
}

__global__ void without_wait(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }

__global__ void divergent_barrier(const float* x, float* y) {
    pdl_wait();
    if (threadIdx.x >= 32) return;
    __syncthreads();
    y[threadIdx.x] = x[threadIdx.x];
}

__global__ void divergent_shuffle(const float* x, float* y) {
    pdl_wait();
    y[threadIdx.x] = threadIdx.x == 5 ? 0.0f : __shfl_xor_sync(whole_warp, x[threadIdx.x], 1);
}

__global__ void misaligned(const float* x, float* y) {
    pdl_wait();
    reinterpret_cast<float4*>(y)[threadIdx.x] = reinterpret_cast<const float4*>(x + 1)[threadIdx.x];
}

__global__ void shuffles_and_votes(const float* x, float* y) {
    pdl_wait();
    const int lane = threadIdx.x;
    const float value = x[lane];
    y[lane] = __shfl_sync(whole_warp, value, 3);
    y[32 + lane] = __shfl_up_sync(whole_warp, value, 2);
    y[64 + lane] = __shfl_down_sync(whole_warp, value, 5);
    y[96 + lane] = __uint_as_float(__ballot_sync(whole_warp, value > 0));
    y[128 + lane] = (__any_sync(whole_warp, value > 0) ? 1 : 0) + (__all_sync(whole_warp, value > 0) ? 2 : 0);
}

// y [16, 8] += a [16, 16] * b [16, 8], half precision, by way of asynchronous copies and ldmatrix.
template <Dtype T, bool wait>
__global__ void multiply(const uint16_t* a, const uint16_t* b, float* y) {
    pdl_wait();
    __shared__ uint4 left[32], right[16];
    const int lane = threadIdx.x, row = lane / 4, pair = lane % 4 * 2;
    copy_16_bytes(left + lane, a + lane * 8);
    if (lane < 16) copy_16_bytes(right + lane, b + lane * 8);
    commit_copies();
    if (wait) wait_for_copies<0>();
    __syncwarp();
    uint32_t fragment[4], across[4];
    load_matrices(fragment, left + lane % 16 * 2 + lane / 16);
    load_matrices_transposed(across, right + lane % 16);
    float d[4] = {y[row * 8 + pair], y[row * 8 + pair + 1], y[(row + 8) * 8 + pair], y[(row + 8) * 8 + pair + 1]};
    mma<T>(d, fragment, across[0], across[1]);
    y[row * 8 + pair] = d[0];
    y[row * 8 + pair + 1] = d[1];
    y[(row + 8) * 8 + pair] = d[2];
    y[(row + 8) * 8 + pair + 1] = d[3];
}

__global__ void round_trip(const float* x, uint16_t* bf16, uint16_t* f16, float* wide) {
    pdl_wait();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    bf16[i] = float_to_bf16(x[i]);
    f16[i] = float_to_f16(x[i]);
    wide[i] = f16_to_float(f16[i]);
}

using Plain = void (*)(const float*, float*);

std::string problem;

template <class F>
const char* told(F run) {
    problem.clear();
    try {
        run();
    } catch (const std::exception& error) {
        problem = error.what();
    }
    return problem.c_str();
}

}  // namespace

}  // namespace blip3o_fast

using namespace blip3o_fast;

#define BLIP3O_TEST extern "C" __attribute__((visibility("default"))) const char*

BLIP3O_TEST sum_of_blocks(const float* x, float* sums, float* largest, int blocks, int threads) {
    return told([&] { Launcher()(sum_blocks, blocks, threads, x, sums, largest); });
}

BLIP3O_TEST plain(const char* name, const float* x, float* y, int threads) {
    const std::pair<const char*, Plain> kernels[] = {
        {"reverse", reverse<true>},
        {"reverse_without_barrier", reverse<false>},
        {"reverse_warp", reverse_warp<true>},
        {"reverse_warp_by_votes", reverse_warp<false>},
        {"never_written", never_written},
        {"without_wait", without_wait},
        {"divergent_barrier", divergent_barrier},
        {"divergent_shuffle", divergent_shuffle},
        {"misaligned", misaligned},
        {"shuffles_and_votes", shuffles_and_votes},
    };
    return told([&] {
        for (const auto& [known, kernel] : kernels)
            if (std::string(known) == name) return Launcher().with_shared(threads * 4)(kernel, 1, threads, x, y);
        throw std::invalid_argument("no such kernel");
    });
}

BLIP3O_TEST product(const uint16_t* a, const uint16_t* b, float* y, int bf16, int wait) {
    return told([&] {
        auto kernel = bf16 ? (wait ? multiply<Dtype::bf16, true> : multiply<Dtype::bf16, false>)
                           : (wait ? multiply<Dtype::f16, true> : multiply<Dtype::f16, false>);
        Launcher()(kernel, 1, 32, a, b, y);
    });
}

BLIP3O_TEST conversions(const float* x, uint16_t* bf16, uint16_t* f16, float* wide, int blocks) {
    return told([&] { Launcher()(round_trip, blocks, 128, x, bf16, f16, wide); });
}
