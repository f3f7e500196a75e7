#include "gated_residual_modulate.h"

#include "modulation.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

namespace {

void check(const View& y, const View& gate, const View& weight, const View& next_weight, const View& next_scale,
           const View& rstd_y, const View& rstd_h) {
    check_rank(y, 3);
    check_float(y);
    const int64_t batch = y.size[0], tokens = y.size[1], dim = y.size[2];
    check_input(gate, {batch, dim});
    check_input(weight, {dim});
    check_input(next_weight, {dim});
    if (next_scale.present()) check_input(next_scale, {batch, dim});
    check_statistic(rstd_y, batch, tokens);
    check_statistic(rstd_h, batch, tokens);
}

// One row of what is read and written in backward, and the two statistics.
struct BackwardRow {
    const float *dh, *dn, *y, *h, *factor, *next_factor;
    float rstd_y, rstd_h;
    float *e, *dy, *sum, *next_sum;
};

// e, dy; sum += e * yhat, next_sum += dn * hhat
void row_backward(const BackwardRow& row, int64_t dim) {
    const float *dh = row.dh, *dn = row.dn, *y = row.y, *h = row.h, *factor = row.factor, *next = row.next_factor;
    float *e = row.e, *dy = row.dy, *sum = row.sum, *next_sum = row.next_sum;
    const float rstd_y = row.rstd_y, rstd_h = row.rstd_h;
    const double next_dot = sum_over_row(dim, [=](int64_t i) { return dn[i] * next[i] * h[i]; });
    const float next_mean = static_cast<float>(next_dot * rstd_h / static_cast<double>(dim));
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) {
        const float hhat = h[i] * rstd_h;
        next_sum[i] += dn[i] * hhat;
        e[i] = dh[i] + rstd_h * (dn[i] * next[i] - hhat * next_mean);
    }
    rms_row_backward(e, y, factor, rstd_y, dy, sum, dim);
}

}  // namespace

void gated_residual_modulate_fwd(const Run& run, const View& x, const View& y, const View& gate, const View& weight,
                                 const View& next_weight, const View& next_scale, const View& h, const View& n,
                                 const View& rstd_y, const View& rstd_h, double eps) {
    check(y, gate, weight, next_weight, next_scale, rstd_y, rstd_h);
    const int64_t batch = y.size[0], tokens = y.size[1], dim = y.size[2];
    check_input(x, {batch, tokens, dim});
    check_output(h, {batch, tokens, dim});
    check_output(n, {batch, tokens, dim});
    Scratch scratch(run.threads, 7 * dim);
    parallel_for(run, batch * tokens, [&](int64_t begin, int64_t end, int thread) {
        float *buffer = scratch.of(thread), *row_buffer = buffer + 4 * dim;
        const float *factor = nullptr, *next_factor = nullptr;
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / tokens, t = row % tokens;
            if (row == begin || t == 0) {
                factor = gate_factor(weight, gate, b, buffer);
                next_factor = scale_factor(next_weight, next_scale, b, buffer + 2 * dim);
            }
            const float* branch = load_row(y, row_offset(y, b, t), dim, row_buffer);
            const float* residual = load_row(x, row_offset(x, b, t), dim, row_buffer + dim);
            float* sum = row_target(h, row * dim, row_buffer + 2 * dim);
            const float r = row_rstd(branch, dim, eps);
#pragma omp simd
            for (int64_t i = 0; i < dim; ++i) sum[i] = residual[i] + branch[i] * r * factor[i];
            store_row(h, row * dim, dim, sum);

            const float* stored = load_row(h, row * dim, dim, 1, row_buffer);  // as backward will read it
            float* out = row_target(n, row * dim, row_buffer + dim);
            const float next_r = row_rstd(stored, dim, eps);
#pragma omp simd
            for (int64_t i = 0; i < dim; ++i) out[i] = stored[i] * next_r * next_factor[i];
            store_row(n, row * dim, dim, out);
            rstd_y.as<float>()[row] = r;
            rstd_h.as<float>()[row] = next_r;
        }
    });
}

void gated_residual_modulate_bwd(const Run& run, const View& dh, const View& dn, const View& y, const View& h,
                                 const View& gate, const View& weight, const View& next_weight,
                                 const View& next_scale, const View& rstd_y, const View& rstd_h, const View& dx,
                                 const View& dy, const View& dgate, const View& dweight, const View& dnext_weight,
                                 const View& dnext_scale) {
    check(y, gate, weight, next_weight, next_scale, rstd_y, rstd_h);
    const int64_t batch = y.size[0], tokens = y.size[1], dim = y.size[2];
    for (const View* v : {&dh, &dn, &h}) check_input(*v, {batch, tokens, dim});
    for (const View* v : {&dx, &dy}) check_output(*v, {batch, tokens, dim});
    check_output(dgate, {batch, dim});
    for (const View* v : {&dweight, &dnext_weight}) check_output(*v, {dim});
    if (next_scale.present()) check_output(dnext_scale, {batch, dim});
    const int64_t chunks = batch * chunks_per_sample(tokens);
    Scratch scratch(run.threads, 10 * dim), sums(2, chunks * dim);
    parallel_for(run, chunks, [&](int64_t begin, int64_t end, int thread) {
        float *buffer = scratch.of(thread), *row_buffer = buffer + 4 * dim;
        BackwardRow r = {};
        for (int64_t c = begin; c < end; ++c) {
            const Chunk chunk = chunk_at(c, tokens);
            const int64_t b = chunk.sample;
            if (c == begin || chunk.first == 0) {
                r.factor = gate_factor(weight, gate, b, buffer);
                r.next_factor = scale_factor(next_weight, next_scale, b, buffer + 2 * dim);
            }
            r.sum = sums.of(0) + c * dim;
            r.next_sum = sums.of(1) + c * dim;
            for (float* sum : {r.sum, r.next_sum}) std::memset(sum, 0, static_cast<size_t>(dim) * sizeof(float));
            for (int64_t t = chunk.first; t < chunk.first + chunk.count; ++t) {
                const int64_t row = b * tokens + t;
                r.dh = load_row(dh, row_offset(dh, b, t), dim, row_buffer);
                r.dn = load_row(dn, row_offset(dn, b, t), dim, row_buffer + dim);
                r.y = load_row(y, row_offset(y, b, t), dim, row_buffer + 2 * dim);
                r.h = load_row(h, row_offset(h, b, t), dim, row_buffer + 3 * dim);
                r.rstd_y = rstd_y.as<const float>()[row];
                r.rstd_h = rstd_h.as<const float>()[row];
                r.e = row_target(dx, row * dim, row_buffer + 4 * dim);
                r.dy = row_target(dy, row * dim, row_buffer + 5 * dim);
                row_backward(r, dim);
                store_row(dx, row * dim, dim, r.e);
                store_row(dy, row * dim, dim, r.dy);
            }
        }
    });
    reduce_gate_gradients(run, sums.of(0), weight, gate, dweight, dgate, batch, tokens);
    reduce_scale_gradients(run, sums.of(1), next_weight, next_scale, dnext_weight, dnext_scale, batch, tokens);
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
