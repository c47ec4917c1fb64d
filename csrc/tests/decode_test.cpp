// The float kernels without Python: what they refuse, and that instruction sets,
// companions and threads do not change what they compute.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/decode_step.h"
#include "core/linear.h"
#include "core/paged_attention.h"
#include "core/parallel.h"
#include "core/product_kernels.h"
#include "core/row_ops.h"
#include "core/sampling.h"
#include "tests/check.h"

namespace {

using testing::check;
using testing::num_failures;

std::vector<vtts::Isa> isas() {
  std::vector<vtts::Isa> result = {vtts::Isa::kScalar};
  for (const vtts::Isa isa : {vtts::Isa::kAvx2, vtts::Isa::kAvx512, vtts::Isa::kAvx512Bf16,
                              vtts::Isa::kAmx, vtts::Isa::kNeon}) {
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

// A matrix as it lies in memory, (kOutputs, kChannels) row-major, in panels of 16 outputs: pairs of
// channels side by side where values are of 2 bytes.
template <typename T>
std::vector<T> in_panels(const std::vector<T>& matrix, int64_t num_outputs, int64_t num_channels) {
  constexpr int64_t kTogether = sizeof(T) == 2 ? 2 : 1;
  const int64_t num_panels = (num_outputs + vtts::kPanel - 1) / vtts::kPanel;
  std::vector<T> panels(num_panels * vtts::kPanel * num_channels, T(0));
  for (int64_t o = 0; o < num_outputs; ++o) {
    for (int64_t c = 0; c < num_channels; ++c) {
      const int64_t line = o / vtts::kPanel * num_channels + c / kTogether * kTogether;
      panels[line * vtts::kPanel + o % vtts::kPanel * kTogether + c % kTogether] =
          matrix[o * num_channels + c];
    }
  }
  return panels;
}

// Rows X times weights: exact to rounding, and the same to the bit alone, in any company, on any
// number of threads, packed before and on the way.
template <typename X, typename Weight>
void test_linear(int64_t num_rows, int64_t num_channels, int64_t num_outputs, double rounding,
                 std::mt19937& random) {
  constexpr bool kBytes = sizeof(Weight) == 1;
  const auto values = noise(num_rows * num_channels, random);
  const auto weights = noise(num_outputs * num_channels, random);
  const auto biases = noise(num_outputs, random);
  std::vector<X> x, bias;
  for (const float value : values) x.push_back(X(value));
  for (const float value : biases) bias.push_back(X(value));
  std::vector<Weight> weight;
  for (const float value : weights) weight.push_back(Weight(kBytes ? 30 * value : value));
  const std::vector<Weight> panels = in_panels(weight, num_outputs, num_channels);
  std::vector<float> scale;
  for (int64_t o = 0; o < num_outputs; ++o) scale.push_back(0.01f * static_cast<float>(o % 13 + 1));
  for (const vtts::Isa isa : isas()) {
    vtts::LinearArgs args;
    args.type = sizeof(X) == 2 ? vtts::DType::kBFloat16 : vtts::DType::kFloat32;
    args.x = x.data();
    args.x_stride = num_channels;
    args.weight = {panels.data(),
                   kBytes                ? vtts::Matrix::kInt8
                   : sizeof(Weight) == 2 ? vtts::Matrix::kBFloat16
                                         : vtts::Matrix::kFloat32,
                   true, kBytes ? scale.data() : nullptr, bias.data()};
    args.num_rows = num_rows;
    args.num_channels = num_channels;
    args.num_outputs = num_outputs;
    std::vector<X> together(num_rows * num_outputs), others(num_rows * num_outputs);
    args.out = together.data();
    vtts::linear(args, isa, 3);
    const auto same = [&] {
      return std::memcmp(together.data(), others.data(), together.size() * sizeof(X)) == 0;
    };
    for (const int64_t part : {1, 5}) {
      for (int64_t n = 0; n < num_rows; n += part) {
        args.x = x.data() + n * num_channels;
        args.out = others.data() + n * num_outputs;
        args.num_rows = std::min(part, num_rows - n);
        vtts::linear(args, isa, 1);
      }
      check(same(), "a row is the same in any company");
    }
    if (!kBytes) {
      std::fill(others.begin(), others.end(), X(0));
      args.x = x.data();
      args.out = others.data();
      args.num_rows = num_rows;
      args.weight.values = weight.data();
      args.weight.packed = false;
      vtts::linear(args, isa, 2);
      check(same(), "a plain matrix gives the same as a packed one");
    }
    double worst = 0.0;
    for (int64_t n = 0; n < num_rows; ++n) {
      for (int64_t o = 0; o < num_outputs; ++o) {
        double exact = 0.0;
        for (int64_t c = 0; c < num_channels; ++c) {
          exact += double{x[n * num_channels + c]} * double(weight[o * num_channels + c]);
        }
        exact = exact * (kBytes ? scale[o] : 1.0f) + double{bias[o]};
        const double error = std::abs(double{together[n * num_outputs + o]} - exact);
        worst = std::max(worst, error / (1.0 + std::abs(exact)));
      }
    }
    check(worst < rounding, "products are exact to rounding");
  }
}

void test_linear_refuses() {
  vtts::LinearArgs args;
  const auto refuses = [&](const std::string& part) {
    try {
      vtts::linear(args, vtts::Isa::kAuto, 1);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what()).find(part) != std::string::npos;
    }
    return false;
  };
  args.weight.type = vtts::Matrix::kBFloat16;
  check(refuses("type of rows"), "weights of another type are refused");
  args.type = vtts::DType::kBFloat16;
  args.num_channels = 3;
  check(refuses("even"), "an odd number of channels is refused");
  args.type = vtts::DType::kFloat16;
  check(refuses("float16"), "float16 is refused");
  args.type = vtts::DType::kFloat32;
  args.weight.type = vtts::Matrix::kInt8;
  check(refuses("packed"), "plain bytes are refused");
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

template <typename T>
std::vector<T> stored(const std::vector<float>& values) {
  std::vector<T> result;
  for (const float value : values) result.push_back(T(value));
  return result;
}

template <typename T>
void test_row_ops(std::mt19937& random) {
  constexpr int64_t kRows = 3, kChannels = 43, kDim = 22, kHeads = 2, kRow = 3 * kHeads * kDim;
  constexpr int64_t kSlots = 5, kSlot = kHeads * kDim;
  // What one rounding may change.
  const double once = sizeof(T) == sizeof(float) ? 1e-6 : 0x1p-8 * 1.001;
  const auto within = [](const std::vector<T>& values, const std::vector<double>& exact,
                         double relative) {
    bool all = values.size() == exact.size();
    for (size_t i = 0; i < exact.size(); ++i) {
      all = all && std::abs(values[i] - exact[i]) <= 1e-5 + relative * std::abs(exact[i]);
    }
    return all;
  };
  const auto some = [&](int64_t count) { return stored<T>(noise(count, random)); };
  const auto x = some(kRows * kChannels), residual = some(kRows * kChannels);
  const auto weight = some(kChannels), gate_up = some(kRows * 2 * kChannels);
  const auto qkv = some(kRows * kRow);
  const auto cos = noise(kRows * kDim / 2, random), sin = noise(kRows * kDim / 2, random);
  std::vector<double> normed, gated, turned(qkv.begin(), qkv.end());
  std::vector<T> sums;
  for (int64_t n = 0; n < kRows; ++n) {
    double squares = 0.0;
    for (int64_t i = n * kChannels; i < (n + 1) * kChannels; ++i) {
      sums.push_back(T(float{x[i]} + float{residual[i]}));
      squares += double{sums[i]} * sums[i];
    }
    for (int64_t c = 0; c < kChannels; ++c) {
      normed.push_back(weight[c] * sums[n * kChannels + c] / std::sqrt(squares / kChannels + 1e-6));
      const double gate = gate_up[2 * n * kChannels + c];
      gated.push_back(gate / (1 + std::exp(-gate)) * gate_up[(2 * n + 1) * kChannels + c]);
    }
    for (int64_t i = 0; i < 2 * kHeads * kDim; ++i) {  // queries and keys
      const int64_t half = kDim / 2, pair = i % kDim % half, low = i - i % kDim + pair;
      const double c = cos[n * half + pair], s = sin[n * half + pair];
      const T* const head = qkv.data() + n * kRow + low;
      turned[n * kRow + i] =
          i % kDim < half ? head[0] * c - head[half] * s : head[half] * c + head[0] * s;
    }
  }
  for (const vtts::Isa isa : isas()) {
    const std::string name = vtts::isa_name(isa);
    std::vector<T> y(kRows * kChannels, T(NAN)), h = y, out = y, rows = qkv, whole = qkv;
    vtts::RmsnormArgs<T> norm;
    norm.x = x.data();
    norm.residual = residual.data();
    norm.x_stride = norm.residual_stride = norm.num_channels = kChannels;
    norm.weight = weight.data();
    norm.eps = 1e-6f;
    norm.num_rows = kRows;
    norm.y = y.data();
    norm.h = h.data();
    vtts::rmsnorm(norm, isa, 2);
    check(within(y, normed, 2 * once), "rmsnorm, " + name);
    check(std::equal(h.begin(), h.end(), sums.begin(), [](float a, float b) { return a == b; }),
          "rmsnorm's sum, " + name);
    vtts::swiglu(gate_up.data(), kRows, kChannels, out.data(), isa, 2);
    check(within(out, gated, once), "swiglu, " + name);
    vtts::rotary(rows.data(), kRow, kRows, 2 * kHeads, kDim, cos.data(), sin.data(), isa, 2);
    check(within(rows, turned, once), "rotary, " + name);

    const int64_t slots[kRows] = {4, -1, 0};
    std::vector<T> keys(kSlots * kSlot, T(7.0f)), values = keys;
    vtts::RotaryKvArgs<T> kv;
    kv.qkv = whole.data();
    kv.row_stride = kRow;
    kv.num_rows = kRows;
    kv.num_heads = kv.num_kv_heads = kHeads;
    kv.head_dim = kDim;
    kv.cos = cos.data();
    kv.sin = sin.data();
    kv.slots = slots;
    kv.num_slots = kSlots;
    kv.keys = keys.data();
    kv.values = values.data();
    vtts::rotary_kv(kv, isa, 2);
    for (int64_t i = 0; i < kSlots * kSlot; ++i) {
      const int64_t* const slot = std::find(slots, slots + kRows, i / kSlot);
      const T* const row = rows.data() + (slot - slots) * kRow + i % kSlot;
      const bool written = slot != slots + kRows;
      check(keys[i] == (written ? row[kSlot] : T(7.0f)), "rotary_kv's keys, " + name);
      check(values[i] == (written ? row[2 * kSlot] : T(7.0f)), "rotary_kv's values, " + name);
    }
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
  const vtts::SampleArgs<float> args = {
      logits.data(), kRows,        kLogits,       kLogits,       temperature.data(),
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
// page. Odd sizes, where T allows: vector tails run too.
template <typename T>
struct StepCase {
  static constexpr int64_t kChannels = sizeof(T) == sizeof(float) ? 19 : 22;
  static constexpr int64_t kHidden = 2 * kChannels - 2, kPageSize = 4, kPages = 40;
  static constexpr int kHeads = 3, kKvHeads = 1, kHeadDim = 8, kLayers = 2;
  static constexpr int64_t kQkv = (kHeads + 2 * kKvHeads) * kHeadDim;
  std::vector<std::vector<T>> weights;
  std::vector<T> embeds, pool;
  std::vector<float> cos, sin;

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
      for (const int64_t size : sizes) weights.push_back(stored<T>(noise(size, random)));
    }
    weights.push_back(stored<T>(noise(kChannels, random)));
    embeds = stored<T>(noise(kPages * kChannels, random));
    cos = noise(kPages * kHeadDim / 2, random);
    sin = noise(kPages * kHeadDim / 2, random);
    pool = stored<T>(noise(kLayers * 2 * kPages * kPageSize * kKvHeads * kHeadDim, random));
  }

  // Rows first .. first + count - 1: (hidden states, pool after the step).
  std::pair<std::vector<T>, std::vector<T>> run(int64_t first, int64_t count, vtts::Isa isa,
                                                int num_threads) const {
    std::vector<T> pages = pool, out(count * kChannels, T(NAN));
    std::vector<vtts::DecodeLayer<T>> layers(kLayers);
    const auto type = sizeof(T) == sizeof(float) ? vtts::Matrix::kFloat32 : vtts::Matrix::kBFloat16;
    const int64_t half = kPages * kPageSize * kKvHeads * kHeadDim;
    for (int i = 0; i < kLayers; ++i) {
      const auto* w = &weights[9 * i];
      vtts::DecodeLayer<T>& layer = layers[i];
      layer.input_norm = w[0].data();
      layer.qkv = {w[1].data(), type, false, nullptr, w[2].data()};
      layer.q_norm = w[3].data();
      layer.k_norm = w[4].data();
      layer.output = {w[5].data(), type};
      layer.post_norm = w[6].data();
      layer.gate_up = {w[7].data(), type};
      layer.down = {w[8].data(), type};
      layer.keys = pages.data() + 2 * i * half;
      layer.values = layer.keys + half;
    }
    std::vector<int64_t> slots, table, row_starts = {0}, num_keys;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t keys = 1 + (first + n) % kPageSize;
      table.push_back(first + n);
      slots.push_back((first + n) * kPageSize + keys - 1);
      row_starts.push_back(n + 1);
      num_keys.push_back(keys);
    }
    vtts::DecodeStepArgs<T> args;
    args.layers = layers.data();
    args.num_layers = kLayers;
    args.final_norm = weights.back().data();
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
template <typename T>
void test_decode_step(std::mt19937& random) {
  const StepCase<T> step(random);
  constexpr int64_t kRows = 37, kChannels = StepCase<T>::kChannels;
  for (const vtts::Isa isa : isas()) {
    const std::string name = vtts::isa_name(isa);
    const auto [out, pages] = step.run(0, kRows, isa, 1);
    check(std::none_of(out.begin(), out.end(), [](float v) { return std::isnan(v); }),
          "decode_step writes every row, " + name);
    check(pages != step.pool, "decode_step writes the pages, " + name);
    check(step.run(0, kRows, isa, 3) == std::make_pair(out, pages),
          "threads change decode_step, " + name);
    for (const int64_t part : {1, 5, 17}) {
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
  for (const int64_t rows : {1, 7, 95}) {
    test_linear<float, float>(rows, 203, 501, 1e-4, random);
    test_linear<float, int8_t>(rows, 203, 501, 1e-4, random);
    test_linear<vtts::BFloat16, vtts::BFloat16>(rows, 302, 501, 1.0 / 256, random);
    test_linear<vtts::BFloat16, int8_t>(rows, 203, 501, 1.0 / 256, random);
  }
  test_linear<float, float>(3, 0, 5, 1e-6, random);
  test_linear_refuses();
  test_attention_refuses();
  test_attention(5, random);
  test_attention(40, random);
  test_row_ops<float>(random);
  test_row_ops<vtts::BFloat16>(random);
  test_sample(random);
  test_decode_step<float>(random);
  test_decode_step<vtts::BFloat16>(random);
  test_threads_that_are_kept();
  std::printf("%s (best: %s)\n", num_failures == 0 ? "all passed" : "failed",
              vtts::isa_name(vtts::resolve_isa("test", vtts::Isa::kAuto)));
  return num_failures == 0 ? 0 : 1;
}
