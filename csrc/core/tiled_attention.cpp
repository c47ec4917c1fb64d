#include "core/tiled_attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/float_kernels.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/tile_kernels.h"

namespace vtts {
namespace {

// Keys of one block: its scores for a panel of queries stay in the first-level cache. A multiple of
// every kernel's rows (4, 6 and 14).
constexpr int64_t kBlockKeys = 168;
// Heads are packed together up to so many floats, 64 MiB: then one head a time.
constexpr int64_t kMostPackedFloats = 16 << 20;

// One sequence and one key head. A panel is as many query rows as a tile has outputs, a row being
// a new token and one of the query heads that share the key head. Scores and weighted values are
// computed transposed, queries side by side, so that no sum runs across a vector:
//   scores[key][query] = keys[key] . queries[query], out[d][query] = values[d] . weights[query]
class Head {
 public:
  Head(const PagedAttentionArgs& args, int64_t sequence, int kv_head, Isa isa)
      : args_(args),
        tile_(tile_kernel("paged_attention", isa)),
        floats_(float_kernels("paged_attention", isa)),
        pages_(args.page_table + sequence * args.table_stride),
        kv_head_(kv_head),
        groups_(args.num_heads / args.num_kv_heads),
        first_row_(args.row_starts[sequence]),
        num_new_(args.row_starts[sequence + 1] - first_row_),
        num_keys_(args.num_keys[sequence]),
        value_tiles_(ceil_div(args.head_dim, tile_.num_rows)),
        key_floats_(kBlockKeys * args.head_dim),
        value_floats_(kBlockKeys * value_tiles_ * tile_.num_rows) {}

  int64_t num_blocks() const { return ceil_div(num_keys_, kBlockKeys); }
  int64_t num_panels() const { return ceil_div(num_new_ * groups_, tile_.num_outputs); }
  int64_t packed_floats() const { return num_blocks() * (key_floats_ + value_floats_); }

  // Packs the keys and values of one block, which lie anywhere in pages.
  void pack_block(int64_t block, float* packed) const {
    float* const keys = packed + block * (key_floats_ + value_floats_);
    float* const values = keys + key_floats_;
    const int64_t first = block * kBlockKeys, dim = args_.head_dim, rows = tile_.num_rows;
    for (int64_t j = 0; j < kBlockKeys; ++j) {
      float* const key = keys + j / rows * rows * dim + j % rows;
      if (first + j >= num_keys_) {
        for (int64_t d = 0; d < dim; ++d) key[d * rows] = 0.0f;
        for (int64_t t = 0; t < value_tiles_; ++t) {
          std::fill_n(values + (t * kBlockKeys + j) * rows, rows, 0.0f);
        }
        continue;
      }
      const int64_t at = first + j, page = pages_[at / args_.page_size];
      const int64_t slot = page * args_.page_size + at % args_.page_size;
      const int64_t offset = (slot * args_.num_kv_heads + kv_head_) * dim;
      const float* const key_from = args_.keys + offset;
      const float* const value_from = args_.values + offset;
      for (int64_t d = 0; d < dim; ++d) key[d * rows] = key_from[d];
      for (int64_t t = 0; t < value_tiles_; ++t) {
        float* const value = values + (t * kBlockKeys + j) * rows;
        const int64_t count = std::min(rows, dim - t * rows);
        std::copy_n(value_from + t * rows, count, value);
        std::fill(value + count, value + rows, 0.0f);
      }
    }
  }

