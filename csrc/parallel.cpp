// The extension links no OpenMP: a second runtime would bring a second pool, whose threads compete with PyTorch's for
// the same cores. PyTorch's wheels load one (libgomp; LLVM's and Intel's libraries export the same entry points), and
// its functions are looked up in the running process. Where there is none, threads are started for the call.
#include "parallel.h"

#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#define BLIP3O_HAS_DLFCN 1
#endif
#if defined(__linux__)
#include <link.h>

#include <cstring>
#endif

namespace blip3o_fast {

namespace {

struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*thread_num)() = nullptr;
    int (*num_threads)() = nullptr;
    int (*in_parallel)() = nullptr;

    bool found() const { return parallel && thread_num && num_threads && in_parallel; }
};

#if defined(BLIP3O_HAS_DLFCN)
OpenMP from_library(void* handle) {
    OpenMP omp;
    omp.parallel = reinterpret_cast<decltype(omp.parallel)>(dlsym(handle, "GOMP_parallel"));
    omp.thread_num = reinterpret_cast<int (*)()>(dlsym(handle, "omp_get_thread_num"));
    omp.num_threads = reinterpret_cast<int (*)()>(dlsym(handle, "omp_get_num_threads"));
    omp.in_parallel = reinterpret_cast<int (*)()>(dlsym(handle, "omp_in_parallel"));
    return omp;
}
#endif

#if defined(__linux__)
// A runtime whose symbols are not global (loaded by an extension module) is found by its file name.
int find_loaded(dl_phdr_info* info, size_t, void* result) {
    const char* path = info->dlpi_name;
    if (!path || !(std::strstr(path, "libgomp") || std::strstr(path, "libiomp5") || std::strstr(path, "libomp")))
        return 0;
    void* handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (!handle) return 0;
    OpenMP omp = from_library(handle);
    if (!omp.found()) return 0;
    *static_cast<OpenMP*>(result) = omp;
    return 1;
}
#endif

OpenMP find_openmp() {
    OpenMP omp;
#if defined(BLIP3O_HAS_DLFCN)
    omp = from_library(RTLD_DEFAULT);
#endif
#if defined(__linux__)
    if (!omp.found()) dl_iterate_phdr(find_loaded, &omp);
#endif
    return omp;
}

const OpenMP& openmp() {
    static const OpenMP omp = find_openmp();
    return omp;
}

struct Work {
    int shares;
    void (*body)(void*, int);
    void* data;
};

// The runtime may give fewer threads than asked for, so each takes every n-th share.
void on_openmp_thread(void* argument) {
    const Work& work = *static_cast<Work*>(argument);
    const int threads = openmp().num_threads();
    for (int share = openmp().thread_num(); share < work.shares; share += threads) work.body(work.data, share);
}

}  // namespace

void run_shares(int shares, void (*body)(void*, int), void* data) {
    const OpenMP& omp = openmp();
    if (omp.found()) {
        Work work{shares, body, data};
        if (omp.in_parallel()) {
            for (int share = 0; share < shares; ++share) body(data, share);
        } else {
            omp.parallel(on_openmp_thread, &work, static_cast<unsigned>(shares), 0);
        }
        return;
    }
    std::vector<std::thread> others;
    others.reserve(shares - 1);
    int started = 1;
    try {
        for (; started < shares; ++started) others.emplace_back(body, data, started);
    } catch (...) {  // no more threads to be had: the caller does the rest
    }
    body(data, 0);
    for (int share = started; share < shares; ++share) body(data, share);
    for (auto& thread : others) thread.join();
}

const char* pool_name() {
#if defined(BLIP3O_HAS_DLFCN)
    if (openmp().found()) {
        Dl_info info;
        return dladdr(reinterpret_cast<void*>(openmp().parallel), &info) && info.dli_fname ? info.dli_fname : "OpenMP";
    }
#endif
    return "std::thread";
}

}  // namespace blip3o_fast
