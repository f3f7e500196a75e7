#include "packed_linear_pack.h"

#include "gemm_split.h"
#include "packed_layout.h"
#include "parallel.h"
#include "quantise.h"
#include "rows.h"
#include "scratch.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

namespace {

constexpr int64_t kChunk = 64;  // steps written per lane in turn: that much of a panel stays in L1 for all its lanes

// Lane `lane` of `steps` rows of a panel, from floats padded to whole words.
void write_lane(const PackedLayout& layout, const float* values, float inverse, int64_t steps, uint32_t* lane) {
    for (int64_t s = 0; s < steps; ++s) {
        uint32_t word = 0;
        if (layout.mode == WeightMode::f32) {
            std::memcpy(&word, values + s, 4);
        } else if (layout.mode == WeightMode::bf16) {
            word = float_to_bf16(values[2 * s]) | static_cast<uint32_t>(float_to_bf16(values[2 * s + 1])) << 16;
        } else {
            for (int i = 0; i < 4; ++i)
                word |= (static_cast<uint32_t>(quantised(values[4 * s + i], inverse)) & 0xffu) << (8 * i);
        }
        lane[s * kPanelColumns] = word;
    }
}

// Scale and sum of an int8 column; returns what its weights are multiplied by to become levels.
float write_scale(const float* values, int64_t depth, float* scale, int32_t* sum) {
    const RowScale row = row_scale(values, depth);
    int32_t total = 0;
    for (int64_t k = 0; k < depth; ++k) total += quantised(values[k], row.inverse);
    *scale = row.scale;
    *sum = static_cast<int32_t>(static_cast<uint32_t>(total) * 128u);  // wraps like the products that it corrects
    return row.inverse;
}

}  // namespace

int64_t packed_size(const Run&, int64_t N, int64_t K, int64_t mode, bool swiglu) {
    return PackedLayout(N, K, weight_mode(mode), swiglu).bytes();
}

void pack_linear(const Run& run, const View& w, const View& packed, int64_t N, int64_t first_column, int64_t mode,
                 bool swiglu) {
    check_rank(w, 2);
    check_float(w);
    const int64_t rows = w.size[0], depth = w.size[1];
    if (depth < 1) refuse_tensor(w, "a matrix [n, K], where K must be at least 1");
    const PackedLayout layout(N, depth, weight_mode(mode), swiglu);
    if (first_column < 0 || first_column > N || rows > N - first_column)
        refuse_number("first_column", "leave room for the rows of w among the N columns", first_column);
    check_packed_buffer(packed);
    if (packed.size[0] != layout.bytes()) refuse_tensor(packed, "of ", layout.bytes(), " bytes");

    char* bytes = packed.as<char>();
    const PackedHeader header = layout.header();
    std::memcpy(bytes, &header, sizeof header);
    const bool int8 = layout.mode == WeightMode::int8;
    const int64_t padded_depth = layout.steps * layout.depth_per_step;
    Scratch scratch(threads_for(run, layout.panels), padded_depth * kPanelColumns);
    parallel_for(run, layout.panels, [&](int64_t begin, int64_t end, int thread) {
        float* lanes = scratch.of(thread);
        float inverse[kPanelColumns];
        for (int64_t panel = begin; panel < end; ++panel) {
            auto* words = reinterpret_cast<uint32_t*>(bytes + kHeaderBytes + panel * layout.panel_bytes());
            auto* scales = reinterpret_cast<float*>(bytes + layout.scales_offset()) + panel * kPanelColumns;
            auto* sums = reinterpret_cast<int32_t*>(bytes + layout.sums_offset()) + panel * kPanelColumns;
            // The padding is zeroed by every call: nobody else would know when it is done.
            bool mine[kPanelColumns];
            for (int64_t lane = 0; lane < kPanelColumns; ++lane) {
                const int64_t column = layout.column_of(panel, lane), row = column - first_column;
                const bool padding = column < 0;
                mine[lane] = padding || (row >= 0 && row < rows);
                if (!mine[lane]) continue;
                float* values = lanes + lane * padded_depth;
                std::memset(values, 0, static_cast<size_t>(padded_depth) * sizeof(float));
                if (!padding) {
                    const float* loaded = load_row(w, row * w.stride[0], depth, values);
                    if (loaded != values) std::memcpy(values, loaded, static_cast<size_t>(depth) * sizeof(float));
                }
                inverse[lane] = int8 ? write_scale(values, depth, scales + lane, sums + lane) : 0.0f;
            }
            for (int64_t step = 0; step < layout.steps; step += kChunk) {
                const int64_t steps = layout.steps - step < kChunk ? layout.steps - step : kChunk;
                for (int64_t lane = 0; lane < kPanelColumns; ++lane) {
                    if (!mine[lane]) continue;
                    write_lane(layout, lanes + lane * padded_depth + step * layout.depth_per_step, inverse[lane], steps,
                               words + step * kPanelColumns + lane);
                }
            }
        }
    });
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
