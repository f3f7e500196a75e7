#include "qk_norm_rope.h"

#include "column_sums.h"
#include "head_groups.h"
#include "reduce.h"
#include "rope.h"
#include "rows.h"
#include "scratch.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

namespace {

// ---- forward -------------------------------------------------------------------------------------------------------

struct Moments {
    float mean, rstd;
};

Moments moments(const float* x, int64_t n, double eps) {
    const float mean = static_cast<float>(sum_over_row(n, [=](int64_t i) { return x[i]; }) / static_cast<double>(n));
    const double squares = sum_over_row(n, [=](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
    return {mean, static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(n) + eps))};
}

template <bool rotated>
void norm_and_turn(const float* x, Moments m, const float* weight, const float* bias, Turn turn, float* y,
                   int64_t heads, int64_t head_dim) {
    for (int64_t h = 0; h < heads; ++h, x += head_dim, weight += head_dim, bias += head_dim, y += head_dim) {
        int64_t j = 0;
        for (; j + vector_floats <= head_dim; j += vector_floats) {
            const FloatVector z =
                (load_vector(x + j) - m.mean) * m.rstd * load_vector(weight + j) + load_vector(bias + j);
            store_vector(y + j, rotated ? z * load_vector(turn.cos + j) + swap_neighbours(z) * load_vector(turn.sin + j)
                                        : z);
        }
        for (; j < head_dim; j += 2) {
            const float a = (x[j] - m.mean) * m.rstd * weight[j] + bias[j];
            const float b = (x[j + 1] - m.mean) * m.rstd * weight[j + 1] + bias[j + 1];
            y[j] = rotated ? a * turn.cos[j] + b * turn.sin[j] : a;
            y[j + 1] = rotated ? b * turn.cos[j + 1] + a * turn.sin[j + 1] : b;
        }
    }
}

// A group without a norm has weight 1, bias 0 and the moments 0 and 1, which change no number.
struct Affine {
    const float* weight = nullptr;
    const float* bias = nullptr;

    // buffer: 2 * columns floats
    void load(const Group& group, float* buffer) {
        const int64_t n = group.columns;
        if (group.weight->present()) {
            weight = load_row(*group.weight, 0, n, buffer);
            if (group.bias) bias = load_row(*group.bias, 0, n, buffer + n);
            return;
        }
        for (int64_t i = 0; i < n; ++i) buffer[i] = 1.0f;
        std::memset(buffer + n, 0, static_cast<size_t>(n) * sizeof(float));
        weight = buffer;
        bias = buffer + n;
    }
};

// ---- backward ------------------------------------------------------------------------------------------------------

struct Sums {
    float g, g_xhat;
};

// dz = dy turned back; dbias += dz, dweight += dz * xhat; the sums of g = dz * weight and of g * xhat.
template <bool rotated>
Sums turn_back(const float* dy, const float* x, Moments m, const float* weight, Turn turn, float* dz, float* dweight,
               float* dbias, int64_t heads, int64_t head_dim) {
    FloatVector sum_g = {}, sum_g_xhat = {};
    float rest_g = 0.0f, rest_g_xhat = 0.0f;
    for (int64_t h = 0; h < heads; ++h) {
        const int64_t head = h * head_dim;
        int64_t j = 0;
        for (; j + vector_floats <= head_dim; j += vector_floats) {
            const int64_t i = head + j;
            FloatVector d = load_vector(dy + i);
            if (rotated) d = d * load_vector(turn.cos + j) - swap_neighbours(d) * load_vector(turn.sin + j);
            const FloatVector xhat = (load_vector(x + i) - m.mean) * m.rstd, g = d * load_vector(weight + i);
            store_vector(dz + i, d);
            store_vector(dbias + i, load_vector(dbias + i) + d);
            store_vector(dweight + i, load_vector(dweight + i) + d * xhat);
            sum_g += g;
            sum_g_xhat += g * xhat;
        }
        for (; j < head_dim; ++j) {
            const int64_t i = head + j;
            const float d = rotated ? dy[i] * turn.cos[j] - dy[i ^ 1] * turn.sin[j] : dy[i];
            const float xhat = (x[i] - m.mean) * m.rstd, g = d * weight[i];
            dz[i] = d;
            dbias[i] += d;
            dweight[i] += d * xhat;
            rest_g += g;
            rest_g_xhat += g * xhat;
        }
    }
    return {sum_of(sum_g) + rest_g, sum_of(sum_g_xhat) + rest_g_xhat};
}

void through_norm(const float* dz, const float* x, Moments m, const float* weight, Sums sums, float* dx, int64_t n) {
    const float mean_g = sums.g / static_cast<float>(n), along = sums.g_xhat / static_cast<float>(n);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float xhat = (x[i] - m.mean) * m.rstd;
        dx[i] = m.rstd * (dz[i] * weight[i] - mean_g - xhat * along);
    }
}

