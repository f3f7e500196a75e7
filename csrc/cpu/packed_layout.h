// How packed_linear's weight [N, K] lies in its buffer of bytes:
//   header   64 bytes, by which a buffer is recognised that was packed for something else
//   panels   [panels][steps][kPanelColumns] words of 32 bits, what a word holds being told in tile.h; zeros where a
//            panel is wider than what is left of N, or the last word deeper than what is left of K
//   int8 only: scale of each column (fp32), then 128 * the column's sum (int32), both [panels][kPanelColumns]
// With swiglu the N = 2F columns are the gate's F and the up projection's F, and a panel holds half of each kind.
#pragma once

#include <cstdint>
#include <cstring>

#include "refuse.h"
#include "run.h"
#include "tile.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

enum class WeightMode : int64_t { f32 = 0, bf16 = 1, int8 = 2 };

inline WeightMode weight_mode(int64_t mode) {
    if (mode < 0 || mode > 2) refuse_number("mode", "be 0 (float32), 1 (bfloat16) or 2 (int8)", mode);
    return static_cast<WeightMode>(mode);
}

struct PackedHeader {
    char magic[8];
    int64_t columns, depth, mode, swiglu, panel_columns;
    char unused[16];
};
constexpr int64_t kHeaderBytes = 64;
static_assert(sizeof(PackedHeader) == kHeaderBytes, "the panels after it must stay aligned");
constexpr char kPackedMagic[8] = {'b', '3', 'o', 'p', 'a', 'c', 'k', '1'};
// The largest depth at which 127 * 127 * depth is still an int32; far above it sizes in bytes stay in int64 too.
constexpr int64_t kMaxDepthInt8 = 131072, kMaxSize = int64_t{1} << 24;

class PackedLayout {
public:
    PackedLayout(int64_t columns, int64_t depth, WeightMode mode, bool swiglu)
        : columns(columns), depth(depth), mode(mode), swiglu(swiglu) {
        if (columns < 1 || columns > kMaxSize) refuse_number("N", "be from 1 to 16777216", columns);
        if (depth < 1 || depth > kMaxSize) refuse_number("K", "be from 1 to 16777216", depth);
        if (swiglu && columns % 2 != 0) refuse_number("N", "be even for swiglu", columns);
        if (mode == WeightMode::int8 && depth > kMaxDepthInt8) refuse_number("K", "be at most 131072 for int8", depth);
        depth_per_step = mode == WeightMode::f32 ? 1 : mode == WeightMode::bf16 ? 2 : 4;
        steps = (depth + depth_per_step - 1) / depth_per_step;
        output_columns = swiglu ? columns / 2 : columns;
        panel_outputs = swiglu ? kPanelColumns / 2 : kPanelColumns;
        panels = (output_columns + panel_outputs - 1) / panel_outputs;
    }

    int64_t columns, depth, depth_per_step, steps, output_columns, panel_outputs, panels;
    WeightMode mode;
    bool swiglu;

    int64_t panel_bytes() const { return steps * kPanelColumns * 4; }
    int64_t scales_offset() const { return kHeaderBytes + panels * panel_bytes(); }
    int64_t sums_offset() const { return scales_offset() + panels * kPanelColumns * 4; }
    int64_t bytes() const {
        return mode == WeightMode::int8 ? sums_offset() + panels * kPanelColumns * 4 : scales_offset();
    }

    // The column of W in a panel's lane, -1 in the padding.
    int64_t column_of(int64_t panel, int64_t lane) const {
        const bool up = lane >= panel_outputs;
        const int64_t output = panel * panel_outputs + (up ? lane - panel_outputs : lane);
        return output >= output_columns ? -1 : up ? output_columns + output : output;
    }

    PackedHeader header() const {
        PackedHeader header{};
        std::memcpy(header.magic, kPackedMagic, sizeof kPackedMagic);
        header.columns = columns;
        header.depth = depth;
        header.mode = static_cast<int64_t>(mode);
        header.swiglu = swiglu;
        header.panel_columns = kPanelColumns;
        return header;
    }
};

// A buffer that panels can be written to or read from.
inline void check_packed_buffer(const View& packed) {
    check_rank(packed, 1);
    check_dtype(packed, Dtype::u8);
    check_contiguous(packed);
    if (reinterpret_cast<uintptr_t>(packed.data) % 64 != 0) refuse_tensor(packed, "aligned to 64 bytes");
}

// The layout of a buffer that pack_linear has filled.
inline PackedLayout read_layout(const View& packed) {
    check_packed_buffer(packed);
    PackedHeader header{};
    if (packed.size[0] >= kHeaderBytes) std::memcpy(&header, packed.data, kHeaderBytes);
    if (std::memcmp(header.magic, kPackedMagic, sizeof kPackedMagic) != 0) refuse_tensor(packed, "filled by pack_linear");
    if (header.panel_columns != kPanelColumns)
        refuse_tensor(packed, "packed for panels of ", kPanelColumns, " columns, which this instruction set uses");
    const PackedLayout layout(header.columns, header.depth, weight_mode(header.mode), header.swiglu != 0);
    if (packed.size[0] != layout.bytes()) refuse_tensor(packed, "of ", layout.bytes(), " bytes");
    return layout;
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
