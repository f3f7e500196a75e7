#include "flow_matching_loss.h"

#include "elementwise.h"
#include "flow_schedule.h"
#include "parallel.h"
#include "philox.h"
#include "reduce.h"
#include "rows.h"
#include "scratch.h"

namespace blip3o_fast {
namespace BLIP3O_ISA {

namespace {

constexpr int metric_count = 7;
constexpr int64_t piece = 256;  // floats of a token that are read at a time
constexpr double min_norm = 1e-8;    // of torch.nn.functional.cosine_similarity
constexpr double min_power = 1e-20;  // keeps snr_db finite for an exact prediction

// Four sums are made at once: two vectors of lanes each, or the registers would not hold them.
constexpr int lanes = sum_lanes / 2;

// Of one token: of squares, and of pred * target.
struct Sums {
    LanesOf<lanes> error, target, pred, dot;
};

struct TokenMetrics {
    double error, target;  // sums of squares
    double cosine, l2_distance, pred_norm, target_norm;
};

// The target is rounded to fp32 once, so that a network can say it exactly. Coefficient: float where both are -1, 0 or 1
// and the products exact (the path that BLIP3-o trains on), else double.
template <class Coefficient>
struct Piece {
    const float *pred, *data, *noise;
    Coefficient of_data, of_noise;