template <bool rotated>
void only_turn_back(const float* dy, Turn turn, float* dz, int64_t heads, int64_t head_dim) {
    for (int64_t h = 0; h < heads; ++h, dy += head_dim, dz += head_dim) {
#pragma omp simd
        for (int64_t j = 0; j < head_dim; j += 2) {
            const float a = dy[j], b = dy[j + 1];
            dz[j] = rotated ? a * turn.cos[j] - b * turn.sin[j] : a;
            dz[j + 1] = rotated ? b * turn.cos[j + 1] - a * turn.sin[j + 1] : b;
        }
    }
}

}  // namespace

void qk_norm_rope_fwd(const Run& run, const View& x, const View& weight0, const View& bias0, const View& weight1,
                      const View& bias1, const View& weight2, const View& bias2, const View& rope, const View& y,
                      const View& mean, const View& rstd, int64_t heads0, int64_t heads1, int64_t heads2,
                      int64_t first_group, int64_t first_head, int64_t head_dim, double eps) {
    const View* weights[] = {&weight0, &weight1, &weight2};
    const View* biases[] = {&bias0, &bias1, &bias2};
    const int64_t heads[] = {heads0, heads1, heads2};
    const Groups groups(x, y, weights, biases, heads, first_group, first_head, head_dim);
    groups.check_rope(rope, x);
    check_contiguous(y);
    check_shape(rstd, {x.size[0], x.size[1], mean.size[2]});
    for (const View* v : {&mean, &rstd}) groups.check_statistics(*v, x);
    const int64_t tokens = x.size[1], width = groups.widest;
    Scratch scratch(run.threads, 2 * head_dim + 2 * width + 2 * groups.columns);
    parallel_for(run, x.size[0] * tokens * groups.count, [&](int64_t begin, int64_t end, int thread) {
        float* buffer = scratch.of(thread);
        const Turn turn{buffer, buffer + head_dim};
        float* in = buffer + 2 * head_dim;
        float* out = in + width;
        Affine affine[most_groups];
        int64_t turned = -1;
        for (int64_t item = begin; item < end; ++item) {
            const int64_t row = item / groups.count, i = item % groups.count, b = row / tokens, t = row % tokens;
            const Group& group = groups.at[i];
            if (!affine[i].weight) affine[i].load(group, out + width + 2 * group.place);
            if (rope.present() && turned != t) turn.load(rope, turned = t);
            const int64_t from = b * x.stride[0] + t * x.stride[1] + group.first_column * x.stride[2];
            const float* z = load_row(x, from, group.columns, in);
            const int64_t to = row * groups.total_heads * head_dim + group.first_column;
            float* target = row_target(y, to, out);
            const Moments m = group.weight->present() ? moments(z, group.columns, eps) : Moments{0.0f, 1.0f};
            const auto apply = rope.present() ? norm_and_turn<true> : norm_and_turn<false>;
            apply(z, m, affine[i].weight, affine[i].bias, turn, target, group.heads, head_dim);
            store_row(y, to, group.columns, target);
            const int64_t place = row * mean.size[2] + groups.first + i;
            mean.as<float>()[place] = m.mean;
            rstd.as<float>()[place] = m.rstd;
        }
    });
}

