// The kernels against plain loops, as a program for the sanitizers. Every buffer is its own allocation of its exact size,
// so that AddressSanitizer sees the first byte beyond it. Prints what is wrong; exits with 1 if anything is.
#include "emulate.h"
#include KERNELS

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>

static int wrong = 0;

static void expect(bool right, const char* what, long a, long b, long c) {
    if (right) return;
    wrong = 1;
    std::printf("wrong: %s (%ld, %ld, %ld)\n", what, a, b, c);
}

static void check_sample(u32 rows, i64 seq_len, i64 keep, bool ranked, unsigned threads) {
    const i64 key = -(1LL << 40) - 7, site = 3;
    std::vector<i64> rank(ranked ? rows * seq_len : 0), indices(rows * keep, -1);
    for (size_t i = 0; i < rank.size(); ++i) rank[i] = (i64)(mix(i) % 3) - 1;
    const Sample args{&key, &site, ranked ? rank.data() : nullptr, indices.data(), seq_len, 1, rows, seq_len, keep};
    const unsigned grid[] = {rows, 1, 1}, block[] = {threads, 1, 1};
    emulate::run(grid, block, [=] { sample_tokens(args); });
    for (u32 row = 0; row < rows; ++row) {
        const Order order(args, row);
        std::vector<i64> tokens(seq_len);
        std::iota(tokens.begin(), tokens.end(), 0);
        std::sort(tokens.begin(), tokens.end(), [&](i64 a, i64 b) { return order(a) < order(b); });
        std::sort(tokens.begin(), tokens.begin() + keep);
        expect(std::equal(tokens.begin(), tokens.begin() + keep, indices.begin() + row * keep), "sample", seq_len, keep, ranked);
    }
}

// [batch, length, bytes] at `offset` bytes into an allocation, batch or length first.
struct Tensor {
    i64 batch, length, bytes, offset;
    bool batch_first;
    std::unique_ptr<byte[]> data;

    Tensor(i64 batch, i64 length, i64 bytes, i64 offset, bool batch_first, u32 seed)
        : batch(batch), length(length), bytes(bytes), offset(offset), batch_first(batch_first),
          data(new byte[batch * length * bytes + offset]) {
        for (i64 i = 0; i < batch * length * bytes + offset; ++i) data[i] = (byte)mix(seed * 1000003 + i);
    }
    Rows rows() const {
        return batch_first ? Rows{data.get() + offset, length * bytes, bytes} : Rows{data.get() + offset, bytes, batch * bytes};
    }
    const byte* at(i64 b, i64 i) const { return rows().at(b, i); }
};

static u32 width_of(i64 bytes, i64 offset) {
    u32 width = 16;
    while (bytes % width || offset % width) width /= 2;
    return width;
}

// Sorted subsets, different in each row.
template <class Index>
static std::vector<Index> subsets(i64 batch, i64 seq_len, i64 keep) {
    std::vector<Index> kept(batch * keep);
    for (i64 b = 0; b < batch; ++b) {
        std::vector<i64> tokens(seq_len);
        std::iota(tokens.begin(), tokens.end(), 0);
        std::sort(tokens.begin(), tokens.end(), [&](i64 x, i64 y) { return mix(x + 7 * b) < mix(y + 7 * b); });
        std::sort(tokens.begin(), tokens.begin() + keep);
        std::copy(tokens.begin(), tokens.begin() + keep, kept.begin() + b * keep);
    }
    return kept;
}

template <class Index>
static void check_rows(i64 batch, i64 seq_len, i64 keep, i64 bytes, i64 offset, bool batch_first, unsigned threads) {
    const auto kept_tokens = subsets<Index>(batch, seq_len, keep);
    const Tensor hidden(batch, seq_len, bytes, offset, batch_first, 1), layer(batch, keep, bytes, offset, batch_first, 2);
    const Tensor kept(batch, keep, bytes, offset, batch_first, 3), merged(batch, seq_len, bytes, offset, batch_first, 4);
    const Indices indices{kept_tokens.data(), keep, sizeof(Index), batch, keep, seq_len};
    const u32 width = width_of(bytes, offset), size = (u32)bytes, tile = std::max(16u, 256 / threads);
    const unsigned block[] = {threads, 256 / threads, 1};
    const Gather gather{indices, hidden.rows(), kept.rows(), size, width};
    const unsigned keep_blocks = (unsigned)((keep + block[1] - 1) / block[1]), tiles = (unsigned)((seq_len + tile - 1) / tile);
    const unsigned gather_grid[] = {keep_blocks, 1, 1}, merge_grid[] = {tiles, 1, 1};  // the batch is looped over
    if (keep) emulate::run(gather_grid, block, [&] { gather_rows(gather); });
    const Merge merge{indices, hidden.rows(), layer.rows(), merged.rows(), size, width, tile};
    emulate::run(merge_grid, block, [&] { merge_rows(merge); });
    for (i64 b = 0; b < batch; ++b) {
        const Index* row = kept_tokens.data() + b * keep;
        for (i64 j = 0; j < keep; ++j)
            expect(std::equal(kept.at(b, j), kept.at(b, j) + bytes, hidden.at(b, row[j])), "gather", seq_len, keep, bytes);
        for (i64 t = 0; t < seq_len; ++t) {
            const i64 j = std::lower_bound(row, row + keep, (Index)t) - row;
            const byte* source = j < keep && row[j] == t ? layer.at(b, j) : hidden.at(b, t);
            expect(std::equal(source, source + bytes, merged.at(b, t)), "merge", seq_len, keep, bytes);
        }
    }
}

