// The core without Python: what it refuses, and that every way to compute gives the same bits.
#include "core/patchify.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/filter.h"
#include "core/parallel.h"
#include "tests/check.h"

namespace {

using testing::check;
using testing::check_refused;
using testing::num_failures;

const vtts::Isa kVectorIsas[] = {vtts::Isa::kAvx2, vtts::Isa::kAvx512, vtts::Isa::kNeon};

struct Image {
  std::vector<uint8_t> bytes;
  vtts::FrameView view;

  // Rows end in a few bytes of padding.
  Image(int height, int width, std::mt19937& random) {
    const int stride = width * vtts::kChannels + static_cast<int>(random() % 9);
    bytes.resize(static_cast<size_t>(stride) * height);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    view = {bytes.data(), stride, height, width};
  }
};

vtts::PatchifyOptions options(vtts::Isa isa, int num_threads, int patch_px = 14) {
  vtts::PatchifyOptions result;
  result.isa = isa;
  result.num_threads = num_threads;
  result.patch_px = patch_px;
  const float mean[] = {122.77f, 116.75f, 104.09f}, std[] = {68.5f, 66.63f, 70.32f};
  std::copy(mean, mean + 3, result.mean);
  std::copy(std, std + 3, result.std);
  return result;
}

std::vector<float> run(const std::vector<vtts::PatchifyJob>& jobs,
                       const vtts::PatchifyOptions& how) {
  int64_t num_rows = 0;
  for (const vtts::PatchifyJob& job : jobs) num_rows += vtts::num_patch_rows(job, how.patch_px);
  constexpr size_t kGuard = 16;
  const float untouched = 12345.0f;
  const auto row_size = static_cast<size_t>(vtts::patch_row(how.patch_px));
  std::vector<float> out(static_cast<size_t>(num_rows) * row_size + kGuard, untouched);
  vtts::patchify(jobs.data(), jobs.size(), how, out.data());
  check(std::all_of(out.end() - kGuard, out.end(), [&](float x) { return x == untouched; }),
        "nothing is written behind the rows");
  out.resize(out.size() - kGuard);
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void test_refusals() {
  std::mt19937 random(1);
  const Image image(40, 50, random);
  const auto job = [&](vtts::PixelBox box, int height, int width) {
    return vtts::PatchifyJob{image.view, image.view, box, height, width, vtts::Resize::kFixed};
  };
  const vtts::PatchifyOptions usual = options(vtts::Isa::kAuto, 1);
  const auto refuse = [&](const std::string& message, const vtts::PatchifyJob& bad,
                          const vtts::PatchifyOptions& how) {
    float out = 0.0f;
    check_refused(message, [&] { vtts::patchify(&bad, 1, how, &out); });
    check(out == 0.0f, "nothing is written by a refused call");
  };
  refuse("box must be non-empty and inside the frame", job({0, 0, 51, 40}, 28, 28), usual);
  refuse("box must be non-empty and inside the frame", job({0, -1, 50, 40}, 28, 28), usual);
  refuse("got x (9, 9), y (0, 40)", job({9, 0, 9, 40}, 28, 28), usual);
  refuse("resized_hw must be positive multiples of 28", job({0, 0, 50, 40}, 28, 29), usual);
  refuse("resized_hw must be positive multiples of 28", job({0, 0, 50, 40}, -28, 28), usual);
  refuse("resized_hw must be positive multiples of 32 px, got (28, 56)",
         job({0, 0, 50, 40}, 28, 56), options(vtts::Isa::kAuto, 1, 16));
  for (const int patch_px : {0, 15, 28}) {
    refuse("patch_px must be 14 or 16, got " + std::to_string(patch_px),
           job({0, 0, 50, 40}, 28, 28), options(vtts::Isa::kAuto, 1, patch_px));
  }
  vtts::PatchifyJob null = job({0, 0, 50, 40}, 28, 28);
  null.frame_b.data = nullptr;
  refuse("frame_b must be a frame, got a null pointer", null, usual);
  vtts::PatchifyJob huge = job({0, 0, 50, 40}, 28, 28);
  huge.frame_a.width = std::numeric_limits<int32_t>::max();
  refuse("frame_a must be 1 to 1048576 px", huge, usual);
  refuse("num_threads must be >= 1", job({0, 0, 50, 40}, 28, 28), options(vtts::Isa::kAuto, 0));
  vtts::patchify(nullptr, 0, usual, nullptr);  // no jobs, nothing to do
}

void test_every_way_gives_the_same_bits() {
  std::mt19937 random(2);
  const auto below = [&](int limit) { return static_cast<int>(random() % limit); };
  for (int round = 0; round < 90; ++round) {
    std::vector<Image> images;
    std::vector<vtts::PatchifyJob> jobs;
    const int patch_px = round % 2 == 0 ? 14 : 16, side = vtts::token_px(patch_px);
    images.reserve(8);
    for (int i = 0; i <= below(3); ++i) {
      const int height = 1 + below(below(5) == 0 ? 900 : 150), width = 1 + below(150);
      images.emplace_back(height, width, random);
      const vtts::FrameView a = images.back().view;
      images.emplace_back(height, width, random);
      const vtts::FrameView b = below(3) == 0 ? a : images.back().view;
      const int x0 = below(width), y0 = below(height);
      const vtts::PixelBox box = {x0, y0, x0 + 1 + below(width - x0), y0 + 1 + below(height - y0)};
      const vtts::Resize kernels[] = {vtts::Resize::kFixed, vtts::Resize::kFloat,
                                      vtts::Resize::kPil};
      jobs.push_back({a, b, box, side * (1 + below(4)), side * (1 + below(4)), kernels[below(3)]});
    }
    const auto expected = run(jobs, options(vtts::Isa::kScalar, 1, patch_px));
    check(same_bits(run(jobs, options(vtts::Isa::kScalar, 3, patch_px)), expected),
          "scalar, three threads");
    for (const vtts::Isa isa : kVectorIsas) {
      if (!vtts::isa_supported(isa)) continue;
      for (const int num_threads : {1, 4}) {
        check(same_bits(run(jobs, options(isa, num_threads, patch_px)), expected),
              std::string(vtts::isa_name(isa)) + ", " + std::to_string(num_threads) +
                  " threads, round " + std::to_string(round));
      }
    }
  }
}

void test_row_order_without_resize(int patch_px) {
  // 2 x 3 tokens that spell their own position: red is x, green is y.
  const int p = patch_px, height = 4 * p, width = 6 * p;
  std::vector<uint8_t> bytes;
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      bytes.insert(bytes.end(), {static_cast<uint8_t>(x), static_cast<uint8_t>(y), 0});
    }
  }
  vtts::PatchifyOptions how;
  how.patch_px = p;
  std::fill(how.std, how.std + 3, 1.0f);
  const vtts::FrameView frame = {bytes.data(), width * 3, height, width};
  const auto rows =
      run({{frame, frame, {0, 0, width, height}, height, width, vtts::Resize::kFixed}}, how);
  // Token (1, 2), its upper right patch, which starts at y 2 p, x 5 p.
  const float* row = rows.data() + (4 * (1 * 3 + 2) + 1) * vtts::patch_row(p);
  const float x = 5.0f * p, y = 2.0f * p;
  check(row[0] == x && row[p - 1] == x + p - 1, "red runs along x");
  check(row[p * p] == x, "the second frame follows the first inside a channel");
  check(row[2 * p * p] == y && row[2 * p * p + p] == y + 1, "green runs along y");
  check(row[4 * p * p] == 0.0f, "blue comes last");
}

