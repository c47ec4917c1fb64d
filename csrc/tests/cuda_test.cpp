// The CUDA kernels, run on the host by cuda_emulation.h, against the core.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/low_precision.h"
#include "cuda/cuda_ops.h"
#include "tests/check.h"
#include "tests/cuda_emulation.h"

namespace {

using vtts::DType;
using vtts::PatchifyJob;
using vtts::Resize;

using testing::check;
using testing::check_refused;
using testing::num_failures;

vtts::PatchifyOptions options(int patch_px) {
  vtts::PatchifyOptions result;
  result.patch_px = patch_px;
  result.isa = vtts::Isa::kScalar;
  const float mean[] = {122.77f, 116.75f, 104.09f}, std[] = {68.5f, 66.63f, 70.32f};
  std::copy(mean, mean + 3, result.mean);
  std::copy(std, std + 3, result.std);
  return result;
}

// Device memory: 16-byte aligned, poisoned (NaN in every type), with nothing of ours behind it.
class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes), all_(new uint8_t[bytes + 2 * kCanary + 16]) {
    std::memset(all_.get(), 0xff, static_cast<size_t>(bytes + 2 * kCanary + 16));
    const auto address = reinterpret_cast<uintptr_t>(all_.get()) + kCanary;
    data_ = all_.get() + kCanary + (16 - address % 16) % 16;
  }
  void* data() { return data_; }
  int64_t bytes() const { return bytes_; }
  bool canaries_live() const {
    const auto live = [](uint8_t byte) { return byte == 0xff; };
    return std::all_of(data_ - kCanary, data_, live) &&
           std::all_of(data_ + bytes_, data_ + bytes_ + kCanary, live);
  }
  double number(int64_t index, DType type) const {
    if (type == DType::kFloat32) {
      float value;
      std::memcpy(&value, data_ + 4 * index, 4);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, data_ + 2 * index, 2);
    return vtts::from_16_bits(bits, type);
  }

 private:
  static constexpr int64_t kCanary = 64;
  int64_t bytes_;
  std::unique_ptr<uint8_t[]> all_;
  uint8_t* data_;
};

// A frame in memory of exactly its size, which a sanitizer watches; rows up or down.
class Image {
 public:
  Image(int height, int width, std::mt19937& random) {
    const int gap = static_cast<int>(random() % 40), row = width * vtts::kChannels;
    const int64_t stride = row + gap;
    bytes_.resize(static_cast<size_t>(stride) * (height - 1) + row);
    for (uint8_t& byte : bytes_) {
      byte = static_cast<uint8_t>(random() % 3 == 0 ? random() % 2 * 255 : random());
    }
    view_ = {bytes_.data(), stride, height, width};
    if (random() % 4 == 0) {
      view_.data += stride * (height - 1);
      view_.row_stride_bytes = -stride;
    }
  }
  const vtts::FrameView& view() const { return view_; }

 private:
  std::vector<uint8_t> bytes_;
  vtts::FrameView view_;
};

constexpr Resize kKernels[] = {Resize::kFixed, Resize::kFloat, Resize::kPil};

// Jobs over images of their own, each with a resize kernel of its own.
struct Batch {
  std::vector<std::unique_ptr<Image>> images;
  std::vector<PatchifyJob> jobs;
  std::mt19937& random;
  const int patch_px, side, row_size;

  Batch(std::mt19937& random, int patch_px)
      : random(random),
        patch_px(patch_px),
        side(vtts::token_px(patch_px)),
        row_size(vtts::patch_row(patch_px)) {}

  int below(int limit) { return static_cast<int>(random() % limit); }
  vtts::FrameView image(int height, int width) {
    images.push_back(std::make_unique<Image>(height, width, random));
    return images.back()->view();
  }
  void add(int height, int width, vtts::PixelBox box, int target_height, int target_width) {
    const vtts::FrameView a = image(height, width);
    const vtts::FrameView b = below(4) == 0 ? a : image(height, width);
    jobs.push_back({a, b, box, target_height, target_width, kKernels[below(3)]});
  }
  void add_whole(int height, int width, int target_height, int target_width) {
    add(height, width, {0, 0, width, height}, target_height, target_width);
  }
  void add_random() {
    const int target_height = side * (1 + below(3)), target_width = side * (1 + below(3));
    if (below(5) == 0) {  // a crop of the size wanted
      const int x = below(9), y = below(9);
      add(target_height + y + below(5), target_width + x + below(5),
          {x, y, x + target_width, y + target_height}, target_height, target_width);
      return;
    }
    const int height = 1 + below(220), width = 1 + below(220), x = below(width), y = below(height);
    add(height, width, {x, y, x + 1 + below(width - x), y + 1 + below(height - y)}, target_height,
        target_width);
  }
  Batch& with(Resize resize) {
    for (PatchifyJob& job : jobs) job.resize = resize;
    return *this;
  }
  int64_t num_rows() const {
    int64_t num = 0;
    for (const PatchifyJob& job : jobs) num += vtts::num_patch_rows(job, patch_px);
    return num;
  }
};