void qk_norm_rope_bwd(const Run& run, const View& dy, const View& x, const View& weight0, const View& weight1,
                      const View& weight2, const View& rope, const View& mean, const View& rstd, const View& dx,
                      const View& daffine, int64_t heads0, int64_t heads1, int64_t heads2, int64_t first_group,
                      int64_t first_head, int64_t head_dim) {
    const View* weights[] = {&weight0, &weight1, &weight2};
    const int64_t heads[] = {heads0, heads1, heads2};
    const Groups groups(x, dy, weights, nullptr, heads, first_group, first_head, head_dim);
    groups.check_rope(rope, x);
    groups.check_statistics(mean, x);
    check_shape(rstd, {x.size[0], x.size[1], mean.size[2]});
    groups.check_statistics(rstd, x);
    check_shape(dx, {x.size[0], x.size[1], x.size[2]});
    check_float(dx);
    check_contiguous(dx);
    if (groups.normed || daffine.present()) {
        check_shape(daffine, {2, x.size[2]});
        check_float(daffine);
        check_contiguous(daffine);
    }
    const int64_t tokens = x.size[1], width = groups.widest;
    const RowChunks chunks(x.size[0] * tokens);
    const int64_t sums = daffine.present() ? 2 * groups.columns : 0;
    Scratch scratch(run.threads, 2 * head_dim + 6 * width), partial(1, chunks.count * sums);
    // One group after the other: the threads' shares of one are alike, and its weight is loaded once.
    parallel_for(run, groups.count * chunks.count, [&](int64_t begin, int64_t end, int thread) {
        float* buffer = scratch.of(thread);
        const Turn turn{buffer, buffer + head_dim};
        float* in = buffer + 2 * head_dim;
        float *up = in + width, *dz = up + width, *out = dz + width;
        Affine affine;
        for (int64_t item = begin; item < end; ++item) {
            const int64_t i = item / chunks.count, c = item % chunks.count, n = groups.at[i].columns;
            const Group& group = groups.at[i];
            if (item == begin || c == 0) affine.load(group, out + width);
            float* dweight = partial.of(0) + c * sums + group.place;
            float* dbias = dweight + groups.columns;
            if (sums > 0) {
                std::memset(dweight, 0, static_cast<size_t>(n) * sizeof(float));
                std::memset(dbias, 0, static_cast<size_t>(n) * sizeof(float));
            }
            for (int64_t row = chunks.begin(c); row < chunks.end(c); ++row) {
                const int64_t b = row / tokens, t = row % tokens;
                if (rope.present()) turn.load(rope, t);
                const float* d = load_heads(dy, b * dy.stride[0] + t * dy.stride[1], group, head_dim, up);
                const int64_t to = row * x.size[2] + group.first_column;
                float* target = row_target(dx, to, out);
                if (group.weight->present()) {
                    const int64_t from = b * x.stride[0] + t * x.stride[1] + group.first_column * x.stride[2];
                    const int64_t place = row * mean.size[2] + groups.first + i;
                    const Moments m{mean.as<const float>()[place], rstd.as<const float>()[place]};
                    const float* z = load_row(x, from, n, in);
                    const auto turn_and_sum = rope.present() ? turn_back<true> : turn_back<false>;
                    const Sums s =
                        turn_and_sum(d, z, m, affine.weight, turn, dz, dweight, dbias, group.heads, head_dim);
                    through_norm(dz, z, m, affine.weight, s, target, n);
                } else {
                    const auto only_turn = rope.present() ? only_turn_back<true> : only_turn_back<false>;
                    only_turn(d, turn, target, group.heads, head_dim);
                }
                store_row(dx, to, n, target);
            }
        }
    });
    if (sums > 0)
        sum_chunks(run, partial.of(0), chunks.count, 2, groups.columns,
                   [&](int64_t kind, int64_t first, int64_t n, const float* values) {
                       store_row(daffine, kind * x.size[2] + groups.at[0].first_column + first, n, values);
                   });
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
