// `flow_matching_loss`: a warp per token, whose noise is made in registers where only a seed is given. A block leaves
// the sums over its tokens, and one more block adds those up.
#include "flow_matching_loss.h"

#include "checks.h"
#include "philox.cuh"
#include "rows.cuh"

namespace blip3o_fast {

namespace {

constexpr int loss_warps = 8, loss_threads = 32 * loss_warps, scale_threads = 256;
// A block's sums: squared error, squared target, cosine, |error|, |pred|, |target|; a row of `partial` has room for 8.
constexpr int sum_count = 6, sum_places = 8;

struct LossArgs {
    Rows pred, data, noise;
    const float* sigma;
    const int64_t* seed;  // or null
    int64_t sigma_stride, seed_stride;
    float *dpred, *partial;  // dpred may be null
    int64_t all_tokens, tokens_of_block;
    int tokens, width;
    bool epsilon, cosine;
    double span;
    float error_factor, norm_factor;
};

// target = of_data * data + of_noise * noise. One coefficient multiplies a whole sample, so its error does not average
// out: it is put together in fp64 and rounded once.
struct Target {
    float of_data = 0.0f, of_noise = 1.0f;

    __device__ Target(const LossArgs& args, int64_t sample) {
        if (args.epsilon) return;
        of_data = -1.0f;
        of_noise = static_cast<float>(args.span);
        if (!args.cosine) return;
        const Angle half = right_angles(args.sigma[sample * args.sigma_stride]);  // of pi * sigma
        const double near = static_cast<double>(half.head) + static_cast<double>(half.rest);
        const double far = 1.0 - static_cast<double>(half.versed);
        const bool odd = (half.turns & 1) != 0;
        const double sin = odd ? far : near, cos = odd ? -near : far;
        of_data = static_cast<float>(-3.141592653589793 * sin * cos);
        of_noise = static_cast<float>(args.span * 1.5707963267948966 * cos);
    }
};

// Eight neighbours of a token's noise; 0 beyond `count`.
template <bool seeded>
__device__ void load_noise(float (&to)[8], const LossArgs& args, const Stream& stream, int64_t sample, int64_t token,
                           int column, int count) {
    if (!seeded) {
        load_eight(to, args.noise.data, args.noise.dtype, args.noise.at(sample, token) + column, count);
        return;
    }
    const int64_t element = token * args.width + column;
    if (args.width % 4 == 0) {
        stream.four(element >> 2, to[0], to[1], to[2], to[3]);
        stream.four((element >> 2) + 1, to[4], to[5], to[6], to[7]);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = stream.one(element + i);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = i < count ? to[i] : 0.0f;
}

template <bool seeded>
__global__ void __launch_bounds__(loss_threads) flow_matching_loss_forward(LossArgs args) {
    pdl_wait();
    pdl_release();
    __shared__ float scratch[loss_warps][sum_count];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t first = blockIdx.x * args.tokens_of_block, end = min(first + args.tokens_of_block, args.all_tokens);
    float totals[sum_count] = {};
    for (int64_t row = first + warp; row < end; row += loss_warps) {
        const int64_t sample = row / args.tokens, token = row % args.tokens;
        const Target target(args, sample);
        const Stream stream(seeded ? args.seed[0] : 0, seeded ? args.seed[args.seed_stride] : 0, sample);
        // squared error, squared target, pred * target, squared pred
        float sums[4] = {};
        for (int column = lane * 8; column < args.width; column += 256) {
            const int count = args.width - column;
            const Eight raw_pred =
                fetch_eight(args.pred.data, args.pred.dtype, args.pred.at(sample, token) + column, count);
            float pred[8], goal[8], noise[8];
            if (!args.epsilon)
                load_eight(goal, args.data.data, args.data.dtype, args.data.at(sample, token) + column, count);
            load_noise<seeded>(noise, args, stream, sample, token, column, count);
            unpack_eight(pred, raw_pred, args.pred.dtype);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                goal[i] = args.epsilon ? noise[i] : target.of_data * goal[i] + target.of_noise * noise[i];
                const float error = pred[i] - goal[i];
                sums[0] += error * error;
                sums[1] += goal[i] * goal[i];
                sums[2] += pred[i] * goal[i];
                sums[3] += pred[i] * pred[i];
                goal[i] = error * args.error_factor;
            }
            if (args.dpred != nullptr) store_eight(goal, args.dpred, Dtype::f32, row * args.width + column, count);
        }
        warp_sums(sums);
        const float error_norm = sqrtf(sums[0]), target_norm = sqrtf(sums[1]), pred_norm = sqrtf(sums[3]);
        totals[0] += sums[0];
        totals[1] += sums[1];
        totals[2] += sums[2] / (fmaxf(pred_norm, 1e-8f) * fmaxf(target_norm, 1e-8f));
        totals[3] += error_norm;
        totals[4] += pred_norm;
        totals[5] += target_norm;
        if (args.dpred == nullptr || args.norm_factor == 0.0f || !(pred_norm > 0.0f)) continue;
        const float factor = args.norm_factor / pred_norm;
        for (int column = lane * 8; column < args.width; column += 256) {
            const int count = args.width - column;
            const int64_t at = row * args.width + column;
            float pred[8], dpred[8];
            load_eight(pred, args.pred.data, args.pred.dtype, args.pred.at(sample, token) + column, count);
            load_eight(dpred, args.dpred, Dtype::f32, at, count);
#pragma unroll
            for (int i = 0; i < 8; ++i) dpred[i] += pred[i] * factor;
            store_eight(dpred, args.dpred, Dtype::f32, at, count);
        }
    }
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < sum_count; ++i) scratch[warp][i] = totals[i];
    }
    __syncthreads();
    if (threadIdx.x >= sum_count) return;
    float sum = 0.0f;
    for (int i = 0; i < loss_warps; ++i) sum += scratch[i][threadIdx.x];
    args.partial[blockIdx.x * sum_places + threadIdx.x] = sum;
}

