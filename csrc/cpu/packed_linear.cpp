#include "packed_linear.h"

#include "gemm_split.h"
#include "math.h"
#include "packed_layout.h"
#include "parallel.h"
#include "quantise.h"
#include "rows.h"
#include "scratch.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

namespace {

// ---- x as the arithmetic wants it: rows of whole words --------------------------------------------------------------

#if defined(__AVX512BF16__)
constexpr bool kBf16Pairs = true;
#else
constexpr bool kBf16Pairs = false;
#endif

bool multiplies_pairs(const View& x, const PackedLayout& layout) {
    return kBf16Pairs && layout.mode == WeightMode::bf16 && x.dtype == Dtype::bf16;
}

// Words of 32 bits that a row of x takes once converted.
int64_t row_words(const View& x, const PackedLayout& layout) {
    if (layout.mode == WeightMode::int8) return layout.steps * Int8::kParts;
    return multiplies_pairs(x, layout) ? layout.steps : layout.steps * layout.depth_per_step;
}

// x can be read where it lies: no conversion, and no last word that reaches beyond a row.
bool read_in_place(const View& x, const PackedLayout& layout) {
    if (x.size[1] % layout.depth_per_step != 0 || layout.mode == WeightMode::int8) return false;
    if (!multiplies_pairs(x, layout)) return x.dtype == Dtype::f32;
    return x.last_stride == 1 && x.stride[0] % 2 == 0 && reinterpret_cast<uintptr_t>(x.data) % 4 == 0;
}

// One row of x as levels for Int8 (tile.h). Levels beyond K meet zero weights.
float quantise_row(const float* values, int64_t depth, uint32_t* words) {
    const RowScale row = row_scale(values, depth);
#if defined(__AVX512VNNI__)
    auto* levels = reinterpret_cast<uint8_t*>(words);
#pragma omp simd
    for (int64_t k = 0; k < depth; ++k) levels[k] = static_cast<uint8_t>(quantised(values[k], row.inverse) + 128);
#elif defined(__AVX2__)
    auto* levels = reinterpret_cast<int16_t*>(words);
    constexpr int kPlace[4] = {0, 2, 1, 3};
    for (int64_t k = 0; k < depth; ++k)
        levels[k / 4 * 4 + kPlace[k % 4]] = static_cast<int16_t>(quantised(values[k], row.inverse));
#else
    for (int64_t k = 0; k < depth; ++k) words[k] = static_cast<uint32_t>(quantised(values[k], row.inverse));
#endif
    return row.scale;
}

void convert_rows(const Run& run, const View& x, const PackedLayout& layout, uint32_t* words, float* scales) {
    const int64_t depth = x.size[1], width = row_words(x, layout);
    const bool int8 = layout.mode == WeightMode::int8, pairs = multiplies_pairs(x, layout);
    Scratch scratch(threads_for(run, x.size[0]), depth);
    parallel_for(run, x.size[0], [&](int64_t begin, int64_t end, int thread) {
        for (int64_t m = begin; m < end; ++m) {
            uint32_t* row = words + m * width;
            const int64_t offset = m * x.stride[0];
            const int64_t last = width < 4 ? width : 4;  // the words that reach beyond K are among these
            std::memset(row + width - last, 0, static_cast<size_t>(last) * 4);
            if (pairs) {
                auto* halves = reinterpret_cast<uint16_t*>(row);
                for (int64_t k = 0; k < depth; ++k) halves[k] = x.as<const uint16_t>()[offset + k * x.last_stride];
            } else if (int8) {
                scales[m] = quantise_row(load_row(x, offset, depth, scratch.of(thread)), depth, row);
            } else {
                auto* floats = reinterpret_cast<float*>(row);
                const float* loaded = load_row(x, offset, depth, floats);
                if (loaded != floats) std::memcpy(floats, loaded, static_cast<size_t>(depth) * sizeof(float));
            }
        }
    });
}

// ---- the product ----------------------------------------------------------------------------------------------------

struct Product {
    const PackedLayout& layout;
    const View& y;
    const char* panels;       // after the header
    const float* row_scales;  // int8: of each row of x
    const View& bias;
};

// What a panel needs to turn its sums into outputs, lane by lane.
struct PanelEnd {
    alignas(64) float bias[kPanelColumns];
    alignas(64) float scale[kPanelColumns];
    alignas(64) int32_t correction[kPanelColumns];

