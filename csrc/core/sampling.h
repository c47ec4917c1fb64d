// The choice of a token from each row of logits: what vtts_rt/ops/sampling.py says, natively.
#pragma once

#include <cstdint>

#include "cpu/cpu_features.h"

namespace vtts {

template <typename T>  // of logits: float or BFloat16
struct SampleArgs {
  const T* logits = nullptr;  // rows row_stride values apart
  int64_t num_rows = 0;
  int64_t num_logits = 0;
  int64_t row_stride = 0;
  // One of each row. Temperature 0 takes the maximum; top_k 0 and top_p 1 keep all tokens.
  const float* temperature = nullptr;
  const int64_t* top_k = nullptr;
  const double* top_p = nullptr;
  const int64_t* noise = nullptr;  // seed, member, round, position of each row
  // Out. Token -1: a row left to the reference, for it holds a NaN or has no finite maximum, or
  // its top-p cuts where another order of sums could cut otherwise.
  int64_t* tokens = nullptr;
  float* logprobs = nullptr;
};

// A row's choice depends neither on the other rows nor on num_threads.
template <typename T>
void sample(const SampleArgs<T>& args, Isa isa, int num_threads);

}  // namespace vtts
