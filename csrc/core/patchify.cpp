#include "core/patchify.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/filter.h"
#include "core/huge_pages.h"
#include "core/parallel.h"
#include "core/patch_rows.h"
#include "core/row_kernels.h"

namespace vtts {
namespace {

constexpr int32_t kMaxExtent = 1 << 20;  // px; keeps every product of extents inside its type
// Parts a thread gets on average. More balance better; every cut inside a job resizes the few
// source rows around it twice.
constexpr int64_t kPartsPerThread = 4;

[[noreturn]] void reject(const std::string& what, const std::string& argument,
                         const std::string& rule, const std::string& got) {
  throw std::invalid_argument(what + ": " + argument + " must be " + rule + ", got " + got);
}

std::string pair_text(int64_t a, int64_t b) {
  return "(" + std::to_string(a) + ", " + std::to_string(b) + ")";
}

void validate_frame(const char* what, const FrameView& frame, const char* name) {
  if (frame.data == nullptr) reject(what, name, "a frame", "a null pointer");
  if (frame.height < 1 || frame.width < 1 || frame.height > kMaxExtent ||
      frame.width > kMaxExtent) {
    reject(what, name, "1 to " + std::to_string(kMaxExtent) + " px high and wide",
           pair_text(frame.height, frame.width));
  }
}

// What the two roundings differ in.
struct FixedPoint {
  using Stage = uint8_t;  // what the horizontal pass hands to the vertical one
  using Weight = int16_t;
  static Taps<Weight> taps(int source, int target) { return fixed_point_taps(source, target); }
  static void horizontal(const RowKernels& kernels, const uint8_t* const* source,
                         const Taps<Weight>& taps, Stage* const* target) {
    kernels.horizontal_fixed(source, taps, target);
  }
  static void vertical(const RowKernels& kernels, const Stage* const* source,
                       const Taps<Weight>& taps, int row, int num_values, uint8_t* target) {
    kernels.vertical_fixed(source, taps.weights_of(row), taps.counts[row] + taps.counts[row] % 2,
                           taps.precision, num_values, target);
  }
};

struct FloatingPoint {
  using Stage = float;
  using Weight = float;
  static Taps<Weight> taps(int source, int target) { return float_taps(source, target); }
  static void horizontal(const RowKernels& kernels, const uint8_t* const* source,
                         const Taps<Weight>& taps, Stage* const* target) {
    kernels.horizontal_float(source, taps, target);
  }
  static void vertical(const RowKernels& kernels, const Stage* const* source,
                       const Taps<Weight>& taps, int row, int num_values, uint8_t* target) {
    kernels.vertical_float(source, taps.weights_of(row), taps.counts[row], num_values, target);
  }
};

// Resizes the crop of one frame row by row, top to bottom. Horizontally resized rows live in a ring
// just large enough for one output row, so that they are still in L1 when they are summed.
template <typename Numerics>
class RowResizer {
 public:
  using Stage = typename Numerics::Stage;
  using AxisTaps = Taps<typename Numerics::Weight>;

  // `first_row`, `last_row`: the source rows (of the crop) that will be needed, half-open.
  void start(const RowKernels& kernels, const uint8_t* crop, int64_t row_stride_bytes,
             int crop_width, const AxisTaps& columns, const AxisTaps& rows, int first_row,
             int last_row) {
    kernels_ = &kernels;
    crop_ = crop;
    row_stride_bytes_ = row_stride_bytes;
    crop_row_bytes_ = static_cast<size_t>(crop_width) * kChannels;
    columns_ = &columns;
    rows_ = &rows;
    done_ = first_row;
    last_row_ = last_row;
    // A weight of zero may stand on up to `stride` pixels beyond the crop.
    padded_row_bytes_ =
        crop_row_bytes_ + static_cast<size_t>(columns.stride) * kChannels + kRowSlack;
    padded_.resize(padded_row_bytes_ * kRowBatch);
    ring_capacity_ = rows.stride + kRowBatch;
    ring_row_ = static_cast<size_t>(columns.num_outputs()) * kChannels + kRowSlack;
    ring_.resize(ring_row_ * ring_capacity_);
    sources_.resize(rows.stride);
  }

