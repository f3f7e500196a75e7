// The host's part of `qk_norm_rope`: what is refused, and the kernel that finishes the gradients of weights and biases.
#include "qk_norm_rope.h"

#include "checks.h"
#include "qk_norm_rope.cuh"

namespace blip3o_fast {

namespace {

constexpr int finish_columns = 32, finish_lanes = 8;

// A block sums 32 columns of partial [chunks, columns], every eighth chunk in one warp, and then the eight sums.
__global__ void __launch_bounds__(finish_columns* finish_lanes)
    qk_norm_rope_finish(const float* partial, int64_t chunks, int columns, void* daffine, Dtype dtype) {
    pdl_wait();
    pdl_release();
    __shared__ double sums[finish_lanes][finish_columns];
    const int lane = threadIdx.x / finish_columns, offset = threadIdx.x % finish_columns;
    const int column = blockIdx.x * finish_columns + offset;
    double sum = 0.0;
    if (column < columns)
        for (int64_t chunk = lane; chunk < chunks; chunk += finish_lanes) sum += partial[chunk * columns + column];
    sums[lane][offset] = sum;
    __syncthreads();
    if (lane != 0 || column >= columns) return;
    for (int i = 1; i < finish_lanes; ++i) sum += sums[i][offset];
    store_float(daffine, dtype, column, static_cast<float>(sum));
}

// The group after all before it; weight and bias may both be absent.
void add_group(QkNormRopeArgs& args, const View& weight, const View* bias, int64_t heads) {
    if (heads == 0) return;
    NormGroup& group = args.groups == 0 ? args.group0 : args.groups == 1 ? args.group1 : args.group2;
    if (heads < 1 || heads > qk_norm_rope_columns / args.head_dim)
        throw std::invalid_argument("heads must be 1 to " + std::to_string(qk_norm_rope_columns / args.head_dim) +
                                    " of " + std::to_string(args.head_dim) + " columns per group, got " +
                                    std::to_string(heads));
    const int64_t columns = heads * args.head_dim;
    if (args.groups > 0) group.first = args.group(args.groups - 1).first + args.group(args.groups - 1).columns;
    group.columns = static_cast<int>(columns);
    ++args.groups;
    if (!weight.present()) return;
    check_whole(weight, {columns});
    group.weight = weight.data;
    group.weight_dtype = weight.dtype;
    if (bias == nullptr) return;
    check_whole(*bias, {columns});
    group.bias = bias->data;
    group.bias_dtype = bias->dtype;
}

// Everything but the groups and the tensors of one direction.
QkNormRopeArgs checked(const View& x, const View& rope, const View& mean, const View& rstd, int64_t first_group,
                       int64_t first_head, int64_t head_dim) {
    check_rank(x, 3);
    const int64_t batch = x.size[0], tokens = x.size[1], columns = x.size[2], limit = int64_t{1} << 31;
    check_rows(x, {batch, tokens, columns});
    if (head_dim < 2 || head_dim % 2 != 0 || head_dim > qk_norm_rope_columns)
        throw std::invalid_argument("head_dim must be even and at most " + std::to_string(qk_norm_rope_columns) +
                                    ", got " + std::to_string(head_dim));
    if (columns % head_dim != 0) refuse(x, "of heads of " + std::to_string(head_dim) + " columns");
    check_rank(mean, 3);
    for (const View* statistic : {&mean, &rstd}) {
        check_whole(*statistic, {batch, tokens, mean.size[2]});
        check_dtype(*statistic, Dtype::f32);
    }
    if (first_group < 0 || first_group >= mean.size[2]) refuse(mean, "of more groups than those before the first");
    if (first_head < 0 || first_head >= columns / head_dim) refuse(x, "of more heads than those before the first");
    if (batch >= limit || tokens >= limit || batch * tokens >= limit / group_limit || columns >= limit / 2)
        refuse(x, "of fewer tokens or columns");
    if (rope.present()) {
        check_whole(rope, {tokens, head_dim / 2, 2});
        check_dtype(rope, Dtype::f32);
    }
    QkNormRopeArgs args;
    args.x = {x.data, x.dtype, x.stride[0], x.stride[1]};
    args.rope = rope.present() ? rope.as<const float>() : nullptr;
    args.mean = mean.as<float>();
    args.rstd = rstd.as<float>();
    args.first_group = static_cast<int>(first_group);
    args.all_groups = static_cast<int>(mean.size[2]);
    args.rows = static_cast<int>(batch * tokens);
    args.tokens = static_cast<int>(tokens);
    args.columns = static_cast<int>(columns);
    args.head_dim = static_cast<int>(head_dim);
    args.group0.first = static_cast<int>(first_head * head_dim);
    return args;
}

void check_groups(const QkNormRopeArgs& args, const View& x, const View& mean) {
    const NormGroup last = args.group(args.groups > 0 ? args.groups - 1 : 0);
    if (args.groups == 0 || last.first + last.columns > args.columns) refuse(x, "as wide as its groups of heads");
    if (args.first_group + args.groups > args.all_groups) refuse(mean, "as large as the number of groups");
}

}  // namespace

void qk_norm_rope_fwd(const Launcher& launcher, const View& x, const View& weight0, const View& weight1,
                      const View& weight2, const View& bias0, const View& bias1, const View& bias2, const View& rope,
                      const View& y, const View& mean, const View& rstd, int64_t heads0, int64_t heads1,
                      int64_t heads2, int64_t first_group, int64_t first_head, int64_t head_dim, double eps) {
    QkNormRopeArgs args = checked(x, rope, mean, rstd, first_group, first_head, head_dim);
    add_group(args, weight0, &bias0, heads0);
    add_group(args, weight1, &bias1, heads1);
    add_group(args, weight2, &bias2, heads2);
    check_groups(args, x, mean);
    check_whole(y, {x.size[0], x.size[1], x.size[2] / head_dim, head_dim});
    args.y = {y.data, y.dtype, 0, 0};
    args.eps = static_cast<float>(eps);
    if (args.rows > 0) launch_norm_forward(launcher, args);
}

void qk_norm_rope_bwd(const Launcher& launcher, const View& dy, const View& x, const View& weight0,
                      const View& weight1, const View& weight2, const View& rope, const View& mean, const View& rstd,
                      const View& dx, const View& partial, int64_t heads0, int64_t heads1, int64_t heads2,
                      int64_t first_group, int64_t first_head, int64_t head_dim) {
    QkNormRopeArgs args = checked(x, rope, mean, rstd, first_group, first_head, head_dim);
    add_group(args, weight0, nullptr, heads0);
    add_group(args, weight1, nullptr, heads1);
    add_group(args, weight2, nullptr, heads2);
    check_groups(args, x, mean);
    check_rows(dy, {x.size[0], x.size[1], x.size[2] / head_dim, head_dim});
    if (dy.size[2] > 1 && dy.stride[2] != head_dim) refuse(dy, "of heads that are neighbours in memory");
    check_whole(dx, {x.size[0], x.size[1], x.size[2]});
    args.dy = {dy.data, dy.dtype, dy.stride[0], dy.stride[1]};
    args.dx = {dx.data, dx.dtype, 0, 0};
    if (args.rows == 0) return;
    int64_t chunks = args.rows;
    if (partial.present()) {
        check_rank(partial, 3);
        check_whole(partial, {partial.size[0], 2, x.size[2]});
        check_dtype(partial, Dtype::f32);
        chunks = partial.size[0];
        if (chunks < 1 || chunks > args.rows) refuse(partial, "of 1 to " + std::to_string(args.rows) + " chunks");
        args.partial = partial.as<float>();
    }
    args.rows_of_chunk = static_cast<int>((args.rows + chunks - 1) / chunks);
    launch_norm_backward(launcher, args, chunks);
}

void qk_norm_rope_bwd_finish(const Launcher& launcher, const View& partial, const View& daffine) {
    check_rank(partial, 3);
    check_whole(partial, {partial.size[0], 2, partial.size[2]});
    check_dtype(partial, Dtype::f32);
    check_whole(daffine, {2, partial.size[2]});
    if (daffine.numel() >= int64_t{1} << 31) refuse(daffine, "of fewer than 2^30 columns");
    const int columns = static_cast<int>(daffine.numel());
    if (columns == 0) return;
    launcher(qk_norm_rope_finish, (columns + finish_columns - 1) / finish_columns, finish_columns * finish_lanes,
             partial.as<const float>(), partial.size[0], columns, daffine.data, daffine.dtype);
}

}  // namespace blip3o_fast
