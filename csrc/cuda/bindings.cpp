// The Python door to the CUDA kernels, blip3o_fast._cuda. Each function takes the number of a device, a stream of it as
// an integer, and then the kernels' own arguments.
#include <pybind11/pybind11.h>

#include "dual_attention.h"
#include "flow_matching_loss.h"
#include "gated_residual_modulate.h"
#include "qk_norm_rope.h"
#include "rms_norm_modulate.h"
#include "source_hash.h"
#include "view_caster.h"

namespace py = pybind11;
using namespace blip3o_fast;

namespace {

template <class... A>
void bind(py::module_& m, const char* name, void (*launch)(const Launcher&, A...),
          std::array<const char*, sizeof...(A)> names) {
    const auto call = [=](int device, uintptr_t stream, const py::args& args) {
        call_with(launch, Launcher{device, stream}, args, names);
    };
    m.def(name, call, py::arg("device"), py::arg("stream"));
}

}  // namespace

#define BLIP3O_BIND(name, ...) bind(m, #name, &name, {__VA_ARGS__})

PYBIND11_MODULE(_cuda, m) {
    m.attr("source_hash") = source_hash();

    BLIP3O_BIND(rms_norm_modulate_fwd, "x", "weight", "scale", "y", "rstd", "eps");
    BLIP3O_BIND(rms_norm_modulate_bwd, "dy", "x", "weight", "scale", "rstd", "dx", "dweight", "dscale", "partial");
    BLIP3O_BIND(gated_residual_modulate_fwd, "x", "y", "gate", "weight", "next_weight", "next_scale", "h", "n",
                "rstd_y", "rstd_h", "eps");
    BLIP3O_BIND(gated_residual_modulate_bwd, "dh", "dn", "y", "h", "gate", "weight", "next_weight", "next_scale",
                "rstd_y", "rstd_h", "dx", "dy", "dgate", "dweight", "dnext_weight", "dnext_scale", "p", "r");
    BLIP3O_BIND(flow_matching_loss_fwd, "pred", "data", "sigma", "noise", "seed", "loss", "metrics", "dpred",
                "partial", "epsilon", "sigma_min", "sigma_max", "cosine", "regularization_weight");
    BLIP3O_BIND(flow_matching_loss_bwd, "dloss", "dpred", "scaled");
    BLIP3O_BIND(qk_norm_rope_fwd, "x", "weight0", "weight1", "weight2", "bias0", "bias1", "bias2", "rope", "y",
                "mean", "rstd", "heads0", "heads1", "heads2", "first_group", "first_head", "head_dim", "eps");
    BLIP3O_BIND(qk_norm_rope_bwd, "dy", "x", "weight0", "weight1", "weight2", "rope", "mean", "rstd", "dx", "partial",
                "heads0", "heads1", "heads2", "first_group", "first_head", "head_dim");
    BLIP3O_BIND(qk_norm_rope_bwd_finish, "partial", "daffine");
    BLIP3O_BIND(dual_attention_fwd, "qkq", "v1", "k2", "v2", "gate", "mask", "out", "scale");
    BLIP3O_BIND(dual_attention_bwd, "dout", "qkq", "v1", "k2", "v2", "gate", "mask", "dqkq", "dv1", "dk2", "dv2",
                "dgate", "gate_sums", "statistics", "scale");
}
