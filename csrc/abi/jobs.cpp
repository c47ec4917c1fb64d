#include "abi/jobs.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "abi/guard.h"
#include "abi/structs.h"

namespace vtts::abi {
namespace {

constexpr int64_t kMaxJobs = int64_t{1} << 24;
constexpr int64_t kMaxRows = int64_t{1} << 40;
constexpr int64_t kMaxStrideBytes = int64_t{1} << 40;  // 2^20 rows of it can still be addressed
constexpr int32_t kMaxThreads = 1024;

// The core's sides are int32; what does not fit is no side of a frame either.
int32_t narrow(int64_t value) {
  constexpr int64_t kLow = std::numeric_limits<int32_t>::min();
  constexpr int64_t kHigh = std::numeric_limits<int32_t>::max();
  return static_cast<int32_t>(std::min(std::max(value, kLow), kHigh));
}

FrameView view(const vtts_frame& frame, const char* what, const std::string& name) {
  const int64_t stride = frame.row_stride_bytes;
  require(stride >= -kMaxStrideBytes && stride <= kMaxStrideBytes, what, name + ".row_stride_bytes",
          "at most 2^40 either way", stride);
  return {frame.data, stride, narrow(frame.height), narrow(frame.width)};
}

}  // namespace

Jobs read_jobs(const vtts_patchify_job* jobs, int64_t num_jobs, int patch_px, const char* what) {
  require(num_jobs >= 0 && num_jobs <= kMaxJobs, what, "num_jobs", "in [0, 2^24]", num_jobs);
  Jobs result;
  if (num_jobs == 0) return result;
  checked_size<vtts_patchify_job>(jobs, what, "jobs");
  result.jobs.reserve(static_cast<size_t>(num_jobs));
  const vtts_patchify_job defaults = vtts_patchify_job_default();
  for (int64_t i = 0; i < num_jobs; ++i) {
    const std::string name = "jobs[" + std::to_string(i) + "]";
    const vtts_patchify_job given = read_element(jobs, i, defaults, what, name);
    PatchifyJob job;
    job.frame_a = view(given.frame_a, what, name + ".frame_a");
    job.frame_b = view(given.frame_b, what, name + ".frame_b");
    job.box = {narrow(given.box.x0), narrow(given.box.y0), narrow(given.box.x1),
               narrow(given.box.y1)};
    job.height = narrow(given.resized_height);
    job.width = narrow(given.resized_width);
    const int32_t resize = number_of(given.resize);
    require(resize >= VTTS_RESIZE_FIXED && resize <= VTTS_RESIZE_PIL, what, name + ".resize",
            "a vtts_resize", resize);
    constexpr Resize kKernels[] = {Resize::kFixed, Resize::kFloat, Resize::kPil};
    job.resize = kKernels[resize];
    validate(job, patch_px);
    result.num_rows += num_patch_rows(job, patch_px);
    require(result.num_rows <= kMaxRows, what, "rows of all jobs", "at most 2^40", result.num_rows);
    result.jobs.push_back(job);
  }
  return result;
}

PatchifyOptions read_options(const vtts_patchify_options* options, bool for_cpu, const char* what) {
  const vtts_patchify_options defaults = vtts_patchify_options_default();
  const vtts_patchify_options given =
      options == nullptr ? defaults : read_struct(options, defaults, what, "options");
  PatchifyOptions result;
  validate_patch(given.patch_px, what);
  result.patch_px = given.patch_px;
  for (int c = 0; c < kChannels; ++c) {
    if (!std::isfinite(given.mean[c]) || !std::isfinite(given.std[c]) || !(given.std[c] > 0.0f)) {
      reject(what, "options.mean, options.std", "finite, std > 0",
             std::to_string(given.mean[c]) + ", " + std::to_string(given.std[c]));
    }
    result.mean[c] = given.mean[c];
    result.std[c] = given.std[c];
  }
  if (!for_cpu) return result;
  require(given.num_threads >= 1 && given.num_threads <= kMaxThreads, what, "options.num_threads",
          "in [1, 1024]", given.num_threads);
  result.num_threads = given.num_threads;
  const int32_t isa = number_of(given.isa);
  constexpr Isa kIsas[] = {Isa::kAuto, Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kNeon};
  require(isa >= VTTS_ISA_AUTO && isa <= VTTS_ISA_NEON, what, "options.isa", "a vtts_isa", isa);
  result.isa = kIsas[isa];
  if (!isa_supported(result.isa)) {
    throw Unsupported(std::string(what) +
                      ": options.isa must be one that this build and this machine have, got " +
                      std::to_string(isa));
  }
  return result;
}

DType read_dtype(vtts_dtype dtype, const char* what) {
  const int32_t type = number_of(dtype);
  require(type >= VTTS_FLOAT32 && type <= VTTS_BFLOAT16, what, "dtype", "a vtts_dtype", type);
  constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  return kTypes[type];
}

}  // namespace vtts::abi
