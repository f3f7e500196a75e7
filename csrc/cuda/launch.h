// How every kernel is launched. Includable by plain C++: the bindings only hand a Launcher on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <cxxabi.h>

#include <cstdlib>
#endif

namespace blip3o_fast {

struct Launcher {
    int device = 0;
    uintptr_t stream = 0;  // cudaStream_t
    size_t shared_bytes = 0;

    // The same with this much dynamic shared memory per block.
    Launcher with_shared(size_t bytes) const { return {device, stream, bytes}; }

    // Nothing is launched for 0 blocks. The kernel may start before the one before it on the stream has ended: it
    // begins with pdl_wait().
    template <class... P, class... A>
    void operator()(void (*kernel)(P...), int64_t blocks, int threads, A&&... args) const;
};

#if defined(__CUDACC__) || defined(BLIP3O_EMULATE)

inline void check_grid(int64_t blocks, int threads) {
    if (blocks < 0 || blocks > 0x7fffffff || threads < 1 || threads > 1024)
        throw std::invalid_argument("a tensor is too large for one launch: " + std::to_string(blocks) + " blocks of " +
                                    std::to_string(threads) + " threads");
}

#endif

#if defined(__CUDACC__)

[[noreturn]] inline void refuse_launch(const void* kernel, cudaError_t error) {
    const char* mangled = nullptr;
    if (kernel == nullptr || cudaFuncGetName(&mangled, kernel) != cudaSuccess) mangled = "a CUDA kernel";
    int status = 0;
    char* name = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
    const std::string text = std::string(name != nullptr ? name : mangled) + ": " + cudaGetErrorString(error);
    std::free(name);
    throw std::runtime_error(text);
}

template <class... P, class... A>
void Launcher::operator()(void (*kernel)(P...), int64_t blocks, int threads, A&&... args) const {
    check_grid(blocks, threads);
    if (blocks == 0) return;
    const auto* address = reinterpret_cast<const void*>(kernel);
    const auto check = [&](cudaError_t error) {
        if (error != cudaSuccess) refuse_launch(address, error);
    };
    int major = 0;
    check(cudaSetDevice(device));
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (shared_bytes > 48 * 1024)
        check(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared_bytes)));
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &early;
    config.numAttrs = major >= 9 ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(std::forward<A>(args))...));
}

// Waits until what the kernel before this one has written is visible.
__device__ inline void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream be scheduled; it still waits for this one's end before it reads.
__device__ inline void pdl_release() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

template <class T>
__device__ inline T* dynamic_shared() {
    extern __shared__ uint4 dynamic_bytes[];
    return reinterpret_cast<T*>(dynamic_bytes);
}

#elif defined(BLIP3O_EMULATE)

template <class... P, class... A>
void Launcher::operator()(void (*kernel)(P...), int64_t blocks, int threads, A&&... args) const {
    check_grid(blocks, threads);
    emulation::launch(kernel, blocks, threads, shared_bytes, static_cast<P>(std::forward<A>(args))...);
}

inline void pdl_wait() { emulation::started(); }
inline void pdl_release() {}

template <class T>
T* dynamic_shared() {
    return static_cast<T*>(emulation::dynamic_shared());
}

#endif

}  // namespace blip3o_fast