void test_taps() {
  for (const auto& [source, target] :
       {std::pair{1, 28}, {7, 28}, {28, 28}, {720, 560}, {9999, 28}}) {
    const auto fixed = vtts::fixed_point_taps(source, target);
    const auto pil = vtts::pil_taps(source, target);
    const auto real = vtts::float_taps(source, target);
    for (int i = 0; i < target; ++i) {
      float total = 0.0f;
      int32_t fixed_total = 0, pil_total = 0;
      for (int k = 0; k < real.stride; ++k) total += real.weights_of(i)[k];
      for (int k = 0; k < fixed.stride; ++k) fixed_total += fixed.weights_of(i)[k];
      for (int k = 0; k < pil.stride; ++k) pil_total += pil.weights_of(i)[k];
      check(std::abs(total - 1.0f) < 1e-5f, "weights sum to one");
      check(std::abs(fixed_total - (1 << fixed.precision)) <= fixed.counts[i],
            "fixed-point weights sum to one up to their rounding");
      check(std::abs(pil_total - (1 << 22)) <= pil.counts[i] && pil.precision == 22,
            "PIL's weights sum to one up to their rounding");
      check(fixed.starts[i] >= 0 && fixed.counts[i] >= 1 &&
                fixed.starts[i] + fixed.counts[i] <= source,
            "taps stay inside the source");
    }
  }
}

void test_parallel_for() {
  std::vector<int> visits(100, 0);
  vtts::parallel_for(visits.size(), 4, [&](int, size_t i) { ++visits[i]; });
  check(std::count(visits.begin(), visits.end(), 1) == 100, "every task runs once");
  check_refused("from a task", [] {
    vtts::parallel_for(8, 3, [](int, size_t i) {
      if (i == 5) throw std::invalid_argument("from a task");
    });
  });
}

}  // namespace

int main() {
  test_refusals();
  test_taps();
  for (const int patch_px : vtts::kPatchSizes) test_row_order_without_resize(patch_px);
  test_every_way_gives_the_same_bits();
  test_parallel_for();
  std::printf("%s (best: %s)\n", num_failures == 0 ? "all passed" : "failed",
              vtts::isa_name(vtts::resolve_isa("test", vtts::Isa::kAuto)));
  return num_failures == 0 ? 0 : 1;
}