// One block: the metrics in their order, and the loss.
__global__ void __launch_bounds__(loss_threads)
    flow_matching_loss_finish(const float* partial, int64_t blocks, float* loss, float* metrics, float per_element,
                              float per_token, float weight) {
    pdl_wait();
    pdl_release();
    __shared__ float scratch[2][32];
    float totals[sum_count] = {};
    for (int64_t block = threadIdx.x; block < blocks; block += loss_threads)
#pragma unroll
        for (int i = 0; i < sum_count; ++i) totals[i] += partial[block * sum_places + i];
#pragma unroll
    for (int i = 0; i < sum_count; ++i) totals[i] = block_sum(totals[i], scratch[i % 2]);
    if (threadIdx.x != 0) return;
    const float mse = totals[0] * per_element, power = totals[1] * per_element, pred_norm = totals[4] * per_token;
    metrics[0] = mse;
    metrics[1] = totals[2] * per_token;
    metrics[2] = totals[3] * per_token;
    metrics[3] = pred_norm;
    metrics[4] = totals[5] * per_token;
    metrics[5] = 10.0f * log10f((power + 1e-20f) / (mse + 1e-20f));
    metrics[6] = pred_norm * weight;
    *loss = mse + pred_norm * weight;
}

__global__ void __launch_bounds__(scale_threads)
    flow_matching_loss_scale(const void* dloss, Dtype dloss_dtype, const float* dpred, void* scaled, Dtype dtype,
                             int64_t elements) {
    pdl_wait();
    pdl_release();
    const int64_t first = (int64_t{blockIdx.x} * scale_threads + threadIdx.x) * 8;
    if (first >= elements) return;
    const int count = static_cast<int>(min(elements - first, int64_t{8}));
    const float factor = load_float(dloss, dloss_dtype, 0);
    float values[8];
    load_eight(values, dpred, Dtype::f32, first, count);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= factor;
    store_eight(values, scaled, dtype, first, count);
}

