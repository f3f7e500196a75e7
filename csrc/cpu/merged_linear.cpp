#include "merged_linear.h"

#include "gemm_split.h"
#include "operand_words.h"
#include "parallel.h"
#include "refuse.h"
#include "scratch.h"
#include "transpose.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

namespace {

// Steps [step, step + steps) of a panel of B, zeros in the columns beyond `count`.
void pack_panel(const Operand& b, int64_t column, int64_t count, int64_t step, int64_t steps, uint32_t* panel,
                uint32_t* buffer) {
    if (!b.depth_is_contiguous()) {
        for (int64_t s = 0; s < steps; ++s) {
            uint32_t* row = panel + s * kPanelColumns;
            const uint32_t* words = b.across(step + s, column, count, row);
            if (words != row) std::memcpy(row, words, static_cast<size_t>(count) * 4);
            if (count < kPanelColumns) std::memset(row + count, 0, static_cast<size_t>(kPanelColumns - count) * 4);
        }
        return;
    }
    for (int64_t lane = 0; lane < kPanelColumns; lane += kLanes) {
        const int64_t left = count - lane, lanes = left < 0 ? 0 : left < kLanes ? left : kLanes;
        const uint32_t* columns[kLanes];
        for (int64_t i = 0; i < lanes; ++i) columns[i] = b.along(column + lane + i, step, steps, buffer + i * steps);
        transpose_columns(columns, lanes, steps, panel + lane);
    }
}

// A as tiles of six rows read it: where it lies, as rows of words, or (A^T in memory) as strips of six rows.
class LeftOperand {
public:
    LeftOperand(const Run& run, const Operand& a)
        : a_(a), steps_(a.steps()), strips_(!a.depth_is_contiguous()),
          copy_(1, in_place() ? 0 : ceil_div(a.free, kTileRows) * kTileRows * steps_) {
        if (in_place()) {
            words_ = static_cast<const uint32_t*>(a.view.data);
            row_stride_ = a.pairs ? a.free_stride / 2 : a.free_stride;
            column_stride_ = a.pairs ? 1 : a.depth_stride;
            return;
        }
        words_ = reinterpret_cast<const uint32_t*>(copy_.of(0));
        row_stride_ = strips_ ? 1 : steps_;
        column_stride_ = strips_ ? kTileRows : 1;
        parallel_for(run, ceil_div(a.free, kGroupRows), [&](int64_t begin, int64_t end, int) {
            for (int64_t row = begin * kGroupRows; row < end * kGroupRows && row < a.free; row += kGroupRows) {
                const int64_t count = a.free - row < kGroupRows ? a.free - row : kGroupRows;
                auto* words = reinterpret_cast<uint32_t*>(copy_.of(0)) + row * steps_;
                strips_ ? copy_strips(row, count, words) : copy_rows(row, count, words);
            }
        });
    }

    // From a row that begins a tile, and a step.
    template <class Element>
    TileRows<Element> at(int64_t row, int64_t step) const {
        const int64_t tile_stride = kTileRows * (strips_ ? steps_ : row_stride_);
        const auto* data = reinterpret_cast<const Element*>(words_);
        return {data + row / kTileRows * tile_stride + step * column_stride_, row_stride_, column_stride_, tile_stride};
    }

private:
    // Rows copied in one go: long enough a run to use whole cache lines of an A^T.
    static constexpr int64_t kGroupRows = 16 * kTileRows;

    bool in_place() const {
        if (!a_.pairs) return a_.view.dtype == Dtype::f32 && !strips_;
        return a_.depth_stride == 1 && a_.depth % 2 == 0 && a_.free_stride % 2 == 0 &&
               reinterpret_cast<uintptr_t>(a_.view.data) % 4 == 0;
    }

    void copy_rows(int64_t row, int64_t count, uint32_t* words) const {
        for (int64_t m = row; m < row + count; ++m, words += steps_) {
            const uint32_t* loaded = a_.along(m, 0, steps_, words);
            if (loaded != words) std::memcpy(words, loaded, static_cast<size_t>(steps_) * 4);
        }
    }

    void copy_strips(int64_t row, int64_t count, uint32_t* words) const {
        uint32_t buffer[kGroupRows];
        for (int64_t step = 0; step < steps_; ++step) {
            const uint32_t* loaded = a_.across(step, row, count, buffer);
            uint32_t* strip = words + step * kTileRows;
            for (int64_t r = 0; r < count; r += kTileRows, strip += kTileRows * steps_) {
                const int64_t rows = count - r < kTileRows ? count - r : kTileRows;
                for (int64_t i = 0; i < rows; ++i) strip[i] = loaded[r + i];
            }
        }
    }

