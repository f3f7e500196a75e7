// The backward of `qk_norm_rope`: a block per chunk of tokens and group, which keeps what its tokens add to dweight and
// dbias in registers and leaves it as one row of partial sums.
#include "qk_norm_rope.cuh"

namespace blip3o_fast {

namespace {

// Eight columns of a token and its statistics as memory has them: all are asked for before the first is needed.
struct Token {
    Eight dy, x;
    float mean, rstd;
};

__device__ Token fetch_token(const QkNormRopeArgs& args, const NormGroup& group, int of, const Columns& own, int row) {
    const int column = group.first + own.column;
    const auto fetch = [&](const NormRows& rows) {
        const int64_t at = row / args.tokens * rows.batch + row % args.tokens * rows.token + column;
        return fetch_eight(rows.data, rows.dtype, at, own.count);
    };
    Token raw = {};
    raw.dy = fetch(args.dy);
    if (group.weight == nullptr) return raw;
    raw.x = fetch(args.x);
    const int64_t statistic = int64_t{row} * args.all_groups + args.first_group + of;
    raw.mean = args.mean[statistic];
    raw.rstd = args.rstd[statistic];
    return raw;
}

template <int vectors>
__global__ void __launch_bounds__(norm_threads, vectors == 1 ? 3 : 1) qk_norm_rope_backward(const QkNormRopeArgs args) {
    pdl_wait();
    pdl_release();
    __shared__ float scratch[2][norm_threads / 32][2];
    const int of = blockIdx.x % args.groups, chunk = blockIdx.x / args.groups;
    const NormGroup group = args.group(of);
    const bool normed = group.weight != nullptr;
    const int first = chunk * args.rows_of_chunk;
    const int end = first + args.rows_of_chunk < args.rows ? first + args.rows_of_chunk : args.rows;
    float weight[vectors][8], dweight[vectors][8] = {}, dbias[vectors][8] = {};
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
        const Columns own(group, i);
        if (normed) load_eight(weight[i], group.weight, group.weight_dtype, own.column, own.count);
    }
    for (int row = first; row < end; ++row) {
        float dz[vectors][8], xhat[vectors][8], rstd = 1.0f, sums[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < vectors; ++i) {
            const Columns own(group, i);
            const Token token = fetch_token(args, group, of, own, row);
            unpack_eight(dz[i], token.dy, args.dy.dtype);
            if (args.rope != nullptr && own.count > 0) turn(dz[i], args, row % args.tokens, own.column, -1.0f);
            if (!normed) continue;
            unpack_eight(xhat[i], token.x, args.x.dtype);
            rstd = token.rstd;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                // dz and weight are zero beyond the group, whatever xhat is there
                xhat[i][j] = (xhat[i][j] - token.mean) * rstd;
                dweight[i][j] += dz[i][j] * xhat[i][j];
                dbias[i][j] += dz[i][j];
                dz[i][j] *= weight[i][j];
                sums[0] += dz[i][j];
                sums[1] += dz[i][j] * xhat[i][j];
            }
        }
        if (normed) {
            sum_over_block(sums, scratch[(row - first) % 2]);
            const float mean_g = sums[0] / group.columns, along = sums[1] / group.columns;
#pragma unroll
            for (int i = 0; i < vectors; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) dz[i][j] = rstd * (dz[i][j] - mean_g - xhat[i][j] * along);
        }
#pragma unroll
        for (int i = 0; i < vectors; ++i) {
            const Columns own(group, i);
            const int64_t dx_at = int64_t{row} * args.columns + group.first + own.column;
            store_eight(dz[i], args.dx.data, args.dx.dtype, dx_at, own.count);
        }
    }
    if (args.partial == nullptr) return;
    float* partial = args.partial + int64_t{chunk} * 2 * args.columns + group.first;
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
        const Columns own(group, i);
        store_eight(dweight[i], partial, Dtype::f32, own.column, own.count);
        store_eight(dbias[i], partial, Dtype::f32, args.columns + own.column, own.count);
    }
}

}  // namespace

void launch_norm_backward(const Launcher& launcher, const QkNormRopeArgs& args, int64_t chunks) {
    const int widest = widest_group(args), threads = threads_of_block(widest);
    const int64_t blocks = chunks * args.groups;
    switch (vectors_of_thread(widest)) {
        case 1: return launcher(qk_norm_rope_backward<1>, blocks, threads, args);
        case 2: return launcher(qk_norm_rope_backward<2>, blocks, threads, args);
        default: return launcher(qk_norm_rope_backward<4>, blocks, threads, args);
    }
}

}  // namespace blip3o_fast
