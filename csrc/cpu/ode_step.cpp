#include "ode_step.h"

#include "elementwise.h"
#include "parallel.h"
#include "rows.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

namespace {

void check_settings(const View& guidance, const View& dsigma, const View& v_uncond) {
    if (guidance.present() != v_uncond.present())
        refuse_tensor(guidance, "given where the unconditional velocity is, and absent where it is");
    if (guidance.present()) check_number(guidance);
    check_number(dsigma);
}

}  // namespace

void ode_step_fwd(const Run& run, const View& x, const View& v_cond, const View& v_uncond, const View& guidance,
                  const View& dsigma, const View& y) {
    if (!x.present()) refuse_tensor(x, "a tensor");
    check_float(x);
    for (const View* v : {&v_cond, &v_uncond, &y})
        if (v != &v_uncond || v->present()) check_like(*v, x);
    check_contiguous(y);
    check_settings(guidance, dsigma, v_uncond);
    const Blocks blocks({&x, &v_cond, &v_uncond}, 0);
    if (blocks.count() == 0) return;
    const float h = *dsigma.as<const float>(), w = guidance.present() ? *guidance.as<const float>() : 1.0f;
    parallel_for(run, blocks.count(), [&](int64_t begin, int64_t end, int) {
        alignas(64) float buffer[4][block_floats];
        for (int64_t i = begin; i < end; ++i) {
            const Block block = blocks.at(i);
            const auto load = [&](const View& view, float* to) {
                return load_row(view, blocks.offset(view, block), block.n, blocks.step(view), to);
            };
            const float *from = load(x, buffer[0]), *cond = load(v_cond, buffer[1]);
            float* out = row_target(y, blocks.place(block), buffer[3]);
            if (v_uncond.present()) {
                const float* null = load(v_uncond, buffer[2]);
#pragma omp simd
                for (int64_t j = 0; j < block.n; ++j) out[j] = from[j] + h * (null[j] + w * (cond[j] - null[j]));
            } else {
#pragma omp simd
                for (int64_t j = 0; j < block.n; ++j) out[j] = from[j] + h * cond[j];
            }
            store_row(y, blocks.place(block), block.n, out);
        }
    });
}

void ode_step_bwd(const Run& run, const View& dy, const View& guidance, const View& dsigma, const View& dv_cond,
                  const View& dv_uncond) {
    if (!dy.present()) refuse_tensor(dy, "a tensor");
    check_float(dy);
    check_settings(guidance, dsigma, dv_uncond);
    for (const View* v : {&dv_cond, &dv_uncond}) {
        if (v == &dv_uncond && !v->present()) continue;
        check_like(*v, dy);
        check_contiguous(*v);
    }
    const Blocks blocks({&dy}, 0);
    if (blocks.count() == 0) return;
    const float h = *dsigma.as<const float>(), w = guidance.present() ? *guidance.as<const float>() : 1.0f;
    parallel_for(run, blocks.count(), [&](int64_t begin, int64_t end, int) {
        alignas(64) float buffer[2][block_floats];
        for (int64_t i = begin; i < end; ++i) {
            const Block block = blocks.at(i);
            const float* up = load_row(dy, blocks.offset(dy, block), block.n, blocks.step(dy), buffer[0]);
            const auto store = [&](const View& view, float factor) {
                float* out = row_target(view, blocks.place(block), buffer[1]);
#pragma omp simd
                for (int64_t j = 0; j < block.n; ++j) out[j] = factor * (h * up[j]);
                store_row(view, blocks.place(block), block.n, out);
            };
            store(dv_cond, w);
            if (dv_uncond.present()) store(dv_uncond, 1.0f - w);
        }
    });
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
