// patchify, patch_embed and DLPack on random structures. They lie over memory of
// exactly the size that they name: what is accepted stays inside, what is refused writes nothing.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "tests/fuzz/fuzz_input.h"
#include "vtts/vtts.h"

using vtts::fuzz::Input;
using vtts::fuzz::promise;

namespace {

constexpr float kUntouched = 12345.0f;

struct Picture {
  std::vector<uint8_t> bytes;
  vtts_frame frame;
};

Picture read_picture(Input& input) {
  Picture picture;
  const int64_t height = 1 + input.below(70), width = 1 + input.below(70);
  const int64_t stride = width * 3 + input.below(5);
  picture.bytes.resize(static_cast<size_t>(stride * (height - 1) + width * 3));
  for (uint8_t& byte : picture.bytes) byte = input.byte();
  picture.frame = {picture.bytes.data(), stride, height, width};
  if (input.one_in(3)) {  // upside down
    picture.frame.data += stride * (height - 1);
    picture.frame.row_stride_bytes = -stride;
  }
  return picture;
}

// Sizes that no frame has: others would misstate the memory, which cannot be checked.
void spoil(vtts_frame& frame, Input& input) {
  constexpr int64_t kImpossible[] = {0, -1, (int64_t{1} << 20) + 1, int64_t{1} << 32, INT64_MIN};
  const int64_t value = kImpossible[input.below(5)];
  switch (input.byte() % 4) {
    case 0:
      frame.height = value;
      break;
    case 1:
      frame.width = value;
      break;
    case 2:
      frame.data = nullptr;
      break;
    default:
      frame.row_stride_bytes = input.one_in(2) ? INT64_MAX : INT64_MIN;
  }
}

// An enumerator of any number.
template <typename Enum>
void number(Enum* target, int64_t value) {
  const auto narrow = static_cast<int32_t>(value);
  std::memcpy(target, &narrow, sizeof narrow);
}

vtts_patchify_job read_job(const Picture& a, const Picture& b, int64_t side, Input& input) {
  vtts_patchify_job job = vtts_patchify_job_default();
  job.frame_a = a.frame;
  job.frame_b = input.one_in(3) ? a.frame : b.frame;
  const int64_t width = std::min(a.frame.width, b.frame.width);
  const int64_t height = std::min(a.frame.height, b.frame.height);
  job.box.x0 = input.below(width);
  job.box.y0 = input.below(height);
  job.box.x1 = job.box.x0 + 1 + input.below(width - job.box.x0);
  job.box.y1 = job.box.y0 + 1 + input.below(height - job.box.y0);
  number(&job.resize, input.below(3));
  if (input.one_in(8)) number(&job.resize, input.integer());
  job.resized_height = side * (1 + input.below(3));
  job.resized_width = side * (1 + input.below(3));
  if (input.one_in(8)) job.box.x1 = input.integer();
  if (input.one_in(8)) job.box.y0 = input.integer();
  if (input.one_in(8)) job.resized_height = input.integer();
  if (input.one_in(8)) spoil(input.one_in(2) ? job.frame_a : job.frame_b, input);
  if (input.one_in(16)) job.struct_size = static_cast<uint32_t>(input.below(sizeof job + 1));
  return job;
}

vtts_patchify_options read_options(Input& input) {
  vtts_patchify_options options = vtts_patchify_options_default();
  if (input.one_in(2)) number(&options.isa, input.below(6));
  options.num_threads = 1 + static_cast<int32_t>(input.below(2));
  if (input.one_in(16)) options.num_threads = static_cast<int32_t>(input.integer());
  options.patch_px = input.one_in(2) ? 14 : 16;
  if (input.one_in(16)) options.patch_px = static_cast<int32_t>(input.integer());
  if (input.one_in(8)) options.std[input.below(3)] = static_cast<float>(input.real());
  return options;
}

bool untouched(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float v) { return v == kUntouched; });
}

