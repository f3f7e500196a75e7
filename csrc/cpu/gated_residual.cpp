#include "gated_residual.h"

#include "modulation.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

namespace {

void check(const View& y, const View& gate, const View& weight, const View& rstd) {
    check_rank(y, 3);
    check_float(y);
    check_input(gate, {y.size[0], y.size[2]});
    check_input(weight, {y.size[2]});
    check_statistic(rstd, y.size[0], y.size[1]);
}

}  // namespace

void gated_residual_fwd(const Run& run, const View& x, const View& y, const View& gate, const View& weight,
                        const View& h, const View& rstd, double eps) {
    check(y, gate, weight, rstd);
    const int64_t batch = y.size[0], tokens = y.size[1], dim = y.size[2];
    check_input(x, {batch, tokens, dim});
    check_output(h, {batch, tokens, dim});
    Scratch scratch(run.threads, 5 * dim);
    parallel_for(run, batch * tokens, [&](int64_t begin, int64_t end, int thread) {
        float* buffer = scratch.of(thread);
        const float* factor = nullptr;
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / tokens, t = row % tokens;
            if (row == begin || t == 0) factor = gate_factor(weight, gate, b, buffer);
            const float* branch = load_row(y, row_offset(y, b, t), dim, buffer + 2 * dim);
            const float* residual = load_row(x, row_offset(x, b, t), dim, buffer + 3 * dim);
            float* out = row_target(h, row * dim, buffer + 4 * dim);
            const float r = row_rstd(branch, dim, eps);
#pragma omp simd
            for (int64_t i = 0; i < dim; ++i) out[i] = residual[i] + branch[i] * r * factor[i];
            store_row(h, row * dim, dim, out);
            rstd.as<float>()[row] = r;
        }
    });
}

void gated_residual_bwd(const Run& run, const View& dh, const View& y, const View& gate, const View& weight,
                        const View& rstd, const View& dy, const View& dgate, const View& dweight) {
    check(y, gate, weight, rstd);
    const int64_t batch = y.size[0], tokens = y.size[1], dim = y.size[2];
    check_input(dh, {batch, tokens, dim});
    check_output(dy, {batch, tokens, dim});
    check_output(dgate, {batch, dim});
    check_output(dweight, {dim});
    Scratch sums(1, batch * chunks_per_sample(tokens) * dim);
    rms_rows_backward(run, dh, y, rstd, dy, sums.of(0),
                      [&](int64_t sample, float* buffer) { return gate_factor(weight, gate, sample, buffer); });
    reduce_gate_gradients(run, sums.of(0), weight, gate, dweight, dgate, batch, tokens);
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
