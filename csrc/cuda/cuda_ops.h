// patchify and patch_embed on a CUDA device. Plain C++: including this needs no CUDA header.
//
// Everything is enqueued on `stream` (a cudaStream_t; null is the legacy default stream) of the
// current device, nothing waits for it. A call sends one blob of descriptors, taps and table to the
// head of the workspace and launches one kernel for all jobs. The blob leaves from pageable memory:
// the call may be repeated but not captured into a CUDA graph.
//
// Bad arguments throw std::invalid_argument ("patchify: box must be ..., got ...") before anything
// is enqueued, failures of CUDA std::runtime_error naming the call that failed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/low_precision.h"
#include "core/patchify.h"

namespace vtts {

// Bytes of device memory that patchify_cuda needs for these jobs. Throws on bad jobs.
int64_t patchify_cuda_workspace_bytes(const PatchifyJob* jobs, size_t num_jobs,
                                      const PatchifyOptions& options);

// The rows of core patchify, to the bit in float32, rounded to nearest even in the other types.
//   jobs: as for patchify, frame.data being device pointers of any alignment and row stride.
//   options: isa and num_threads are without effect.
//   places: null, or device int32: merged token t, counted over all jobs in the order of patchify,
//     fills rows 4 * places[t] .. + 3 instead of 4 * t .. + 3. A permutation of all tokens; the
//     caller answers for its values, which are not read on the host.
//   workspace: device memory, 16-byte aligned; used until the work enqueued here is done.
//   out: device memory, (rows, values of a row) of out_type, packed, 16-byte aligned.
void patchify_cuda(const PatchifyJob* jobs, size_t num_jobs, const PatchifyOptions& options,
                   const int32_t* places, void* workspace, int64_t workspace_bytes, void* out,
                   DType out_type, void* stream);

// Both from fold_patch_embed, in device memory, 16-byte aligned.
struct PatchEmbedCudaArgs {
  const void* weight = nullptr;  // (num_outputs, values of a row) of `type`, packed
  const float* bias = nullptr;   // (num_outputs)
  int64_t num_outputs = 0;       // a multiple of 8
  DType type = DType::kBFloat16;
};

int64_t patch_embed_cuda_workspace_bytes(const PatchifyJob* jobs, size_t num_jobs,
                                         const PatchifyOptions& options,
                                         const PatchEmbedCudaArgs& args);

// patchify and the product with the patch embedding in one kernel; the rows stay on the chip.
//   options: mean and std are already in weight and bias; only patch_px is read here.
//   out: device memory, (rows, num_outputs) of args.type, packed, 16-byte aligned.
// The rest as for patchify_cuda. Sums run in float32: on tensor cores for 16-bit types, with plain
// fused multiply-adds for float32.
void patch_embed_cuda(const PatchifyJob* jobs, size_t num_jobs, const PatchifyOptions& options,
                      const PatchEmbedCudaArgs& args, const int32_t* places, void* workspace,
                      int64_t workspace_bytes, void* out, void* stream);

}  // namespace vtts
