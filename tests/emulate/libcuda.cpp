// A CUDA driver for tests: the few functions that ltd_fx calls, by their real names and types, with the kernels run on the
// CPU. What the real bindings pass is what is tested.
#include "emulate.h"
#include KERNELS

#include <dlfcn.h>

#include <cstring>

static int context, module;  // their addresses are the handles
static const char* names[] = {"sample_tokens", "gather_rows", "merge_rows", "gather_aligned", "gather_mask"};
static void* current = nullptr;

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, INVALID_IMAGE = 200, NOT_FOUND = 500 };

extern "C" {

int cuInit(unsigned) { return SUCCESS; }

int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal + 40;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void** retained, int device) {
    *retained = &context;
    return device == 40 ? SUCCESS : INVALID_VALUE;
}

int cuCtxSetCurrent(void* given) {
    current = given;
    return given == &context ? SUCCESS : INVALID_CONTEXT;
}

int cuModuleLoadData(void** loaded, const void* image) {
    *loaded = &module;
    if (current != &context) return INVALID_CONTEXT;
    return std::memcmp(image, "\x7f" "ELF", 4) ? INVALID_IMAGE : SUCCESS;
}

int cuModuleGetFunction(void** function, void* from, const char* name) {
    for (auto& each : names)
        if (from == &module && !std::strcmp(each, name)) {
            *function = &each;
            return SUCCESS;
        }
    return NOT_FOUND;
}

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** params, void** extra) {
    if (current != &context) return INVALID_CONTEXT;
    if (shared || extra || stream != (void*)1000) return INVALID_VALUE;
    const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
    const auto which = (const char**)function - names;
    std::printf("%s\n", names[which]);
    if (which == 0) emulate::run(grid, block, [=] { sample_tokens(*(const Sample*)params[0]); });
    if (which == 1) emulate::run(grid, block, [=] { gather_rows(*(const Gather*)params[0]); });
    if (which == 2) emulate::run(grid, block, [=] { merge_rows(*(const Merge*)params[0]); });
    if (which == 3) emulate::run(grid, block, [=] { gather_aligned(*(const Aligned*)params[0]); });
    if (which == 4) emulate::run(grid, block, [=] { gather_mask(*(const Mask*)params[0]); });
    std::fflush(stdout);
    return SUCCESS;
}

int cuGetProcAddress_v2(const char* name, void** address, int, std::uint64_t, int* found) {
    *address = dlsym(dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD), name);
    if (found) *found = *address ? 0 : 1;
    return *address ? SUCCESS : NOT_FOUND;
}

int cuGetProcAddress(const char* name, void** address, int version, std::uint64_t flags) {
    return cuGetProcAddress_v2(name, address, version, flags, nullptr);
}
}
