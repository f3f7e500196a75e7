// `dual_attention` where both attentions are one tile of scores: 64 queries, 64 keys, half precision, heads of 64.
// A block of four warps per (sample, query head); scores and probabilities never leave the registers.
#include "dual_attention_args.cuh"
#include "dual_attention_tile.cuh"

namespace blip3o_fast {

namespace {

// P v of the warp's 16 queries.
template <Dtype T>
__device__ void attend(Accumulator& out, const uint4* q, const uint4* k, const uint4* v, float score,
                       uint32_t visible) {
    Accumulator p = {};
    multiply_transposed<T>(p, q, k);
    float inverse[2];
    exponentials(p, inverse, score, visible);
    Operand rounded;
    round_to_operand<T>(rounded, p, 1.0f);
    multiply<T>(out, rounded, v);
    scale_rows(out, inverse);
}

template <Dtype T>
__global__ void __launch_bounds__(tile_threads, 4) dual_attention_tile_forward(const DualAttentionArgs args) {
    pdl_wait();
    pdl_release();
    __shared__ uint4 tiles[6][tile_chunks];
    const int head = blockIdx.x % args.heads, sample = blockIdx.x / args.heads, key_head = head / args.group();
    const auto fetch = [&](int tile, const HeadsTensor& x, int of) {
        fetch_tile(tiles[tile], static_cast<const uint16_t*>(x.data) + x.at(sample, of), x.token);
    };
    fetch(0, args.qkq, head);
    fetch(1, args.qkq, args.heads + key_head);
    fetch(2, args.v1, key_head);
    commit_copies();
    fetch(3, args.qkq, args.heads + args.key_heads + head);
    fetch(4, args.k2, key_head);
    fetch(5, args.v2, key_head);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    Accumulator own = {};
    attend<T>(own, tiles[0], tiles[1], tiles[2], args.scale1 * log2e, 0xffff);
    wait_for_copies<0>();
    __syncthreads();
    Accumulator cross = {};
    const uint32_t visible = visible_columns(args.mask_of(sample), args.mask_token);
    attend<T>(cross, tiles[3], tiles[4], tiles[5], args.scale2 * log2e, visible);
    const float gate = args.gate_of(head);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) own[i][j] += gate * cross[i][j];
    // only this warp has read these rows of q1, and is done with them
    auto* out = static_cast<uint16_t*>(args.out.data) + args.out.at(sample, head);
    store_rows<T>(out, args.out.token, tiles[0], own, 1.0f);
}

}  // namespace

void launch_tile_forward(const Launcher& launcher, const DualAttentionArgs& args) {
    const int64_t blocks = int64_t{args.batch} * args.heads;
    if (args.qkq.dtype == Dtype::bf16)
        launcher(dual_attention_tile_forward<Dtype::bf16>, blocks, tile_threads, args);
    else
        launcher(dual_attention_tile_forward<Dtype::f16>, blocks, tile_threads, args);
}

}  // namespace blip3o_fast
