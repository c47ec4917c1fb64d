// patch_embed in strips: the bits of patchify followed by linear, whatever the jobs and threads.
#include "core/patch_embed.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/linear.h"
#include "core/low_precision.h"
#include "tests/check.h"

namespace {

using testing::check;
using testing::check_refused;
using testing::num_failures;

vtts::PatchifyOptions options(int num_threads, int patch_px = 14) {
  vtts::PatchifyOptions result;
  result.num_threads = num_threads;
  result.patch_px = patch_px;
  const float mean[] = {122.77f, 116.75f, 104.09f}, std[] = {68.5f, 66.63f, 70.32f};
  std::copy(mean, mean + 3, result.mean);
  std::copy(std, std + 3, result.std);
  return result;
}

std::vector<float> random_floats(int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, 0.02f);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

void test_bits(int patch_px) {
  const int side = vtts::token_px(patch_px), row_size = vtts::patch_row(patch_px);
  std::mt19937 random(3);
  std::vector<uint8_t> pixels(90 * 120 * 3);
  for (uint8_t& pixel : pixels) pixel = static_cast<uint8_t>(random());
  const vtts::FrameView a = {pixels.data(), 120 * 3, 90, 120};
  const vtts::FrameView b = {pixels.data() + 5 * 360, 120 * 3, 85, 120};
  const vtts::PatchifyJob small = {a,    b,    {3, 2, 70, 77},
                                   side, side, vtts::Resize::kFixed};  // 4 rows
  const vtts::PatchifyJob narrow = {a, a, {0, 0, 31, 85}, side * 20, side, vtts::Resize::kPil};
  // 1,200 rows a token row.
  const vtts::PatchifyJob wide = {b, a, {1, 0, 120, 9}, 2 * side, side * 300, vtts::Resize::kFloat};
  const std::vector<std::vector<vtts::PatchifyJob>> calls = {
      {small},                              // linear's side of few rows
      {small, small, small, small},         // its last number, in one strip
      {small, small, small, small, small},  // one more
      {narrow, small},                      // parts of less than kFewRows rows
      {wide, small, narrow},                // several strips, one of four rows
      {narrow, wide}};
  const int64_t num_outputs = 21;
  const auto weight = random_floats(num_outputs * row_size, random);
  const auto bias = random_floats(num_outputs, random);
  for (size_t i = 0; i < calls.size(); ++i) {
    const auto& jobs = calls[i];
    int64_t num_rows = 0;
    for (const auto& job : jobs) num_rows += vtts::num_patch_rows(job, patch_px);
    for (const bool with_bias : {true, false}) {
      std::vector<float> rows(static_cast<size_t>(num_rows) * row_size);
      vtts::patchify(jobs.data(), jobs.size(), options(1, patch_px), rows.data());
      std::vector<float> expected(static_cast<size_t>(num_rows * num_outputs));
      vtts::LinearArgs linear;
      linear.x = rows.data();
      linear.x_stride = linear.num_channels = row_size;
      linear.weight.values = weight.data();
      linear.weight.bias = with_bias ? bias.data() : nullptr;
      linear.out = expected.data();
      linear.num_rows = num_rows;
      linear.num_outputs = num_outputs;
      vtts::linear(linear, vtts::Isa::kAuto, 1);
      for (const int num_threads : {1, 3}) {
        std::vector<float> out(expected.size() + 8, NAN);
        vtts::patch_embed(
            jobs.data(), jobs.size(), options(num_threads, patch_px),
            {weight.data(), with_bias ? bias.data() : nullptr, num_outputs, out.data()});
        check(std::memcmp(out.data(), expected.data(), expected.size() * sizeof(float)) == 0,
              "patches of " + std::to_string(patch_px) + ", call " + std::to_string(i) + " on " +
                  std::to_string(num_threads) + " threads");
        check(std::all_of(out.end() - 8, out.end(), [](float x) { return std::isnan(x); }),
              "nothing is written behind the rows");
      }
    }
  }
}

void test_refusals() {
  std::vector<uint8_t> pixels(30 * 30 * 3);
  const vtts::FrameView frame = {pixels.data(), 90, 30, 30};
  const vtts::PatchifyJob job = {frame, frame, {0, 0, 30, 30}, 28, 28, vtts::Resize::kFixed};
  const vtts::PatchifyJob bad = {frame, frame, {0, 0, 31, 30}, 28, 28, vtts::Resize::kFixed};
  const std::vector<float> weight(vtts::patch_row(14));
  float out[4] = {};
  const auto run = [&](const vtts::PatchifyJob& of, vtts::PatchEmbedArgs args, int num_threads) {
    return [&of, args, num_threads] { vtts::patch_embed(&of, 1, options(num_threads), args); };
  };
  check_refused("patch_embed: box must be", run(bad, {weight.data(), nullptr, 1, out}, 1));
  check_refused("patch_embed: num_threads must be", run(job, {weight.data(), nullptr, 1, out}, 0));
  check_refused("patch_embed: weight must be", run(job, {nullptr, nullptr, 1, out}, 1));
  check_refused("patch_embed: out must be", run(job, {weight.data(), nullptr, 1, nullptr}, 1));
  check_refused("patch_embed: num_outputs must be >= 1, got 0",
                run(job, {weight.data(), nullptr, 0, out}, 1));
  vtts::patch_embed(nullptr, 0, options(1), {});  // nothing to do
}

void test_sixteen_bits() {
  using vtts::DType;
  for (const DType type : {DType::kFloat16, DType::kBFloat16}) {
    for (int bits = 0; bits < 1 << 16; ++bits) {
      const float value = vtts::from_16_bits(static_cast<uint16_t>(bits), type);
      if (std::isnan(value)) {
        check(std::isnan(vtts::from_16_bits(vtts::to_16_bits(value, type), type)), "NaN stays");
        continue;
      }
      check(vtts::to_16_bits(value, type) == bits, "a 16-bit number stays");
      // Halfway to the next number up: to the even one of the two.
      const float next = vtts::from_16_bits(static_cast<uint16_t>(bits + 1), type);
      if (!std::isfinite(value) || !std::isfinite(next)) continue;
      const float half = value + (next - value) / 2;
      check(vtts::to_16_bits(half, type) == bits + (bits & 1), "ties go to even");
      check(vtts::to_16_bits(std::nextafter(half, value), type) == bits, "nearest below");
      check(vtts::to_16_bits(std::nextafter(half, next), type) == bits + 1, "nearest above");
    }
  }
  check(vtts::to_16_bits(65519.0f, DType::kFloat16) == 0x7bff, "the largest float16");
  check(vtts::to_16_bits(65520.0f, DType::kFloat16) == 0x7c00, "rounds to infinity");
}

void test_folding(int patch_px) {
  const int row_size = vtts::patch_row(patch_px);
  std::mt19937 random(4);
  const auto weight = random_floats(3 * row_size, random);
  const auto how = options(1, patch_px);
  std::vector<uint16_t> folded(weight.size());
  float bias[3];
  vtts::fold_patch_embed(weight.data(), nullptr, 3, how, vtts::DType::kBFloat16, folded.data(),
                         bias);
  for (int n = 0; n < 3; ++n) {
    // A picture of the mean colour gives zero but for the rounding of the bias: whatever the
    // weights were rounded to.
    double total = bias[n];
    for (int k = 0; k < row_size; ++k) {
      const float value = vtts::from_16_bits(folded[n * row_size + k], vtts::DType::kBFloat16);
      total += static_cast<double>(value) * how.mean[k / (row_size / 3)];
    }
    check(std::abs(total) < 1e-6, "the bias undoes the mean");
  }
}

}  // namespace

int main() {
  for (const int patch_px : vtts::kPatchSizes) {
    test_bits(patch_px);
    test_folding(patch_px);
  }
  test_refusals();
  test_sixteen_bits();
  std::printf("%s\n", num_failures == 0 ? "all passed" : "failed");
  return num_failures == 0 ? 0 : 1;
}
