// A decoding step and what lies between its products: exact to rounding in either storage type, and
// that companions and threads do not change it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/decode_step.h"
#include "core/row_ops.h"
#include "tests/check.h"
#include "tests/kernels.h"

namespace {

using testing::check;
using testing::isas;
using testing::noise;
using testing::num_failures;
using testing::stored;

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
  test_row_ops<float>(random);
  test_row_ops<vtts::BFloat16>(random);
  test_decode_step<float>(random);
  test_decode_step<vtts::BFloat16>(random);
  std::printf("%s (best: %s)\n", num_failures == 0 ? "all passed" : "failed",
              vtts::isa_name(vtts::resolve_isa("test", vtts::Isa::kAuto)));
  return num_failures == 0 ? 0 : 1;
}