void check_fp32(const View& view, std::initializer_list<int64_t> sizes) {
    check_whole(view, sizes);
    check_dtype(view, Dtype::f32);
}

}  // namespace

void flow_matching_loss_fwd(const Launcher& launcher, const View& pred, const View& data, const View& sigma,
                            const View& noise, const View& seed, const View& loss, const View& metrics,
                            const View& dpred, const View& partial, bool epsilon, double sigma_min, double sigma_max,
                            bool cosine, double regularization_weight) {
    check_rank(pred, 3);
    const int64_t batch = pred.size[0], tokens = pred.size[1], width = pred.size[2], limit = int64_t{1} << 31;
    if (tokens >= limit || width >= limit / 2) refuse(pred, "of fewer tokens or channels");
    for (const View* view : {&pred, &data}) check_rows(*view, {batch, tokens, width});
    check_shape(sigma, {batch});
    check_dtype(sigma, Dtype::f32);
    if (seed.present() == noise.present()) refuse(seed, "given where noise is not, and absent where it is");
    if (noise.present()) check_rows(noise, {batch, tokens, width});
    if (seed.present()) {
        check_shape(seed, {2});
        check_dtype(seed, Dtype::i64);
    }
    check_fp32(loss, {});
    check_fp32(metrics, {7});
    if (dpred.present()) check_fp32(dpred, {batch, tokens, width});
    check_rank(partial, 2);
    check_fp32(partial, {partial.size[0], sum_places});
    const int64_t elements = pred.numel(), blocks = partial.size[0];
    const int64_t all_tokens = elements > 0 ? batch * tokens : 0;
    if (blocks > all_tokens || (blocks == 0) != (all_tokens == 0)) refuse(partial, "of 1 block up to one per token");
    const double per_element = 1.0 / static_cast<double>(elements > 0 ? elements : 1);
    const double per_token = 1.0 / static_cast<double>(all_tokens > 0 ? all_tokens : 1);
    if (blocks > 0) {
        LossArgs args = {};
        args.pred = rows_of(pred);
        args.data = rows_of(data);
        args.noise = rows_of(noise);
        args.sigma = sigma.as<const float>();
        args.seed = seed.present() ? seed.as<const int64_t>() : nullptr;
        args.sigma_stride = sigma.stride[0];
        args.seed_stride = seed.stride[0];
        args.dpred = dpred.present() ? dpred.as<float>() : nullptr;
        args.partial = partial.as<float>();
        args.all_tokens = all_tokens;
        args.tokens_of_block = (all_tokens + blocks - 1) / blocks;
        args.tokens = static_cast<int>(tokens);
        args.width = static_cast<int>(width);
        args.epsilon = epsilon;
        args.cosine = cosine;
        args.span = sigma_max - sigma_min;
        args.error_factor = static_cast<float>(2.0 * per_element);
        args.norm_factor = static_cast<float>(regularization_weight * per_token);
        const auto kernel = seed.present() ? flow_matching_loss_forward<true> : flow_matching_loss_forward<false>;
        launcher(kernel, blocks, loss_threads, args);
    }
    launcher(flow_matching_loss_finish, 1, loss_threads, partial.as<const float>(), blocks, loss.as<float>(),
             metrics.as<float>(), static_cast<float>(per_element), static_cast<float>(per_token),
             static_cast<float>(regularization_weight));
}

void flow_matching_loss_bwd(const Launcher& launcher, const View& dloss, const View& dpred, const View& scaled) {
    check_shape(dloss, {});
    check_float(dloss);
    check_rank(dpred, 3);
    check_fp32(dpred, {dpred.size[0], dpred.size[1], dpred.size[2]});
    check_whole(scaled, {dpred.size[0], dpred.size[1], dpred.size[2]});
    const int64_t elements = dpred.numel(), of_block = scale_threads * 8;
    launcher(flow_matching_loss_scale, (elements + of_block - 1) / of_block, scale_threads, dloss.data, dloss.dtype,
             dpred.as<const float>(), scaled.data, scaled.dtype, elements);
}

}  // namespace blip3o_fast
