// The Python door to the CPU kernels, blip3o_fast._C. Each function takes the number of an instruction set (of `isas`),
// the number of threads, and then the kernel's own arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/rms_norm_modulate.h"
#include "isa.h"
#include "parallel.h"
#include "view_caster.h"

namespace py = pybind11;
using namespace blip3o_fast;

namespace {

template <class R, class... A>
void bind(py::module_& m, const char* name, std::array<R (*)(const Run&, A...), isa_count> variants,
          std::array<const char*, sizeof...(A)> names) {
    m.def(name, [=](int isa, int threads, const py::args& args) -> R {
        if (isa < 0 || isa >= isa_count || !isa_runs_here(isa))
            throw std::invalid_argument("isa must be one that this machine runs, got " + std::to_string(isa));
        if (threads < 1 || threads > 4096)
            throw std::invalid_argument("threads must be from 1 to 4096, got " + std::to_string(threads));
        return call_with(variants[isa], Run{threads}, args, names);
    });
}

}  // namespace

#if defined(BLIP3O_X86)
#define BLIP3O_VARIANTS(name) std::array{&generic::name, &avx2::name, &avx512::name, &avx512_bf16::name}
#else
#define BLIP3O_VARIANTS(name) std::array{&generic::name}
#endif
#define BLIP3O_BIND(name, ...) bind(m, #name, BLIP3O_VARIANTS(name), {__VA_ARGS__})

PYBIND11_MODULE(_C, m) {
    m.attr("source_hash") = BLIP3O_FAST_SOURCE_HASH;
    std::vector<std::string> names;
    for (int isa = 0; isa < isa_count; ++isa) names.emplace_back(isa_name(isa));
    m.attr("isas") = py::cast(names);
    m.def("runs_here", [](int isa) { return isa >= 0 && isa < isa_count && isa_runs_here(isa); });
    m.def("pool_name", &pool_name);

    BLIP3O_BIND(rms_norm_modulate_fwd, "x", "weight", "scale", "y", "rstd", "eps");
    BLIP3O_BIND(rms_norm_modulate_bwd, "dy", "x", "weight", "scale", "rstd", "dx", "dweight", "dscale");
}
