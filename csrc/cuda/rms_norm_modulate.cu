// `rms_norm_modulate`: a block owns some tokens of one sample, and keeps weight * (1 + scale) for all of them.
#include "rms_norm_modulate.h"

#include "checks.h"
#include "rows.cuh"
#include "sample_sums.cuh"

namespace blip3o_fast {

namespace {

template <bool held>
__global__ void __launch_bounds__(most_row_threads)
    rms_norm_modulate_forward(Rows x, Rows weight, Rows scale, Rows y, float* rstd, Shape shape, float eps) {
    pdl_wait();
    pdl_release();
    __shared__ float scratch[2][32];
    const Share own(shape, held);
    float values[8], factor[8];
    if (held) load_factor(factor, weight, scale, own.sample, own.column, shape.width - own.column);
    for (int token = own.first; token < own.end; ++token) {
        const int64_t x_at = x.at(own.sample, token), y_at = y.at(own.sample, token);
        float square = 0.0f;
        for (int column = own.column; column < shape.width; column += own.step) {
            load_eight(values, x.data, x.dtype, x_at + column, shape.width - column);
#pragma unroll
            for (int i = 0; i < 8; ++i) square += values[i] * values[i];
        }
        const float inverse = rsqrtf(block_sum(square, scratch[token % 2]) / shape.width + eps);
        if (threadIdx.x == 0) rstd[own.sample * shape.tokens + token] = inverse;
        for (int column = own.column; column < shape.width; column += own.step) {
            const int count = shape.width - column;
            if (!held) {
                load_factor(factor, weight, scale, own.sample, column, count);
                load_eight(values, x.data, x.dtype, x_at + column, count);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) values[i] = values[i] * inverse * factor[i];
            store_eight(values, y.data, y.dtype, y_at + column, count);
        }
    }
}

// p = sum over the block's tokens of dy * xhat, a row of `partial`
template <bool held>
__global__ void __launch_bounds__(most_row_threads)
    rms_norm_modulate_backward(Rows dy, Rows x, Rows weight, Rows scale, const float* rstd, Rows dx, float* partial,
                               Shape shape) {
    pdl_wait();
    pdl_release();
    __shared__ float scratch[2][32];
    const Share own(shape, held);
    partial += int64_t{blockIdx.x} * shape.width;
    float upstream[8], xhat[8], factor[8], p[8] = {};
    if (held) load_factor(factor, weight, scale, own.sample, own.column, shape.width - own.column);
    for (int token = own.first; token < own.end; ++token) {
        const int64_t dy_at = dy.at(own.sample, token), x_at = x.at(own.sample, token);
        const float inverse = rstd[own.sample * shape.tokens + token];
        float along = 0.0f;
        const auto read = [&](int column) {
            const int count = shape.width - column;
            const Eight raw_dy = fetch_eight(dy.data, dy.dtype, dy_at + column, count);
            const Eight raw_x = fetch_eight(x.data, x.dtype, x_at + column, count);
            if (!held) load_factor(factor, weight, scale, own.sample, column, count);
            unpack_eight(upstream, raw_dy, dy.dtype);
            unpack_eight(xhat, raw_x, x.dtype);
#pragma unroll
            for (int i = 0; i < 8; ++i) xhat[i] *= inverse;
        };
        for (int column = own.column; column < shape.width; column += own.step) {
            read(column);
            if (!held && token > own.first) load_eight(p, partial, Dtype::f32, column, shape.width - column);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                p[i] = (held || token > own.first ? p[i] : 0.0f) + upstream[i] * xhat[i];
                upstream[i] *= factor[i];
                along += upstream[i] * xhat[i];
            }
            if (!held) store_eight(p, partial, Dtype::f32, column, shape.width - column);
        }
        const float mean = block_sum(along, scratch[token % 2]) / shape.width;
        for (int column = own.column; column < shape.width; column += own.step) {
            if (!held) {
                read(column);
#pragma unroll
                for (int i = 0; i < 8; ++i) upstream[i] *= factor[i];
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) upstream[i] = inverse * (upstream[i] - xhat[i] * mean);
            store_eight(upstream, dx.data, dx.dtype, dx.at(own.sample, token) + column, shape.width - column);
        }
    }
    if (held && own.column < shape.width)
        store_eight(p, partial, Dtype::f32, own.column, shape.width - own.column);
}

void check_parameters(const View& x, const View& weight, const View& scale, const View& rstd) {
    check_rows(x, {x.size[0], x.size[1], x.size[2]});
    check_whole(weight, {x.size[2]});
    if (scale.present()) check_rows(scale, {x.size[0], x.size[2]});
    check_whole(rstd, {x.size[0], x.size[1]});
    check_dtype(rstd, Dtype::f32);
}

}  // namespace

void rms_norm_modulate_fwd(const Launcher& launcher, const View& x, const View& weight, const View& scale,
                           const View& y, const View& rstd, double eps) {
    const Shape shape = shape_of(x, busy_chunks(x));
    check_parameters(x, weight, scale, rstd);
    check_whole(y, {x.size[0], x.size[1], x.size[2]});
    const auto kernel = shape.width <= held_width ? rms_norm_modulate_forward<true> : rms_norm_modulate_forward<false>;
    launcher(kernel, shape.batch * shape.chunks, row_threads(shape.width), rows_of(x), rows_of(weight), rows_of(scale),
             rows_of(y), rstd.as<float>(), shape, static_cast<float>(eps));
}

void rms_norm_modulate_bwd(const Launcher& launcher, const View& dy, const View& x, const View& weight,
                           const View& scale, const View& rstd, const View& dx, const View& dweight,
                           const View& dscale, const View& partial) {
    check_rank(partial, 3);
    const Shape shape = shape_of(x, partial.size[1]);
    check_parameters(x, weight, scale, rstd);
    check_rows(dy, {x.size[0], x.size[1], x.size[2]});
    check_whole(dx, {x.size[0], x.size[1], x.size[2]});
    check_whole(dweight, {x.size[2]});
    if (scale.present()) check_whole(dscale, {x.size[0], x.size[2]});
    check_whole(partial, {x.size[0], partial.size[1], x.size[2]});
    check_dtype(partial, Dtype::f32);
    const auto kernel =
        shape.width <= held_width ? rms_norm_modulate_backward<true> : rms_norm_modulate_backward<false>;
    launcher(kernel, shape.batch * shape.chunks, row_threads(shape.width), rows_of(dy), rows_of(x), rows_of(weight),
             rows_of(scale), rstd.as<const float>(), rows_of(dx), partial.as<float>(), shape);
    const Modulation kind = scale.present() ? Modulation::scale : Modulation::none;
    launch_sample_sums(launcher, shape, sums_of(partial, kind, scale, weight, dscale, dweight), {});
}

}  // namespace blip3o_fast
