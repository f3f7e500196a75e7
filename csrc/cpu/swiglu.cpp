#include "swiglu.h"

#include "math.h"
#include "parallel.h"
#include "refuse.h"
#include "rows.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

namespace {

// Columns that are worked on at a time: what is read and written of them, as floats, stays in the first cache.
constexpr int64_t kBlock = 1024;

// half [..., F] of whole [..., 2F]
void check(const View& half, const View& whole) {
    check_float(whole);
    if (whole.rank < 1) refuse_tensor(whole, "a tensor of 1 dimensions or more");
    const int last = whole.rank - 1;
    if (whole.size[last] % 2 != 0) refuse_tensor(whole, "of an even last dimension");
    bool same = half.rank == whole.rank && half.size[last] == whole.size[last] / 2;
    for (int i = 0; i < last && same; ++i) same = half.size[i] == whole.size[i];
    if (!same) {
        View wanted = whole;
        wanted.size[last] /= 2;
        refuse_shape(half, wanted);
    }
    check_float(half);
}

// Where row `row` begins, counted through all dimensions but the last.
int64_t row_offset(const View& view, int64_t row) {
    int64_t offset = 0;
    for (int i = view.rank - 2; i >= 0; --i) {
        offset += row % view.size[i] * view.stride[i];
        row /= view.size[i];
    }
    return offset;
}

// work(row, first column, number of columns) over the blocks of [..., F].
template <class Work>
void for_blocks(const Run& run, const View& half, Work work) {
    const int64_t width = half.size[half.rank - 1], blocks = (width + kBlock - 1) / kBlock;
    if (width == 0) return;
    parallel_for(run, half.numel() / width * blocks, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = i % blocks * kBlock;
            work(i / blocks, first, width - first < kBlock ? width - first : kBlock);
        }
    });
}

}  // namespace

void swiglu_fwd(const Run& run, const View& gate_up, const View& y) {
    check(y, gate_up);
    check_contiguous(y);
    const int64_t width = y.size[y.rank - 1], step = gate_up.last_stride;
    for_blocks(run, y, [&](int64_t row, int64_t first, int64_t n) {
        alignas(64) float a_buffer[kBlock], b_buffer[kBlock], y_buffer[kBlock];
        const int64_t start = row_offset(gate_up, row) + first * step;
        const float* a = load_row(gate_up, start, n, a_buffer);
        const float* b = load_row(gate_up, start + width * step, n, b_buffer);
        float* out = row_target(y, row * width + first, y_buffer);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] = a[i] / (1.0f + exp_f(-a[i])) * b[i];
        store_row(y, row * width + first, n, out);
    });
}

void swiglu_bwd(const Run& run, const View& dy, const View& gate_up, const View& dgate_up) {
    check(dy, gate_up);
    check(dy, dgate_up);
    check_contiguous(dgate_up);
    const int64_t width = dy.size[dy.rank - 1], step = gate_up.last_stride;
    for_blocks(run, dy, [&](int64_t row, int64_t first, int64_t n) {
        alignas(64) float buffers[5][kBlock];
        const int64_t start = row_offset(gate_up, row) + first * step, target = row * 2 * width + first;
        const float* up = load_row(dy, row_offset(dy, row) + first * dy.last_stride, n, buffers[0]);
        const float* a = load_row(gate_up, start, n, buffers[1]);
        const float* b = load_row(gate_up, start + width * step, n, buffers[2]);
        float* da = row_target(dgate_up, target, buffers[3]);
        float* db = row_target(dgate_up, target + width, buffers[4]);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const float divisor = 1.0f + exp_f(-a[i]), s = 1.0f / divisor;
            da[i] = up[i] * b[i] * s * (1.0f + a[i] * (1.0f - s));
            db[i] = up[i] * (a[i] / divisor);  // a * s would round once more
        }
        store_row(dgate_up, target, n, da);
        store_row(dgate_up, target + width, n, db);
    });
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
