#include "core/tiled_attention.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
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

// One head's keys, values and queries.
struct Problem {
  const float* queries;  // of the first row; rows query_stride apart, heads head_dim
  int64_t query_stride;
  const float* keys;  // of slot 0; slots slot_stride apart
  const float* values;
  int64_t slot_stride;
  const int64_t* pages;  // slot of key j is pages[j / page_size] * page_size + j % page_size,
  int64_t page_size;     // or j, where pages is null
  int64_t num_new, num_keys;
  bool causal;     // row i of n sees the first num_keys - n + i + 1 keys; or it sees all
  int64_t groups;  // query heads that share the key head, the first at queries
  int64_t head_dim;
  float scale;
  float* out;  // of the first row, as queries
  int64_t out_stride;
};

// A panel is as many query rows as a tile has outputs, a row being a new token and one of the query
// heads that share the key head. Scores and weighted values are computed transposed, queries side
// by side, so that no sum runs across a vector:
//   scores[key][query] = keys[key] . queries[query], out[d][query] = values[d] . weights[query]
class Head {
 public:
  Head(const Problem& problem, const char* what, Isa isa)
      : problem_(problem),
        tile_(tile_kernel(what, isa)),
        floats_(float_kernels(what, isa)),
        value_tiles_(ceil_div(problem.head_dim, tile_.num_rows)),
        key_floats_(kBlockKeys * problem.head_dim),
        value_floats_(kBlockKeys * value_tiles_ * tile_.num_rows) {}

  int64_t num_blocks() const { return ceil_div(problem_.num_keys, kBlockKeys); }
  int64_t num_panels() const { return ceil_div(num_rows(), tile_.num_outputs); }
  int64_t packed_floats() const { return num_blocks() * (key_floats_ + value_floats_); }

  // Packs the keys and values of one block.
  void pack_block(int64_t block, float* packed) const {
    const int64_t first = block * kBlockKeys, dim = problem_.head_dim, rows = tile_.num_rows;
    const int64_t there = std::min(kBlockKeys, problem_.num_keys - first);
    float* const keys = packed + block * (key_floats_ + value_floats_);
    float* const values = keys + key_floats_;
    for (int64_t j = 0; j < there; ++j) {
      const int64_t offset = slot(first + j) * problem_.slot_stride;
      const float* const key_from = problem_.keys + offset;
      const float* const value_from = problem_.values + offset;
      float* const key = keys + j / rows * rows * dim + j % rows;
      for (int64_t d = 0; d < dim; ++d) key[d * rows] = key_from[d];
      for (int64_t t = 0; t < value_tiles_; ++t) {
        float* const value = values + (t * kBlockKeys + j) * rows;
        const int64_t count = std::min(rows, dim - t * rows);
        std::copy_n(value_from + t * rows, count, value);
        std::fill(value + count, value + rows, 0.0f);
      }
    }
    // The last tile of keys is computed whole.
    for (int64_t j = there; j % rows != 0; ++j) {
      float* const key = keys + j / rows * rows * dim + j % rows;
      for (int64_t d = 0; d < dim; ++d) key[d * rows] = 0.0f;
    }
  }

  void attend(int64_t panel, const float* packed) const {
    const int64_t width = tile_.num_outputs, rows = tile_.num_rows, dim = problem_.head_dim;
    const int64_t count = std::min(width, num_rows() - panel * width);
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
      for (int64_t d = 0; d < dim; ++d) queries[d * width + r] = problem_.scale * from[d];
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
      float* const to = problem_.out + place(row, problem_.out_stride);
      for (int64_t d = 0; d < dim; ++d) to[d] = out[d * width + r] / sums[r];
    }
  }

 private:
  int64_t num_rows() const { return problem_.num_new * problem_.groups; }
  int64_t visible(int64_t row) const {
    if (!problem_.causal) return problem_.num_keys;
    return problem_.num_keys - problem_.num_new + row / problem_.groups + 1;
  }
  int64_t slot(int64_t key) const {
    if (problem_.pages == nullptr) return key;
    return problem_.pages[key / problem_.page_size] * problem_.page_size + key % problem_.page_size;
  }
  // Where the head vector of a row is, in rows that far apart.
  int64_t place(int64_t row, int64_t stride) const {
    return row / problem_.groups * stride + row % problem_.groups * problem_.head_dim;
  }
  const float* query(int64_t row) const {
    return problem_.queries + place(row, problem_.query_stride);
  }

  Problem problem_;
  const TileKernel& tile_;
  const FloatKernels& floats_;
  int64_t value_tiles_, key_floats_, value_floats_;
};