std::vector<float> core_rows(const Batch& batch) {
  std::vector<float> rows(static_cast<size_t>(batch.num_rows()) * batch.row_size);
  vtts::patchify(batch.jobs.data(), batch.jobs.size(), options(batch.patch_px), rows.data());
  return rows;
}

std::vector<int32_t> random_places(const Batch& batch) {
  std::vector<int32_t> places(static_cast<size_t>(batch.num_rows() / 4));
  std::iota(places.begin(), places.end(), 0);
  std::shuffle(places.begin(), places.end(), batch.random);
  return places;
}

void check_patchify(const Batch& batch, const std::string& what) {
  const std::vector<float> expected = core_rows(batch);
  const std::vector<int32_t> places = random_places(batch);
  for (const DType type : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const bool placed = batch.random() % 2 == 0;
    const auto how = options(batch.patch_px);
    Memory out(batch.num_rows() * batch.row_size * vtts::bytes_of(type));
    Memory workspace(
        vtts::patchify_cuda_workspace_bytes(batch.jobs.data(), batch.jobs.size(), how));
    const int launches = vtts::emulation::num_launches;
    vtts::patchify_cuda(batch.jobs.data(), batch.jobs.size(), how, placed ? places.data() : nullptr,
                        workspace.data(), workspace.bytes(), out.data(), type, nullptr);
    check(vtts::emulation::num_launches == launches + 1, what + ": one launch");
    check(out.canaries_live() && workspace.canaries_live(), what + ": stays inside its memory");
    int64_t num_wrong = 0;
    for (int64_t i = 0; i < static_cast<int64_t>(expected.size()); ++i) {
      const int64_t row = i / batch.row_size, column = i % batch.row_size;
      const int64_t to = placed ? 4 * int64_t{places[row / 4]} + row % 4 : row;
      const int64_t at = to * batch.row_size + column;
      if (type == DType::kFloat32) {
        num_wrong += std::memcmp(static_cast<float*>(out.data()) + at, &expected[i], 4) != 0;
      } else {
        num_wrong += static_cast<uint16_t*>(out.data())[at] != vtts::to_16_bits(expected[i], type);
      }
    }
    check(num_wrong == 0, what + ": " + std::to_string(num_wrong) + " of " +
                              std::to_string(expected.size()) + " values differ");
  }
}

// Whether to run every case: the emulation is slow, and its sanitized build twenty times slower.
bool all_cases(int patch_px) { return patch_px == 14 && std::getenv("VTTS_TEST_BRIEF") == nullptr; }

void test_patchify(int patch_px) {
  std::mt19937 random(5);
  const int side = vtts::token_px(patch_px);
  for (int round = 0; round < (all_cases(patch_px) ? 9 : 3); ++round) {
    Batch batch(random, patch_px);
    for (int i = 0; i <= batch.below(4); ++i) batch.add_random();
    check_patchify(batch, "random batch " + std::to_string(round));
  }
  // Groups of ever fewer rows down to one, then windows beyond shared memory: one axis, the other,
  // both.
  const int sizes[][2] = {{side * 4, side * 3}, {side * 6, side * 5},   {side * 9, side * 7},
                          {side * 14, 200},     {side * 11, side * 10}, {side * 13, side * 12},
                          {1, side * 600},      {side * 150, 5},        {side * 14, side * 15}};
  for (size_t i = 0; i < std::size(sizes); ++i) {
    const auto& [height, width] = sizes[i];
    Batch batch(random, patch_px);
    batch.add_whole(height, width, side, side);
    for (const Resize resize : kKernels) {
      if (!all_cases(patch_px) && (i + static_cast<size_t>(resize)) % 4 != 0) continue;
      check_patchify(batch.with(resize),
                     "downscale of " + std::to_string(height) + " x " + std::to_string(width));
    }
  }
  Batch mixed(random, patch_px);
  mixed.add_whole(side * 14, 200, side, side);
  mixed.add_whole(3, 2, 2 * side, side);
  mixed.add_whole(side, 2 * side, side, 2 * side);
  mixed.add_whole(side * 15, side * 14, side, side);
  check_patchify(mixed, "all kinds in one call");
}

