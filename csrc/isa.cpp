#include "isa.h"

namespace blip3o_fast {

const char* isa_name(int isa) {
#define BLIP3O_NAME(name) #name,
    constexpr const char* names[] = {BLIP3O_ISAS(BLIP3O_NAME)};
#undef BLIP3O_NAME
    return names[isa];
}

bool isa_runs_here(int isa) {
#if defined(BLIP3O_X86)
    // These ask the operating system too: wide registers that it does not save do not count.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    switch (static_cast<Isa>(isa)) {
        case Isa::avx2: return avx2;  // every CPU with AVX2 converts float16 (F16C)
        case Isa::avx512: return avx512;
        case Isa::avx512_bf16:
            return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
        default: return true;
    }
#else
    return isa == 0;
#endif
}

}  // namespace blip3o_fast
