// The forward of `qk_norm_rope`: a block per token and group, whose columns stay in registers from load to store.
#include "qk_norm_rope.cuh"

namespace blip3o_fast {

namespace {

template <int vectors>
__global__ void __launch_bounds__(norm_threads) qk_norm_rope_forward(const QkNormRopeArgs args) {
    pdl_wait();
    pdl_release();
    __shared__ float scratch[2][norm_threads / 32][1];
    const int of = blockIdx.x % args.groups, row = blockIdx.x / args.groups;
    const int sample = row / args.tokens, token = row % args.tokens;
    const NormGroup group = args.group(of);
    const int64_t x_at = sample * args.x.batch + token * args.x.token + group.first;
    float x[vectors][8], mean = 0.0f, rstd = 1.0f;
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
        const Columns own(group, i);
        load_eight(x[i], args.x.data, args.x.dtype, x_at + own.column, own.count);
    }
    if (group.weight != nullptr) {
        float sum[1] = {0.0f}, squares[1] = {0.0f};
#pragma unroll
        for (int i = 0; i < vectors; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[0] += x[i][j];
        sum_over_block(sum, scratch[0]);
        mean = sum[0] / group.columns;
#pragma unroll
        for (int i = 0; i < vectors; ++i) {
            const int count = Columns(group, i).count;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                x[i][j] -= mean;
                if (j < count) squares[0] += x[i][j] * x[i][j];
            }
        }
        sum_over_block(squares, scratch[1]);
        rstd = 1.0f / sqrtf(squares[0] / group.columns + args.eps);
    }
    const int64_t y_at = int64_t{row} * args.columns + group.first;
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
        const Columns own(group, i);
        if (own.count == 0) continue;
        if (group.weight != nullptr) {
            float weight[8], bias[8];
            const Eight raw_weight = fetch_eight(group.weight, group.weight_dtype, own.column, own.count);
            const Eight raw_bias = fetch_eight(group.bias, group.bias_dtype, own.column, own.count);
            unpack_eight(weight, raw_weight, group.weight_dtype);
            unpack_eight(bias, raw_bias, group.bias_dtype);
#pragma unroll
            for (int j = 0; j < 8; ++j) x[i][j] = x[i][j] * rstd * weight[j] + bias[j];
        }
        if (args.rope != nullptr) turn(x[i], args, token, own.column, 1.0f);
        store_eight(x[i], args.y.data, args.y.dtype, y_at + own.column, own.count);
    }
    if (threadIdx.x == 0) {
        const int64_t statistic = int64_t{row} * args.all_groups + args.first_group + of;
        args.mean[statistic] = mean;
        args.rstd[statistic] = rstd;
    }
}

}  // namespace

void launch_norm_forward(const Launcher& launcher, const QkNormRopeArgs& args) {
    const int widest = widest_group(args), threads = threads_of_block(widest);
    const int64_t blocks = int64_t{args.rows} * args.groups;
    switch (vectors_of_thread(widest)) {
        case 1: return launcher(qk_norm_rope_forward<1>, blocks, threads, args);
        case 2: return launcher(qk_norm_rope_forward<2>, blocks, threads, args);
        default: return launcher(qk_norm_rope_forward<4>, blocks, threads, args);
    }
}

}  // namespace blip3o_fast
