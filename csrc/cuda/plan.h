// What the host computes for a call and the kernels read: one blob at the head of the workspace.
//
// Plain C++. The structs below lie in the blob and hold device addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/low_precision.h"
#include "core/patchify.h"

namespace vtts {

// Pixels start at `crop`; [first, end) is memory of the frame, so that 16 bytes at once are only
// read where all of them are the frame's.
struct DeviceFrame {
  const uint8_t* crop;
  const uint8_t* first;
  const uint8_t* end;
  int64_t row_stride_bytes;
};

// Taps of one axis. `weights` are 32-bit words: float32 (times kColumnScale along columns), int32
// (PIL), or two int16 in a row for two taps. `stride` is even, taps beyond an output's count weigh
// zero.
struct DeviceAxis {
  const int32_t* starts;
  const int32_t* counts;
  // Rows: the words of output after output. Columns: the words of four taps (zeros behind the last)
  // of output after output, then of the next four: neighbouring outputs are read together.
  const uint32_t* weights;
  int32_t stride;
  int32_t precision;
  int32_t extent;  // of the target
};

// Scaling by a power of two is exact, and lets a byte be used as a float32 without a conversion:
// shifted up by 16 bits it is the number byte * 2^-133, below the normal ones (and up to the first
// of them), where floats are evenly spaced. Times weights * 2^125 the sums are 2^-8 of their value.
inline constexpr float kColumnScale = 0x1p125f;
inline constexpr float kColumnUnscale = 0x1p8f;

enum class JobKind : int32_t {
  kCopy,             // the crop has the target's size
  kBanded,           // the source of a token's rows fits into shared memory
  kDirect,           // it does not: every value sums its window alone, no matter how large that is
  kDirectRowsFirst,  // likewise, along y before x, as PIL does for some
};

struct DeviceJob {
  DeviceFrame frames[kFramesPerPair];
  DeviceAxis columns, rows;
  uint32_t first_token;  // over all jobs
  int32_t tokens_wide;
  int32_t num_frames;  // 1: both are the same memory
  JobKind kind;
  Resize resize;
  int32_t rows_per_group;     // resized rows made at once
  int32_t raw_pitch_bytes;    // of a source row in shared memory
  uint32_t piece_reciprocal;  // times i, its upper half is i / (raw_pitch_bytes / 16)
};

// Shared memory for source rows and horizontally resized ones. Where both together fit into `good`,
// a token's resized rows or half of them are made at once; else as many as fit, down to one. Each
// kind has a bound of its own, as the largest of all jobs of a call share a launch.
struct ScratchBudget {
  int64_t good_bytes, source_bytes, stage_bytes;
};

struct Plan {
  std::vector<uint8_t> blob;
  const DeviceJob* jobs = nullptr;  // device addresses inside the workspace
  const void* table = nullptr;
  int32_t num_jobs = 0;
  int64_t num_tokens = 0;
  // Shared memory: source rows from 0 on, resized ones from stage_offset_bytes on, the same for all
  // jobs, as the source of one may arrive while another's resized rows are read.
  int32_t stage_offset_bytes = 0, scratch_bytes = 0;
};

// An upper bound of the blob's size. Throws on bad jobs or patch sizes, in the name of `what`.
int64_t blob_bytes(const char* what, const PatchifyJob* jobs, size_t num_jobs, int patch_px);

// `workspace` is a device address. The table holds (x - mean[c]) / std[c] as `table_type`, if one
// is wanted.
Plan make_plan(const PatchifyJob* jobs, size_t num_jobs, const PatchifyOptions& options,
               std::optional<DType> table_type, const ScratchBudget& budget, const void* workspace);

// What both operations require, apart from their weights: throws std::invalid_argument.
void validate_call(const char* what, const PatchifyJob* jobs, size_t num_jobs, int patch_px,
                   const void* workspace, int64_t workspace_bytes, const void* out);

}  // namespace vtts
