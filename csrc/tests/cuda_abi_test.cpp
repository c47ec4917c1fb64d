// The CUDA half of the C interface, its kernels run on the host by cuda_emulation.h. The same rows
// as on the CPU, in places, and errors before anything is launched.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "vtts/vtts.h"

namespace {

int num_failures = 0;

void check(bool ok, const std::string& what) {
  if (ok) return;
  ++num_failures;
  std::fprintf(stderr, "FAILED: %s (last error: %s)\n", what.c_str(), vtts_last_error_message());
}

// Memory as a device gives it: aligned to 256 bytes, of exactly this size.
template <typename T>
struct DeviceMemory {
  explicit DeviceMemory(size_t num)
      : bytes((num * sizeof(T) + 255) / 256 * 256),
        data(static_cast<T*>(::operator new(bytes, std::align_val_t(256)))) {
    std::memset(data, 0xFF, bytes);  // NaN as floats
  }
  ~DeviceMemory() { ::operator delete(data, std::align_val_t(256)); }
  DeviceMemory(const DeviceMemory&) = delete;
  size_t bytes;
  T* data;
};

struct Scene {
  std::vector<uint8_t> pixels;
  vtts_patchify_job jobs[2];
  vtts_patchify_options options = vtts_patchify_options_default();
  int64_t num_rows = 0, row_size = 0;

  explicit Scene(int32_t patch_px) {
    options.patch_px = patch_px;
    std::mt19937 random(1);
    constexpr int64_t kHeight = 70, kWidth = 91, kStride = 91 * 3 + 5;
    pixels.resize(2 * kHeight * kStride);
    for (uint8_t& pixel : pixels) pixel = static_cast<uint8_t>(random());
    for (vtts_patchify_job& job : jobs) {
      job = vtts_patchify_job_default();
      job.frame_a = {pixels.data(), kStride, kHeight, kWidth};
      job.frame_b = {pixels.data() + kHeight * kStride, kStride, kHeight, kWidth};
      job.box = {3, 2, 83, 66};
      job.resized_height = 4 * patch_px;
      job.resized_width = 2 * patch_px;
    }
    jobs[1].box = {0, 0, 2 * patch_px, 2 * patch_px};
    jobs[1].resized_height = 2 * patch_px;
    check(vtts_patchify_num_rows(jobs, 2, &options, &num_rows) == VTTS_OK, "the scene is usable");
    check(vtts_patchify_row_size(&options, &row_size) == VTTS_OK &&
              row_size == 6 * patch_px * patch_px,
          "the size of a row");
  }
};

void test_rows(Scene scene, vtts_resize resize) {
  const vtts_patchify_options& options = scene.options;
  scene.jobs[0].resize = resize;
  const auto num_floats = static_cast<size_t>(scene.num_rows * scene.row_size);
  std::vector<float> expected(num_floats);
  check(vtts_patchify_cpu(scene.jobs, 2, &options, expected.data()) == VTTS_OK, "rows on the CPU");

  int64_t num_bytes = -1;
  check(vtts_patchify_cuda_workspace_bytes(scene.jobs, 2, &options, &num_bytes) == VTTS_OK &&
            num_bytes > 0,
        "a workspace");
  const DeviceMemory<uint8_t> workspace(static_cast<size_t>(num_bytes));
  const DeviceMemory<float> out(num_floats);
  vtts_cuda_launch launch = vtts_cuda_launch_default();
  launch.workspace = workspace.data;
  launch.workspace_bytes = num_bytes;
  check(vtts_patchify_cuda(scene.jobs, 2, &options, &launch, out.data) == VTTS_OK, "rows");
  check(std::memcmp(out.data, expected.data(), num_floats * sizeof(float)) == 0,
        "with the bits of the CPU");

  const int32_t places[] = {2, 0, 1};
  launch.places = places;
  const DeviceMemory<float> placed(num_floats);
  check(vtts_patchify_cuda(scene.jobs, 2, &options, &launch, placed.data) == VTTS_OK, "places");
  const auto token_size = static_cast<size_t>(4 * scene.row_size);
  for (size_t token = 0; token < 3; ++token) {
    check(std::memcmp(placed.data + static_cast<size_t>(places[token]) * token_size,
                      expected.data() + token * token_size, token_size * sizeof(float)) == 0,
          "token " + std::to_string(token) + " is where its place says");
  }
  launch.workspace_bytes = num_bytes - 1;
  check(
      vtts_patchify_cuda(scene.jobs, 2, &options, &launch, out.data) == VTTS_ERROR_INVALID_ARGUMENT,
      "a workspace that is too small");
  launch.workspace_bytes = num_bytes;
  check(vtts_patchify_cuda(scene.jobs, 2, &options, &launch, out.data + 1) ==
            VTTS_ERROR_INVALID_ARGUMENT,
        "an output that is not aligned");
}

void test_product(const Scene& scene) {
  constexpr int64_t kOutputs = 16;
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> weight(static_cast<size_t>(kOutputs * scene.row_size)), bias(kOutputs);
  for (float& v : weight) v = normal(random) / 32.0f;
  for (float& v : bias) v = normal(random);
  vtts_patch_embed_weights weights = vtts_patch_embed_weights_default();
  weights.weight = weight.data();
  weights.bias = bias.data();
  weights.num_outputs = kOutputs;
  const vtts_patchify_options& options = scene.options;
  const size_t num_values = static_cast<size_t>(scene.num_rows * kOutputs);
  std::vector<float> expected(num_values);
  check(vtts_patch_embed_cpu(scene.jobs, 2, &options, &weights, expected.data()) == VTTS_OK,
        "the product on the CPU");

  const DeviceMemory<float> folded(weight.size()), folded_bias(bias.size());
  check(vtts_patch_embed_fold(&weights, &options, VTTS_FLOAT32, folded.data, folded_bias.data) ==
            VTTS_OK,
        "folding");
  vtts_patch_embed_folded device_weights = vtts_patch_embed_folded_default();
  device_weights.weight = folded.data;
  device_weights.bias = folded_bias.data;
  device_weights.num_outputs = kOutputs;
  int64_t num_bytes = 0;
  check(vtts_patch_embed_cuda_workspace_bytes(scene.jobs, 2, &options, &device_weights,
                                              VTTS_FLOAT32, &num_bytes) == VTTS_OK,
        "its workspace");
  const DeviceMemory<uint8_t> workspace(static_cast<size_t>(num_bytes));
  const DeviceMemory<float> out(num_values);
  vtts_cuda_launch launch = vtts_cuda_launch_default();
  launch.workspace = workspace.data;
  launch.workspace_bytes = num_bytes;
  check(
      vtts_patch_embed_cuda(scene.jobs, 2, &options, &device_weights, &launch, out.data) == VTTS_OK,
      "the product");
  // Another order of sums of over 1,000 products of pixel values up to 255.
  for (size_t i = 0; i < num_values; ++i) {
    check(std::abs(out.data[i] - expected[i]) < 1e-3f, "value " + std::to_string(i));
  }
}

}  // namespace

int main() {
  check(vtts_has_cuda() == 1, "this is a build with CUDA");
  for (const int32_t patch_px : {14, 16}) {
    const Scene scene(patch_px);
    for (const vtts_resize resize : {VTTS_RESIZE_FIXED, VTTS_RESIZE_FLOAT, VTTS_RESIZE_PIL}) {
      test_rows(scene, resize);
    }
    test_product(scene);
  }
  std::printf("%s\n", num_failures == 0 ? "all passed" : "failed");
  return num_failures == 0 ? 0 : 1;
}
