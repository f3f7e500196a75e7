#include "flash_attention.h"

#include "attention_backward.h"
#include "attention_forward.h"
#include "parallel.h"
#include "refuse.h"
#include "scratch.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

namespace {

struct Sizes {
    int64_t batch, queries, keys, heads, key_heads, dim;
};

Sizes check(const View& q, const View& k, const View& v, const View& mask) {
    check_rank(q, 4);
    check_rank(k, 4);
    const Sizes n{q.size[0], q.size[1], k.size[1], q.size[2], k.size[2], q.size[3]};
    if (n.key_heads < 1 || n.heads % n.key_heads != 0) refuse_tensor(k, "of key heads that divide q's heads");
    for (const View* keys : {&k, &v}) check_shape(*keys, {n.batch, n.keys, n.key_heads, n.dim});
    for (const View* operand : {&q, &k, &v}) check_float(*operand);
    check_mask(mask, n.batch, n.keys);
    return n;
}

}  // namespace

void flash_attention_fwd(const Run& run, const View& q, const View& k, const View& v, const View& mask, double scale,
                         const View& out) {
    const Sizes n = check(q, k, v, mask);
    check_shape(out, {n.batch, n.queries, n.heads, n.dim});
    check_float(out);
    check_contiguous(out);
    const int64_t rows = block_rows(n.queries, n.keys), blocks = rows > 0 ? (n.queries + rows - 1) / rows : 0;
    const int64_t group = n.heads / n.key_heads;
    Pieces measure;
    Attention(measure, n.keys, n.dim, rows);
    Scratch scratch(run.threads, measure.used());
    parallel_for(run, n.batch * n.heads * blocks, [&](int64_t begin, int64_t end, int thread) {
        Pieces pieces(scratch.of(thread));
        Attention attention(pieces, n.keys, n.dim, rows);
        int64_t loaded = -1;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = i % blocks * rows, head = i / blocks % n.heads, b = i / blocks / n.heads;
            const int64_t key_head = head / group;
            if (loaded != b * n.key_heads + key_head) {
                loaded = b * n.key_heads + key_head;
                attention.load(head_rows(k, b, key_head), head_rows(v, b, key_head), mask, b);
            }
            const int64_t count = smaller(rows, n.queries - first);
            attention.attend(head_rows(q, b, head), first, count, static_cast<float>(scale));
            for (int64_t r = 0; r < count; ++r)
                store_scaled(head_rows(out, b, head), first + r, n.dim, attention.inverse(r), attention.row(r));
        }
    });
}

void flash_attention_bwd(const Run& run, const View& dout, const View& q, const View& k, const View& v,
                         const View& mask, double scale, const View& dq, const View& dk, const View& dv) {
    const Sizes n = check(q, k, v, mask);
    for (const View* queries : {&dout, &dq}) check_shape(*queries, {n.batch, n.queries, n.heads, n.dim});
    for (const View* keys : {&dk, &dv}) check_shape(*keys, {n.batch, n.keys, n.key_heads, n.dim});
    check_float(dout);
    for (const View* gradient : {&dq, &dk, &dv}) {
        check_float(*gradient);
        check_contiguous(*gradient);
    }
    const int64_t rows = block_rows(n.queries, n.keys), group = n.heads / n.key_heads;
    Pieces measure;
    AttentionGradient(measure, n.keys, n.dim, rows);
    Scratch scratch(run.threads, measure.used());
    parallel_for(run, n.batch * n.key_heads, [&](int64_t begin, int64_t end, int thread) {
        Pieces pieces(scratch.of(thread));
        AttentionGradient gradient(pieces, n.keys, n.dim, rows);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / n.key_heads, key_head = i % n.key_heads;
            gradient.load(head_rows(k, b, key_head), head_rows(v, b, key_head), mask, b, n.keys);
            for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
                gradient.add(head_rows(q, b, head), head_rows(dout, b, head), n.queries, static_cast<float>(scale),
                             1.0f, head_rows(dq, b, head));
            gradient.store(static_cast<float>(scale), head_rows(dk, b, key_head), head_rows(dv, b, key_head));
        }
    });
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
