// Some blocks own 32 columns of dweight and walk over all samples; the others own columns of one sample's dmod. The
// sums are long and few: they are kept in fp64 and rounded once.
#include "sample_sums.cuh"

namespace blip3o_fast {

namespace {

constexpr int columns = 32, lanes = 32, sum_threads = columns * lanes;

__device__ double sum_of_sample(const SampleSums& sums, const Shape& shape, int64_t sample, int column) {
    const float* row = sums.partial + sample * shape.chunks * shape.width + column;
    double sum = 0.0;
    for (int i = 0; i < shape.chunks; ++i) sum += row[int64_t{i} * shape.width];
    return sum;
}

// Every 32nd sample in one warp, and then the 32 sums.
__device__ void add_up_weight(const SampleSums& sums, const Shape& shape, int block,
                              double (&scratch)[lanes][columns + 1]) {
    const int lane = threadIdx.x / columns, offset = threadIdx.x % columns, column = block * columns + offset;
    double sum = 0.0;
    if (column < shape.width)
        for (int64_t sample = lane; sample < shape.batch; sample += lanes) {
            float factor = 1.0f;
            if (sums.kind != Modulation::none) {
                const float mod = load_float(sums.mod.data, sums.mod.dtype, sums.mod.at(sample, 0) + column);
                factor = sums.kind == Modulation::gate ? tanhf(mod) : 1.0f + mod;
            }
            sum += sum_of_sample(sums, shape, sample, column) * factor;
        }
    scratch[lane][offset] = sum;
    __syncthreads();
    if (lane != 0 || column >= shape.width) return;
    for (int i = 1; i < lanes; ++i) sum += scratch[i][offset];
    store_float(sums.dweight.data, sums.dweight.dtype, column, static_cast<float>(sum));
}

__device__ void add_up_mod(const SampleSums& sums, const Shape& shape, int block) {
    const int per_sample = (shape.width + sum_threads - 1) / sum_threads;
    const int64_t sample = block / per_sample;
    const int column = block % per_sample * sum_threads + static_cast<int>(threadIdx.x);
    if (column >= shape.width) return;
    float factor = load_float(sums.weight.data, sums.weight.dtype, column);
    if (sums.kind == Modulation::gate) {
        const float t = tanhf(load_float(sums.mod.data, sums.mod.dtype, sums.mod.at(sample, 0) + column));
        factor *= 1.0f - t * t;
    }
    const auto sum = static_cast<float>(sum_of_sample(sums, shape, sample, column) * factor);
    store_float(sums.dmod.data, sums.dmod.dtype, sample * shape.width + column, sum);
}

__device__ void add_up(const SampleSums& sums, const Shape& shape, int block, int weight_blocks,
                       double (&scratch)[lanes][columns + 1]) {
    if (block < weight_blocks)
        add_up_weight(sums, shape, block, scratch);
    else
        add_up_mod(sums, shape, block - weight_blocks);
}

// One block per multiprocessor is enough: for two, ptxas would spill.
__global__ void __launch_bounds__(sum_threads, 1)
    sample_sums(SampleSums first, SampleSums second, Shape shape, int blocks_of_first, int weight_blocks) {
    pdl_wait();
    pdl_release();
    __shared__ double scratch[lanes][columns + 1];
    const int block = static_cast<int>(blockIdx.x);
    // not a reference to one of the two: the parameters would have to be copied to where they have addresses
    if (block < blocks_of_first)
        add_up(first, shape, block, weight_blocks, scratch);
    else
        add_up(second, shape, block - blocks_of_first, weight_blocks, scratch);
}

}  // namespace

void launch_sample_sums(const Launcher& launcher, const Shape& shape, const SampleSums& first,
                        const SampleSums& second) {
    const int weight_blocks = (shape.width + columns - 1) / columns;
    const auto blocks = [&](const SampleSums& sums, bool given) -> int64_t {
        if (!given) return 0;
        const int64_t per_sample = (shape.width + sum_threads - 1) / sum_threads;
        return weight_blocks + (sums.kind == Modulation::none ? 0 : shape.batch * per_sample);
    };
    const int64_t own = blocks(first, true), all = own + blocks(second, second.dweight.data != nullptr);
    launcher(sample_sums, all, sum_threads, first, second, shape, own, weight_blocks);
}

}  // namespace blip3o_fast
