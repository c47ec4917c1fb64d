// The float kernels without Python: what they refuse, and that instruction sets,
// companions and threads do not change what they compute.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/decode_step.h"
#include "core/linear.h"
#include "core/linear_int8.h"
#include "core/paged_attention.h"
#include "core/parallel.h"
#include "core/row_ops.h"
#include "core/sampling.h"
#include "tests/check.h"

namespace {

using testing::check;
using testing::num_failures;

std::vector<vtts::Isa> isas() {
  std::vector<vtts::Isa> result = {vtts::Isa::kScalar};
  for (const vtts::Isa isa : {vtts::Isa::kAvx2, vtts::Isa::kAvx512, vtts::Isa::kNeon}) {
    if (vtts::isa_supported(isa)) result.push_back(isa);
  }
  return result;
}

std::vector<float> noise(size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

bool close(const std::vector<float>& values, const std::vector<double>& exact, double tolerance) {
  for (size_t i = 0; i < exact.size(); ++i) {
    if (!(std::abs(values[i] - exact[i]) <= tolerance)) return false;  // a NaN is not close
  }
  return values.size() == exact.size();
}

// Few rows and many run other kernels; `part` rows among `num_rows` are of the same kind.
void test_linear(int64_t num_rows, int64_t part, std::mt19937& random) {
  constexpr int64_t kChannels = 203, kOutputs = 501;
  const auto x = noise(num_rows * kChannels, random), weight = noise(kOutputs * kChannels, random);
  for (const vtts::Isa isa : isas()) {
    std::vector<float> together(num_rows * kOutputs), alone(part * kOutputs);
    vtts::linear({x.data(), kChannels, weight.data(), nullptr, together.data(), num_rows, kChannels,
                  kOutputs},
                 isa, 3);
    for (int64_t n = 0; n + part <= num_rows; n += part) {
      vtts::linear({x.data() + n * kChannels, kChannels, weight.data(), nullptr, alone.data(), part,
                    kChannels, kOutputs},
                   isa, 1);
      check(std::equal(alone.begin(), alone.end(), together.begin() + n * kOutputs),
            "a row is the same in any company");
    }
    double worst = 0.0;
    for (int64_t i = 0; i < num_rows * kOutputs; ++i) {
      double exact = 0.0;
      for (int64_t c = 0; c < kChannels; ++c) {
        exact += double{x[i / kOutputs * kChannels + c]} * weight[i % kOutputs * kChannels + c];
      }
      worst = std::max(worst, std::abs(together[i] - exact));
    }
    check(worst < 1e-4, "products are exact to rounding");
  }
}

void test_linear_int8(int64_t num_rows, int64_t part, std::mt19937& random) {
  constexpr int64_t kChannels = 203, kOutputs = 501;
  const auto x = noise(num_rows * kChannels, random), bias = noise(kOutputs, random);
  std::uniform_int_distribution<int> bytes(-128, 127);
  std::vector<int8_t> weight(kOutputs * kChannels);
  for (int8_t& value : weight) value = static_cast<int8_t>(bytes(random));
  std::vector<float> scale(kOutputs);
  for (int64_t o = 0; o < kOutputs; ++o) scale[o] = 0.001f * static_cast<float>(o % 13 + 1);
  std::vector<double> exact(num_rows * kOutputs);
  for (int64_t i = 0; i < num_rows * kOutputs; ++i) {
    const int64_t o = i % kOutputs;
    for (int64_t c = 0; c < kChannels; ++c) {
      exact[i] += double{x[i / kOutputs * kChannels + c]} * weight[o * kChannels + c];
    }
    exact[i] = exact[i] * scale[o] + bias[o];
  }
  for (const vtts::Isa isa : isas()) {
    std::vector<float> together(num_rows * kOutputs, NAN), alone(part * kOutputs, NAN);
    vtts::linear_int8({x.data(), kChannels, weight.data(), scale.data(), bias.data(),
                       together.data(), num_rows, kChannels, kOutputs},
                      isa, 3);
    for (int64_t n = 0; n + part <= num_rows; n += part) {
      vtts::linear_int8({x.data() + n * kChannels, kChannels, weight.data(), scale.data(),
                         bias.data(), alone.data(), part, kChannels, kOutputs},
                        isa, 1);
      check(std::equal(alone.begin(), alone.end(), together.begin() + n * kOutputs),
            "a row times bytes is the same in any company");
    }
    check(close(together, exact, 1e-4), "products with bytes are exact to rounding");
  }
}

void test_attention_refuses() {
  const std::vector<float> zeros(64, 0.0f);
  std::vector<float> out(64);
  const int64_t page = 2, starts[] = {0, 1}, num_keys = 1;
  vtts::PagedAttentionArgs args;
  args.queries = args.keys = args.values = zeros.data();
  args.page_table = &page;
  args.table_stride = 1;
  args.row_starts = starts;
  args.num_keys = &num_keys;
  args.out = out.data();
  args.num_rows = args.num_sequences = args.num_pages = args.page_size = 1;
  args.num_heads = args.num_kv_heads = 1;
  args.head_dim = 8;
  try {
    vtts::paged_attention(args, vtts::Isa::kScalar, 1);
    check(false, "a page outside the pool is refused");
  } catch (const std::invalid_argument& error) {
    check(
        std::string(error.what()) == "paged_attention: page_table must be pages of the pool, got 2",
        error.what());
  }
}

// One sequence whose pages lie backwards; fewer rows than kFewRows and more run other kernels.
void test_attention(int64_t num_new, std::mt19937& random) {
  constexpr int64_t kPages = 23, kPageSize = 16, kKeys = kPages * kPageSize - 5;
  constexpr int kHeads = 6, kKvHeads = 2, kDim = 24;
  const int64_t row = kHeads * kDim, slot = kKvHeads * kDim;
  const auto queries = noise(num_new * row, random);
  const auto keys = noise(kPages * kPageSize * slot, random);
  const auto values = noise(kPages * kPageSize * slot, random);
  std::vector<int64_t> pages(kPages);
  for (int64_t p = 0; p < kPages; ++p) pages[p] = kPages - 1 - p;
  const int64_t starts[] = {0, num_new}, num_keys = kKeys;
  vtts::PagedAttentionArgs args;
  args.queries = queries.data();
  args.query_stride = row;
  args.keys = keys.data();
  args.values = values.data();
  args.page_table = pages.data();
  args.table_stride = args.num_pages = kPages;
  args.row_starts = starts;
  args.num_keys = &num_keys;
  args.num_rows = num_new;
  args.num_sequences = 1;
  args.page_size = kPageSize;
  args.num_heads = kHeads;
  args.num_kv_heads = kKvHeads;
  args.head_dim = kDim;
  args.scale = 0.2f;
  const auto at = [&](int64_t key, int64_t head) {
    return (pages[key / kPageSize] * kPageSize + key % kPageSize) * slot + head / 3 * kDim;
  };
  std::vector<double> exact(num_new * row, 0.0);
  for (int64_t i = 0; i < num_new * kHeads; ++i) {
    const int64_t sees = kKeys - num_new + i / kHeads + 1;
    double sum = 0.0;
    for (int64_t j = 0; j < sees; ++j) {
      double score = 0.0;
      for (int d = 0; d < kDim; ++d) {
        score += double{queries[i * kDim + d]} * keys[at(j, i % kHeads) + d];
      }
      const double weight = std::exp(args.scale * score);
      sum += weight;
      for (int d = 0; d < kDim; ++d) {
        exact[i * kDim + d] += weight * values[at(j, i % kHeads) + d];
      }
    }
    for (int d = 0; d < kDim; ++d) exact[i * kDim + d] /= sum;
  }
  for (const vtts::Isa isa : isas()) {
    std::vector<float> once(num_new * row, NAN), again(num_new * row, NAN);
    args.out = once.data();
    vtts::paged_attention(args, isa, 1);
    args.out = again.data();
    vtts::paged_attention(args, isa, 3);
    check(once == again, "threads do not change attention");
    check(close(once, exact, 1e-5), "attention is exact to rounding");
  }
}

void test_row_ops(std::mt19937& random) {
  constexpr int64_t kRows = 3, kChannels = 43, kDim = 22, kHeads = 2;
  const auto x = noise(kRows * kChannels, random), residual = noise(kRows * kChannels, random);
  const auto weight = noise(kChannels, random), gate_up = noise(kRows * 2 * kChannels, random);
  const auto heads = noise(kRows * kHeads * kDim, random);
  const auto cos = noise(kRows * kDim / 2, random), sin = noise(kRows * kDim / 2, random);
  std::vector<double> normed, gated, turned(heads.begin(), heads.end());
  for (int64_t n = 0; n < kRows; ++n) {
    double squares = 0.0;
    for (int64_t c = 0; c < kChannels; ++c) {
      const double h = double{x[n * kChannels + c]} + residual[n * kChannels + c];
      squares += h * h;
    }
    for (int64_t c = 0; c < kChannels; ++c) {
      const double h = double{x[n * kChannels + c]} + residual[n * kChannels + c];
      normed.push_back(weight[c] * h / std::sqrt(squares / kChannels + 1e-6));
      const double gate = gate_up[2 * n * kChannels + c];
      gated.push_back(gate / (1 + std::exp(-gate)) * gate_up[(2 * n + 1) * kChannels + c]);
    }
    for (int64_t i = 0; i < kHeads * kDim; ++i) {
      const int64_t half = kDim / 2, pair = i % kDim % half, low = i - i % kDim + pair;
      const double c = cos[n * half + pair], s = sin[n * half + pair];
      const float* const head = heads.data() + n * kHeads * kDim + low;
      turned[n * kHeads * kDim + i] =
          i % kDim < half ? head[0] * c - head[half] * s : head[half] * c + head[0] * s;
    }
  }
  for (const vtts::Isa isa : isas()) {
    std::vector<float> y(kRows * kChannels, NAN), h = y, out = y, rows = heads;
    vtts::rmsnorm({x.data(), kChannels, residual.data(), kChannels, weight.data(), 1e-6f, kRows,
                   kChannels, y.data(), h.data()},
                  isa, 2);
    check(close(y, normed, 1e-5), "rmsnorm");
    vtts::swiglu(gate_up.data(), kRows, kChannels, out.data(), isa, 2);
    check(close(out, gated, 1e-5), "swiglu");
    vtts::rotary(rows.data(), kHeads * kDim, kRows, kHeads, kDim, cos.data(), sin.data(), isa, 2);
    check(close(rows, turned, 1e-5), "rotary");
  }
}

void test_sample(std::mt19937& random) {
  constexpr int64_t kRows = 5, kLogits = 5003;
  std::vector<float> logits = noise(kRows * kLogits, random), logprobs(kRows);
  logits[4711] = logits[4712] = 9.0f;
  logits[4 * kLogits + 17] = NAN;
  double sum = 0.0;
  for (int i = 0; i < kLogits; ++i) sum += std::exp(double{logits[i]} - 9.0);
  const std::vector<float> temperature = {0.0f, 1.0f, 0.5f, 0.5f, 1.0f};
  const std::vector<double> top_p = {1.0, 1.0, 0.5, 0.9, 1.0};
  const std::vector<int64_t> top_k = {0, 0, 0, 1, 0}, places(4 * kRows, 7);
  std::vector<int64_t> tokens(kRows), expected;
  const vtts::SampleArgs args = {
      logits.data(), false,        kRows,         kLogits,       kLogits,        temperature.data(),
      top_k.data(),  top_p.data(), places.data(), tokens.data(), logprobs.data()};
  for (const vtts::Isa isa : isas()) {
    for (const int num_threads : {1, 3}) {
      vtts::sample(args, isa, num_threads);
      if (expected.empty()) expected = tokens;
      check(tokens == expected, "a choice depends on instructions or threads");
      check(std::abs(logprobs[0] + std::log(sum)) < 1e-6, "log-probability of the maximum");
    }
  }
  check(tokens[0] == 4711, "the first maximum is chosen");
  check(tokens[4] == -1, "a NaN is not hidden");
  const auto row = logits.begin() + 3 * kLogits;
  check(row + tokens[3] == std::max_element(row, row + kLogits), "the only one of a top-k of 1");
}

// Calls of many sizes in a row, calls within calls, and an exception in between: each task runs
// exactly once, whatever the threads that are kept were doing.
void test_threads_that_are_kept() {
  for (int round = 0; round < 2000; ++round) {
    const size_t num_tasks = round % 7;
    std::vector<std::atomic<int>> runs(num_tasks);
    vtts::parallel_for(num_tasks, 1 + round % 4, [&](int worker, size_t i) {
      check(worker >= 0 && worker < 1 + round % 4, "workers are numbered");
      if (round % 10 == 0) {
        vtts::parallel_for(2, 2, [&](int, size_t) { ++runs[i]; });
      } else {
        runs[i] += 2;
      }
    });
    for (const auto& count : runs) check(count == 2, "every task runs once");
    if (round % 100 == 0) {
      try {
        vtts::parallel_for(5, 3, [](int, size_t i) {
          if (i == 3) throw std::runtime_error("task 3");
        });
        check(false, "an exception comes through");
      } catch (const std::runtime_error&) {
      }
    }
  }
}

// Two layers for rows of `num_sequences` sequences of one new token each; sequence s has its own
// page. Odd sizes: vector tails run too.
struct StepCase {
  static constexpr int64_t kChannels = 19, kHidden = 37, kPageSize = 4, kPages = 16;
  static constexpr int kHeads = 3, kKvHeads = 1, kHeadDim = 8, kLayers = 2;
  static constexpr int64_t kQkv = (kHeads + 2 * kKvHeads) * kHeadDim;
  std::vector<std::vector<float>> matrices;
  std::vector<float> embeds, cos, sin, pool;

  explicit StepCase(std::mt19937& random) {
    const int64_t sizes[] = {kChannels,
                             kQkv * kChannels,
                             kQkv,
                             kHeadDim,
                             kHeadDim,
                             kChannels * kHeads * kHeadDim,
                             kChannels,
                             2 * kHidden * kChannels,
                             kChannels * kHidden};
    for (int i = 0; i < kLayers; ++i) {
      for (const int64_t size : sizes) matrices.push_back(noise(size, random));
    }
    matrices.push_back(noise(kChannels, random));
    embeds = noise(kPages * kChannels, random);
    cos = noise(kPages * kHeadDim / 2, random);
    sin = noise(kPages * kHeadDim / 2, random);
    pool = noise(kLayers * 2 * kPages * kPageSize * kKvHeads * kHeadDim, random);
  }

  // Rows first .. first + count - 1: (hidden states, pool after the step).
  std::pair<std::vector<float>, std::vector<float>> run(int64_t first, int64_t count, vtts::Isa isa,
                                                        int num_threads) const {
    std::vector<float> pages = pool, out(count * kChannels, NAN);
    std::vector<vtts::DecodeLayer> layers(kLayers);
    const int64_t half = kPages * kPageSize * kKvHeads * kHeadDim;
    for (int i = 0; i < kLayers; ++i) {
      const auto* m = &matrices[9 * i];
      layers[i] = {m[0].data(),
                   m[1].data(),
                   m[2].data(),
                   m[3].data(),
                   m[4].data(),
                   m[5].data(),
                   m[6].data(),
                   m[7].data(),
                   m[8].data(),
                   pages.data() + 2 * i * half,
                   pages.data() + (2 * i + 1) * half};
    }
    std::vector<int64_t> slots, table, row_starts = {0}, num_keys;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t keys = 1 + (first + n) % kPageSize;
      table.push_back(first + n);
      slots.push_back((first + n) * kPageSize + keys - 1);
      row_starts.push_back(n + 1);
      num_keys.push_back(keys);
    }
    vtts::DecodeStepArgs args;
    args.layers = layers.data();
    args.num_layers = kLayers;
    args.final_norm = matrices.back().data();
    args.num_channels = kChannels;
    args.num_hidden = kHidden;
    args.num_heads = kHeads;
    args.num_kv_heads = kKvHeads;
    args.head_dim = kHeadDim;
    args.eps = 1e-6f;
    args.embeds = embeds.data() + first * kChannels;
    args.num_rows = args.num_sequences = count;
    args.cos = cos.data() + first * kHeadDim / 2;
    args.sin = sin.data() + first * kHeadDim / 2;
    args.slots = slots.data();
    args.page_table = table.data();
    args.table_stride = 1;
    args.row_starts = row_starts.data();
    args.num_keys = num_keys.data();
    args.num_pages = kPages;
    args.page_size = kPageSize;
    args.out = out.data();
    vtts::decode_step(args, isa, num_threads);
    return {out, pages};
  }
};

// Neither threads nor the rows beside a row change its bits, nor what is written to the pages.
void test_decode_step(std::mt19937& random) {
  const StepCase step(random);
  constexpr int64_t kRows = 16, kChannels = StepCase::kChannels;
  for (const vtts::Isa isa : isas()) {
    const std::string name = vtts::isa_name(isa);
    const auto [out, pages] = step.run(0, kRows, isa, 1);
    check(std::none_of(out.begin(), out.end(), [](float v) { return std::isnan(v); }),
          "decode_step writes every row, " + name);
    check(pages != step.pool, "decode_step writes the pages, " + name);
    check(step.run(0, kRows, isa, 3) == std::make_pair(out, pages),
          "threads change decode_step, " + name);
    for (const int64_t part : {1, 5}) {
      for (int64_t n = 0; n + part <= kRows; n += part) {
        const auto alone = step.run(n, part, isa, 2).first;
        check(std::equal(alone.begin(), alone.end(), out.begin() + n * kChannels),
              "companions change decode_step, " + name);
      }
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(0);
  test_linear(7, 1, random);
  test_linear(95, 19, random);
  test_linear_int8(7, 1, random);
  test_linear_int8(95, 19, random);
  test_attention_refuses();
  test_attention(5, random);
  test_attention(40, random);
  test_row_ops(random);
  test_sample(random);
  test_decode_step(random);
  test_threads_that_are_kept();
  std::printf("%s (best: %s)\n", num_failures == 0 ? "all passed" : "failed",
              vtts::isa_name(vtts::resolve_isa("test", vtts::Isa::kAuto)));
  return num_failures == 0 ? 0 : 1;
}
