#include "core/paged_attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/head_attention.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace vtts {
namespace {

// Packed keys and values of several heads at once take up to so many floats, 64 MiB; those of one
// head are packed whole.
constexpr int64_t kMostPackedFloats = 16 << 20;
// Joining fewer floats takes some 10 us, and is left to the caller's thread.
constexpr int64_t kMostFloatsAlone = 64 << 10;

[[noreturn]] void reject(const std::string& argument, const std::string& rule, int64_t got) {
  throw std::invalid_argument("paged_attention: " + argument + " must be " + rule + ", got " +
                              std::to_string(got));
}

template <typename T>
void validate(const PagedAttentionArgs<T>& args) {
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

// The query heads of one sequence that share a key head.
template <typename T>
HeadProblem<T> problem_of(const PagedAttentionArgs<T>& args, int64_t sequence, int64_t kv_head) {
  const int64_t first = args.row_starts[sequence], groups = args.num_heads / args.num_kv_heads;
  const int64_t head = kv_head * groups * args.head_dim, dim = args.head_dim;
  HeadProblem<T> problem = {};
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

// Few rows a head: a task packs one block of keys, and all rows of a head attend to it.
template <typename T>
void attend_by_blocks(const std::vector<HeadAttention<T>>& heads, int num_threads) {
  struct Task {
    const HeadAttention<T>* head;
    int64_t block, partials;
  };
  std::vector<Task> tasks;
  std::vector<int64_t> starts;  // of each head's partials
  int64_t num_floats = 0;
  for (const HeadAttention<T>& head : heads) {
    starts.push_back(num_floats);
    for (int64_t block = 0; block < head.num_blocks(); ++block) {
      tasks.push_back({&head, block, num_floats});
      num_floats += head.partial_floats(head.num_rows());
    }
  }
  // Heads lie side by side in a page.
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.block < b.block; });
  thread_local Scratch scratch;
  float* const partials = scratch.floats(num_floats);
  parallel_for(tasks.size(), num_threads, [&](int, size_t i) {
    tasks[i].head->attend_block(tasks[i].block, partials + tasks[i].partials);
  });
  parallel_for(heads.size(), num_floats > kMostFloatsAlone ? num_threads : 1,
               [&](int, size_t i) { heads[i].join(partials + starts[i]); });
}

// Many rows: all blocks of keys are packed, and a task takes some rows through them. The heads are
// of one sequence.
template <typename T>
void attend_by_rows(const std::vector<HeadAttention<T>>& heads, int num_threads) {
  const HeadAttention<T>& any = heads.front();
  const int64_t floats = any.num_blocks() * any.block_floats();
  const auto at_once = static_cast<size_t>(std::max<int64_t>(1, kMostPackedFloats / floats));
  thread_local Scratch scratch;
  for (size_t first = 0; first < heads.size(); first += at_once) {
    const size_t count = std::min(at_once, heads.size() - first);
    float* const packed = scratch.floats(floats * count);
    parallel_for(any.num_blocks() * count, num_threads, [&](int, size_t i) {
      const int64_t block = i / count;
      heads[first + i % count].pack(block,
                                    packed + i % count * floats + block * any.block_floats());
    });
    constexpr int64_t kMost = HeadAttention<T>::kMostRows;
    const int64_t num_tasks = ceil_div(any.num_rows(), kMost);
    // The last rows first: they see most keys.
    parallel_for(num_tasks * count, num_threads, [&](int, size_t i) {
      const int64_t row = (num_tasks - 1 - static_cast<int64_t>(i / count)) * kMost;
      heads[first + i % count].attend_all(packed + i % count * floats, row,
                                          std::min(kMost, any.num_rows() - row));
    });
  }
}

}  // namespace

template <typename T>
void paged_attention(const PagedAttentionArgs<T>& args, Isa isa, int num_threads) {
  resolve_isa("paged_attention", isa);
  validate(args);
  std::vector<HeadAttention<T>> few;
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    if (args.row_starts[s + 1] == args.row_starts[s]) continue;
    std::vector<HeadAttention<T>> heads;
    for (int head = 0; head < args.num_kv_heads; ++head) {
      heads.emplace_back(problem_of(args, s, head), "paged_attention", isa);
    }
    if (heads.front().num_rows() <= HeadAttention<T>::kMostRows) {
      few.insert(few.end(), heads.begin(), heads.end());
    } else {
      attend_by_rows(heads, num_threads);
    }
  }
  attend_by_blocks(few, num_threads);
}

template void paged_attention(const PagedAttentionArgs<float>&, Isa, int);
template void paged_attention(const PagedAttentionArgs<BFloat16>&, Isa, int);

}  // namespace vtts
