// Linked with the generic kernels and run where there is no Python, in an emulator for instance: prints what one of
// them and the conversions between dtypes give.
#include <cstdio>
#include <vector>

#include "rms_norm_modulate.h"
#include "rows.h"

using namespace blip3o_fast;

namespace {

View view_of(void* data, Dtype dtype, std::initializer_list<int64_t> sizes) {
    View view;
    view.data = data;
    view.dtype = dtype;
    view.rank = static_cast<int>(sizes.size());
    int i = 0;
    for (int64_t size : sizes) view.size[i++] = size;
    int64_t step = 1;
    for (i = view.rank - 1; i >= 0; --i) {
        view.stride[i] = step;
        step *= view.size[i];
    }
    return view;
}

// FNV-1a over the results of all 65536 numbers of 16 bits
template <class F>
uint32_t hash_of_all(F&& f) {
    uint32_t hash = 2166136261u;
    for (uint32_t h = 0; h < 65536; ++h) hash = (hash ^ f(static_cast<uint16_t>(h))) * 16777619u;
    return hash;
}

uint32_t bits_of(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return std::isnan(f) ? 0x7fc00000u : bits;
}

}  // namespace

int main() {
    std::printf("f16 to float %08x\n", hash_of_all([](uint16_t h) { return bits_of(generic::f16_to_float(h)); }));
    std::printf("float to f16 %08x\n", hash_of_all([](uint16_t h) {
        const uint32_t bits = h * 65536u + h;  // numbers of every exponent, most of them between two of float16
        float f;
        std::memcpy(&f, &bits, 4);
        return static_cast<uint32_t>(generic::float_to_f16(f));
    }));
    std::printf("float to bf16 %08x\n", hash_of_all([](uint16_t h) {
        const uint32_t bits = h * 65536u + h;
        float f;
        std::memcpy(&f, &bits, 4);
        return static_cast<uint32_t>(generic::float_to_bf16(f));
    }));

    constexpr int64_t batch = 2, tokens = 5, dim = 37;
    std::vector<uint16_t> x(batch * tokens * dim);
    std::vector<float> weight(dim), scale(batch * dim), y(x.size()), rstd(batch * tokens);
    for (size_t i = 0; i < x.size(); ++i) x[i] = generic::float_to_bf16(static_cast<float>(i % 23) / 8 - 1.25f);
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = 1.0f + static_cast<float>(i % 7) / 16;
    for (size_t i = 0; i < scale.size(); ++i) scale[i] = static_cast<float>(i % 11) / 32 - 0.125f;
    generic::rms_norm_modulate_fwd(Run{2}, view_of(x.data(), Dtype::bf16, {batch, tokens, dim}),
                                   view_of(weight.data(), Dtype::f32, {dim}),
                                   view_of(scale.data(), Dtype::f32, {batch, dim}),
                                   view_of(y.data(), Dtype::f32, {batch, tokens, dim}),
                                   view_of(rstd.data(), Dtype::f32, {batch, tokens}), 1e-5);
    double sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += y[i] * static_cast<double>(i % 5 + 1);
    std::printf("rms_norm_modulate %.5f %.5f\n", sum, static_cast<double>(rstd.back()));
    return 0;
}
