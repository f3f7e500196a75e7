// What every kernel is given beside its tensors, and how a kernel is declared for all instruction sets.
#pragma once

#include "view.h"

namespace blip3o_fast {

struct Run {
    int threads = 1;
};

}  // namespace blip3o_fast

// setup.py compiles each file of csrc/cpu once per instruction set, with BLIP3O_ISA naming it; BLIP3O_X86 says that
// there is more than the generic one.
#if defined(BLIP3O_X86)
#define BLIP3O_ISAS(X) X(generic) X(avx2) X(avx512) X(avx512_bf16)
#define BLIP3O_FUNCTION(result, name, ...)                      \
    namespace generic { result name(const Run&, __VA_ARGS__); } \
    namespace avx2 { result name(const Run&, __VA_ARGS__); }    \
    namespace avx512 { result name(const Run&, __VA_ARGS__); }  \
    namespace avx512_bf16 { result name(const Run&, __VA_ARGS__); }
#else
#define BLIP3O_ISAS(X) X(generic)
#define BLIP3O_FUNCTION(result, name, ...) \
    namespace generic { result name(const Run&, __VA_ARGS__); }
#endif

#define BLIP3O_KERNEL(name, ...) BLIP3O_FUNCTION(void, name, __VA_ARGS__)