  // Output row `row`, num_outputs * 3 bytes (and slack); rows must ascend.
  void resize(int row, uint8_t* target) {
    const int begin = rows_->starts[row], count = rows_->counts[row];
    done_ = std::max(done_, begin);
    while (done_ < begin + count) advance();
    for (int k = 0; k < rows_->stride; ++k) {
      sources_[k] = ring_row(begin + std::min(k, count - 1));
    }
    Numerics::vertical(*kernels_, sources_.data(), *rows_, row, columns_->num_outputs() * kChannels,
                       target);
  }

 private:
  Stage* ring_row(int source_row) {
    return ring_.data() + ring_row_ * (source_row % ring_capacity_);
  }

  void advance() {
    const uint8_t* sources[kRowBatch];
    Stage* targets[kRowBatch];
    const int batch = std::min(kRowBatch, last_row_ - done_);
    for (int i = 0; i < kRowBatch; ++i) {
      const int row = done_ + std::min(i, batch - 1);
      uint8_t* padded = padded_.data() + padded_row_bytes_ * std::min(i, batch - 1);
      if (i < batch) std::memcpy(padded, crop_ + row * row_stride_bytes_, crop_row_bytes_);
      sources[i] = padded;
      targets[i] = ring_row(row);
    }
    Numerics::horizontal(*kernels_, sources, *columns_, targets);
    done_ += batch;
  }

  const RowKernels* kernels_ = nullptr;
  const uint8_t* crop_ = nullptr;
  int64_t row_stride_bytes_ = 0;
  size_t crop_row_bytes_ = 0, padded_row_bytes_ = 0, ring_row_ = 0;
  const AxisTaps *columns_ = nullptr, *rows_ = nullptr;
  int done_ = 0, last_row_ = 0, ring_capacity_ = 0;
  std::vector<uint8_t> padded_;
  std::vector<Stage> ring_;
  std::vector<const Stage*> sources_;
};

template <typename Numerics>
class Patchifier {
 public:
  using AxisTaps = typename RowResizer<Numerics>::AxisTaps;

  Patchifier(const PatchifyJob* jobs, size_t num_jobs, const RowKernels& kernels,
             const Normalisation& normalisation)
      : kernels_(kernels), normalisation_(normalisation) {
    for (size_t i = 0; i < num_jobs; ++i) {
      const PatchifyJob& job = jobs[i];
      if (!needs_resize(job)) continue;
      remember(job.box.x1 - job.box.x0, job.width);
      remember(job.box.y1 - job.box.y0, job.height);
    }
  }

  struct Scratch {
    RowResizer<Numerics> resizers[kFramesPerPair];
    std::vector<uint8_t> packed;                 // one resized row
    std::vector<uint8_t> strip[kFramesPerPair];  // kTokenPx rows, each as three channel rows
    uint8_t patch[kPatchRow + kRowSlack] = {};
  };

  void run(const TokenRows& task, Scratch& scratch) const {
    const PatchifyJob& job = *task.job;
    const bool same = job.frame_a.data == job.frame_b.data &&
                      job.frame_a.row_stride_bytes == job.frame_b.row_stride_bytes;
    const int num_frames = same ? 1 : kFramesPerPair;
    const int64_t plane_stride = job.width;
    const int64_t strip_row = kChannels * plane_stride;
    scratch.packed.resize(static_cast<size_t>(strip_row) + kRowSlack);
    for (auto& strip : scratch.strip) {
      strip.resize(static_cast<size_t>(kTokenPx * strip_row) + kRowSlack);
    }

    float* out = task.out;
    if (!needs_resize(job)) {
      for (int token_row = task.begin; token_row < task.end; ++token_row) {
        for (int f = 0; f < num_frames; ++f) {
          const FrameView& frame = f == 0 ? job.frame_a : job.frame_b;
          for (int y = 0; y < kTokenPx; ++y) {
            kernels_.split_channels(
                crop_of(frame, job.box) + (token_row * kTokenPx + y) * frame.row_stride_bytes,
                job.width, scratch.strip[f].data() + y * strip_row, plane_stride);
          }
        }
        out = write_token_row(job, same, scratch, out);
      }
      return;
    }

    const AxisTaps& columns = taps(job.box.x1 - job.box.x0, job.width);
    const AxisTaps& rows = taps(job.box.y1 - job.box.y0, job.height);
    const int last = task.end * kTokenPx - 1;
    for (int f = 0; f < num_frames; ++f) {
      const FrameView& frame = f == 0 ? job.frame_a : job.frame_b;
      scratch.resizers[f].start(
          kernels_, crop_of(frame, job.box), frame.row_stride_bytes, job.box.x1 - job.box.x0,
          columns, rows, rows.starts[task.begin * kTokenPx], rows.starts[last] + rows.counts[last]);
    }
    for (int token_row = task.begin; token_row < task.end; ++token_row) {
      for (int f = 0; f < num_frames; ++f) {
        for (int y = 0; y < kTokenPx; ++y) {
          scratch.resizers[f].resize(token_row * kTokenPx + y, scratch.packed.data());
          kernels_.split_channels(scratch.packed.data(), job.width,
                                  scratch.strip[f].data() + y * strip_row, plane_stride);
        }
      }
      out = write_token_row(job, same, scratch, out);
    }
  }

