// patchify: uint8 RGB frames -> crop -> antialiased bicubic resize -> normalise -> ViT patch rows.
//
// Torch-free and Python-free. One job is one frame pair seen through one crop box at one size; a
// call takes many jobs, each with its own resize kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cpu/cpu_features.h"

namespace vtts {

inline constexpr int kChannels = 3;
inline constexpr int kPatch = 14;    // px a side of a ViT patch
inline constexpr int kTokenPx = 28;  // px a side of 2 x 2 patches, one LM token
inline constexpr int kPatchesPerToken = 4;
inline constexpr int kFramesPerPair = 2;
inline constexpr int kPatchRow = kChannels * kFramesPerPair * kPatch * kPatch;  // 1176

// A borrowed RGB frame: `height` rows of `width` packed pixels, `row_stride_bytes` apart (the
// stride may be any value, negative included).
struct FrameView {
  const uint8_t* data = nullptr;
  int64_t row_stride_bytes = 0;
  int32_t height = 0;
  int32_t width = 0;
};

// Source pixels, half-open: columns [x0, x1), rows [y0, y1).
struct PixelBox {
  int32_t x0 = 0, y0 = 0, x1 = 0, y1 = 0;
};

// How a crop becomes the pixels of its view; without effect where it has the target's size.
enum class Resize {
  kFixed,  // ATen for uint8 on a CPU: int16 weights, rounded to uint8 after each of the two passes
  kFloat,  // torchvision v1, and ATen on a GPU: float32 in both passes, rounded half to even once
  kPil,    // PIL 13: weights of 22 bits, rounded after each pass, along y first where that is less
};

// Both frames are cropped to `box` and resized to `height` x `width` (multiples of kTokenPx). The
// resize sees the crop only: taps stop at its border. Frames may be the same memory, then the work
// is done once.
struct PatchifyJob {
  FrameView frame_a, frame_b;
  PixelBox box;
  int32_t height = 0;
  int32_t width = 0;
  Resize resize = Resize::kFixed;
};

// "fixed", "float" or "pil". Throws std::invalid_argument, in the name of `what`, on another.
Resize parse_resize(const std::string& what, const std::string& name);

// Whether PIL resizes this job along y before it does along x (Resample.c of Pillow 13).
bool pil_rows_first(const PatchifyJob& job);

struct PatchifyOptions {
  Isa isa = Isa::kAuto;
  int num_threads = 1;
  // A value x of channel c becomes (x - mean[c]) / std[c] in float32; both are in 0..255 units.
  float mean[kChannels] = {};
  float std[kChannels] = {};
};

// Rows of kPatchRow floats that `job` produces.
int64_t num_patch_rows(const PatchifyJob& job);

// Throws std::invalid_argument, in the name of `what`, unless frames, box and size of `job` are
// usable.
void validate(const PatchifyJob& job, const char* what = "patchify");

// Writes the rows of all jobs, one job after the other, to `out` (sum of num_patch_rows(job) *
// kPatchRow floats). Row r of a job: r = ((bh * (W' / 28) + bw) * 2 + mh) * 2 + mw is the patch at
// patch row 2 * bh + mh and patch column 2 * bw + mw; column ((c * 2 + frame) * 14 + y) * 14 + x.
// Thread-safe. Throws std::invalid_argument on a bad job or option before anything is written.
void patchify(const PatchifyJob* jobs, size_t num_jobs, const PatchifyOptions& options, float* out);

}  // namespace vtts
