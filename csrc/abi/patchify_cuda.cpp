// patchify and patch_embed on a GPU. A build without CUDA checks the same arguments and then says
// that it has none.
#include "abi/guard.h"
#include "abi/jobs.h"
#include "abi/structs.h"
#include "cuda/cuda_ops.h"
#include "vtts/patchify.h"

namespace vtts::abi {
namespace {

#ifdef VTTS_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

constexpr uintptr_t kDeviceAlignment = 16;  // device memory is read and written in vectors

vtts_cuda_launch read_launch(const vtts_cuda_launch* launch, const void* out, const Jobs& jobs,
                             const char* what) {
  const vtts_cuda_launch given = read_struct(launch, vtts_cuda_launch_default(), what, "launch");
  require_aligned(given.places, alignof(int32_t), what, "launch.places");
  require(given.workspace_bytes >= 0, what, "launch.workspace_bytes", ">= 0",
          given.workspace_bytes);
  require_aligned(given.workspace, kDeviceAlignment, what, "launch.workspace");
  require_aligned(out, kDeviceAlignment, what, "out");
  if (!jobs.empty()) {
    require_pointer(given.workspace, what, "launch.workspace");
    require_pointer(out, what, "out");
  }
  return given;
}

PatchEmbedCudaArgs read_folded(const vtts_patch_embed_folded* folded, vtts_dtype dtype,
                               const char* what) {
  const vtts_patch_embed_folded given =
      read_struct(folded, vtts_patch_embed_folded_default(), what, "folded");
  require_pointer(given.weight, what, "folded.weight");
  require_aligned(given.weight, kDeviceAlignment, what, "folded.weight");
  require_pointer(given.bias, what, "folded.bias");
  require_aligned(given.bias, kDeviceAlignment, what, "folded.bias");
  require(given.num_outputs >= 8 && given.num_outputs <= 65536 && given.num_outputs % 8 == 0, what,
          "folded.num_outputs", "a multiple of 8 in [8, 65536]", given.num_outputs);
  PatchEmbedCudaArgs args;
  args.weight = given.weight;
  args.bias = given.bias;
  args.num_outputs = given.num_outputs;
  args.type = read_dtype(dtype, what);
  return args;
}

// Runs `body`; in a build without CUDA it only checks, and what it would have done is refused.
template <typename Body>
vtts_status guard_cuda(const char* what, Body&& body) noexcept {
  return guard(
      [&] {
        body();
        if (kWithCuda) return;
        throw Unsupported(std::string(what) +
                          ": this libvtts was built without CUDA; build vtts_rt with "
                          "VTTS_RT_BUILD=cuda where nvcc is");
      },
      VTTS_ERROR_CUDA);
}

}  // namespace
}  // namespace vtts::abi

// What calls CUDA, and its names, vanish from a build without it.
#ifdef VTTS_WITH_CUDA
#define VTTS_CUDA(call) call
#else
#define VTTS_CUDA(call) (void)0
#endif

using namespace vtts::abi;

extern "C" {

vtts_cuda_launch vtts_cuda_launch_default(void) {
  vtts_cuda_launch launch = {};
  launch.struct_size = sizeof launch;
  return launch;
}

vtts_patch_embed_folded vtts_patch_embed_folded_default(void) {
  vtts_patch_embed_folded folded = {};
  folded.struct_size = sizeof folded;
  return folded;
}

vtts_status vtts_patchify_cuda_workspace_bytes(const vtts_patchify_job* jobs, int64_t num_jobs,
                                               const vtts_patchify_options* options,
                                               int64_t* num_bytes) {
  const char* what = "patchify_cuda_workspace_bytes";
  return guard_cuda(what, [&] {
    require_pointer(num_bytes, what, "num_bytes");
    const vtts::PatchifyOptions how = read_options(options, false, what);
    const Jobs native = read_jobs(jobs, num_jobs, how.patch_px, what);
    VTTS_CUDA(*num_bytes = vtts::patchify_cuda_workspace_bytes(native.data(), native.size(), how));
  });
}

vtts_status vtts_patchify_cuda(const vtts_patchify_job* jobs, int64_t num_jobs,
                               const vtts_patchify_options* options, const vtts_cuda_launch* launch,
                               void* out) {
  const char* what = "patchify_cuda";
  return guard_cuda(what, [&] {
    const vtts::PatchifyOptions how = read_options(options, false, what);
    const Jobs native = read_jobs(jobs, num_jobs, how.patch_px, what);
    const vtts_cuda_launch given = read_launch(launch, out, native, what);
    [[maybe_unused]] const vtts::DType type = read_dtype(given.dtype, what);
    if (native.empty()) return;
    VTTS_CUDA(vtts::patchify_cuda(native.data(), native.size(), how, given.places, given.workspace,
                                  given.workspace_bytes, out, type, given.cuda_stream));
  });
}

vtts_status vtts_patch_embed_cuda_workspace_bytes(const vtts_patchify_job* jobs, int64_t num_jobs,
                                                  const vtts_patchify_options* options,
                                                  const vtts_patch_embed_folded* folded,
                                                  vtts_dtype dtype, int64_t* num_bytes) {
  const char* what = "patch_embed_cuda_workspace_bytes";
  return guard_cuda(what, [&] {
    require_pointer(num_bytes, what, "num_bytes");
    const vtts::PatchifyOptions how = read_options(options, false, what);
    const Jobs native = read_jobs(jobs, num_jobs, how.patch_px, what);
    [[maybe_unused]] const vtts::PatchEmbedCudaArgs args = read_folded(folded, dtype, what);
    VTTS_CUDA(*num_bytes =
                  vtts::patch_embed_cuda_workspace_bytes(native.data(), native.size(), how, args));
  });
}

vtts_status vtts_patch_embed_cuda(const vtts_patchify_job* jobs, int64_t num_jobs,
                                  const vtts_patchify_options* options,
                                  const vtts_patch_embed_folded* folded,
                                  const vtts_cuda_launch* launch, void* out) {
  const char* what = "patch_embed_cuda";
  return guard_cuda(what, [&] {
    const vtts::PatchifyOptions how = read_options(options, false, what);
    const Jobs native = read_jobs(jobs, num_jobs, how.patch_px, what);
    const vtts_cuda_launch given = read_launch(launch, out, native, what);
    [[maybe_unused]] const vtts::PatchEmbedCudaArgs args = read_folded(folded, given.dtype, what);
    if (native.empty()) return;
    VTTS_CUDA(vtts::patch_embed_cuda(native.data(), native.size(), how, args, given.places,
                                     given.workspace, given.workspace_bytes, out,
                                     given.cuda_stream));
  });
}

}  // extern "C"
