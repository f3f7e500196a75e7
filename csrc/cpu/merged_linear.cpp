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

// A as tiles of six rows read it: where it lies, or copied as rows of words, or (A^T in memory) as strips of six rows.
class LeftOperand {
public:
    explicit LeftOperand(const Operand& a) : a_(a), steps_(a.steps()), strips_(!a.depth_is_contiguous()) {
        if (!a.pairs) {
            in_place_ = a.view.dtype == Dtype::f32 && !strips_;
        } else {
            in_place_ = a.depth_stride == 1 && a.depth % 2 == 0 && a.free_stride % 2 == 0 &&
                        reinterpret_cast<uintptr_t>(a.view.data) % 4 == 0;
        }
    }

    // Rows are copied in multiples of this: long enough runs to use whole cache lines of an A^T.
    static constexpr int64_t kGroupRows = 16 * kTileRows;

    // Words that a copy of so many rows takes; 0 where none is needed.
    int64_t words(int64_t rows) const { return in_place_ ? 0 : ceil_div(rows, kTileRows) * kTileRows * steps_; }

    void copy(int64_t row, int64_t count, uint32_t* words) const {
        if (in_place_) return;
        for (int64_t r = 0; r < count; r += kGroupRows) {
            const int64_t group = count - r < kGroupRows ? count - r : kGroupRows;
            strips_ ? copy_strips(row + r, group, words + r * steps_) : copy_rows(row + r, group, words + r * steps_);
        }
    }

    // From a row that begins a tile, and a step. `copied` holds the rows from `first_row` on, which begins a tile too.
    template <class Element>
    TileRows<Element> at(int64_t row, int64_t step, const uint32_t* copied, int64_t first_row) const {
        if (in_place_) {
            const int64_t row_stride = a_.pairs ? a_.free_stride / 2 : a_.free_stride;
            const int64_t column_stride = a_.pairs ? 1 : a_.depth_stride;
            const auto* data = static_cast<const Element*>(a_.view.data);
            return {data + row * row_stride + step * column_stride, row_stride, column_stride, kTileRows * row_stride};
        }
        const int64_t row_stride = strips_ ? 1 : steps_, column_stride = strips_ ? kTileRows : 1;
        const auto* data = reinterpret_cast<const Element*>(copied) + (row - first_row) * steps_;
        return {data + step * column_stride, row_stride, column_stride, kTileRows * steps_};
    }

private:
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
    int64_t steps_;
    bool strips_, in_place_;
};

int64_t panel_width(int64_t columns, int64_t panel) {
    const int64_t left = columns - panel * kPanelColumns;
    return left < kPanelColumns ? left : kPanelColumns;
}

// Panel after panel of B, packed for all rows of A.
template <class Arithmetic>
void multiply_wide(const Run& run, const Operand& left, const Operand& b, const View& c) {
    using Element = typename Arithmetic::Element;
    const int64_t rows = c.size[0], columns = c.size[1], steps = b.steps(), block = block_steps(steps);
    const LeftOperand a(left);
    Scratch copy(1, a.words(rows));
    auto* copied = reinterpret_cast<uint32_t*>(copy.of(0));
    if (a.words(rows) > 0)
        parallel_for(run, ceil_div(rows, LeftOperand::kGroupRows), [&](int64_t begin, int64_t end, int) {
            const int64_t first = begin * LeftOperand::kGroupRows, last = end * LeftOperand::kGroupRows;
            a.copy(first, (last < rows ? last : rows) - first, copied + first * steps);
        });
    const GemmSplit split(rows, ceil_div(columns, kPanelColumns), run.threads);
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
            const int64_t width = panel_width(columns, panel);
            for (int64_t step = 0; step < steps; step += block) {
                const int64_t deep = steps - step < block ? steps - step : block;
                if (panel != packed_panel) pack_panel(b, panel * kPanelColumns, width, step, deep, words, buffer);
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
                        b.prefetch(next_panel * kPanelColumns, panel_width(columns, next_panel), next_step, next_deep,
                                   part, parts);
                    tiles<Arithmetic>(chunk - r < kTileRows ? chunk - r : kTileRows, deep,
                                      a.at<Element>(first_row + r, step, copied, 0), words, kPanelColumns,
                                      sums + r * kPanelColumns, kPanelColumns, step > 0,
                                      Prefetch{reinterpret_cast<const char*>(words), 0});
                }
            }
            for (int64_t r = 0; r < chunk; ++r)
                store_row(c, (first_row + r) * c.stride[0] + panel * kPanelColumns, width, sums + r * kPanelColumns);
        }
    });
}

