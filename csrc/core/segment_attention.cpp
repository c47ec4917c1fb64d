#include "core/segment_attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/head_attention.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace vtts {
namespace {

// One head of one segment.
template <typename T>
HeadProblem<T> problem_of(const SegmentAttentionArgs<T>& args, int64_t segment, int64_t head) {
  const int64_t first = args.starts[segment] * args.row_stride + head * args.head_dim;
  HeadProblem<T> problem = {};
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

template <typename T>
void segment_attention(const SegmentAttentionArgs<T>& args, Isa isa, int num_threads) {
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
  resolve_isa("segment_attention", isa);
  parallel_for(args.num_segments * args.num_heads, num_threads, [&](int, size_t i) {
    const int64_t segment = static_cast<int64_t>(i) / args.num_heads;
    if (args.lengths[segment] == 0) return;
    const HeadAttention<T> head(problem_of(args, segment, static_cast<int64_t>(i) % args.num_heads),
                                "segment_attention", isa);
    thread_local Scratch scratch;
    float* const packed = scratch.floats(head.num_blocks() * head.block_floats());
    for (int64_t block = 0; block < head.num_blocks(); ++block) {
      head.pack(block, packed + block * head.block_floats());
    }
    constexpr int64_t kMost = HeadAttention<T>::kMostRows;
    for (int64_t row = 0; row < head.num_rows(); row += kMost) {
      head.attend_all(packed, row, std::min(kMost, head.num_rows() - row));
    }
  });
}

template void segment_attention(const SegmentAttentionArgs<float>&, Isa, int);
template void segment_attention(const SegmentAttentionArgs<BFloat16>&, Isa, int);

}  // namespace vtts
