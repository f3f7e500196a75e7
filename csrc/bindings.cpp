// The Python door to the CPU kernels, blip3o_fast._C. Each function takes the number of an instruction set (of `isas`),
// the number of threads, and then the kernel's own arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/flow_interpolate.h"
#include "cpu/flow_matching_loss.h"
#include "cpu/merged_linear.h"
#include "cpu/ode_step.h"
#include "cpu/packed_linear_pack.h"
#include "cpu/packed_linear.h"
#include "cpu/qk_norm_rope.h"
#include "cpu/gated_residual.h"
#include "cpu/gated_residual_modulate.h"
#include "cpu/layer_norm_modulate.h"
#include "cpu/dual_attention.h"
#include "cpu/flash_attention.h"
#include "cpu/rms_norm_modulate.h"
#include "cpu/swiglu.h"
#include "isa.h"
#include "large_block.h"
#include "parallel.h"
#include "source_hash.h"
#include "view_caster.h"

namespace py = pybind11;
using namespace blip3o_fast;

namespace {

template <class T>
constexpr const char* kind_of() {
    if (std::is_same_v<T, View>) return "tensor";
    if (std::is_same_v<T, bool>) return "bool";
    return std::is_floating_point_v<T> ? "float" : "int";
}

// Also enters the kernel into `signatures`: its arguments' names and kinds.
template <class R, class... A>
void bind(py::module_& m, const char* name, std::array<R (*)(const Run&, A...), isa_count> variants,
          std::array<const char*, sizeof...(A)> names) {
    const auto call = [=](int isa, int threads, const py::args& args) -> R {
        if (isa < 0 || isa >= isa_count || !isa_runs_here(isa))
            throw std::invalid_argument("isa must be one that this machine runs, got " + std::to_string(isa));
        if (threads < 1 || threads > 4096)
            throw std::invalid_argument("threads must be from 1 to 4096, got " + std::to_string(threads));
        return call_with(variants[isa], Run{threads}, args, names);
    };
    m.def(name, call, py::arg("isa"), py::arg("threads"));
    const char* kinds[] = {kind_of<std::decay_t<A>>()...};
    py::list arguments;
    for (size_t i = 0; i < names.size(); ++i) arguments.append(py::make_tuple(names[i], kinds[i]));
    m.attr("signatures")[name] = arguments;
}

}  // namespace

#if defined(BLIP3O_X86)
#define BLIP3O_VARIANTS(name) std::array{&generic::name, &avx2::name, &avx512::name, &avx512_bf16::name}
#else
#define BLIP3O_VARIANTS(name) std::array{&generic::name}
#endif
#define BLIP3O_BIND(name, ...) bind(m, #name, BLIP3O_VARIANTS(name), {__VA_ARGS__})

PYBIND11_MODULE(_C, m) {
    m.attr("source_hash") = source_hash();
    std::vector<std::string> names;
    for (int isa = 0; isa < isa_count; ++isa) names.emplace_back(isa_name(isa));
    m.attr("isas") = py::cast(names);
    m.def("runs_here", [](int isa) { return isa >= 0 && isa < isa_count && isa_runs_here(isa); });
    m.def("pool_name", &pool_name);
    py::class_<LargeBlock>(m, "LargeBlock", py::buffer_protocol())
        .def(py::init<int64_t>(), py::arg("bytes"))
        .def_buffer([](const LargeBlock& block) {
            return py::buffer_info(static_cast<uint8_t*>(block.data()), static_cast<py::ssize_t>(block.bytes()));
        });
    m.def("large_blocks", [] { return std::make_tuple(large_blocks().in_use, large_blocks().kept); });
    m.attr("signatures") = py::dict();

    BLIP3O_BIND(rms_norm_modulate_fwd, "x", "weight", "scale", "y", "rstd", "eps");
    BLIP3O_BIND(rms_norm_modulate_bwd, "dy", "x", "weight", "scale", "rstd", "dx", "dweight", "dscale");
    BLIP3O_BIND(linear, "a", "b", "c");
    BLIP3O_BIND(packed_size, "N", "K", "mode", "swiglu");
    BLIP3O_BIND(pack_linear, "w", "packed", "N", "first_column", "mode", "swiglu");
    BLIP3O_BIND(packed_linear, "x", "packed", "bias", "y");
    BLIP3O_BIND(qk_norm_rope_fwd, "x", "weight0", "bias0", "weight1", "bias1", "weight2", "bias2", "rope", "y", "mean",
                "rstd", "heads0", "heads1", "heads2", "first_group", "first_head", "head_dim", "eps");
    BLIP3O_BIND(qk_norm_rope_bwd, "dy", "x", "weight0", "weight1", "weight2", "rope", "mean", "rstd", "dx", "daffine",
                "heads0", "heads1", "heads2", "first_group", "first_head", "head_dim");
    BLIP3O_BIND(ode_step_fwd, "x", "v_cond", "v_uncond", "guidance", "dsigma", "y");
    BLIP3O_BIND(ode_step_bwd, "dy", "guidance", "dsigma", "dv_cond", "dv_uncond");
    BLIP3O_BIND(flow_interpolate_fwd, "data", "sigma", "noise", "seed", "x_t", "sigma_min", "sigma_max", "cosine");
    BLIP3O_BIND(flow_interpolate_bwd, "dy", "sigma", "ddata", "dnoise", "sigma_min", "sigma_max", "cosine");
    BLIP3O_BIND(flow_matching_loss_fwd, "pred", "data", "sigma", "noise", "seed", "loss", "metrics", "dpred", "epsilon",
                "sigma_min", "sigma_max", "cosine", "regularization_weight");
    BLIP3O_BIND(flow_matching_loss_bwd, "dloss", "dpred", "scaled");
    BLIP3O_BIND(layer_norm_modulate_fwd, "x", "scale", "y", "mean", "rstd", "eps");
    BLIP3O_BIND(layer_norm_modulate_bwd, "dy", "x", "scale", "mean", "rstd", "dx", "dscale");
    BLIP3O_BIND(gated_residual_fwd, "x", "y", "gate", "weight", "h", "rstd", "eps");
    BLIP3O_BIND(gated_residual_bwd, "dh", "y", "gate", "weight", "rstd", "dy", "dgate", "dweight");
    BLIP3O_BIND(gated_residual_modulate_fwd, "x", "y", "gate", "weight", "next_weight", "next_scale", "h", "n",
                "rstd_y", "rstd_h", "eps");
    BLIP3O_BIND(gated_residual_modulate_bwd, "dh", "dn", "y", "h", "gate", "weight", "next_weight", "next_scale",
                "rstd_y", "rstd_h", "dx", "dy", "dgate", "dweight", "dnext_weight", "dnext_scale");
    BLIP3O_BIND(swiglu_fwd, "gate_up", "y");
    BLIP3O_BIND(swiglu_bwd, "dy", "gate_up", "dgate_up");
    BLIP3O_BIND(flash_attention_fwd, "q", "k", "v", "mask", "scale", "out");
    BLIP3O_BIND(flash_attention_bwd, "dout", "q", "k", "v", "mask", "scale", "dq", "dk", "dv");
    BLIP3O_BIND(dual_attention_fwd, "qkq", "v1", "k2", "v2", "gate", "mask", "scale", "out");
    BLIP3O_BIND(dual_attention_bwd, "dout", "qkq", "v1", "k2", "v2", "gate", "mask", "scale", "dqkq", "dv1", "dk2",
                "dv2", "dgate");
}