double ulp(double value, DType type) {
  const int bits = type == DType::kFloat32 ? 23 : type == DType::kFloat16 ? 10 : 7;
  return std::ldexp(1.0, std::ilogb(value) - bits);
}

// Errors against float64 are at most twice those of the plain computation in `type` (rows and
// weight rounded to it, sums in float32, the result rounded) plus one step of the largest value.
void check_patch_embed(const Batch& batch, int64_t num_outputs, DType type, bool placed,
                       bool with_bias, const std::string& what) {
  const auto how = options(batch.patch_px);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  std::vector<float> weight(static_cast<size_t>(num_outputs) * batch.row_size),
      bias(static_cast<size_t>(num_outputs), 0.0f);
  for (float& value : weight) value = normal(batch.random);
  if (with_bias) {
    for (float& value : bias) value = normal(batch.random);
  }
  Memory folded(num_outputs * batch.row_size * vtts::bytes_of(type)), folded_bias(num_outputs * 4);
  vtts::fold_patch_embed(weight.data(), with_bias ? bias.data() : nullptr, num_outputs, how, type,
                         folded.data(), static_cast<float*>(folded_bias.data()));
  const vtts::PatchEmbedCudaArgs args = {
      folded.data(), static_cast<const float*>(folded_bias.data()), num_outputs, type};
  const std::vector<int32_t> places = random_places(batch);
  const int64_t num_rows = batch.num_rows();
  Memory out(num_rows * num_outputs * vtts::bytes_of(type));
  Memory workspace(
      vtts::patch_embed_cuda_workspace_bytes(batch.jobs.data(), batch.jobs.size(), how, args));
  vtts::patch_embed_cuda(batch.jobs.data(), batch.jobs.size(), how, args,
                         placed ? places.data() : nullptr, workspace.data(), workspace.bytes(),
                         out.data(), nullptr);
  check(out.canaries_live() && workspace.canaries_live(), what + ": stays inside its memory");

  const std::vector<float> rows = core_rows(batch);
  const auto rounded = [type](float value) {
    return type == DType::kFloat32 ? value
                                   : vtts::from_16_bits(vtts::to_16_bits(value, type), type);
  };
  double error = 0.0, plain_error = 0.0, largest = 0.0;
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t to = placed ? 4 * int64_t{places[r / 4]} + r % 4 : r;
    for (int64_t n = 0; n < num_outputs; ++n) {
      double exact = bias[n];
      float plain = 0.0f;
      for (int64_t k = 0; k < batch.row_size; ++k) {
        const float x = rows[r * batch.row_size + k], w = weight[n * batch.row_size + k];
        exact += static_cast<double>(x) * w;
        plain = std::fma(rounded(x), rounded(w), plain);
      }
      largest = std::max(largest, std::abs(exact));
      plain_error = std::max(plain_error, std::abs(rounded(plain + bias[n]) - exact));
      const double got = out.number(to * num_outputs + n, type);
      // A NaN must not pass for a small error.
      error = std::isnan(got) ? INFINITY : std::max(error, std::abs(got - exact));
    }
  }
  if (std::getenv("VTTS_SHOW_ERRORS") != nullptr) {
    std::printf("%s: error %.3g, plain %.3g, largest %.3g\n", what.c_str(), error, plain_error,
                largest);
  }
  check(error <= 2 * plain_error + ulp(largest, type),
        what + ": error " + std::to_string(error) + ", plain " + std::to_string(plain_error));
}

