// The kernels of ltd_fx; align.cu goes on. No headers: NVRTC compiles both as one file at first use, and in the tests a C++
// compiler does.
// Each kernel takes one struct, which launch.py mirrors. Rows are copied as bytes, so one kernel serves every dtype.

typedef unsigned char byte;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// ---- sample_tokens: the `keep` smallest by (rank, hash), as ltd_fx/sampling.py defines them

struct Sample {
    const i64* key;            // []
    const i64* site;           // [] or [sites]
    const i64* rank;           // [rows | 1, seq_len] of -1, 0 or 1; or null
    i64* indices;              // [sites, rows, keep], ascending
    i64 rank_row, rank_token;  // strides of rank in elements, 0 where one row serves all
    i64 rows, seq_len, keep;
};

__device__ inline u32 mix(u32 x) {
    x = (x ^ (x >> 16)) * 0x21F0AAADu;
    x = (x ^ (x >> 15)) * 0x735A2D97u;
    return x ^ (x >> 15);
}

// The tokens of one row, in the order in which they are kept.
struct Order {
    u32 left, right;
    const i64* rank;
    i64 rank_token;

    __device__ Order(const Sample& a, u32 block) : left(0), right(0), rank(a.rank), rank_token(a.rank_token) {
        const u64 key = *a.key;
        const u32 site = block / (u32)a.rows, row = block % (u32)a.rows;
        absorb((u32)key, 0x9E3779B9u);
        absorb((u32)(key >> 32), 0x85EBCA6Bu);
        absorb((u32)a.site[site], 0xC2B2AE35u);
        absorb(row, 0x27D4EB2Fu);
        absorb(0, 0x165667B1u);
        if (rank) rank += row * a.rank_row;
    }

    __device__ void absorb(u32 word, u32 increment) {
        const u32 next = right ^ mix((left ^ word) + increment);
        right = left;
        left = next;
    }

    // (rank, hash) as one number of 34 bits, different for each token: the hash is a bijection of it.
    // Computed again wherever it is needed, which is cheaper than storing it.
    __device__ u64 operator()(u32 token) const {
        const u32 hash = mix(mix(token + left) ^ right);
        const i64 level = rank ? rank[token * rank_token] : 0;
        return (u64)(level < 0 ? 0 : level > 0 ? 2 : 1) << 32 | hash;
    }
};

// The sum of `value` over the threads before this one, and over all. Every thread of a 1-D block must call it.
__device__ inline u32 exclusive_sum(u32 value, u32* warp_sums, u32& total) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    u32 sum = value;
    for (u32 distance = 1; distance < 32; distance *= 2) {
        const u32 before = __shfl_up_sync(0xFFFFFFFFu, sum, distance);
        if (lane >= distance) sum += before;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    u32 before = 0;
    total = 0;
    for (u32 i = 0; i < warps; ++i) {
        if (i < warp) before += warp_sums[i];
        total += warp_sums[i];
    }
    __syncthreads();  // the next call writes warp_sums
    return before + sum - value;
}

// One block a row. Radix select of the keep-th smallest (rank, hash), nine bits at a time from the top; then one pass over
// the tokens in order writes those up to it. `keep` is at least 1.
extern "C" __global__ void __launch_bounds__(1024) sample_tokens(const __grid_constant__ Sample a) {
    constexpr u32 BITS = 9, BINS = 1 << BITS, STRIP = 16;
    __shared__ u32 histogram[BINS], warp_sums[32], chosen, before_chosen;
    const u32 seq_len = (u32)a.seq_len, thread = threadIdx.x;
    const Order order(a, blockIdx.x);

    u64 last = 0;            // the bits found so far of the keep-th smallest
    u32 wanted = (u32)a.keep;  // which one it is among those that start with these bits
    u32 total;
    for (int shift = 27; shift >= 0; shift -= BITS) {
        for (u32 bin = thread; bin < BINS; bin += blockDim.x) histogram[bin] = 0;
        __syncthreads();
        for (u32 token = thread; token < seq_len; token += blockDim.x) {
            const u64 value = order(token);
            if (value >> (shift + BITS) == last >> (shift + BITS)) atomicAdd(&histogram[value >> shift & (BINS - 1)], 1u);
        }
        __syncthreads();
        const bool owner = thread < BINS / 2;  // of two bins; a block has at least that many threads
        const u32 first = owner ? histogram[2 * thread] : 0, second = owner ? histogram[2 * thread + 1] : 0;
        const u32 before = exclusive_sum(first + second, warp_sums, total);
        if (before < wanted && wanted <= before + first + second) {  // one thread
            const bool in_second = wanted > before + first;
            chosen = 2 * thread + in_second;
            before_chosen = before + (in_second ? first : 0);
        }
        __syncthreads();
        last |= (u64)chosen << shift;
        wanted -= before_chosen;
    }

    i64* indices = a.indices + blockIdx.x * a.keep;
    u32 written = 0;
    for (u32 start = 0; start < seq_len; start += blockDim.x * STRIP) {
        const u32 strip = start + thread * STRIP;
        u32 kept = 0;  // a bit a token
        for (u32 i = 0; i < STRIP && strip + i < seq_len; ++i) kept |= (u32)(order(strip + i) <= last) << i;
        u32 at = written + exclusive_sum(__popc(kept), warp_sums, total);
        for (u32 i = 0; i < STRIP; ++i) {
            if (kept >> i & 1) indices[at++] = strip + i;
        }
        written += total;
    }
}

