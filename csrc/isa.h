// The instruction sets that kernels are compiled for, and those that this machine can run.
#pragma once

#include "run.h"

namespace blip3o_fast {

#define BLIP3O_NAME(isa) isa,
enum class Isa : int { BLIP3O_ISAS(BLIP3O_NAME) count };
#undef BLIP3O_NAME

constexpr int isa_count = static_cast<int>(Isa::count);

const char* isa_name(int isa);
bool isa_runs_here(int isa);

}  // namespace blip3o_fast