// The query heads of one sequence that share a key head.
Problem paged_problem(const PagedAttentionArgs& args, int64_t sequence, int64_t kv_head) {
  const int64_t first = args.row_starts[sequence], groups = args.num_heads / args.num_kv_heads;
  const int64_t head = kv_head * groups * args.head_dim, dim = args.head_dim;
  Problem problem = {};
  problem.queries = args.queries + first * args.query_stride + head;
  problem.query_stride = args.query_stride;
  problem.keys = args.keys + kv_head * dim;
  problem.values = args.values + kv_head * dim;
  problem.slot_stride = args.num_kv_heads * dim;
  problem.pages = args.page_table + sequence * args.table_stride;
  problem.page_size = args.page_size;
  problem.num_new = args.row_starts[sequence + 1] - first;
  problem.num_keys = args.num_keys[sequence];
  problem.causal = true;
  problem.groups = groups;
  problem.head_dim = dim;
  problem.scale = args.scale;
  problem.out_stride = args.num_heads * dim;
  problem.out = args.out + first * problem.out_stride + head;
  return problem;
}

// One head of one segment.
Problem segment_problem(const SegmentAttentionArgs& args, int64_t segment, int64_t head) {
  const int64_t first = args.starts[segment] * args.row_stride + head * args.head_dim;
  Problem problem = {};
  problem.queries = args.queries + first;
  problem.query_stride = problem.slot_stride = args.row_stride;
  problem.keys = args.keys + first;
  problem.values = args.values + first;
  problem.num_new = problem.num_keys = args.lengths[segment];
  problem.groups = 1;
  problem.head_dim = args.head_dim;
  problem.scale = args.scale;
  problem.out_stride = int64_t{args.num_heads} * args.head_dim;
  problem.out = args.out + args.starts[segment] * problem.out_stride + head * args.head_dim;
  return problem;
}

}  // namespace

const TileKernel& tile_kernel(const char* what, Isa isa) {
  switch (resolve_isa(what, isa)) {
    case Isa::kScalar:
      return scalar_tile_kernel();
    case Isa::kAvx2:
      return *avx2_tile_kernel();
    case Isa::kNeon:
      return *neon_tile_kernel();
    default:
      return *avx512_tile_kernel();
  }
}

void tiled_attention(const PagedAttentionArgs& args, int64_t sequence, Isa isa, int num_threads) {
  thread_local Scratch scratch;
  for (int first = 0; first < args.num_kv_heads;) {
    std::vector<Head> heads;
    int64_t num_floats = 0;
    for (; first < args.num_kv_heads && (heads.empty() || num_floats < kMostPackedFloats);
         ++first) {
      heads.emplace_back(paged_problem(args, sequence, first), "paged_attention", isa);
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

void segment_attention(const SegmentAttentionArgs& args, Isa isa, int num_threads) {
  const auto reject = [](const std::string& argument, const std::string& rule, int64_t got) {
    throw std::invalid_argument("segment_attention: " + argument + " must be " + rule + ", got " +
                                std::to_string(got));
  };
  if (args.head_dim < 1 || args.head_dim > kMaxHeadDim) {
    reject("head_dim", "1 to " + std::to_string(kMaxHeadDim), args.head_dim);
  }
  for (int64_t s = 0; s < args.num_segments; ++s) {
    const int64_t start = args.starts[s], length = args.lengths[s];
    if (length < 0 || length > args.num_rows) reject("lengths", "0 to the rows there are", length);
    if (start < 0 || start > args.num_rows - length) reject("starts", "inside the rows", start);
  }
  tile_kernel("segment_attention", isa);  // refuses an instruction set that is not there
  parallel_for(args.num_segments * args.num_heads, num_threads, [&](int, size_t i) {
    const int64_t segment = static_cast<int64_t>(i) / args.num_heads;
    if (args.lengths[segment] == 0) return;
    const Head head(segment_problem(args, segment, static_cast<int64_t>(i) % args.num_heads),
                    "segment_attention", isa);
    thread_local Scratch scratch;
    float* const packed = scratch.floats(head.packed_floats());
    for (int64_t block = 0; block < head.num_blocks(); ++block) head.pack_block(block, packed);
    for (int64_t panel = 0; panel < head.num_panels(); ++panel) head.attend(panel, packed);
  });
}

}  // namespace vtts
