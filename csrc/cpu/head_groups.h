// Groups of neighbouring heads, each with a norm of its own or without: what a call of qk_norm_rope works on.
#pragma once

#include "refuse.h"
#include "rows.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

constexpr int most_groups = 3;

struct Group {
    const View* weight;
    const View* bias;  // of the forward
    int64_t heads, first_head, columns, first_column;
    int64_t place;  // among the columns of this call's groups
};

struct Groups {
    Group at[most_groups];
    int count = 0;
    int64_t first, head_dim, columns = 0, widest = 0, total_heads;
    bool normed = false;

    // packed [B, T, heads * d], split [B, T, heads, d]
    Groups(const View& packed, const View& split, const View* const* weights, const View* const* biases,
           const int64_t* heads, int64_t first_group, int64_t first_head, int64_t dim)
        : first(first_group), head_dim(dim) {
        check_rank(packed, 3);
        check_float(packed);
        check_rank(split, 4);
        check_float(split);
        total_heads = split.size[2];
        if (dim < 2 || dim % 2 != 0) refuse_number("head_dim", "be even and at least 2", dim);
        check_shape(split, {packed.size[0], packed.size[1], total_heads, dim});
        check_shape(packed, {packed.size[0], packed.size[1], total_heads * dim});
        constexpr const char* names[most_groups] = {"heads0", "heads1", "heads2"};
        int64_t head = first_head;
        if (head < 0 || head > total_heads) refuse_number("first_head", "be the number of a head", head);
        for (int i = 0; i < most_groups && heads[i] != 0; ++i, ++count) {
            if (heads[i] < 0 || heads[i] > total_heads - head)
                refuse_number(names[i], "be at most the number of heads that are left", heads[i]);
            Group& group = at[count];
            group = {weights[i], biases ? biases[i] : nullptr, heads[i], head, heads[i] * dim, head * dim, columns};
            head += heads[i];
            columns += group.columns;
            widest = group.columns > widest ? group.columns : widest;
            if (biases && weights[i]->present() != biases[i]->present())
                refuse_tensor(*biases[i], "given where its weight is, and absent where it is");
            if (!weights[i]->present()) continue;
            normed = true;
            for (const View* v : {weights[i], biases ? biases[i] : weights[i]}) {
                check_shape(*v, {group.columns});
                check_float(*v);
            }
        }
    }

    void check_statistics(const View& statistic, const View& packed) const {
        check_rank(statistic, 3);
        check_shape(statistic, {packed.size[0], packed.size[1], statistic.size[2]});
        check_dtype(statistic, Dtype::f32);
        check_contiguous(statistic);
        if (first < 0 || first > statistic.size[2] - count)
            refuse_number("first_group", "be such that every group has its place", first);
    }

    void check_rope(const View& rope, const View& packed) const {
        if (!rope.present()) return;
        check_shape(rope, {packed.size[1], head_dim / 2, 2});
        check_dtype(rope, Dtype::f32);
    }
};

// Heads of one token as floats; they may lie apart.
inline const float* load_heads(const View& view, int64_t offset, const Group& group, int64_t head_dim, float* buffer) {
    offset += group.first_head * view.stride[2];
    const int64_t step = view.last_stride;
    if (view.stride[2] == head_dim * step) return load_row(view, offset, group.columns, step, buffer);
    for (int64_t h = 0; h < group.heads; ++h) {
        float* head = buffer + h * head_dim;
        const float* found = load_row(view, offset + h * view.stride[2], head_dim, step, head);
        if (found != head) std::memcpy(head, found, static_cast<size_t>(head_dim) * sizeof(float));
    }
    return buffer;
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
