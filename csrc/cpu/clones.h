// BLIP3O_CLONES compiles a function once per instruction set and lets the loader pick by cpuid: a distributed binary
// stays generic and still uses AVX2 or AVX-512. Where the toolchain lacks it, the generic version is all there is.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define BLIP3O_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define BLIP3O_CLONES
#endif
