// Arguments that follow the tokens. Goes on from kernels.cu.

// ---- gather_aligned: out[b, i, j] = in[b, i, indices[b, j]] for several tensors at once

struct Piece {           // [batch, outer, seq_len, row] to [batch, outer, keep, row], which is contiguous
    const byte* in;
    byte* out;
    i64 batch, outer;
    i64 batch_stride, outer_stride, row_stride;  // of `in`, in bytes
    u32 bytes, width;    // of a row, and of one access
    u32 threads;         // of a row, a power of two
};

struct Aligned {
    Indices indices;
    Piece pieces[8];
};

// grid: rows of the block, batch (the most of any piece), pieces.
extern "C" __global__ void __launch_bounds__(256, 4) gather_aligned(const __grid_constant__ Aligned a) {
    const Piece& p = a.pieces[blockIdx.z];
    const i64 j = (i64)blockIdx.x * (blockDim.x / p.threads) + threadIdx.x / p.threads, keep = a.indices.keep;
    if (j >= keep) return;
    for (i64 b = blockIdx.y; b < p.batch; b += gridDim.y) {
        const byte* from = p.in + b * p.batch_stride + a.indices.token(b, j) * p.row_stride;
        byte* to = p.out + (b * p.outer * keep + j) * p.bytes;
#pragma unroll 1
        for (i64 i = 0; i < p.outer; ++i, from += p.outer_stride, to += keep * p.bytes)
            copy_row(to, from, p.bytes, p.width, threadIdx.x % p.threads, p.threads);
    }
}

// ---- gather_mask: out[b, h, i, j] = in[b, h, indices[b, i], indices[b, j]]

struct Mask {            // [batch, heads, seq_len, seq_len] to [batch, heads, keep, keep], which is contiguous
    Indices indices;
    const byte* in;
    byte* out;
    i64 batch, heads;
    i64 batch_stride, head_stride, row_stride, column_stride;  // of `in`, in bytes
    u32 bytes, count;    // of an element, and elements of one store: as many as 16 bytes hold, at most 8; or one
};

// A thread takes the columns of one store, and finds them once for all of its rows.
template <class Item, u32 count>
__device__ inline void gather_columns(const Mask& a) {
    struct alignas(sizeof(Item) * count) Vector { Item items[count]; };
    const i64 keep = a.indices.keep, first = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * count;
    if (first >= keep) return;
    for (i64 b = blockIdx.z; b < a.batch; b += gridDim.z) {
        u32 columns[count];  // a row of more than 2^32 elements does not fit twice
#pragma unroll
        for (u32 n = 0; n < count; ++n) columns[n] = (u32)a.indices.token(b, first + n);
#pragma unroll 1
        for (i64 i = (i64)blockIdx.y * blockDim.y + threadIdx.y; i < keep; i += (i64)gridDim.y * blockDim.y) {
            const byte* from = a.in + b * a.batch_stride + a.indices.token(b, i) * a.row_stride;
            Item* to = (Item*)a.out + (b * a.heads * keep + i) * keep + first;
#pragma unroll 1
            for (i64 h = 0; h < a.heads; ++h, from += a.head_stride, to += keep * keep) {
                Vector vector;
#pragma unroll
                for (u32 n = 0; n < count; ++n) vector.items[n] = *(const Item*)(from + columns[n] * a.column_stride);
                *(Vector*)to = vector;
            }
        }
    }
}

// grid: stores of a row, rows, batch; block: stores of a row, rows.
extern "C" __global__ void __launch_bounds__(256, 4) gather_mask(const __grid_constant__ Mask a) {
    const bool many = a.count > 1;
    switch (a.bytes) {
        case 16: return gather_columns<uint4, 1>(a);
        case 8: return many ? gather_columns<u64, 2>(a) : gather_columns<u64, 1>(a);
        case 4: return many ? gather_columns<u32, 4>(a) : gather_columns<u32, 1>(a);
        case 2: return many ? gather_columns<unsigned short, 8>(a) : gather_columns<unsigned short, 1>(a);
        default: return many ? gather_columns<byte, 8>(a) : gather_columns<byte, 1>(a);
    }
}
