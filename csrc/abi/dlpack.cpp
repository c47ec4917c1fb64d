// DLPack in and out.
#include "vtts/dlpack.h"

#include <memory>
#include <string>

#include "abi/guard.h"
#include "abi/jobs.h"

namespace vtts::abi {
namespace {

// A tensor that the library owns: the rows, and what its DLTensor points to.
struct Owned {
  DLManagedTensorVersioned tensor = {};
  int64_t shape[2] = {};
  int64_t strides[2] = {};
  std::unique_ptr<float[]> rows;
};

void delete_owned(DLManagedTensorVersioned* tensor) {
  if (tensor != nullptr) delete static_cast<Owned*>(tensor->manager_ctx);
}

vtts_device device_of(const DLTensor& tensor, const char* what) {
  const int32_t type = number_of(tensor.device.device_type);
  if (type == kDLCPU || type == kDLCUDAHost) return VTTS_DEVICE_CPU;
  if (type == kDLCUDA || type == kDLCUDAManaged) return VTTS_DEVICE_CUDA;
  reject(what, "tensor", "on a CPU or a CUDA device", "device type " + std::to_string(type));
}

void check_tensor(const DLTensor* tensor, int32_t ndim, const char* what) {
  require_pointer(tensor, what, "tensor");
  require_aligned(tensor, alignof(DLTensor), what, "tensor");
  require(tensor->ndim == ndim, what, "tensor.ndim", ndim == 3 ? "3" : "2", tensor->ndim);
  require_pointer(tensor->shape, what, "tensor.shape");
  require(tensor->dtype.lanes == 1, what, "tensor.dtype.lanes", "1", tensor->dtype.lanes);
}

unsigned char* data_of(const DLTensor& tensor, const char* what) {
  require_pointer(tensor.data, what, "tensor.data");
  return static_cast<unsigned char*>(tensor.data) + tensor.byte_offset;
}

std::string shape_text(const DLTensor& tensor) {
  std::string text = "(";
  for (int32_t i = 0; i < tensor.ndim; ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(tensor.shape[i]);
  }
  return text + ")";
}

[[noreturn]] void reject_type(const DLTensor& tensor, const char* rule, const char* what) {
  reject(what, "tensor.dtype", rule,
         "code " + std::to_string(tensor.dtype.code) + " of " + std::to_string(tensor.dtype.bits) +
             " bits");
}

vtts_frame read_frame(const DLTensor* tensor, const char* what) {
  check_tensor(tensor, 3, what);
  if (tensor->dtype.code != kDLUInt || tensor->dtype.bits != 8) reject_type(*tensor, "uint8", what);
  const int64_t height = tensor->shape[0], width = tensor->shape[1];
  constexpr int64_t kMaxSide = int64_t{1} << 20;
  if (height < 1 || height > kMaxSide || width < 1 || width > kMaxSide ||
      tensor->shape[2] != kChannels) {
    reject(what, "tensor", "(H, W, 3) with 1 to 2^20 px a side", shape_text(*tensor));
  }
  int64_t row_stride = width * kChannels;
  if (const int64_t* strides = tensor->strides; strides != nullptr) {
    // The stride of a side of one says nothing.
    const bool packed = strides[2] == 1 && (width == 1 || strides[1] == kChannels);
    require(packed, what, "tensor", "of packed pixels, strides (any, 3, 1)", strides[1]);
    if (height > 1) row_stride = strides[0];
  }
  return {data_of(*tensor, what), row_stride, height, width};
}

vtts_dtype read_type(const DLTensor& tensor, const char* what) {
  const DLDataType& type = tensor.dtype;
  if (type.code == kDLFloat && type.bits == 32) return VTTS_FLOAT32;
  if (type.code == kDLFloat && type.bits == 16) return VTTS_FLOAT16;
  if (type.code == kDLBfloat && type.bits == 16) return VTTS_BFLOAT16;
  reject_type(tensor, "float32, float16 or bfloat16", what);
}

}  // namespace
}  // namespace vtts::abi

using namespace vtts::abi;

extern "C" {

vtts_status vtts_frame_from_dlpack(const DLTensor* tensor, vtts_frame* frame, vtts_device* device) {
  return guard([&] {
    const char* what = "frame_from_dlpack";
    require_pointer(frame, what, "frame");
    const vtts_frame view = read_frame(tensor, what);
    const vtts_device where = device_of(*tensor, what);
    *frame = view;
    if (device != nullptr) *device = where;
  });
}

vtts_status vtts_output_from_dlpack(const DLTensor* tensor, int64_t num_rows, int64_t num_columns,
                                    vtts_device device, void** data, vtts_dtype* dtype) {
  return guard([&] {
    const char* what = "output_from_dlpack";
    require_pointer(data, what, "data");
    require_pointer(dtype, what, "dtype");
    check_tensor(tensor, 2, what);
    const vtts_dtype type = read_type(*tensor, what);
    if (tensor->shape[0] != num_rows || tensor->shape[1] != num_columns) {
      reject(what, "tensor",
             "(" + std::to_string(num_rows) + ", " + std::to_string(num_columns) + ")",
             shape_text(*tensor));
    }
    if (const int64_t* strides = tensor->strides; strides != nullptr) {
      const bool packed =
          (num_columns <= 1 || strides[1] == 1) && (num_rows <= 1 || strides[0] == num_columns);
      require(packed, what, "tensor", "contiguous", strides[0]);
    }
    const int32_t wanted = number_of(device);
    require(device_of(*tensor, what) == wanted, what, "tensor",
            wanted == VTTS_DEVICE_CUDA ? "on a CUDA device" : "on the CPU",
            number_of(tensor->device.device_type));
    void* const memory = num_rows == 0 ? nullptr : data_of(*tensor, what);
    require_aligned(memory, type == VTTS_FLOAT32 ? 4 : 2, what, "tensor.data");
    *data = memory;
    *dtype = type;
  });
}

vtts_status vtts_patchify_cpu_dlpack(const vtts_patchify_job* jobs, int64_t num_jobs,
                                     const vtts_patchify_options* options,
                                     DLManagedTensorVersioned** tensor) {
  return guard([&] {
    const char* what = "patchify_cpu_dlpack";
    require_pointer(tensor, what, "tensor");
    const vtts::PatchifyOptions how = read_options(options, true, what);
    const Jobs native = read_jobs(jobs, num_jobs, how.patch_px, what);
    const int row_size = vtts::patch_row(how.patch_px);
    auto owned = std::make_unique<Owned>();
    const auto num_floats = static_cast<size_t>(native.num_rows) * row_size;
    owned->rows.reset(new float[num_floats]);
    vtts::patchify(native.data(), native.size(), how, owned->rows.get());
    owned->shape[0] = native.num_rows;
    owned->shape[1] = owned->strides[0] = row_size;
    owned->strides[1] = 1;
    DLManagedTensorVersioned& result = owned->tensor;
    result.version = {1, 0};
    result.manager_ctx = owned.get();
    result.deleter = delete_owned;
    DLTensor& shown = result.dl_tensor;
    shown.data = owned->rows.get();
    shown.device = {kDLCPU, 0};
    shown.ndim = 2;
    shown.dtype = {kDLFloat, 32, 1};
    shown.shape = owned->shape;
    shown.strides = owned->strides;
    *tensor = &owned.release()->tensor;
  });
}

}  // extern "C"
