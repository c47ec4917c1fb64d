/* DLPack 1.x in and out: frames from tensors of other libraries, rows into theirs or as our own.
 *
 * The structures below are those of dlpack.h, version 1, declared here so that nothing else is
 * needed. To use them with the original, include it before vtts.h.
 */
#ifndef VTTS_DLPACK_H_
#define VTTS_DLPACK_H_

#include "vtts/patchify.h"

#ifndef DLPACK_MAJOR_VERSION

#ifdef __cplusplus
extern "C" {
#endif

#define DLPACK_MAJOR_VERSION 1
#define DLPACK_MINOR_VERSION 0

#define DLPACK_FLAG_BITMASK_READ_ONLY (1UL << 0UL)
#define DLPACK_FLAG_BITMASK_IS_COPIED (1UL << 1UL)

typedef struct DLPackVersion {
  uint32_t major, minor;
} DLPackVersion;

typedef enum DLDeviceType {
  kDLCPU = 1,
  kDLCUDA = 2,
  kDLCUDAHost = 3,
  kDLCUDAManaged = 13
} DLDeviceType;

typedef struct DLDevice {
  DLDeviceType device_type;
  int32_t device_id;
} DLDevice;

typedef enum DLDataTypeCode { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4 } DLDataTypeCode;

typedef struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
} DLDataType;

typedef struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides; /* in elements; NULL: contiguous */
  uint64_t byte_offset;
} DLTensor;

typedef struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager_ctx;
  void (*deleter)(struct DLManagedTensorVersioned* self);
  uint64_t flags;
  DLTensor dl_tensor;
} DLManagedTensorVersioned;

#ifdef __cplusplus
}
#endif

#endif /* DLPACK_MAJOR_VERSION */

#ifdef __cplusplus
extern "C" {
#endif

/* A tensor as a frame: uint8 of one lane, (H, W, 3) with packed pixels and any row stride, on
 * kDLCPU, kDLCUDAHost (both VTTS_DEVICE_CPU) or kDLCUDA, kDLCUDAManaged (VTTS_DEVICE_CUDA). Borrows
 * the tensor's memory. device may be NULL where any is fine.
 * VTTS_ERROR_INVALID_ARGUMENT: another type, shape, stride or device. */
VTTS_API vtts_status vtts_frame_from_dlpack(const DLTensor* tensor, vtts_frame* frame,
                                            vtts_device* device);

/* Where a caller's tensor takes an output: contiguous (num_rows, num_columns) float32, float16 or
 * bfloat16 on `device`. Its memory to *data, which is an `out` of the functions in patchify.h, and
 * its type to *dtype. VTTS_ERROR_INVALID_ARGUMENT: another type, shape, stride or device. */
VTTS_API vtts_status vtts_output_from_dlpack(const DLTensor* tensor, int64_t num_rows,
                                             int64_t num_columns, vtts_device device, void** data,
                                             vtts_dtype* dtype);

/* vtts_patchify_cpu into memory of the library: a float32 tensor (rows, 6 p^2) on kDLCPU, to
 * *tensor. The caller, or whom it hands the tensor to, calls tensor->deleter(tensor) once. */
VTTS_API vtts_status vtts_patchify_cpu_dlpack(const vtts_patchify_job* jobs, int64_t num_jobs,
                                              const vtts_patchify_options* options,
                                              DLManagedTensorVersioned** tensor);

#ifdef __cplusplus
}
#endif

#endif /* VTTS_DLPACK_H_ */