// Pieces of rows of `bytes` and of twice as many, two of the outer dimension each, in one launch.
static void check_aligned(i64 batch, i64 seq_len, i64 keep, i64 bytes, u32 threads) {
    const auto tokens = subsets<int>(batch, seq_len, keep);
    Aligned args{{tokens.data(), keep, sizeof(int), batch, keep, seq_len}, {}};
    std::vector<Tensor> ins, outs;
    for (i64 i = 0; i < 2; ++i) {
        const i64 size = bytes * (i + 1);
        ins.emplace_back(batch * 2, seq_len, size, 0, true, 5);
        outs.emplace_back(batch * 2, keep, size, 0, true, 6);
        args.pieces[i] = {ins[i].data.get(), outs[i].data.get(), batch, 2, 2 * seq_len * size, seq_len * size,
                          size, (u32)size, width_of(size, 0), threads};
    }
    const unsigned rows = 256 / threads, grid[] = {(unsigned)(keep + rows - 1) / rows, 1, 2}, block[] = {256, 1, 1};
    emulate::run(grid, block, [&] { gather_aligned(args); });
    for (i64 i = 0; i < 2; ++i)
        for (i64 outer = 0; outer < 2 * batch; ++outer)
            for (i64 j = 0; j < keep; ++j) {
                const byte *out = outs[i].at(outer, j), *in = ins[i].at(outer, tokens[outer / 2 * keep + j]);
                expect(std::equal(out, out + bytes * (i + 1), in), "aligned", seq_len, keep, bytes);
            }
}

// [batch, 2, seq_len, seq_len] of `bytes`, `count` to a store.
static void check_mask(i64 batch, i64 seq_len, i64 keep, u32 bytes, u32 count) {
    const auto tokens = subsets<i64>(batch, seq_len, keep);
    const Tensor full(batch * 2 * seq_len, seq_len, bytes, 0, true, 7), few(batch * 2 * keep, keep, bytes, 0, true, 8);
    const i64 row = seq_len * bytes, head = seq_len * row;
    const Mask args{{tokens.data(), keep, 8, batch, keep, seq_len}, full.data.get(), few.data.get(), batch, 2,
                    2 * head, head, row, bytes, bytes, count};
    const unsigned stores = (unsigned)((keep + count - 1) / count), grid[] = {(stores + 7) / 8, 2, 1}, block[] = {8, 4, 1};
    emulate::run(grid, block, [&] { gather_mask(args); });
    for (i64 outer = 0; outer < batch * 2; ++outer)
        for (i64 i = 0; i < keep; ++i)
            for (i64 j = 0; j < keep; ++j) {
                const i64* kept = tokens.data() + outer / 2 * keep;
                const byte *out = few.at(outer * keep + i, j), *in = full.at(outer * seq_len + kept[i], kept[j]);
                expect(std::equal(out, out + bytes, in), "mask", seq_len, keep, bytes);
            }
}

// A row that gather_rows must refuse to read.
static void read_beyond() {
    const Tensor hidden(1, 4, 16, 0, true, 1), kept(1, 1, 16, 0, true, 2);
    const i64 token = 4;
    const Gather gather{{&token, 1, 8, 1, 1, 4}, hidden.rows(), kept.rows(), 16, 16};
    const unsigned grid[] = {1, 1, 1}, block[] = {1, 256, 1};
    emulate::run(grid, block, [&] { gather_rows(gather); });
}

// "few": fewer cases, with every kernel and every width, for seconds under ThreadSanitizer. "beyond": none but that.
int main(int argc, char** argv) {
    const std::string what = argc == 1 ? "all" : argv[1];
    const bool all = what == "all";
    if (what == "beyond") read_beyond();
    using Case = std::tuple<i64, i64>;
    check_sample(1, 37, 18, true, 256);
    check_sample(1, 4099, 1500, false, 256);
    check_rows<i64>(2, 700, 301, 16, 0, true, 1);
    check_rows<int>(2, 19, 7, 3584, 0, false, 32);  // a thread copies four vectors, then three
    for (i64 bytes : {2, 3, 4, 24}) check_rows<i64>(1, 19, 7, bytes, 0, true, 8);
    for (i64 bytes : {16, 1}) check_aligned(2, 19, 7, bytes, 4);
    for (u32 bytes : {1, 2, 4, 8, 16}) check_mask(2, 19, 7, bytes, 1);
    for (u32 bytes : {1, 2, 4, 8}) check_mask(1, 19, 16, bytes, std::min(16 / bytes, 8u));
    if (all) {
        for (auto [seq_len, keep] : {Case{1, 1}, {37, 1}, {37, 37}, {4099, 4099}})
            for (bool ranked : {false, true}) check_sample(2, seq_len, keep, ranked, 256);
        for (auto [seq_len, keep] : {Case{1, 1}, {1, 0}, {53, 0}, {53, 1}, {53, 26}, {53, 53}}) {
            check_rows<i64>(2, seq_len, keep, 16, 0, true, 1);
            check_rows<int>(2, seq_len, keep, 1, 0, false, 1);
        }
        check_rows<i64>(2, 53, 26, 4096, 0, true, 64);
        for (i64 keep : {1, 26, 53}) {
            for (i64 bytes : {1, 2, 3, 4, 8, 24, 48, 4096}) check_aligned(2, 53, keep, bytes, bytes < 48 ? 1 : 32);
            for (u32 bytes : {1, 2, 4, 8, 16}) check_mask(2, 53, keep, bytes, 1);
        }
        for (i64 offset : {1, 2, 4, 8}) check_rows<int>(2, 19, 7, 48, offset, true, 4);
    }
    if (!wrong) std::puts("all right");
    return wrong;
}