// ---- rows

struct Indices {        // [batch, keep], ascending and unique in each row
    const void* data;
    i64 batch_stride;   // in elements, 0 where one row serves all; the kept tokens of a row are contiguous
    i64 item_bytes;     // 4 or 8
    i64 batch, keep, seq_len;

    __device__ i64 at(i64 b, i64 j) const {
        const i64 item = b * batch_stride + j;
        return item_bytes == 8 ? ((const i64*)data)[item] : ((const int*)data)[item];
    }

    __device__ i64 token(i64 b, i64 j) const {
        const i64 token = at(b, j);
        if ((u64)token >= (u64)seq_len) __trap();
        return token;
    }
};

struct Rows {            // a tensor [batch, length, row], in either layout
    byte* data;
    i64 batch_stride, row_stride;  // in bytes

    __device__ byte* at(i64 b, i64 row) const { return data + b * batch_stride + row * row_stride; }
};

// One of `step` threads that copy a row together.
template <class Vector>
__device__ inline void copy_as(byte* to, const byte* from, u32 bytes, u32 thread, u32 step) {
    Vector* __restrict__ out = (Vector*)to;
    const Vector* __restrict__ in = (const Vector*)from;
    const u32 count = bytes / sizeof(Vector);
    u32 i = thread;
    if constexpr (sizeof(Vector) == 16) {  // four loads under way before the first store
#pragma unroll 1
        for (; i + 3 * step < count; i += 4 * step) {
            const Vector a = in[i], b = in[i + step], c = in[i + 2 * step], d = in[i + 3 * step];
            out[i] = a;
            out[i + step] = b;
            out[i + 2 * step] = c;
            out[i + 3 * step] = d;
        }
    }
#pragma unroll 1
    for (; i < count; i += step) out[i] = in[i];
}

// `width` divides the addresses and `bytes`.
__device__ inline void copy_row(byte* to, const byte* from, u32 bytes, u32 width, u32 thread, u32 step) {
    switch (width) {
        case 16: return copy_as<uint4>(to, from, bytes, thread, step);
        case 8: return copy_as<uint2>(to, from, bytes, thread, step);
        case 4: return copy_as<u32>(to, from, bytes, thread, step);
        case 2: return copy_as<unsigned short>(to, from, bytes, thread, step);
        default: return copy_as<byte>(to, from, bytes, thread, step);
    }
}

// ---- gather_rows: out[b, j] = in[b, indices[b, j]]

struct Gather {
    Indices indices;
    Rows in, out;
    u32 bytes, width;  // of a row, and of one access
};

// grid: rows of the block, batch; block: threads of a row, rows.
extern "C" __global__ void __launch_bounds__(256, 4) gather_rows(const __grid_constant__ Gather a) {
    const i64 j = (i64)blockIdx.x * blockDim.y + threadIdx.y;
    if (j >= a.indices.keep) return;
    for (i64 b = blockIdx.y; b < a.indices.batch; b += gridDim.y) {
        copy_row(a.out.at(b, j), a.in.at(b, a.indices.token(b, j)), a.bytes, a.width, threadIdx.x, blockDim.x);
    }
}

// ---- merge_rows: out[b, indices[b, j]] = kept[b, j], and out[b, t] = rest[b, t] for every other token

struct Merge {
    Indices indices;
    Rows rest, kept, out;
    u32 bytes, width;
    u32 tile;  // tokens of a block, at most as many as its threads
};

// How many of a row's indices lie before `token`. The whole block searches, as many ways as it has threads: two or three
// rounds, where a binary search would wait for ten loads and more, one after the other.
__device__ inline i64 count_before(const Indices& indices, i64 b, i64 token, i64 thread, i64 threads) {
    i64 low = 0, high = indices.keep;
    while (low < high) {
        const i64 step = (high - low) / threads + 1, at = low + thread * step;
        const i64 before = __syncthreads_count(at < high && indices.at(b, at) < token);
        if (before == 0) break;
        high = min(high, low + before * step);
        low += (before - 1) * step + 1;
    }
    return low;
}

// Each output row is read from one source: the tile's tokens are looked up among the sorted indices, so there is no
// clone, no second write, and no inverse map in memory. grid: tiles, batch; block: threads of a row, rows.
extern "C" __global__ void __launch_bounds__(256, 4) merge_rows(const __grid_constant__ Merge a) {
    __shared__ i64 source[256];  // the row of `kept`, or -1, for each token of the tile
    const i64 thread = threadIdx.y * blockDim.x + threadIdx.x, first = blockIdx.x * a.tile;
    for (i64 b = blockIdx.y; b < a.indices.batch; b += gridDim.y) {
        if (thread < a.tile) source[thread] = -1;
        // a barrier, unless no token is kept
        const i64 j = count_before(a.indices, b, first, thread, blockDim.x * blockDim.y) + thread;
        if (thread < a.tile && j < a.indices.keep) {
            const i64 token = a.indices.at(b, j) - first;
            if (0 <= token && token < a.tile) source[token] = j;
        }
        __syncthreads();
        for (i64 i = threadIdx.y; i < a.tile && first + i < a.indices.seq_len; i += blockDim.y) {
            const i64 j = source[i];
            const byte* from = j < 0 ? a.rest.at(b, first + i) : a.kept.at(b, j);
            copy_row(a.out.at(b, first + i), from, a.bytes, a.width, threadIdx.x, blockDim.x);
        }
        __syncthreads();  // the next turn writes source
    }
}
