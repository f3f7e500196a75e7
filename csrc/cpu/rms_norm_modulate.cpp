#include "rms_norm_modulate.h"

#include "modulation.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

namespace {

void check(const View& x, const View& weight, const View& scale, const View& rstd) {
    check_rank(x, 3);
    check_float(x);
    check_input(weight, {x.size[2]});
    if (scale.present()) check_input(scale, {x.size[0], x.size[2]});
    check_statistic(rstd, x.size[0], x.size[1]);
}

}  // namespace

void rms_norm_modulate_fwd(const Run& run, const View& x, const View& weight, const View& scale, const View& y,
                           const View& rstd, double eps) {
    check(x, weight, scale, rstd);
    const int64_t tokens = x.size[1], dim = x.size[2];
    check_output(y, {x.size[0], tokens, dim});
    Scratch scratch(run.threads, 4 * dim);
    parallel_for(run, x.size[0] * tokens, [&](int64_t begin, int64_t end, int thread) {
        float* buffer = scratch.of(thread);
        const float* factor = nullptr;
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / tokens, t = row % tokens;
            if (row == begin || t == 0) factor = scale_factor(weight, scale, b, buffer);
            const float* in = load_row(x, row_offset(x, b, t), dim, buffer + 2 * dim);
            float* out = row_target(y, row * dim, buffer + 3 * dim);
            const float r = row_rstd(in, dim, eps);
#pragma omp simd
            for (int64_t i = 0; i < dim; ++i) out[i] = in[i] * r * factor[i];
            store_row(y, row * dim, dim, out);
            rstd.as<float>()[row] = r;
        }
    });
}

void rms_norm_modulate_bwd(const Run& run, const View& dy, const View& x, const View& weight, const View& scale,
                           const View& rstd, const View& dx, const View& dweight, const View& dscale) {
    check(x, weight, scale, rstd);
    const int64_t batch = x.size[0], tokens = x.size[1], dim = x.size[2];
    check_input(dy, {batch, tokens, dim});
    check_output(dx, {batch, tokens, dim});
    check_output(dweight, {dim});
    if (scale.present()) check_output(dscale, {batch, dim});
    Scratch sums(1, batch * chunks_per_sample(tokens) * dim);
    rms_rows_backward(run, dy, x, rstd, dx, sums.of(0),
                      [&](int64_t sample, float* buffer) { return scale_factor(weight, scale, sample, buffer); });
    reduce_scale_gradients(run, sums.of(0), weight, scale, dweight, dscale, batch, tokens);
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
