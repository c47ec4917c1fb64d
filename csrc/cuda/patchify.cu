// patchify_cuda: bytes in, patch rows out, one launch for all jobs.
//
// Predicted for an H100, not measured: 132 multiprocessors at 1.7 GHz that issue 4 x 32 lanes in 75
// % of their cycles, copies at 3 TB/s. A resized pixel of a pair at scale s = source / target moves
// 6 s^2 bytes in and 12 out as 16-bit rows, 24 as float32; its lane-instructions are
//   s            fetch  along rows  along columns  table, store   sum   time     of copy speed, by
//   row 1, cropped      12          -             35            26     73    3 ps    memory is the
//   bound 1, float32      12        114            102            26    254   12 ps    51 %,
//   float32 85 % 1.5             26        224            123            26    399   19 ps    46 %,
//   67 % 2               45        367            144            26    582   27 ps    44 %, 59 % 1,
//   fixed        12         87             90            26    215   10 ps    60 %,        100 % 2,
//   fixed        45        261            120            26    452   21 ps    57 %,         76 %
// so arithmetic is the bound of what is resized to 16-bit rows: a byte_perm and a multiply-add for
// every tap of every value are most of `along rows`.
//
// A block of 128 threads takes one token at a time; blocks stay and walk through the tokens, so
// that the table (1.5 or 3 KB) is loaded once a block. Shared memory beside the tile of 4.7 or 6.1
// KB and the table: for float32 stages at s = 1 / 1.5 / 2 about 14 / 23 / 34 KB; six blocks of 38
// KB share a multiprocessor of an H100 (227 KB), and 85 registers a thread let six in.
#include <algorithm>

#include "cuda/cuda_ops.h"
#include "cuda/resize.cuh"

namespace vtts {
namespace {

template <typename Shape>
inline constexpr int kTokenBytes = kPatchesPerToken * Shape::kPatchRow;
// Four and more blocks a multiprocessor where half a token's rows at once fit; two in the worst
// case.
constexpr ScratchBudget kBudget = {48 << 10, 48 << 10, 32 << 10};

struct PatchifyArguments {
  DeviceJobs jobs;
  const void* table;
  void* out;
};

// Element: the 16 or 32 bits of a row's value. Values are only looked up, so bits are enough.
template <typename Shape, typename Element>
__global__ void __launch_bounds__(kResizeThreads, 6) patchify_kernel(PatchifyArguments arguments) {
  constexpr int kTokenBytes = vtts::kTokenBytes<Shape>;
  VTTS_DYNAMIC_SHARED(shared);
  uint8_t* const tile = shared;
  auto* const table = reinterpret_cast<Element*>(tile + kTokenBytes);
  uint8_t* const scratch = tile + kTokenBytes + kChannels * 256 * sizeof(Element);
  for (int i = threadIdx.x; i < kChannels * 256; i += kResizeThreads) {
    table[i] = static_cast<const Element*>(arguments.table)[i];
  }
  const DeviceJobs& jobs = arguments.jobs;
  resize_tokens<Shape, kResizeThreads>(
      jobs, blockIdx.x, jobs.num_tokens, gridDim.x, scratch, Shape::kPatchRow,
      [tile](uint32_t) { return tile; },
      [&](uint32_t token) {
        // The four rows of a token are neighbours: 16 bytes a thread, all of one channel.
        constexpr int kValues = 16 / sizeof(Element);
        constexpr int kPerChannel = Shape::kPatchRow / kChannels / kValues;
        const int64_t place = jobs.places == nullptr ? int64_t{token} : __ldg(jobs.places + token);
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

}  // namespace

int64_t patchify_cuda_workspace_bytes(const PatchifyJob* jobs, size_t num_jobs,
                                      const PatchifyOptions& options) {
  return blob_bytes("patchify", jobs, num_jobs, options.patch_px);
}

void patchify_cuda(const PatchifyJob* jobs, size_t num_jobs, const PatchifyOptions& options,
                   const int32_t* places, void* workspace, int64_t workspace_bytes, void* out,
                   DType out_type, void* stream) {
  if (num_jobs == 0) return;
  validate_call("patchify", jobs, num_jobs, options.patch_px, workspace, workspace_bytes, out);
  const Plan plan = make_plan(jobs, num_jobs, options, out_type, kBudget, workspace);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  send("patchify", plan.blob, workspace, cuda_stream);
  const PatchifyArguments arguments = {
      {plan.jobs, plan.num_jobs, plan.stage_offset_bytes, plan.num_tokens, places},
      plan.table,
      out};
  with_patch(options.patch_px, [&](auto shape) {
    using Shape = decltype(shape);
    const auto kernel = out_type == DType::kFloat32 ? patchify_kernel<Shape, uint32_t>
                                                    : patchify_kernel<Shape, uint16_t>;
    const int shared_bytes =
        static_cast<int>(kTokenBytes<Shape> + kChannels * 256 * bytes_of(out_type)) +
        plan.scratch_bytes;
    const int64_t num_blocks =
        std::min(plan.num_tokens, blocks_at_once("patchify", kernel, kResizeThreads, shared_bytes));
    launch("patchify", kernel, num_blocks, kResizeThreads, shared_bytes, arguments, cuda_stream);
  });
}

}  // namespace vtts
