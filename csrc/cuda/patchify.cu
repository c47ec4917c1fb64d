// patchify_cuda: bytes in, patch rows out, one launch for all jobs.
//
// Memory is the bound. A pair of frames at scale s = source / target moves 6 s^2 bytes in and, in
// 16 bits, 12 out for every resized pixel, and the work (resize.cuh) grows with s alike. Predicted
// for an H100 (132 SMs at 1.7 GHz, 4 x 32 lanes, copies at some 3 TB/s); not measured:
//   s       bytes  copy time   lane-instructions (rows + columns + tables and rest)   at 75 % issue
//   1 crop     18       6 ps   -          + 30 + 45 =  75                              3.5 ps
//   1          18       6 ps   97 + 54    + 75      = 226                              11 ps   57 %
//   1.5      25.5     8.5 ps   192 + 72   + 80      = 344                              16 ps   53 %
//   2          36      12 ps   320 + 90   + 90      = 500                              23 ps   52 %
// in float32 rounding; fixed point halves the first term (dp2a) and stays at the copy's 60 % or
// above. Rows of float32 move 12 bytes more for the same work.
//
// A block of 128 threads takes one token at a time; blocks stay and walk through the tokens, so
// that the table (1.5 or 3 KB) is loaded once a block. Shared memory: tile 4.7 KB, table, and for
// float32 stages at s = 1 / 1.5 / 2: 15 / 25 / 38 KB, that is 9 / 6 / 4 blocks a multiprocessor of
// an H100 (227 KB), and the 8 that 64 registers a thread allow.
#include <algorithm>

#include "cuda/cuda_ops.h"
#include "cuda/resize.cuh"

namespace vtts {
namespace {

constexpr int kTokenBytes = kPatchesPerToken * kPatchRow;
// Four and more blocks a multiprocessor where 14 rows at once fit; two in the worst case.
constexpr ScratchBudget kBudget = {48 << 10, 80 << 10};

struct PatchifyArguments {
  DeviceJobs jobs;
  const void* table;
  void* out;
};

// Element: the 16 or 32 bits of a row's value. Values are only looked up, so bits are enough.
template <typename Numerics, typename Element>
__global__ void __launch_bounds__(kResizeThreads, 6) patchify_kernel(PatchifyArguments arguments) {
  VTTS_DYNAMIC_SHARED(shared);
  uint8_t* const tile = shared;
  auto* const table = reinterpret_cast<Element*>(tile + kTokenBytes);
  uint8_t* const scratch = tile + kTokenBytes + kChannels * 256 * sizeof(Element);
  for (int i = threadIdx.x; i < kChannels * 256; i += kResizeThreads) {
    table[i] = static_cast<const Element*>(arguments.table)[i];
  }
  const DeviceJobs& jobs = arguments.jobs;
  resize_tokens<Numerics, kResizeThreads>(
      jobs, blockIdx.x, jobs.num_tokens, gridDim.x, scratch, kPatchRow,
      [tile](int64_t) { return tile; },
      [&](int64_t token) {
        // The four rows of a token are neighbours: 16 bytes a thread, all of one channel.
        constexpr int kValues = 16 / sizeof(Element);
        constexpr int kPerChannel = kPatchRow / kChannels / kValues;
        const int64_t place = jobs.places == nullptr ? token : jobs.places[token];
        auto* const out =
            reinterpret_cast<uint4*>(static_cast<Element*>(arguments.out) + place * kTokenBytes);
        for (int i = threadIdx.x; i < kTokenBytes / kValues; i += kResizeThreads) {
          const Element* const values = table + i / kPerChannel % kChannels * 256;
          uint32_t words[4];
          if constexpr (kValues == 4) {
            const uint32_t bytes = reinterpret_cast<const uint32_t*>(tile)[i];
            for (int v = 0; v < 4; ++v) words[v] = values[bytes >> (8 * v) & 255];
          } else {
            const uint2 bytes = reinterpret_cast<const uint2*>(tile)[i];
            for (int v = 0; v < 4; ++v) {
              const uint32_t two = (v < 2 ? bytes.x : bytes.y) >> (16 * (v % 2));
              words[v] = values[two & 255] | uint32_t{values[two >> 8 & 255]} << 16;
            }
          }
          out[i] = make_uint4(words[0], words[1], words[2], words[3]);
        }
      });
}

template <typename Numerics>
auto kernel_of(DType type) {
  return type == DType::kFloat32 ? patchify_kernel<Numerics, uint32_t>
                                 : patchify_kernel<Numerics, uint16_t>;
}

}  // namespace

int64_t patchify_cuda_workspace_bytes(const PatchifyJob* jobs, size_t num_jobs,
                                      const PatchifyOptions&) {
  return blob_bytes("patchify", jobs, num_jobs);
}

void patchify_cuda(const PatchifyJob* jobs, size_t num_jobs, const PatchifyOptions& options,
                   const int32_t* places, void* workspace, int64_t workspace_bytes, void* out,
                   DType out_type, void* stream) {
  if (num_jobs == 0) return;
  validate_call("patchify", jobs, num_jobs, workspace, workspace_bytes, out);
  const Plan plan = make_plan(jobs, num_jobs, options, out_type, kBudget, workspace);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  send("patchify", plan.blob, workspace, cuda_stream);
  const PatchifyArguments arguments = {
      {plan.jobs, plan.num_jobs, plan.stage_offset_bytes, plan.num_tokens, places},
      plan.table,
      out};
  const auto kernel = options.rounding == Rounding::kCpu ? kernel_of<DeviceFixedPoint>(out_type)
                                                         : kernel_of<DeviceFloatingPoint>(out_type);
  const int shared_bytes =
      static_cast<int>(kTokenBytes + kChannels * 256 * bytes_of(out_type)) + plan.scratch_bytes;
  const int64_t num_blocks =
      std::min(plan.num_tokens, blocks_at_once("patchify", kernel, kResizeThreads, shared_bytes));
  launch("patchify", kernel, num_blocks, kResizeThreads, shared_bytes, arguments, cuda_stream);
}

}  // namespace vtts