    PanelEnd(const Product& product, int64_t panel) {
        const PackedLayout& layout = product.layout;
        const char* base = product.panels - kHeaderBytes;
        for (int64_t lane = 0; lane < kPanelColumns; ++lane) {
            const int64_t column = layout.column_of(panel, lane);
            bias[lane] = product.bias.present() && column >= 0
                             ? load_element(product.bias, column * product.bias.stride[0])
                             : 0.0f;
        }
        if (layout.mode != WeightMode::int8) return;
        std::memcpy(scale, base + layout.scales_offset() + panel * sizeof scale, sizeof scale);
        std::memcpy(correction, base + layout.sums_offset() + panel * sizeof correction, sizeof correction);
#if !defined(__AVX512VNNI__)
        std::memset(correction, 0, sizeof correction);  // only unsigned levels are shifted
#endif
    }
};

// One row of sums, fp32 or int32, into y.
void store_outputs(const Product& product, const PanelEnd& end, const float* sums, int64_t m, int64_t panel) {
    const PackedLayout& layout = product.layout;
    alignas(64) float row[kPanelColumns];
    if (layout.mode == WeightMode::int8) {
        alignas(64) int32_t integers[kPanelColumns];
        std::memcpy(integers, sums, sizeof integers);
        const float row_scale = product.row_scales[m];
#pragma omp simd
        for (int64_t i = 0; i < kPanelColumns; ++i)
            row[i] = static_cast<float>(integers[i] - end.correction[i]) * (row_scale * end.scale[i]) + end.bias[i];
    } else {
#pragma omp simd
        for (int64_t i = 0; i < kPanelColumns; ++i) row[i] = sums[i] + end.bias[i];
    }
    if (layout.swiglu) {
#pragma omp simd
        for (int64_t i = 0; i < kPanelColumns / 2; ++i)
            row[i] = row[i] * sigmoid_f(row[i]) * row[kPanelColumns / 2 + i];
    }
    const int64_t first = panel * layout.panel_outputs, left = layout.output_columns - first;
    store_row(product.y, m * product.y.stride[0] + first, left < layout.panel_outputs ? left : layout.panel_outputs,
              row);
}

template <class Arithmetic>
void multiply(const Run& run, const Product& product, TileRows<typename Arithmetic::Element> x) {
    const PackedLayout& layout = product.layout;
    const int64_t rows = product.y.size[0], block = block_steps(layout.steps);
    const GemmSplit split(rows, layout.panels, run.threads);
    Scratch scratch(threads_for(run, split.items), split.chunk_rows * kPanelColumns);
    parallel_for(run, split.items, [&](int64_t begin, int64_t end, int thread) {
        float* sums = scratch.of(thread);
        for (int64_t item = begin; item < end; ++item) {
            const int64_t panel = item / split.chunks, first_row = item % split.chunks * split.chunk_rows;
            const int64_t chunk = rows - first_row < split.chunk_rows ? rows - first_row : split.chunk_rows;
            const char* words = product.panels + panel * layout.panel_bytes();
            TileRows<typename Arithmetic::Element> left = x;
            left.data += first_row * x.row_stride;
            for (int64_t step = 0; step < layout.steps; step += block) {
                const int64_t steps = layout.steps - step < block ? layout.steps - step : block;
                // While this block is multiplied, the next comes from memory, evenly over the tiles.
                const bool last = step + steps == layout.steps;
                const char* next = last ? product.panels + (item + 1) / split.chunks * layout.panel_bytes()
                                        : words + (step + steps) * kPanelColumns * 4;
                const Prefetch prefetch{next, ceil_div(kPanelColumns * 4, ceil_div(chunk, kTileRows))};
                tiles<Arithmetic>(chunk, steps, left, words + step * kPanelColumns * 4, kPanelColumns, sums,
                                  kPanelColumns, step > 0, prefetch);
                left.data += steps * Arithmetic::kParts * x.column_stride;
            }
            const PanelEnd panel_end(product, panel);
            for (int64_t r = 0; r < chunk; ++r)
                store_outputs(product, panel_end, sums + r * kPanelColumns, first_row + r, panel);
        }
    });
}

template <class Arithmetic>
void multiply(const Run& run, const Product& product, const void* x, int64_t row_stride, int64_t column_stride) {
    using Element = typename Arithmetic::Element;
    multiply<Arithmetic>(run, product, TileRows<Element>{static_cast<const Element*>(x), row_stride, column_stride,
                                                         kTileRows * row_stride});
}

}  // namespace

void packed_linear(const Run& run, const View& x, const View& packed, const View& bias, const View& y) {
    const PackedLayout layout = read_layout(packed);
    check_rank(x, 2);
    check_float(x);
    check_shape(x, {x.size[0], layout.depth});
    if (bias.present()) {
        check_shape(bias, {layout.columns});
        check_float(bias);
    }
    check_shape(y, {x.size[0], layout.output_columns});
    check_float(y);
    if (layout.output_columns > 1 && y.last_stride != 1) refuse_tensor(y, "contiguous within its rows");
    if (x.size[0] > 1 && y.stride[0] < layout.output_columns) refuse_tensor(y, "without rows that overlap");
    const int64_t rows = x.size[0];
    if (rows == 0) return;

    const bool in_place = read_in_place(x, layout), pairs = multiplies_pairs(x, layout);
    const int64_t width = row_words(x, layout);
    Scratch converted(1, in_place ? 0 : rows * width), scales(1, layout.mode == WeightMode::int8 ? rows : 0);
    const void* left = x.data;
    int64_t row_stride = pairs ? x.stride[0] / 2 : x.stride[0], column_stride = pairs ? 1 : x.last_stride;
    if (!in_place) {
        convert_rows(run, x, layout, reinterpret_cast<uint32_t*>(converted.of(0)), scales.of(0));
        left = converted.of(0);
        row_stride = width;
        column_stride = 1;
    }
    const Product product{layout, y, packed.as<const char>() + kHeaderBytes, scales.of(0), bias};
    switch (layout.mode) {
        case WeightMode::f32: return multiply<Fp32>(run, product, left, row_stride, column_stride);
        case WeightMode::int8: return multiply<Int8>(run, product, left, row_stride, column_stride);
        case WeightMode::bf16: break;
    }
#if defined(__AVX512BF16__)
    if (pairs) return multiply<Bf16Pairs>(run, product, left, row_stride, column_stride);
#endif
    multiply<Bf16AsFp32>(run, product, left, row_stride, column_stride);
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
