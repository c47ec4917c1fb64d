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
inline constexpr int kPatchesPerToken = 4;
inline constexpr int kFramesPerPair = 2;

// px a side of 2 x 2 patches of `patch_px`, one LM token.
constexpr int token_px(int patch_px) { return 2 * patch_px; }

// Values of a patch row.
constexpr int patch_row(int patch_px) { return kChannels * kFramesPerPair * patch_px * patch_px; }

// The sizes that a ViT patch may have: Qwen2-VL and Qwen2.5-VL, Qwen3-VL.
inline constexpr int kPatchSizes[] = {14, 16};

// The same where they are compiled in.
template <int kPatchPx>
struct PatchShape {
  static constexpr int kPatch = kPatchPx;
  static constexpr int kTokenPx = token_px(kPatchPx);
  static constexpr int kPatchRow = patch_row(kPatchPx);
  static constexpr int kTokenValues = kTokenPx * kChannels;  // one resized row of a token
};

// Throws std::invalid_argument, in the name of `what`, unless `patch_px` is one of kPatchSizes.
void validate_patch(int patch_px, const char* what);

// use(PatchShape<patch_px>()), `patch_px` being valid.
template <typename Use>
auto with_patch(int patch_px, const Use& use) {
  return patch_px == 14 ? use(PatchShape<14>()) : use(PatchShape<16>());
}

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

// Both frames are cropped to `box` and resized to `height` x `width` (multiples of token_px). The
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
  int patch_px = 0;  // one of kPatchSizes
  // A value x of channel c becomes (x - mean[c]) / std[c] in float32; both are in 0..255 units.
  float mean[kChannels] = {};
  float std[kChannels] = {};
};

// Rows of patch_row(patch_px) floats that `job` produces.
int64_t num_patch_rows(const PatchifyJob& job, int patch_px);

// Throws std::invalid_argument, in the name of `what`, unless frames, box and size of `job` are
// usable with patches of a valid `patch_px`.
void validate(const PatchifyJob& job, int patch_px, const char* what = "patchify");

// Writes the rows of all jobs, one job after the other, to `out` (sum of num_patch_rows *
// patch_row floats). With patches of p px, row r of a job, r = ((bh * (W' / 2p) + bw) * 2 + mh) * 2
// + mw, is the patch at patch row 2 * bh + mh and patch column 2 * bw + mw; its column is
// ((c * 2 + frame) * p + y) * p + x.
// Thread-safe. Throws std::invalid_argument on a bad job or option before anything is written.
void patchify(const PatchifyJob* jobs, size_t num_jobs, const PatchifyOptions& options, float* out);

}  // namespace vtts
