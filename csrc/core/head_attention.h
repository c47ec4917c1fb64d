// Attention of the query rows that share one head of keys and values.
//
// Keys are taken in blocks of 256 from the first one on. A row takes its maximum, its weights and
// their sum in each block alone, and joins blocks in their order: where all values are finite, a
// row depends on its query and on the keys that it sees, not on how many rows or blocks are
// computed together or where.
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "core/float_kernels.h"
#include "core/product_kernels.h"
#include "core/scratch.h"

namespace vtts {

inline constexpr int kMaxHeadDim = 256;

// T: float or BFloat16, what queries, keys, values and results are stored as.
template <typename T>
struct HeadProblem {
  const T* queries;  // of the first token; tokens query_stride apart, heads head_dim
  int64_t query_stride;
  const T* keys;  // of slot 0; slots slot_stride apart
  const T* values;
  int64_t slot_stride;
  const int64_t* pages;  // slot of key j is pages[j / page_size] * page_size + j % page_size,
  int64_t page_size;     // or j, where pages is null
  int64_t num_new, num_keys;
  bool causal;     // token i of n sees the first num_keys - n + i + 1 keys; or it sees all
  int64_t groups;  // query heads that share the key head, the first at queries
  int64_t head_dim;
  float scale;
  T* out;  // of the first token, as queries
  int64_t out_stride;
};

// A row is a new token and one of the query heads, token by token.
template <typename T>
class HeadAttention {
 public:
  // Rows of one task: with what they need for a block they stay in the second-level cache, and
  // packed keys are read once for all of them.
  static constexpr int64_t kMostRows = 240;

  HeadAttention(const HeadProblem<T>& problem, const char* what, Isa isa)
      : problem_(problem),
        products_(&product_kernels(what, isa)),
        kernels_(&std::get<AttentionKernels<T>>(float_kernels(what, isa).attention)),
        key_panel_((problem.head_dim + 1) * kPanel),
        num_value_panels_(ceil_div(problem.head_dim, kPanel)),
        row_floats_(num_value_panels_ * kPanel) {}

  int64_t num_rows() const { return problem_.num_new * problem_.groups; }
  int64_t num_blocks() const { return ceil_div(problem_.num_keys, kBlockKeys); }
  int64_t block_floats() const { return values_at() + num_value_panels_ * kValuePanel; }
  int64_t partial_floats(int64_t num_rows) const {
    return num_rows * row_floats_ + 2 * ceil_div(num_rows, 8) * 8;
  }

  // Packs the keys and values of one block: block_floats().
  void pack(int64_t block, float* packed) const {
    const BlockAddresses<T> addresses = addresses_of(block);
    pack_keys(addresses, 0, addresses.num_keys, packed);
    for (int64_t panel = 0; panel < num_value_panels_; ++panel) {
      kernels_->pack_values(addresses, static_cast<int>(panel) * kPanel, dim(),
                            packed + values_at() + panel * kValuePanel);
    }
  }

  // What all rows get from one block alone, to partial_floats(num_rows()).
  void attend_block(int64_t block, float* partials) const {
    thread_local Scratch scratch, memory;
    float* packed = nullptr;
    if (num_rows() > kPanelRows) pack(block, packed = memory.floats(block_floats()));
    attend(block, packed, read_queries(0, num_rows(), scratch), 0, num_rows(),
           partials_at(partials, num_rows()));
  }

  // Rows attend to all blocks, which are packed one behind the other.
  void attend_all(const float* packed, int64_t first, int64_t count) const {
    thread_local Scratch scratch, memory;
    const float* const queries = read_queries(first, count, scratch);
    float* const joined = memory.floats(2 * partial_floats(count));
    const Partials into = partials_at(joined, count);
    const Partials part = partials_at(joined + partial_floats(count), count);
    attend(0, packed, queries, first, count, into);
    const int64_t seen = visible(first + count - 1);
    for (int64_t block = 1; block * kBlockKeys < seen; ++block) {
      packed += block_floats();
      attend(block, packed, queries, first, count, part);
      kernels_->join(into, part, count, row_floats_);
    }
    write(into, first, count);
  }

  // Joins the blocks' partials of all rows, which lie one behind the other, and writes the rows.
  void join(float* partials) const {
    const Partials into = partials_at(partials, num_rows());
    for (int64_t block = 1; block < num_blocks(); ++block) {
      partials += partial_floats(num_rows());
      kernels_->join(into, partials_at(partials, num_rows()), num_rows(), row_floats_);
    }
    write(into, 0, num_rows());
  }

 private:
  static constexpr int64_t kPanelRows =
      48;  // their scores take up as much as the first-level cache
  // Panels are a line of 16 floats further apart than they are long, rows of scores a panel: at
  // powers of two they would share few lines of the cache.
  static constexpr int64_t kScoreStride = kBlockKeys + kPanel;
  static constexpr int64_t kValuePanel = (kBlockKeys + 1) * kPanel;
  static constexpr int kPanelsAtOnce = 4;  // of keys that are not packed before

