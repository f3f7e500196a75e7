// `gated_residual_modulate` backward: e, the whole gradient of h, stays in fp32 registers; dy and p come from it and
// not from what dx has of it.
#include "gated_residual_modulate.cuh"

namespace blip3o_fast {

namespace {

// Adds to the thread's columns of a row in memory, which the first token of a block begins.
__device__ void add_to_row(float* row, const float (&values)[8], bool begins, int column, int count) {
    float sums[8] = {};
    if (!begins) load_eight(sums, row, Dtype::f32, column, count);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += values[i];
    store_eight(sums, row, Dtype::f32, column, count);
}

template <bool held>
__global__ void __launch_bounds__(most_row_threads)
    gated_residual_modulate_backward(GatedBackward args, Shape shape) {
    pdl_wait();
    pdl_release();
    __shared__ float scratch[2][32];
    const Share own(shape, held);
    float* p_row = args.p + int64_t{blockIdx.x} * shape.width;
    float* r_row = args.r + int64_t{blockIdx.x} * shape.width;
    float factor[8], next_factor[8], p[8] = {}, r[8] = {};
    const auto gated = [&](int column) {
        load_gated(factor, args.weight, args.gate, own.sample, column, shape.width - column);
    };
    const auto next = [&](int column) {
        load_factor(next_factor, args.next_weight, args.next_scale, own.sample, column, shape.width - column);
    };
    if (held) {
        gated(own.column);
        next(own.column);
    }
    for (int token = own.first; token < own.end; ++token) {
        const int64_t row = own.sample * shape.tokens + token, at = row * shape.width;
        const float rstd_h = args.rstd_h[row], rstd_y = args.rstd_y[row];
        // q = dn * next_factor and hhat of a norm's backward; dn stays beside them for r
        float dn[8], q[8], hhat[8], e[8], yhat[8];
        const auto read = [&](int column) {
            const int count = shape.width - column;
            const auto fetch = [&](const Rows& rows) {
                return fetch_eight(rows.data, rows.dtype, rows.at(own.sample, token) + column, count);
            };
            const Eight raw_dn = fetch(args.dn), raw_h = fetch(args.h), raw_dh = fetch(args.dh), raw_y = fetch(args.y);
            if (!held) next(column);
            unpack_eight(dn, raw_dn, args.dn.dtype);
            unpack_eight(hhat, raw_h, args.h.dtype);
            unpack_eight(e, raw_dh, args.dh.dtype);
            unpack_eight(yhat, raw_y, args.y.dtype);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                hhat[i] *= rstd_h;
                yhat[i] *= rstd_y;
                q[i] = dn[i] * next_factor[i];
            }
        };
        float along = 0.0f;
        for (int column = own.column; column < shape.width; column += own.step) {
            read(column);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                along += q[i] * hhat[i];
                dn[i] *= hhat[i];
                r[i] += dn[i];
            }
            if (!held) add_to_row(r_row, dn, token == own.first, column, shape.width - column);
        }
        const float mean_h = block_sum(along, scratch[0]) / shape.width;
        const auto whole_gradient = [&] {
#pragma unroll
            for (int i = 0; i < 8; ++i) e[i] += rstd_h * (q[i] - hhat[i] * mean_h);
        };
        along = 0.0f;
        for (int column = own.column; column < shape.width; column += own.step) {
            if (!held) {
                read(column);
                gated(column);
            }
            whole_gradient();
            store_eight(e, args.dx.data, args.dx.dtype, at + column, shape.width - column);
            float product[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                product[i] = e[i] * yhat[i];
                p[i] += product[i];
                along += product[i] * factor[i];
            }
            if (!held) add_to_row(p_row, product, token == own.first, column, shape.width - column);
        }
        const float mean_y = block_sum(along, scratch[1]) / shape.width;
        for (int column = own.column; column < shape.width; column += own.step) {
            if (!held) {
                read(column);
                gated(column);
                whole_gradient();
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) e[i] = rstd_y * (e[i] * factor[i] - yhat[i] * mean_y);
            store_eight(e, args.dy.data, args.dy.dtype, at + column, shape.width - column);
        }
    }
    if (held && own.column < shape.width) {
        store_eight(p, p_row, Dtype::f32, own.column, shape.width - own.column);
        store_eight(r, r_row, Dtype::f32, own.column, shape.width - own.column);
    }
}

}  // namespace

void launch_gated_backward(const Launcher& launcher, const GatedBackward& args, const Shape& shape) {
    const auto kernel =
        shape.width <= held_width ? gated_residual_modulate_backward<true> : gated_residual_modulate_backward<false>;
    launcher(kernel, shape.batch * shape.chunks, row_threads(shape.width), args, shape);
}

}  // namespace blip3o_fast
