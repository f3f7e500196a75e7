// `gated_residual_modulate` forward, and the host's part of both directions.
#include "gated_residual_modulate.h"

#include "checks.h"
#include "gated_residual_modulate.cuh"
#include "sample_sums.cuh"

namespace blip3o_fast {

namespace {

template <bool held>
__global__ void __launch_bounds__(most_row_threads)
    gated_residual_modulate_forward(GatedForward args, Shape shape, float eps) {
    pdl_wait();
    pdl_release();
    __shared__ float scratch[2][32];
    const Share own(shape, held);
    const auto gated = [&](float(&to)[8], int column) {
        load_gated(to, args.weight, args.gate, own.sample, column, shape.width - column);
    };
    const auto next = [&](float(&to)[8], int column) {
        load_factor(to, args.next_weight, args.next_scale, own.sample, column, shape.width - column);
    };
    float x[8], y[8], factor[8], next_factor[8];
    if (held) {
        gated(factor, own.column);
        next(next_factor, own.column);
    }
    for (int token = own.first; token < own.end; ++token) {
        const auto read = [&](int column) {
            const int count = shape.width - column;
            const Eight raw_x = fetch_eight(args.x.data, args.x.dtype, args.x.at(own.sample, token) + column, count);
            load_eight(y, args.y.data, args.y.dtype, args.y.at(own.sample, token) + column, count);
            unpack_eight(x, raw_x, args.x.dtype);
        };
        const int64_t row = own.sample * shape.tokens + token, at = row * shape.width;
        float square = 0.0f;
        for (int column = own.column; column < shape.width; column += own.step) {
            read(column);
#pragma unroll
            for (int i = 0; i < 8; ++i) square += y[i] * y[i];
        }
        const float rstd_y = rsqrtf(block_sum(square, scratch[0]) / shape.width + eps);
        square = 0.0f;
        for (int column = own.column; column < shape.width; column += own.step) {
            if (!held) {
                read(column);
                gated(factor, column);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] += y[i] * rstd_y * factor[i];
            const Eight stored = pack_eight(x, args.h.dtype);
            put_eight(stored, args.h.data, args.h.dtype, at + column, shape.width - column);
            // the norm of what memory holds: backward reads h from there
            unpack_eight(x, stored, args.h.dtype);
#pragma unroll
            for (int i = 0; i < 8; ++i) square += x[i] * x[i];
        }
        const float rstd_h = rsqrtf(block_sum(square, scratch[1]) / shape.width + eps);
        for (int column = own.column; column < shape.width; column += own.step) {
            if (!held) {
                load_eight(x, args.h.data, args.h.dtype, at + column, shape.width - column);
                next(next_factor, column);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = x[i] * rstd_h * next_factor[i];
            store_eight(x, args.n.data, args.n.dtype, at + column, shape.width - column);
        }
        if (threadIdx.x == 0) {
            args.rstd_y[row] = rstd_y;
            args.rstd_h[row] = rstd_h;
        }
    }
}

// What both directions are given.
void check_parameters(const View& y, const View& gate, const View& weight, const View& next_weight,
                      const View& next_scale, const View& rstd_y, const View& rstd_h) {
    const int64_t batch = y.size[0], tokens = y.size[1], width = y.size[2];
    check_rows(y, {batch, tokens, width});
    check_rows(gate, {batch, width});
    check_whole(weight, {width});
    check_whole(next_weight, {width});
    if (next_scale.present()) check_rows(next_scale, {batch, width});
    for (const View* statistic : {&rstd_y, &rstd_h}) {
        check_whole(*statistic, {batch, tokens});
        check_dtype(*statistic, Dtype::f32);
    }
}

}  // namespace

void gated_residual_modulate_fwd(const Launcher& launcher, const View& x, const View& y, const View& gate,
                                 const View& weight, const View& next_weight, const View& next_scale, const View& h,
                                 const View& n, const View& rstd_y, const View& rstd_h, double eps) {
    const Shape shape = shape_of(y, busy_chunks(y));
    check_parameters(y, gate, weight, next_weight, next_scale, rstd_y, rstd_h);
    check_rows(x, {y.size[0], y.size[1], y.size[2]});
    check_whole(h, {y.size[0], y.size[1], y.size[2]});
    check_dtype(h, x.dtype);
    check_whole(n, {y.size[0], y.size[1], y.size[2]});
    const GatedForward args = {rows_of(x), rows_of(y),           rows_of(gate),       rows_of(weight),
                               rows_of(next_weight), rows_of(next_scale), rows_of(h), rows_of(n),
                               rstd_y.as<float>(),   rstd_h.as<float>()};
    const auto kernel =
        shape.width <= held_width ? gated_residual_modulate_forward<true> : gated_residual_modulate_forward<false>;
    launcher(kernel, shape.batch * shape.chunks, row_threads(shape.width), args, shape, static_cast<float>(eps));
}

void gated_residual_modulate_bwd(const Launcher& launcher, const View& dh, const View& dn, const View& y,
                                 const View& h, const View& gate, const View& weight, const View& next_weight,
                                 const View& next_scale, const View& rstd_y, const View& rstd_h, const View& dx,
                                 const View& dy, const View& dgate, const View& dweight, const View& dnext_weight,
                                 const View& dnext_scale, const View& p, const View& r) {
    check_rank(p, 3);
    const Shape shape = shape_of(y, p.size[1]);
    check_parameters(y, gate, weight, next_weight, next_scale, rstd_y, rstd_h);
    const int64_t batch = y.size[0], tokens = y.size[1], width = y.size[2];
    for (const View* view : {&dh, &dn, &h}) check_rows(*view, {batch, tokens, width});
    for (const View* view : {&dx, &dy}) check_whole(*view, {batch, tokens, width});
    for (const View* view : {&dweight, &dnext_weight}) check_whole(*view, {width});
    check_whole(dgate, {batch, width});
    if (next_scale.present()) check_whole(dnext_scale, {batch, width});
    for (const View* view : {&p, &r}) {
        check_whole(*view, {batch, p.size[1], width});
        check_dtype(*view, Dtype::f32);
    }
    const GatedBackward args = {rows_of(dh),         rows_of(dn),     rows_of(y),           rows_of(h),
                                rows_of(gate),       rows_of(weight), rows_of(next_weight), rows_of(next_scale),
                                rows_of(dx),         rows_of(dy),     rstd_y.as<const float>(),
                                rstd_h.as<const float>(), p.as<float>(), r.as<float>()};
    launch_gated_backward(launcher, args, shape);
    const Modulation kind = next_scale.present() ? Modulation::scale : Modulation::none;
    launch_sample_sums(launcher, shape, sums_of(p, Modulation::gate, gate, weight, dgate, dweight),
                       sums_of(r, kind, next_scale, next_weight, dnext_scale, dnext_weight));
}

}  // namespace blip3o_fast