  int dim() const { return static_cast<int>(problem_.head_dim); }
  int64_t values_at() const { return kBlockKeys / kPanel * key_panel_; }  // in a packed block
  int64_t visible(int64_t row) const {
    if (!problem_.causal) return problem_.num_keys;
    return problem_.num_keys - problem_.num_new + row / problem_.groups + 1;
  }
  int64_t slot(int64_t key) const {
    if (problem_.pages == nullptr) return key;
    return problem_.pages[key / problem_.page_size] * problem_.page_size + key % problem_.page_size;
  }
  // Where the head vector of a row is, tokens being that far apart.
  int64_t place(int64_t row, int64_t stride) const {
    return row / problem_.groups * stride + row % problem_.groups * problem_.head_dim;
  }
  Partials partials_at(float* memory, int64_t num_rows) const {
    float* const maxima = memory + num_rows * row_floats_;
    return {memory, maxima, maxima + ceil_div(num_rows, 8) * 8};
  }

  // In float32, times the scale and log2(e), of which scores are powers.
  float* read_queries(int64_t first, int64_t count, Scratch& scratch) const {
    constexpr float kLog2E = 1.44269504f;
    float* const queries = scratch.floats(count * dim() + 8);
    for (int64_t r = 0; r < count; ++r) {
      kernels_->scale(problem_.queries + place(first + r, problem_.query_stride),
                      problem_.scale * kLog2E, dim(), queries + r * dim());
    }
    return queries;
  }

  BlockAddresses<T> addresses_of(int64_t block) const {
    BlockAddresses<T> result;
    const int64_t first = block * kBlockKeys;
    result.num_keys = static_cast<int>(std::min<int64_t>(kBlockKeys, problem_.num_keys - first));
    for (int j = 0; j < result.num_keys; ++j) {
      const int64_t offset = slot(first + j) * problem_.slot_stride;
      result.keys[j] = problem_.keys + offset;
      result.values[j] = problem_.values + offset;
    }
    return result;
  }

  void pack_keys(const BlockAddresses<T>& addresses, int first, int end, float* panels) const {
    for (; first < end; first += kPanel, panels += key_panel_) {
      kernels_->pack_keys(addresses, first, dim(), panels);
    }
  }

  // What `count` rows get from a block. packed: the block, or null for at most kPanelRows rows:
  // its panels are then packed as they are multiplied, and those to come fetched meanwhile.
  void attend(int64_t block, const float* packed, const float* queries, int64_t first,
              int64_t count, const Partials& to) const {
    thread_local Scratch scratch;
    const int64_t panel_floats = packed ? 0 : std::max(kPanelsAtOnce * key_panel_, kValuePanel);
    float* const scores = scratch.floats(kPanelRows * kScoreStride + panel_floats);
    float* const panels = scores + kPanelRows * kScoreStride;
    const int keys_at_once = packed ? kBlockKeys : kPanelsAtOnce * kPanel;
    const int64_t values_at_once = packed ? num_value_panels_ : 1;
    BlockAddresses<T> addresses;
    if (!packed) addresses = addresses_of(block);
    for (int64_t r = 0; r < count; r += kPanelRows) {
      const int64_t rows = std::min(kPanelRows, count - r);
      int seen[kPanelRows];
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t sees = visible(first + r + i) - block * kBlockKeys;
        seen[i] = static_cast<int>(std::clamp<int64_t>(sees, 0, kBlockKeys));
      }
      const int most = seen[rows - 1];
      for (int j = 0; j < most; j += keys_at_once) {
        const int end = std::min(most, j + keys_at_once);
        if (!packed) pack_keys(addresses, j, end, panels);
        products_->multiply(queries + r * dim(), dim(), rows, packed ? packed : panels, key_panel_,
                            static_cast<int>(ceil_div(end - j, kPanel)), dim(), scores + j,
                            kScoreStride, false);
      }
      kernels_->weigh(scores, kScoreStride, rows, seen, most, to.maxima + r, to.sums + r);
      for (int64_t panel = 0; panel < num_value_panels_; panel += values_at_once) {
        if (!packed) {
          kernels_->pack_values(addresses, static_cast<int>(panel) * kPanel, dim(), panels);
        }
        products_->multiply(scores, kScoreStride, rows, packed ? packed + values_at() : panels,
                            kValuePanel, static_cast<int>(values_at_once), most,
                            to.out + r * row_floats_ + panel * kPanel, row_floats_, false);
      }
    }
  }

  void write(const Partials& from, int64_t first, int64_t count) const {
    for (int64_t r = 0; r < count; ++r) {
      kernels_->divide(from.out + r * row_floats_, from.sums[r], dim(),
                       problem_.out + place(first + r, problem_.out_stride));
    }
  }

  HeadProblem<T> problem_;
  const ProductKernels* products_;
  const AttentionKernels<T>* kernels_;
  int64_t key_panel_, num_value_panels_, row_floats_;
};

}  // namespace vtts