// Chunk after chunk of A, which stays in L2 for all panels of B: a weight's gradient has thousands of rows, and read
// anew for every panel they would come from L3.
template <class Arithmetic>
void multiply_tall(const Run& run, const Operand& left, const Operand& b, const View& c, int64_t chunk_rows) {
    using Element = typename Arithmetic::Element;
    const int64_t rows = c.size[0], columns = c.size[1], steps = b.steps(), block = block_steps(steps);
    const int64_t panels = ceil_div(columns, kPanelColumns), panel_words = steps * kPanelColumns;
    Scratch packed(1, panels * panel_words), buffers(threads_for(run, panels), steps * kLanes);
    auto* words = reinterpret_cast<uint32_t*>(packed.of(0));
    parallel_for(run, panels, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t panel = begin; panel < end; ++panel)
            pack_panel(b, panel * kPanelColumns, panel_width(columns, panel), 0, steps, words + panel * panel_words,
                       reinterpret_cast<uint32_t*>(buffers.of(thread)));
    });
    const LeftOperand a(left);
    const int64_t chunks = ceil_div(rows, chunk_rows);
    Scratch scratch(threads_for(run, chunks), chunk_rows * kPanelColumns + a.words(chunk_rows));
    parallel_for(run, chunks, [&](int64_t begin, int64_t end, int thread) {
        float* sums = scratch.of(thread);
        auto* copied = reinterpret_cast<uint32_t*>(sums + chunk_rows * kPanelColumns);
        for (int64_t first_row = begin * chunk_rows; first_row < end * chunk_rows && first_row < rows;
             first_row += chunk_rows) {
            const int64_t chunk = rows - first_row < chunk_rows ? rows - first_row : chunk_rows;
            a.copy(first_row, chunk, copied);
            for (int64_t panel = 0; panel < panels; ++panel) {
                for (int64_t step = 0; step < steps; step += block) {
                    const int64_t deep = steps - step < block ? steps - step : block;
                    const uint32_t* here = words + panel * panel_words + step * kPanelColumns;
                    const char* next = reinterpret_cast<const char*>(here + deep * kPanelColumns);
                    const Prefetch prefetch{next, ceil_div(kPanelColumns * 4, ceil_div(chunk, kTileRows))};
                    tiles<Arithmetic>(chunk, deep, a.at<Element>(first_row, step, copied, first_row), here,
                                      kPanelColumns, sums, kPanelColumns, step > 0, prefetch);
                }
                const int64_t width = panel_width(columns, panel);
                for (int64_t r = 0; r < chunk; ++r)
                    store_row(c, (first_row + r) * c.stride[0] + panel * kPanelColumns, width,
                              sums + r * kPanelColumns);
            }
        }
    });
}

// Rows of a chunk of multiply_tall, or 0 where it does not pay: A is no larger than the wide product's chunk, B packed
// is too much memory, or so deep that few rows of A fit in L2.
int64_t tall_chunk_rows(const Run& run, int64_t rows, int64_t columns, int64_t steps) {
    constexpr int64_t kPackedWords = int64_t{4} << 20, kChunkWords = 96 << 10;
    const int64_t fitting = kChunkWords / steps / kTileRows * kTileRows;
    const int64_t most = fitting < kMaxChunkRows ? fitting : kMaxChunkRows;
    if (rows <= 2 * kMaxChunkRows || ceil_div(columns, kPanelColumns) * kPanelColumns * steps > kPackedWords) return 0;
    if (most < 8 * kTileRows) return 0;
    const int64_t rounds = ceil_div(rows, most * run.threads);  // chunks for each thread, all of a size
    return ceil_div(ceil_div(rows, rounds * run.threads), kTileRows) * kTileRows;
}

template <class Arithmetic>
void multiply(const Run& run, const Operand& a, const Operand& b, const View& c) {
    const int64_t chunk_rows = tall_chunk_rows(run, c.size[0], c.size[1], b.steps());
    chunk_rows > 0 ? multiply_tall<Arithmetic>(run, a, b, c, chunk_rows) : multiply_wide<Arithmetic>(run, a, b, c);
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
#if defined(__AVX512BF16__)
    if (pairs) return multiply<Bf16Pairs>(run, left, right, c);
#endif
    multiply<Fp32>(run, left, right, c);
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
