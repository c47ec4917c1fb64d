#include "core/paged_attention.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/float_kernels.h"
#include "core/linear.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/tiled_attention.h"

namespace vtts {
namespace {

// One task: the query rows of a sequence that share a key head, over one range of its keys.
struct Task {
  int64_t sequence, first_key;
  int kv_head;
  float* partials;  // for each row: head_dim weighted values, then maximum and sum
};

// The row that follows from its place among a task's rows: new token after new token, each with the
// query heads of one key head.
struct Rows {
  int64_t first, num_new;
  int groups;

  int64_t count() const { return num_new * groups; }
};

Rows rows_of(const PagedAttentionArgs& args, int64_t sequence) {
  const int64_t first = args.row_starts[sequence];
  return {first, args.row_starts[sequence + 1] - first, args.num_heads / args.num_kv_heads};
}

[[noreturn]] void reject(const std::string& argument, const std::string& rule, int64_t got) {
  throw std::invalid_argument("paged_attention: " + argument + " must be " + rule + ", got " +
                              std::to_string(got));
}

void validate(const PagedAttentionArgs& args) {
  if (args.head_dim < 8 || args.head_dim % 8 != 0 || args.head_dim > kMaxHeadDim) {
    reject("head_dim", "a multiple of 8 up to 256", args.head_dim);
  }
  if (args.page_size < 1) reject("page_size", ">= 1", args.page_size);
  if (args.num_kv_heads < 1) reject("num_kv_heads", ">= 1", args.num_kv_heads);
  const int64_t* starts = args.row_starts;
  const int64_t end = starts[args.num_sequences];
  if (starts[0] != 0 || end != args.num_rows) {
    reject("cu_seqlens_q", "ascending from 0 to " + std::to_string(args.num_rows), end);
  }
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    const int64_t num_new = starts[s + 1] - starts[s], num_keys = args.num_keys[s];
    if (num_new < 0) {
      reject("cu_seqlens_q", "ascending from 0 to " + std::to_string(args.num_rows), starts[s + 1]);
    }
    if (num_keys < num_new) reject("seqlens_k", ">= the sequence's rows", num_keys);
    if (num_keys / args.page_size > args.table_stride ||
        num_keys > args.table_stride * args.page_size) {
      reject("seqlens_k", "covered by page_table", num_keys);
    }
    const int64_t num_pages = ceil_div(num_keys, args.page_size);
    for (int64_t p = 0; p < num_pages; ++p) {
      const int64_t page = args.page_table[s * args.table_stride + p];
      if (page < 0 || page >= args.num_pages) reject("page_table", "pages of the pool", page);
    }
  }
}

void attend(const PagedAttentionArgs& args, const Task& task, const FloatKernels& kernels) {
  const Rows rows = rows_of(args, task.sequence);
  const int64_t num_keys = args.num_keys[task.sequence];
  const int64_t slot_stride = int64_t{args.num_kv_heads} * args.head_dim;
  const int64_t* pages = args.page_table + task.sequence * args.table_stride;

  AttentionBlock block;
  block.num_keys = static_cast<int>(std::min<int64_t>(kKeyRange, num_keys - task.first_key));
  for (int j = 0; j < block.num_keys; ++j) {
    const int64_t key = task.first_key + j;
    const int64_t slot = pages[key / args.page_size] * args.page_size + key % args.page_size;
    block.keys[j] = args.keys + slot * slot_stride + int64_t{task.kv_head} * args.head_dim;
  }
  block.values_behind_keys = args.values - args.keys;
  block.head_dim = args.head_dim;
  block.scale = args.scale;
  for (int64_t row = 0; row < rows.count(); row += kAttentionRows) {
    for (int r = 0; r < kAttentionRows; ++r) {
      // A row beyond the last repeats it, and its result goes nowhere.
      const int64_t at = std::min(row + r, rows.count() - 1);
      const int64_t token = at / rows.groups, head = task.kv_head * rows.groups + at % rows.groups;
      block.queries[r] =
          args.queries + (rows.first + token) * args.query_stride + head * args.head_dim;
      const int64_t sees = num_keys - rows.num_new + token + 1 - task.first_key;
      block.visible[r] = static_cast<int>(std::clamp<int64_t>(sees, 0, block.num_keys));
      block.partials[r] = task.partials + at * (args.head_dim + 2);
    }
    kernels.attend(block);
  }
}

// Joins the ranges of one row, in order.
void merge(const float* partials, int64_t num_ranges, int64_t range_stride, int head_dim,
           float* out) {
  float maximum = -INFINITY, sum = 0.0f;
  for (int64_t i = 0; i < num_ranges; ++i) {
    maximum = std::max(maximum, partials[i * range_stride + head_dim]);
  }
  std::fill(out, out + head_dim, 0.0f);
  for (int64_t i = 0; i < num_ranges; ++i) {
    const float* part = partials + i * range_stride;
    const float share = std::exp(part[head_dim] - maximum);
    sum += share * part[head_dim + 1];
    for (int d = 0; d < head_dim; ++d) out[d] += share * part[d];
  }
  for (int d = 0; d < head_dim; ++d) out[d] /= sum;
}

}  // namespace

void paged_attention(const PagedAttentionArgs& args, Isa isa, int num_threads) {
  const FloatKernels& kernels = float_kernels("paged_attention", isa);
  validate(args);
  const int64_t row_floats = args.head_dim + 2;
  std::vector<Task> tasks;
  int64_t num_floats = 0;
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    const int64_t count = rows_of(args, s).count();
    if (count == 0) continue;
    if (rows_of(args, s).num_new > kFewRows) {
      tiled_attention(args, s, isa, num_threads);
      continue;
    }
    for (int head = 0; head < args.num_kv_heads; ++head) {
      for (int64_t key = 0; key < args.num_keys[s]; key += kKeyRange) {
        tasks.push_back({s, key, head, nullptr});
        num_floats += count * row_floats;
      }
    }
  }
  const std::unique_ptr<float[]> partials(new float[num_floats]);
  float* next = partials.get();
  for (Task& task : tasks) {
    task.partials = next;
    next += rows_of(args, task.sequence).count() * row_floats;
  }
  parallel_for(tasks.size(), num_threads, [&](int, size_t i) { attend(args, tasks[i], kernels); });

  for (size_t i = 0; i < tasks.size();) {
    const Rows rows = rows_of(args, tasks[i].sequence);
    const int64_t num_ranges = (args.num_keys[tasks[i].sequence] + kKeyRange - 1) / kKeyRange;
    for (int64_t at = 0; at < rows.count(); ++at) {
      const int64_t token = rows.first + at / rows.groups;
      const int64_t head = tasks[i].kv_head * rows.groups + at % rows.groups;
      merge(tasks[i].partials + at * row_floats, num_ranges, rows.count() * row_floats,
            args.head_dim, args.out + (token * args.num_heads + head) * args.head_dim);
    }
    i += num_ranges;
  }
}

}  // namespace vtts