 private:
  static bool needs_resize(const PatchifyJob& job) {
    return job.box.x1 - job.box.x0 != job.width || job.box.y1 - job.box.y0 != job.height;
  }

  static const uint8_t* crop_of(const FrameView& frame, const PixelBox& box) {
    return frame.data + box.y0 * frame.row_stride_bytes + int64_t{kChannels} * box.x0;
  }

  void remember(int source, int target) {
    auto& slot = taps_[{source, target}];
    if (slot.stride == 0) slot = Numerics::taps(source, target);
  }

  const AxisTaps& taps(int source, int target) const { return taps_.at({source, target}); }

  // The patches of one strip, in row order: the output is written strictly forward.
  float* write_token_row(const PatchifyJob& job, bool same, Scratch& scratch, float* out) const {
    const int64_t width = job.width;
    const uint8_t* strips[kFramesPerPair] = {scratch.strip[0].data(),
                                             scratch.strip[same ? 0 : 1].data()};
    for (int token = 0; token < job.width / kTokenPx; ++token) {
      for (int quarter = 0; quarter < kPatchesPerToken; ++quarter) {
        const int64_t y0 = quarter / 2 * kPatch;
        const int64_t x0 = token * kTokenPx + quarter % 2 * kPatch;
        uint8_t* patch = scratch.patch;
        for (int c = 0; c < kChannels; ++c) {
          for (const uint8_t* strip : strips) {
            const uint8_t* source = strip + (y0 * kChannels + c) * width + x0;
            for (int y = 0; y < kPatch; ++y) {
              std::memcpy(patch, source, 16);  // 14 wanted; one load and one store
              patch += kPatch;
              source += kChannels * width;
            }
          }
        }
        kernels_.normalise(scratch.patch, normalisation_, out);
        out += kPatchRow;
      }
    }
    return out;
  }

  const RowKernels& kernels_;
  const Normalisation& normalisation_;
  std::map<std::pair<int, int>, AxisTaps> taps_;
};

const RowKernels& row_kernels(const char* what, Isa isa) {
  switch (resolve_isa(what, isa)) {
    case Isa::kScalar:
      return scalar_row_kernels();
    case Isa::kNeon:
      return *neon_row_kernels();
    default:
      return *avx2_row_kernels();
  }
}

template <typename Numerics>
class RowsOf : public PatchRows {
 public:
  RowsOf(const PatchifyJob* jobs, size_t num_jobs, const PatchifyOptions& options,
         const RowKernels& kernels)
      : normalisation_(make_normalisation(options)),
        patchifier_(jobs, num_jobs, kernels, normalisation_),
        scratch_(options.num_threads) {}

  void write(const std::vector<TokenRows>& parts) override {
    parallel_for(parts.size(), static_cast<int>(scratch_.size()),
                 [&](int worker, size_t i) { patchifier_.run(parts[i], scratch_[worker]); });
  }