    const Operand& a_;
    int64_t steps_, row_stride_ = 0, column_stride_ = 0;
    bool strips_;
    Scratch copy_;
    const uint32_t* words_ = nullptr;
};

template <class Arithmetic>
void multiply(const Run& run, const LeftOperand& a, const Operand& b, const View& c) {
    using Element = typename Arithmetic::Element;
    const int64_t rows = c.size[0], columns = c.size[1], steps = b.steps(), block = block_steps(steps);
    const GemmSplit split(rows, ceil_div(columns, kPanelColumns), run.threads);
    const auto width = [&](int64_t panel) {
        const int64_t left = columns - panel * kPanelColumns;
        return left < kPanelColumns ? left : kPanelColumns;
    };
    const int64_t sums_size = split.chunk_rows * kPanelColumns, panel_size = block * kPanelColumns;
    Scratch scratch(threads_for(run, split.items), sums_size + panel_size + block * kLanes);
    parallel_for(run, split.items, [&](int64_t begin, int64_t end, int thread) {
        float* sums = scratch.of(thread);
        auto* words = reinterpret_cast<uint32_t*>(sums + sums_size);
        uint32_t* buffer = words + panel_size;
        int64_t packed_panel = -1;  // the panel that `words` holds whole
        for (int64_t item = begin; item < end; ++item) {
            const int64_t panel = item / split.chunks, first_row = item % split.chunks * split.chunk_rows;
            const int64_t chunk = rows - first_row < split.chunk_rows ? rows - first_row : split.chunk_rows;
            for (int64_t step = 0; step < steps; step += block) {
                const int64_t deep = steps - step < block ? steps - step : block;
                if (panel != packed_panel)
                    pack_panel(b, panel * kPanelColumns, width(panel), step, deep, words, buffer);
                packed_panel = deep == steps ? panel : -1;
                // What is packed next is asked for tile by tile meanwhile.
                const bool last = step + deep == steps;
                const int64_t next_panel = last ? (item + 1) / split.chunks : panel, next_step = last ? 0 : step + deep;
                const int64_t next_deep = steps - next_step < block ? steps - next_step : block;
                const bool more = next_panel != packed_panel && (!last || item + 1 < end);
                const int64_t parts = ceil_div(chunk, kTileRows);
                for (int64_t part = 0; part < parts; ++part) {
                    const int64_t r = part * kTileRows;
                    if (more)
                        b.prefetch(next_panel * kPanelColumns, width(next_panel), next_step, next_deep, part, parts);
                    tiles<Arithmetic>(chunk - r < kTileRows ? chunk - r : kTileRows, deep,
                                      a.at<Element>(first_row + r, step), words, kPanelColumns,
                                      sums + r * kPanelColumns, kPanelColumns, step > 0,
                                      Prefetch{reinterpret_cast<const char*>(words), 0});
                }
            }
            for (int64_t r = 0; r < chunk; ++r)
                store_row(c, (first_row + r) * c.stride[0] + panel * kPanelColumns, width(panel),
                          sums + r * kPanelColumns);
        }
    });
}

void write_zeros(const View& c) {
    float zeros[kPanelColumns] = {};
    for (int64_t m = 0; m < c.size[0]; ++m)
        for (int64_t n = 0; n < c.size[1]; n += kPanelColumns)
            store_row(c, m * c.stride[0] + n, c.size[1] - n < kPanelColumns ? c.size[1] - n : kPanelColumns, zeros);
}

}  // namespace

void linear(const Run& run, const View& a, const View& b, const View& c) {
    check_rank(a, 2);
    check_float(a);
    check_rank(b, 2);
    check_float(b);
    const int64_t rows = a.size[0], depth = a.size[1], columns = b.size[1];
    check_shape(b, {depth, columns});
    check_shape(c, {rows, columns});
    check_float(c);
    if (columns > 1 && c.last_stride != 1) refuse_tensor(c, "contiguous within its rows");
    if (rows > 1 && c.stride[0] < columns) refuse_tensor(c, "without rows that overlap");
    if (rows == 0 || columns == 0) return;
    if (depth == 0) return write_zeros(c);
#if defined(__AVX512BF16__)
    const bool pairs = a.dtype == Dtype::bf16 && b.dtype == Dtype::bf16;
#else
    const bool pairs = false;
#endif
    const Operand left{a, rows, depth, a.stride[0], a.stride[1], pairs};
    const Operand right{b, columns, depth, b.stride[1], b.stride[0], pairs};
    const LeftOperand words(run, left);
#if defined(__AVX512BF16__)
    if (pairs) return multiply<Bf16Pairs>(run, words, right, c);
#endif
    multiply<Fp32>(run, words, right, c);
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
