#include "dual_attention.h"

#include "attention_backward.h"
#include "attention_forward.h"
#include "parallel.h"
#include "refuse.h"
#include "scratch.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

namespace {

struct Sizes {
    int64_t batch, tokens, context, heads, key_heads, dim;
    int64_t packed() const { return 2 * heads + key_heads; }
    float cross_scale() const { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim))); }
};

Sizes check(const View& qkq, const View& v1, const View& k2, const View& v2, const View& gate, const View& mask) {
    check_rank(qkq, 4);
    check_rank(v1, 4);
    check_rank(k2, 4);
    check_rank(gate, 1);
    const Sizes n{qkq.size[0], qkq.size[1], k2.size[1], gate.size[0], v1.size[2], qkq.size[3]};
    if (n.key_heads < 1 || n.heads % n.key_heads != 0) refuse_tensor(v1, "of key heads that divide gate's heads");
    check_shape(qkq, {n.batch, n.tokens, n.packed(), n.dim});
    check_shape(v1, {n.batch, n.tokens, n.key_heads, n.dim});
    for (const View* keys : {&k2, &v2}) check_shape(*keys, {n.batch, n.context, n.key_heads, n.dim});
    for (const View* operand : {&qkq, &v1, &k2, &v2, &gate}) check_float(*operand);
    check_mask(mask, n.batch, n.context);
    return n;
}

// Head `head` of sample b of [B, T, H*d].
HeadRows flat_head_rows(const View& view, int64_t b, int64_t head, int64_t dim) {
    return {&view, b * view.stride[0] + head * dim * view.last_stride, view.stride[1]};
}

float gate_of(const View& gate, int64_t head) { return tanh_f(load_element(gate, head * gate.last_stride)); }

}  // namespace

void dual_attention_fwd(const Run& run, const View& qkq, const View& v1, const View& k2, const View& v2,
                        const View& gate, const View& mask, double scale, const View& out) {
    const Sizes n = check(qkq, v1, k2, v2, gate, mask);
    check_shape(out, {n.batch, n.tokens, n.heads * n.dim});
    check_float(out);
    check_contiguous(out);
    const int64_t longer = n.tokens > n.context ? n.tokens : n.context;
    const int64_t rows = block_rows(n.tokens, longer), blocks = rows > 0 ? (n.tokens + rows - 1) / rows : 0;
    const int64_t group = n.heads / n.key_heads, second = n.heads + n.key_heads;
    Pieces measure;
    Attention(measure, n.tokens, n.dim, rows);
    Attention(measure, n.context, n.dim, rows);
    Scratch scratch(run.threads, measure.used());
    parallel_for(run, n.batch * n.heads * blocks, [&](int64_t begin, int64_t end, int thread) {
        Pieces pieces(scratch.of(thread));
        Attention own(pieces, n.tokens, n.dim, rows), cross(pieces, n.context, n.dim, rows);
        int64_t loaded = -1;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = i % blocks * rows, head = i / blocks % n.heads, b = i / blocks / n.heads;
            const int64_t key_head = head / group;
            if (loaded != b * n.key_heads + key_head) {
                loaded = b * n.key_heads + key_head;
                own.load(head_rows(qkq, b, n.heads + key_head), head_rows(v1, b, key_head), View(), b);
                cross.load(head_rows(k2, b, key_head), head_rows(v2, b, key_head), mask, b);
            }
            const int64_t count = smaller(rows, n.tokens - first);
            own.attend(head_rows(qkq, b, head), first, count, static_cast<float>(scale));
            cross.attend(head_rows(qkq, b, second + head), first, count, n.cross_scale());
            const float g = gate_of(gate, head);
            for (int64_t r = 0; r < count; ++r) {
                float* row = own.row(r);
                const float* context = cross.row(r);
                const float own_factor = own.inverse(r), cross_factor = g * cross.inverse(r);
#pragma omp simd
                for (int64_t c = 0; c < n.dim; ++c) row[c] = own_factor * row[c] + cross_factor * context[c];
                store_row(out, flat_head_rows(out, b, head, n.dim).at(first + r), n.dim, row);
            }
        }
    });
}

void dual_attention_bwd(const Run& run, const View& dout, const View& qkq, const View& v1, const View& k2,
                        const View& v2, const View& gate, const View& mask, double scale, const View& dqkq,
                        const View& dv1, const View& dk2, const View& dv2, const View& dgate) {
    const Sizes n = check(qkq, v1, k2, v2, gate, mask);
    check_shape(dout, {n.batch, n.tokens, n.heads * n.dim});
    check_float(dout);
    check_shape(dqkq, {n.batch, n.tokens, n.packed(), n.dim});
    check_shape(dv1, {n.batch, n.tokens, n.key_heads, n.dim});
    for (const View* keys : {&dk2, &dv2}) check_shape(*keys, {n.batch, n.context, n.key_heads, n.dim});
    check_shape(dgate, {n.heads});
    for (const View* gradient : {&dqkq, &dv1, &dk2, &dv2, &dgate}) {
        check_float(*gradient);
        check_contiguous(*gradient);
    }
    const int64_t longer = n.tokens > n.context ? n.tokens : n.context, rows = block_rows(n.tokens, longer);
    const int64_t group = n.heads / n.key_heads, second = n.heads + n.key_heads;
    Pieces measure;
    AttentionGradient(measure, longer, n.dim, rows);
    Scratch scratch(run.threads, measure.used());
    // sum(dout * P2 v2) of each head and sample: the sum of P2 * dP2 that dS2 needs anyway
    Scratch sums(1, n.batch * n.heads);
    parallel_for(run, n.batch * n.key_heads, [&](int64_t begin, int64_t end, int thread) {
        Pieces pieces(scratch.of(thread));
        AttentionGradient gradient(pieces, longer, n.dim, rows);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / n.key_heads, key_head = i % n.key_heads;
            gradient.load(head_rows(qkq, b, n.heads + key_head), head_rows(v1, b, key_head), View(), b, n.tokens);
            for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
                gradient.add(head_rows(qkq, b, head), flat_head_rows(dout, b, head, n.dim), n.tokens,
                             static_cast<float>(scale), 1.0f, head_rows(dqkq, b, head));
            gradient.store(static_cast<float>(scale), head_rows(dqkq, b, n.heads + key_head),
                           head_rows(dv1, b, key_head));

            gradient.load(head_rows(k2, b, key_head), head_rows(v2, b, key_head), mask, b, n.context);
            for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
                const double sum = gradient.add(head_rows(qkq, b, second + head),
                                                flat_head_rows(dout, b, head, n.dim), n.tokens, n.cross_scale(),
                                                gate_of(gate, head), head_rows(dqkq, b, second + head));
                sums.of(0)[b * n.heads + head] = static_cast<float>(sum);
            }
            gradient.store(n.cross_scale(), head_rows(dk2, b, key_head), head_rows(dv2, b, key_head));
        }
    });
    for (int64_t head = 0; head < n.heads; ++head) {
        double sum = 0;
        for (int64_t b = 0; b < n.batch; ++b) sum += sums.of(0)[b * n.heads + head];
        const float g = gate_of(gate, head), slope = (1.0f - g) * (1.0f + g);
        const float value = static_cast<float>(sum) * slope;
        store_row(dgate, head, 1, &value);
    }
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