    // Element i into lane j of the sums; the element's error is returned.
    float add(int64_t i, int j, Sums& sums) const {
        const float p = pred[i], target = static_cast<float>(of_data * data[i] + of_noise * noise[i]);
        const float difference = p - target;
        sums.error.value[j] += difference * difference;
        sums.target.value[j] += target * target;
        sums.pred.value[j] += p * p;
        sums.dot.value[j] += p * target;
        return difference;
    }
};

// n elements; where it is wanted, their errors times factor go to out.
template <bool wanted, class Coefficient>
void add_elements(const Piece<Coefficient>& piece, int64_t n, double factor, float* out, Sums& sums) {
    Sums local = sums;  // nothing else points at it, so it stays in registers
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
#pragma omp simd
        for (int j = 0; j < lanes; ++j) {
            const float difference = piece.add(i + j, j, local);
            if (wanted) out[i + j] = static_cast<float>(difference * factor);
        }
    }
    for (int j = 0; i < n; ++i, ++j) {
        const float difference = piece.add(i, j, local);
        if (wanted) out[i] = static_cast<float>(difference * factor);
    }
    sums = local;
}

bool exact(double coefficient) { return coefficient == 0.0 || coefficient == 1.0 || coefficient == -1.0; }

void add_piece(const Piece<double>& piece, int64_t n, double factor, float* gradient, Sums& sums) {
    const auto add = [&](const auto& given) {
        if (gradient == nullptr) {
            add_elements<false>(given, n, factor, nullptr, sums);
        } else {
            add_elements<true>(given, n, factor, gradient, sums);
        }
    };
    if (exact(piece.of_data) && exact(piece.of_noise)) {
        add(Piece<float>{piece.pred, piece.data, piece.noise, static_cast<float>(piece.of_data),
                         static_cast<float>(piece.of_noise)});
    } else {
        add(piece);
    }
}

// NaN stays NaN
double at_least(double value, double least) { return value < least ? least : value; }

TokenMetrics token_metrics(const Sums& sums) {
    const double error = sums.error.sum(), target = sums.target.sum();
    const double pred_norm = std::sqrt(sums.pred.sum()), target_norm = std::sqrt(target);
    const double cosine = sums.dot.sum() / (at_least(pred_norm, min_norm) * at_least(target_norm, min_norm));
    return {error, target, cosine, std::sqrt(error), pred_norm, target_norm};
}

void store_metrics(const TokenMetrics* tokens, int64_t count, int64_t channels, double regularization_weight,
                   const View& loss, const View& metrics) {
    TokenMetrics sum = {};
    for (int64_t t = 0; t < count; ++t) {
        sum.error += tokens[t].error;
        sum.target += tokens[t].target;
        sum.cosine += tokens[t].cosine;
        sum.l2_distance += tokens[t].l2_distance;
        sum.pred_norm += tokens[t].pred_norm;
        sum.target_norm += tokens[t].target_norm;
    }
    const double n = static_cast<double>(count > 0 ? count : 1);  // an empty batch has loss 0
    const double elements = n * static_cast<double>(channels > 0 ? channels : 1);
    const double mse = sum.error / elements, power = sum.target / elements;
    const double regularization = regularization_weight * sum.pred_norm / n;
    const double values[metric_count] = {mse, sum.cosine / n, sum.l2_distance / n, sum.pred_norm / n, sum.target_norm / n,
                                         10.0 * std::log10((power + min_power) / (mse + min_power)), regularization};
    for (int i = 0; i < metric_count; ++i) metrics.as<float>()[i] = static_cast<float>(values[i]);
    *loss.as<float>() = static_cast<float>(mse + regularization);
}

}  // namespace

void flow_matching_loss_fwd(const Run& run, const View& pred, const View& data, const View& sigma, const View& noise,
                            const View& seed, const View& loss, const View& metrics, const View& dpred, bool epsilon,
                            double sigma_min, double sigma_max, bool cosine, double regularization_weight) {
    check_rank(pred, 3);
    check_float(pred);
    check_like(data, pred);
    check_sigma(sigma, pred.size[0]);
    check_seed(seed, noise);
    if (noise.present()) check_like(noise, pred);
    check_number(loss);
    check_shape(metrics, {metric_count});
    check_dtype(metrics, Dtype::f32);
    check_contiguous(metrics);
    if (dpred.present()) {
        check_like(dpred, pred);
        check_dtype(dpred, Dtype::f32);
        check_contiguous(dpred);
    }
    const int64_t tokens = pred.size[1], rows = pred.size[0] * tokens, channels = pred.size[2];
    const Schedule schedule{sigma_min, sigma_max, cosine};
    const double factor = 2.0 / (static_cast<double>(rows) * static_cast<double>(channels));
    const bool regularized = regularization_weight != 0.0;  // then the errors wait for the token's norm
    Scratch kept(1, rows * static_cast<int64_t>(sizeof(TokenMetrics) / sizeof(float)));
    TokenMetrics* const of_tokens = reinterpret_cast<TokenMetrics*>(kept.of(0));
    parallel_for(run, rows, [&](int64_t begin, int64_t end, int) {
        alignas(64) float of_pred[piece], of_data[piece], of_noise[normals_room(piece)];
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / tokens, t = row % tokens;
            const Path path = path_at(sigma.as<const float>()[b * sigma.stride[0]], schedule);
            const double p = epsilon ? 0.0 : path.d_alpha, q = epsilon ? 1.0 : path.d_scale;
            float* gradient = dpred.present() ? dpred.as<float>() + row * channels : nullptr;
            const Stream stream = seed.present() ? sample_stream(seed, b) : Stream{};
            const auto load = [&](const View& view, int64_t first, int64_t n, float* buffer) {
                const int64_t start = b * view.stride[0] + t * view.stride[1] + first * view.last_stride;
                return load_row(view, start, n, buffer);
            };
            Sums sums = {};
            for (int64_t first = 0; first < channels; first += piece) {
                const int64_t n = channels - first < piece ? channels - first : piece;
                const float* z = noise.present() ? load(noise, first, n, of_noise)
                                                 : normals(stream, t * channels + first, n, of_noise);
                const Piece<double> part{load(pred, first, n, of_pred), load(data, first, n, of_data), z, p, q};
                add_piece(part, n, regularized ? 1.0 : factor, gradient == nullptr ? nullptr : gradient + first, sums);
            }
            of_tokens[row] = token_metrics(sums);
            if (gradient == nullptr || !regularized) continue;
            const double norm = of_tokens[row].pred_norm;
            const double pull = norm == 0.0 ? 0.0 : regularization_weight / static_cast<double>(rows) / norm;
            for (int64_t first = 0; first < channels; first += piece) {
                const int64_t n = channels - first < piece ? channels - first : piece;
                const float* x = load(pred, first, n, of_pred);
#pragma omp simd
                for (int64_t i = 0; i < n; ++i) {
                    gradient[first + i] = static_cast<float>(gradient[first + i] * factor + x[i] * pull);
                }
            }
        }
    });
    store_metrics(of_tokens, rows, channels, regularization_weight, loss, metrics);
}

void flow_matching_loss_bwd(const Run& run, const View& dloss, const View& dpred, const View& scaled) {
    check_number(dloss);
    if (!dpred.present()) refuse_tensor(dpred, "a tensor");
    check_dtype(dpred, Dtype::f32);
    check_like(scaled, dpred);
    check_contiguous(scaled);
    const Blocks blocks({&dpred}, 0);
    if (blocks.count() == 0) return;
    const float g = *dloss.as<const float>();
    parallel_for(run, blocks.count(), [&](int64_t begin, int64_t end, int) {
        alignas(64) float buffer[2][block_floats];
        for (int64_t i = begin; i < end; ++i) {
            const Block block = blocks.at(i);
            const float* d = load_row(dpred, blocks.offset(dpred, block), block.n, blocks.step(dpred), buffer[0]);
            float* out = row_target(scaled, blocks.place(block), buffer[1]);
#pragma omp simd
            for (int64_t j = 0; j < block.n; ++j) out[j] = d[j] * g;
            store_row(scaled, blocks.place(block), block.n, out);
        }
    });
}

}  // namespace BLIP3O_ISA
}  // namespace blip3o_fast
