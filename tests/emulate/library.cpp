// The kernels as functions of a shared library: (arguments, grid, block).
#include "emulate.h"
#include KERNELS

#define EXPORT(name, Args)                                                                     \
    extern "C" void run_##name(const Args* args, const unsigned* grid, const unsigned* block) { \
        emulate::run(grid, block, [=] { name(*args); });                                       \
    }                                                                                          \
    extern "C" unsigned long sizeof_##name() { return sizeof(Args); }

EXPORT(sample_tokens, Sample)
EXPORT(gather_rows, Gather)
EXPORT(merge_rows, Merge)
EXPORT(gather_aligned, Aligned)
EXPORT(gather_mask, Mask)
