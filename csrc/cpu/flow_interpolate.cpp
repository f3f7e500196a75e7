#include "flow_interpolate.h"

#include "elementwise.h"
#include "flow_schedule.h"
#include "parallel.h"
#include "philox.h"
#include "rows.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

namespace {

void check_batch(const View& view) {
    if (view.rank < 2) refuse_tensor(view, "a tensor of at least 2 dimensions");
    check_float(view);
}

}  // namespace

void flow_interpolate_fwd(const Run& run, const View& data, const View& sigma, const View& noise, const View& seed,
                          const View& x_t, double sigma_min, double sigma_max, bool cosine) {
    check_batch(data);
    check_sigma(sigma, data.size[0]);
    check_seed(seed, noise);
    if (noise.present()) check_like(noise, data);
    check_like(x_t, data);
    check_contiguous(x_t);
    const Blocks blocks({&data, &noise}, 1);
    if (blocks.count() == 0) return;
    const int64_t rows_per_sample = blocks.rows() / data.size[0];
    const Schedule schedule{sigma_min, sigma_max, cosine};
    parallel_for(run, blocks.count(), [&](int64_t begin, int64_t end, int) {
        alignas(64) float of_data[block_floats], of_noise[normals_room(block_floats)], result[block_floats];
        int64_t sample = -1;
        Path path{};
        Stream stream{};
        for (int64_t i = begin; i < end; ++i) {
            const Block block = blocks.at(i);
            const int64_t b = block.row / rows_per_sample;
            if (b != sample) {
                path = path_at(sigma.as<const float>()[b * sigma.stride[0]], schedule);
                if (seed.present()) stream = sample_stream(seed, b);
                sample = b;
            }
            const auto load = [&](const View& view, float* buffer) {
                return load_row(view, blocks.offset(view, block), block.n, blocks.step(view), buffer);
            };
            const int64_t element = block.row % rows_per_sample * blocks.length() + block.first;
            const float* x = load(data, of_data);
            const float* z = noise.present() ? load(noise, of_noise) : normals(stream, element, block.n, of_noise);
            float* out = row_target(x_t, blocks.place(block), result);
            const float alpha = static_cast<float>(path.alpha), scale = static_cast<float>(path.scale);
#pragma omp simd
            for (int64_t j = 0; j < block.n; ++j) out[j] = alpha * x[j] + scale * z[j];
            store_row(x_t, blocks.place(block), block.n, out);
        }
    });
}

void flow_interpolate_bwd(const Run& run, const View& dy, const View& sigma, const View& ddata, const View& dnoise,
                          double sigma_min, double sigma_max, bool cosine) {
    check_batch(dy);
    check_sigma(sigma, dy.size[0]);
    for (const View* v : {&ddata, &dnoise}) {
        if (v == &dnoise && !v->present()) continue;
        check_like(*v, dy);
        check_contiguous(*v);
    }
    const Blocks blocks({&dy}, 1);
    if (blocks.count() == 0) return;
    const int64_t rows_per_sample = blocks.rows() / dy.size[0];
    const Schedule schedule{sigma_min, sigma_max, cosine};
    parallel_for(run, blocks.count(), [&](int64_t begin, int64_t end, int) {
        alignas(64) float buffer[2][block_floats];
        for (int64_t i = begin; i < end; ++i) {
            const Block block = blocks.at(i);
            const Path path = path_at(sigma.as<const float>()[block.row / rows_per_sample * sigma.stride[0]], schedule);
            const float* up = load_row(dy, blocks.offset(dy, block), block.n, blocks.step(dy), buffer[0]);
            const auto store = [&](const View& view, float factor) {
                float* out = row_target(view, blocks.place(block), buffer[1]);
#pragma omp simd
                for (int64_t j = 0; j < block.n; ++j) out[j] = factor * up[j];
                store_row(view, blocks.place(block), block.n, out);
            };
            store(ddata, static_cast<float>(path.alpha));
            if (dnoise.present()) store(dnoise, static_cast<float>(path.scale));
        }
    });
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