 private:
  const Normalisation normalisation_;
  const Patchifier<Numerics> patchifier_;
  std::vector<typename Patchifier<Numerics>::Scratch> scratch_;
};

}  // namespace

int64_t num_patch_rows(const PatchifyJob& job) {
  return int64_t{job.height / kPatch} * (job.width / kPatch);
}

Normalisation make_normalisation(const PatchifyOptions& options) {
  Normalisation n;
  n.division_is_two_fmas = true;
  for (int c = 0; c < kChannels; ++c) {
    n.mean[c] = options.mean[c];
    n.std[c] = options.std[c];
    n.reciprocal[c] = 1.0f / options.std[c];
    for (int x = 0; x < 256; ++x) {
      const float centred = static_cast<float>(x) - n.mean[c];
      n.table[c][x] = centred / n.std[c];
      const float guess = centred * n.reciprocal[c];
      const float rest = std::fma(-guess, n.std[c], centred);
      n.division_is_two_fmas &= std::fma(rest, n.reciprocal[c], guess) == n.table[c][x];
    }
  }
  return n;
}

void validate(const PatchifyJob& job, const char* what) {
  validate_frame(what, job.frame_a, "frame_a");
  validate_frame(what, job.frame_b, "frame_b");
  const PixelBox& box = job.box;
  for (const FrameView* frame : {&job.frame_a, &job.frame_b}) {
    if (box.x0 < 0 || box.y0 < 0 || box.x1 <= box.x0 || box.y1 <= box.y0 || box.x1 > frame->width ||
        box.y1 > frame->height) {
      reject(what, "box",
             "non-empty and inside the frame of (height, width) " +
                 pair_text(frame->height, frame->width),
             "x " + pair_text(box.x0, box.x1) + ", y " + pair_text(box.y0, box.y1));
    }
  }
  if (job.height < kTokenPx || job.width < kTokenPx || job.height % kTokenPx != 0 ||
      job.width % kTokenPx != 0 || job.height > kMaxExtent || job.width > kMaxExtent) {
    reject(what, "resized_hw", "positive multiples of 28 px", pair_text(job.height, job.width));
  }
}

std::unique_ptr<PatchRows> make_patch_rows(const char* what, const PatchifyJob* jobs,
                                           size_t num_jobs, const PatchifyOptions& options) {
  if (options.num_threads < 1) {
    reject(what, "num_threads", ">= 1", std::to_string(options.num_threads));
  }
  for (size_t i = 0; i < num_jobs; ++i) validate(jobs[i], what);
  const RowKernels& kernels = row_kernels(what, options.isa);
  if (options.rounding == Rounding::kCpu) {
    return std::make_unique<RowsOf<FixedPoint>>(jobs, num_jobs, options, kernels);
  }
  return std::make_unique<RowsOf<FloatingPoint>>(jobs, num_jobs, options, kernels);
}

int64_t rows_per_part(int64_t num_token_rows, int num_threads) {
  const int64_t num_wanted = num_threads == 1 ? 1 : num_threads * kPartsPerThread;
  return std::max<int64_t>(1, num_token_rows / num_wanted);
}

float* cut(const TokenRows& rows, int64_t rows_per_part, std::vector<TokenRows>* parts) {
  const int64_t num_rows = rows.end - rows.begin;
  const int64_t num_parts = (num_rows + rows_per_part - 1) / rows_per_part;
  const int64_t floats_per_token_row =
      int64_t{rows.job->width} / kTokenPx * kPatchesPerToken * kPatchRow;
  for (int64_t part = 0; part < num_parts; ++part) {
    const int64_t begin = num_rows * part / num_parts;
    const int64_t end = num_rows * (part + 1) / num_parts;
    parts->push_back({rows.job, static_cast<int>(rows.begin + begin),
                      static_cast<int>(rows.begin + end), rows.out + begin * floats_per_token_row});
  }
  return rows.out + num_rows * floats_per_token_row;
}

void patchify(const PatchifyJob* jobs, size_t num_jobs, const PatchifyOptions& options,
              float* out) {
  const std::unique_ptr<PatchRows> rows = make_patch_rows("patchify", jobs, num_jobs, options);
  int64_t num_token_rows = 0;
  for (size_t i = 0; i < num_jobs; ++i) num_token_rows += jobs[i].height / kTokenPx;
  const int64_t token_rows = rows_per_part(num_token_rows, options.num_threads);
  float* const begin = out;
  std::vector<TokenRows> parts;
  for (size_t i = 0; i < num_jobs; ++i) {
    out = cut({&jobs[i], 0, jobs[i].height / kTokenPx, out}, token_rows, &parts);
  }
  prefer_huge_pages(begin, (out - begin) * sizeof(float));
  rows->write(parts);
}

}  // namespace vtts