void test_patch_embed(int patch_px) {
  std::mt19937 random(7);
  const int side = vtts::token_px(patch_px);
  const DType types[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  for (const DType type : types) {
    const std::string what = "patch_embed, type " + std::to_string(static_cast<int>(type));
    for (const Resize resize : kKernels) {
      if (!all_cases(patch_px) && static_cast<int>(resize) != static_cast<int>(type)) continue;
      Batch small(random, patch_px);  // one token of 16, and one tile of outputs, a part of it
      small.add_whole(40, 31, side, side);
      check_patch_embed(small.with(resize), 8, type, false, false, what + ", one token");
    }
    Batch mixed(random,
                patch_px);  // tiles over the borders of jobs; more tiles of outputs than one
    mixed.add_whole(100, 90, side, side * 3);
    mixed.add_whole(side, 2 * side, side, 2 * side);
    mixed.add_whole(side * 30, 9, side, side);
    mixed.add_random();
    mixed.add_whole(50, 60, side * 2, side * 6);  // of every kernel
    check_patch_embed(mixed, 136, type, true, true, what + ", many jobs");
  }
  // The most source rows of one job and the most resized rows of another are one launch's.
  Batch apart(random, patch_px);
  apart.add_whole(side * 11, side * 11, side, side);
  apart.add_whole(side * 2, side * 2, side, side);
  apart.with(Resize::kFixed).jobs[1].resize = Resize::kFloat;
  check_patch_embed(apart, 8, DType::kBFloat16, false, true, "the largest scratch memory");
  if (!all_cases(patch_px)) return;
  // More tiles than blocks: a block's next resize follows upon its product, in the same memory.
  for (const DType type : {DType::kFloat32, DType::kBFloat16}) {
    Batch many(random, patch_px);
    many.add_whole(400, 380, side * 9, side * 16);
    check_patch_embed(many, 16, type, true, true, "nine tiles");
  }
}

void test_refusals() {
  std::mt19937 random(6);
  Batch batch(random, 14);
  batch.add_whole(40, 50, 28, 28);
  auto how = options(14);
  Memory out(4 * batch.row_size * 4), workspace(64 << 10);
  const auto run = [&](const PatchifyJob& job, void* work, int64_t work_bytes, void* to) {
    return [&how, job, work, work_bytes, to] {
      vtts::patchify_cuda(&job, 1, how, nullptr, work, work_bytes, to, DType::kFloat32, nullptr);
    };
  };
  using Refusal = std::invalid_argument;
  const PatchifyJob good = batch.jobs[0];
  PatchifyJob bad = good;
  bad.box.x1 = 51;
  const int launches = vtts::emulation::num_launches;
  const auto shifted = [](Memory& memory) { return static_cast<uint8_t*>(memory.data()) + 4; };
  check_refused<Refusal>("patchify: box must be non-empty and inside",
                         run(bad, workspace.data(), workspace.bytes(), out.data()));
  check_refused<Refusal>("patchify: out must be device memory, got a null pointer",
                         run(good, workspace.data(), workspace.bytes(), nullptr));
  check_refused<Refusal>("patchify: out must be aligned to 16 bytes, got an address 4 bytes",
                         run(good, workspace.data(), workspace.bytes(), shifted(out)));
  check_refused<Refusal>("patchify: workspace must be aligned to 16 bytes",
                         run(good, shifted(workspace), workspace.bytes() - 4, out.data()));
  check_refused<Refusal>("patchify: workspace_bytes must be >= ",
                         run(good, workspace.data(), 100, out.data()));
  how.patch_px = 15;
  check_refused<Refusal>("patchify: patch_px must be 14 or 16, got 15",
                         run(good, workspace.data(), workspace.bytes(), out.data()));
  how.patch_px = 14;
  const PatchifyJob huge = {good.frame_a, good.frame_b, good.box, 28 << 15, 28 << 15};
  const PatchifyJob huge_twice[] = {huge, huge};
  check_refused<Refusal>("patchify: jobs must be of fewer than 2^31 merged tokens",
                         [&] { vtts::patchify_cuda_workspace_bytes(huge_twice, 2, how); });
  check(vtts::emulation::num_launches == launches, "refused before anything is enqueued");
  vtts::patchify_cuda(nullptr, 0, how, nullptr, nullptr, 0, nullptr, DType::kFloat32, nullptr);
  const vtts::PatchEmbedCudaArgs weights[] = {
      {nullptr, static_cast<float*>(out.data()), 8, DType::kBFloat16},
      {out.data(), nullptr, 8, DType::kBFloat16},
      {out.data(), static_cast<float*>(out.data()) + 1, 8, DType::kBFloat16},
      {out.data(), static_cast<float*>(out.data()), 12, DType::kBFloat16}};
  const char* messages[] = {"weight must be device memory", "bias must be device memory",
                            "bias must be aligned to 16 bytes, got an address 4 bytes",
                            "num_outputs must be a multiple of 8 up to 2^20, got 12"};
  for (int i = 0; i < 4; ++i) {
    check_refused<Refusal>(std::string("patch_embed: ") + messages[i], [&] {
      vtts::patch_embed_cuda(&good, 1, how, weights[i], nullptr, workspace.data(),
                             workspace.bytes(), out.data(), nullptr);
    });
  }
  for (const char* call :
       {"cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaMemcpyAsync",
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor", "cudaLaunchKernel"}) {
    vtts::emulation::failing_call = call;
    check_refused<std::runtime_error>("patchify: " + std::string(call) + " failed: ",
                                      run(good, workspace.data(), workspace.bytes(), out.data()));
  }
  vtts::emulation::failing_call = nullptr;
}

}  // namespace

int main() {
  for (const int patch_px : vtts::kPatchSizes) {
    test_patchify(patch_px);
    test_patch_embed(patch_px);
  }
  test_refusals();
  std::printf("%s\n", num_failures == 0 ? "all passed" : "failed");
  return num_failures == 0 ? 0 : 1;
}