  void attend(int64_t panel, const float* packed) const {
    const int64_t width = tile_.num_outputs, rows = tile_.num_rows, dim = args_.head_dim;
    const int64_t count = std::min(width, num_new_ * groups_ - panel * width);
    thread_local Scratch scratch;
    float* const queries = scratch.floats(width * (dim + kBlockKeys + value_tiles_ * rows + 4));
    float* const scores = queries + dim * width;
    float* const out = scores + kBlockKeys * width;
    float* const maxima = out + value_tiles_ * rows * width;
    float* const sums = maxima + width;
    float* const shares = sums + width;
    float* const zeros = shares + width;
    std::fill(out, out + value_tiles_ * rows * width, 0.0f);
    std::fill(maxima, maxima + width, -INFINITY);
    std::fill(sums, zeros + width, 0.0f);

    for (int64_t r = 0; r < width; ++r) {
      const float* const from = query(panel * width + std::min(r, count - 1));
      for (int64_t d = 0; d < dim; ++d) queries[d * width + r] = args_.scale * from[d];
    }
    // Keys that the panel's rows see: ever more of them.
    const int64_t fewest = visible(panel * width), most = visible(panel * width + count - 1);
    for (int64_t first = 0; first < most; first += kBlockKeys) {
      const float* const keys = packed + first / kBlockKeys * (key_floats_ + value_floats_);
      const float* const values = keys + key_floats_;
      const int64_t num_keys = std::min(kBlockKeys, most - first);
      for (int64_t j = 0; j < num_keys; j += rows) {
        tile_.run(keys + j * dim, queries, dim, zeros, true, static_cast<int>(rows),
                  static_cast<int>(width), scores + j * width, width);
      }
      const auto hide = [&](float value) {
        for (int64_t j = std::max<int64_t>(0, fewest - first); j < num_keys; ++j) {
          for (int64_t r = 0; r < width; ++r) {
            const int64_t row = panel * width + std::min(r, count - 1);
            if (first + j >= visible(row)) scores[j * width + r] = value;
          }
        }
      };
      hide(-INFINITY);
      floats_.weigh_columns(scores, num_keys, width, maxima, sums, shares);
      hide(0.0f);
      for (int64_t d = 0; d < dim; ++d) {
        for (int64_t r = 0; r < width; ++r) out[d * width + r] *= shares[r];
      }
      for (int64_t t = 0; t < value_tiles_; ++t) {
        tile_.run(values + t * kBlockKeys * rows, scores, num_keys, zeros, false,
                  static_cast<int>(rows), static_cast<int>(width), out + t * rows * width, width);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = panel * width + r;
      float* const to =
          args_.out + ((first_row_ + row / groups_) * args_.num_heads + head(row)) * dim;
      for (int64_t d = 0; d < dim; ++d) to[d] = out[d * width + r] / sums[r];
    }
  }

 private:
  int64_t head(int64_t row) const { return kv_head_ * groups_ + row % groups_; }
  int64_t visible(int64_t row) const { return num_keys_ - num_new_ + row / groups_ + 1; }
  const float* query(int64_t row) const {
    return args_.queries + (first_row_ + row / groups_) * args_.query_stride +
           head(row) * args_.head_dim;
  }

  const PagedAttentionArgs& args_;
  const TileKernel& tile_;
  const FloatKernels& floats_;
  const int64_t* const pages_;
  const int64_t kv_head_, groups_, first_row_, num_new_, num_keys_, value_tiles_;
  const int64_t key_floats_, value_floats_;
};

}  // namespace

void tiled_attention(const PagedAttentionArgs& args, int64_t sequence, Isa isa, int num_threads) {
  thread_local Scratch scratch;
  for (int first = 0; first < args.num_kv_heads;) {
    std::vector<Head> heads;
    int64_t num_floats = 0;
    for (; first < args.num_kv_heads && (heads.empty() || num_floats < kMostPackedFloats);
         ++first) {
      heads.emplace_back(args, sequence, first, isa);
      num_floats += heads.back().packed_floats();
    }
    // All heads are alike: task i is of head i % heads.size().
    const size_t num_heads = heads.size();
    float* const packed = scratch.floats(num_floats);
    const auto packed_of = [&](size_t head) { return packed + head * heads[0].packed_floats(); };
    parallel_for(heads[0].num_blocks() * num_heads, num_threads, [&](int, size_t i) {
      heads[i % num_heads].pack_block(i / num_heads, packed_of(i % num_heads));
    });
    parallel_for(heads[0].num_panels() * num_heads, num_threads, [&](int, size_t i) {
      heads[i % num_heads].attend(i / num_heads, packed_of(i % num_heads));
    });
  }
}

}  // namespace vtts