void fuzz_patchify(Input& input) {
  const Picture a = read_picture(input), b = read_picture(input);
  const vtts_patchify_options options = read_options(input);
  const int64_t side = options.patch_px == 16 ? 32 : 28;
  std::vector<vtts_patchify_job> jobs;
  for (int64_t i = input.below(3); i >= 0; --i) jobs.push_back(read_job(a, b, side, input));
  const int64_t num_jobs = static_cast<int64_t>(jobs.size());
  int64_t num_rows = 16, row_size = 1176;
  const bool usable =
      vtts_patchify_num_rows(jobs.data(), num_jobs, &options, &num_rows) == VTTS_OK &&
      vtts_patchify_row_size(&options, &row_size) == VTTS_OK;
  if (usable && num_rows > 512) return;
  std::vector<float> out(static_cast<size_t>(num_rows * row_size), kUntouched);
  const vtts_status status = vtts_patchify_cpu(jobs.data(), num_jobs, &options, out.data());
  promise(status == VTTS_OK ? usable : untouched(out));

  constexpr int64_t kOutputs = 5;
  const std::vector<float> weight(static_cast<size_t>(kOutputs * row_size), 0.5f);
  vtts_patch_embed_weights weights = vtts_patch_embed_weights_default();
  weights.weight = weight.data();
  weights.num_outputs = kOutputs;
  std::vector<float> product(static_cast<size_t>(num_rows * kOutputs), kUntouched);
  promise(vtts_patch_embed_cpu(jobs.data(), num_jobs, &options, &weights, product.data()) ==
          status);
  promise(status == VTTS_OK || untouched(product));

  DLManagedTensorVersioned* tensor = nullptr;
  promise(vtts_patchify_cpu_dlpack(jobs.data(), num_jobs, &options, &tensor) == status);
  promise((tensor != nullptr) == (status == VTTS_OK));
  if (tensor == nullptr) return;
  promise(tensor->dl_tensor.shape[0] == num_rows);
  promise(std::memcmp(tensor->dl_tensor.data, out.data(), out.size() * sizeof(float)) == 0);
  tensor->deleter(tensor);
}

void fuzz_dlpack(Input& input) {
  std::vector<uint8_t> memory(static_cast<size_t>(input.below(4096) + 1));
  int64_t shape[3] = {1 + input.below(40), 1 + input.below(40), 3};
  int64_t strides[3] = {shape[1] * 3, 3, 1};
  for (int i = 0; i < 3; ++i) {
    if (input.one_in(8)) shape[i] = input.integer();
    if (input.one_in(8)) strides[i] = input.integer();
  }
  DLTensor tensor = {};
  tensor.data = input.one_in(16) ? nullptr : memory.data();
  const auto type = static_cast<int32_t>(input.one_in(4) ? input.integer() : 1);
  std::memcpy(&tensor.device.device_type, &type, sizeof type);
  tensor.ndim = static_cast<int32_t>(input.one_in(8) ? input.integer() : 3);
  tensor.dtype = {static_cast<uint8_t>(input.one_in(4) ? input.byte() : 1),
                  static_cast<uint8_t>(input.one_in(4) ? input.byte() : 8),
                  static_cast<uint16_t>(input.one_in(8) ? input.byte() : 1)};
  tensor.shape = shape;
  tensor.strides = input.one_in(3) ? nullptr : strides;
  vtts_frame frame = {nullptr, 0, 0, 0};
  const vtts_status status = vtts_frame_from_dlpack(&tensor, &frame, nullptr);
  promise(status == VTTS_OK ? frame.height == shape[0] && frame.width == shape[1]
                            : frame.data == nullptr);
  tensor.ndim = 2;
  tensor.dtype.code = kDLFloat;
  tensor.dtype.bits = input.one_in(2) ? 32 : 16;
  void* data = nullptr;
  vtts_dtype dtype = VTTS_FLOAT32;
  const int64_t rows = input.one_in(2) ? shape[0] : input.integer();
  vtts_output_from_dlpack(&tensor, rows, shape[1], VTTS_DEVICE_CPU, &data, &dtype);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  if (input.byte() % 4 == 0) {
    fuzz_dlpack(input);
  } else {
    fuzz_patchify(input);
  }
  return 0;
}
