// What the kernels need of CUDA, on the CPU: a block's threads are real threads, so that sanitizers see races, missing
// barriers and bad accesses. Blocks run one after the other. Include this, then the kernels.
#pragma once

#include <pthread.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

inline thread_local uint3 threadIdx, blockIdx;
inline uint3 blockDim, gridDim;

namespace emulate {

struct Barrier {
    pthread_barrier_t barrier;
    explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier, nullptr, threads); }
    Barrier(const Barrier&) = delete;
    ~Barrier() { pthread_barrier_destroy(&barrier); }
    void wait() { pthread_barrier_wait(&barrier); }
};

// Threads that exchange values: a warp, or the whole block. One barrier for each exchange, as on the device: the next one
// writes elsewhere, and the one after that cannot begin before all have read this.
struct Group {
    Barrier barrier;
    std::vector<long long> values[2];
    std::vector<int> turns;
    explicit Group(unsigned threads)
        : barrier(threads), values{std::vector<long long>(threads), std::vector<long long>(threads)}, turns(threads) {}

    template <class Read>
    auto exchange(unsigned thread, long long value, Read read) {
        auto& now = values[turns[thread] ^= 1];
        now[thread] = value;
        barrier.wait();
        return read(now);
    }
};

inline Group* block;
inline std::vector<Group*> warps;

inline unsigned thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

inline void run(const unsigned* grid, const unsigned* shape, const std::function<void()>& kernel) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {shape[0], shape[1], shape[2]};
    const unsigned threads = shape[0] * shape[1] * shape[2];
    block = new Group(threads);
    for (unsigned first = 0; first < threads; first += 32) warps.push_back(new Group(threads - first < 32 ? threads - first : 32));
    auto work = [&](unsigned i) {
        threadIdx = {i % shape[0], i / shape[0] % shape[1], i / shape[0] / shape[1]};
        for (unsigned z = 0; z < grid[2]; ++z)
            for (unsigned y = 0; y < grid[1]; ++y)
                for (unsigned x = 0; x < grid[0]; ++x) {
                    blockIdx = {x, y, z};
                    kernel();
                    block->barrier.wait();
                }
    };
    std::vector<std::thread> pool;
    for (unsigned i = 0; i < threads; ++i) pool.emplace_back(work, i);
    for (auto& each : pool) each.join();
    for (auto* warp : warps) delete warp;
    warps.clear();
    delete block;
}

}  // namespace emulate

inline void __syncthreads() { emulate::block->barrier.wait(); }

inline int __syncthreads_count(bool predicate) {
    return emulate::block->exchange(emulate::thread(), predicate, [](const auto& values) {
        int count = 0;
        for (auto value : values) count += value;
        return count;
    });
}

inline unsigned __shfl_up_sync(unsigned, unsigned value, unsigned distance) {
    const unsigned lane = emulate::thread() % 32;
    return emulate::warps[emulate::thread() / 32]->exchange(
        lane, value, [&](const auto& values) { return (unsigned)values[lane < distance ? lane : lane - distance]; });
}

inline unsigned atomicAdd(unsigned* address, unsigned value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }
inline unsigned __popc(unsigned value) { return __builtin_popcount(value); }
template <class T>
T min(T a, T b) { return b < a ? b : a; }
[[noreturn]] inline void __trap() {
    std::fputs("trap\n", stderr);
    std::abort();
}
