#include "core/patchify.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/filter.h"
#include "core/huge_pages.h"
#include "core/parallel.h"
#include "core/patch_rows.h"
#include "core/row_kernels.h"
#include "core/row_resizer.h"

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

template <typename Shape>
class Patchifier {
  static constexpr int kPatch = Shape::kPatch, kTokenPx = Shape::kTokenPx;

 public:
  Patchifier(const PatchifyJob* jobs, size_t num_jobs, const RowKernels& kernels,
             const Normalisation& normalisation)
      : kernels_(kernels), normalisation_(normalisation) {
    for (size_t i = 0; i < num_jobs; ++i) {
      const PatchifyJob& job = jobs[i];
      if (!needs_resize(job)) continue;
      with_numerics(job.resize, [&](auto numerics) {
        remember<decltype(numerics)>(job.box.x1 - job.box.x0, job.width);
        remember<decltype(numerics)>(job.box.y1 - job.box.y0, job.height);
      });
    }
  }

  template <typename Numerics>
  using Resizers = std::array<RowResizer<Numerics>, kFramesPerPair>;

  struct Scratch {
    std::tuple<Resizers<FixedPoint>, Resizers<FloatingPoint>, Resizers<Pil>> resizers;
    std::vector<uint8_t> packed;                 // one resized row
    std::vector<uint8_t> strip[kFramesPerPair];  // kTokenPx rows, each as three channel rows
    uint8_t patch[Shape::kPatchRow + kRowSlack] = {};
  };

  void run(const TokenRows& task, Scratch& scratch) const {
    const PatchifyJob& job = *task.job;
    const int64_t strip_row = kChannels * int64_t{job.width};
    scratch.packed.resize(static_cast<size_t>(strip_row) + kRowSlack);
    for (auto& strip : scratch.strip) {
      strip.resize(static_cast<size_t>(kTokenPx * strip_row) + kRowSlack);
    }

    if (!needs_resize(job)) {
      write_rows(task, scratch, [&](int frame, int y, uint8_t* planes) {
        const FrameView& view = frame == 0 ? job.frame_a : job.frame_b;
        kernels_.split_channels(crop_of(view, job.box) + y * view.row_stride_bytes, job.width,
                                planes, job.width);
      });
      return;
    }
    with_numerics(job.resize, [&](auto numerics) {
      using Numerics = decltype(numerics);
      auto& resizers = std::get<Resizers<Numerics>>(scratch.resizers);
      for (int f = 0; f < num_frames(job); ++f) {
        const FrameView& view = f == 0 ? job.frame_a : job.frame_b;
        resizers[f].start(kernels_, job, crop_of(view, job.box), view.row_stride_bytes,
                          taps<Numerics>(job.box.x1 - job.box.x0, job.width),
                          taps<Numerics>(job.box.y1 - job.box.y0, job.height),
                          task.begin * kTokenPx, task.end * kTokenPx);
      }
      write_rows(task, scratch, [&](int frame, int y, uint8_t* planes) {
        resizers[frame].resize(y, scratch.packed.data());
        kernels_.split_channels(scratch.packed.data(), job.width, planes, job.width);
      });
    });
  }

 private:
  static bool needs_resize(const PatchifyJob& job) {
    return job.box.x1 - job.box.x0 != job.width || job.box.y1 - job.box.y0 != job.height;
  }

  static const uint8_t* crop_of(const FrameView& frame, const PixelBox& box) {
    return frame.data + box.y0 * frame.row_stride_bytes + int64_t{kChannels} * box.x0;
  }

  static int num_frames(const PatchifyJob& job) {
    const bool same = job.frame_a.data == job.frame_b.data &&
                      job.frame_a.row_stride_bytes == job.frame_b.row_stride_bytes;
    return same ? 1 : kFramesPerPair;
  }

  template <typename Numerics>
  using TapsOf = std::map<std::pair<int, int>, Taps<typename Numerics::Weight>>;

  template <typename Numerics>
  void remember(int source, int target) {
    auto& slot = std::get<TapsOf<Numerics>>(taps_)[{source, target}];
    if (slot.stride == 0) slot = Numerics::taps(source, target);
  }

  template <typename Numerics>
  const auto& taps(int source, int target) const {
    return std::get<TapsOf<Numerics>>(taps_).at({source, target});
  }

  // `make(frame, y, planes)` writes row y of a frame as three channel rows.
  template <typename Make>
  void write_rows(const TokenRows& task, Scratch& scratch, const Make& make) const {
    const PatchifyJob& job = *task.job;
    const int64_t strip_row = kChannels * int64_t{job.width};
    float* out = task.out;
    for (int token_row = task.begin; token_row < task.end; ++token_row) {
      for (int f = 0; f < num_frames(job); ++f) {
        for (int y = 0; y < kTokenPx; ++y) {
          make(f, token_row * kTokenPx + y, scratch.strip[f].data() + y * strip_row);
        }
      }
      out = write_token_row(job, scratch, out);
    }
  }

  // The patches of one strip, in row order: the output is written strictly forward.
  float* write_token_row(const PatchifyJob& job, Scratch& scratch, float* out) const {
    const int64_t width = job.width;
    const uint8_t* strips[kFramesPerPair] = {scratch.strip[0].data(),
                                             scratch.strip[num_frames(job) - 1].data()};
    for (int token = 0; token < job.width / kTokenPx; ++token) {
      for (int quarter = 0; quarter < kPatchesPerToken; ++quarter) {
        const int64_t y0 = quarter / 2 * kPatch;
        const int64_t x0 = token * kTokenPx + quarter % 2 * kPatch;
        uint8_t* patch = scratch.patch;
        for (int c = 0; c < kChannels; ++c) {
          for (const uint8_t* strip : strips) {
            const uint8_t* source = strip + (y0 * kChannels + c) * width + x0;
            for (int y = 0; y < kPatch; ++y) {
              std::memcpy(patch, source, 16);  // kPatch wanted; one load and one store
              patch += kPatch;
              source += kChannels * width;
            }
          }
        }
        kernels_.normalise(scratch.patch, Shape::kPatchRow / kChannels, normalisation_, out);
        out += Shape::kPatchRow;
      }
    }
    return out;
  }

  const RowKernels& kernels_;
  const Normalisation& normalisation_;
  std::tuple<TapsOf<FixedPoint>, TapsOf<FloatingPoint>, TapsOf<Pil>> taps_;
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

template <typename Shape>
class Rows : public PatchRows {
 public:
  Rows(const PatchifyJob* jobs, size_t num_jobs, const PatchifyOptions& options,
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
  const Patchifier<Shape> patchifier_;
  std::vector<typename Patchifier<Shape>::Scratch> scratch_;
};

}  // namespace

int64_t num_patch_rows(const PatchifyJob& job, int patch_px) {
  return int64_t{job.height / patch_px} * (job.width / patch_px);
}

void validate_patch(int patch_px, const char* what) {
  if (std::count(std::begin(kPatchSizes), std::end(kPatchSizes), patch_px) > 0) return;
  reject(what, "patch_px", "14 or 16", std::to_string(patch_px));
}

Resize parse_resize(const std::string& what, const std::string& name) {
  if (name == "fixed") return Resize::kFixed;
  if (name == "float") return Resize::kFloat;
  if (name == "pil") return Resize::kPil;
  reject(what, "resize", "fixed, float or pil", name);
}

bool pil_rows_first(const PatchifyJob& job) {
  const int fewer_rows = job.box.y1 - job.box.y0 - job.height;
  const int fewer_columns = job.box.x1 - job.box.x0 - job.width;
  return fewer_rows > std::max(0, 2 * fewer_columns);
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

void validate(const PatchifyJob& job, int patch_px, const char* what) {
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
  const int side = token_px(patch_px);
  if (job.height < side || job.width < side || job.height % side != 0 || job.width % side != 0 ||
      job.height > kMaxExtent || job.width > kMaxExtent) {
    reject(what, "resized_hw", "positive multiples of " + std::to_string(side) + " px",
           pair_text(job.height, job.width));
  }
}

std::unique_ptr<PatchRows> make_patch_rows(const char* what, const PatchifyJob* jobs,
                                           size_t num_jobs, const PatchifyOptions& options) {
  if (options.num_threads < 1) {
    reject(what, "num_threads", ">= 1", std::to_string(options.num_threads));
  }
  validate_patch(options.patch_px, what);
  for (size_t i = 0; i < num_jobs; ++i) validate(jobs[i], options.patch_px, what);
  const RowKernels& kernels = row_kernels(what, options.isa);
  return with_patch(options.patch_px, [&](auto shape) -> std::unique_ptr<PatchRows> {
    return std::make_unique<Rows<decltype(shape)>>(jobs, num_jobs, options, kernels);
  });
}

int64_t rows_per_part(int64_t num_token_rows, int num_threads) {
  const int64_t num_wanted = num_threads == 1 ? 1 : num_threads * kPartsPerThread;
  return std::max<int64_t>(1, num_token_rows / num_wanted);
}

float* cut(const TokenRows& rows, int patch_px, int64_t rows_per_part,
           std::vector<TokenRows>* parts) {
  const int64_t num_rows = rows.end - rows.begin;
  const int64_t num_parts = (num_rows + rows_per_part - 1) / rows_per_part;
  const int64_t floats_per_token_row =
      int64_t{rows.job->width} / token_px(patch_px) * kPatchesPerToken * patch_row(patch_px);
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
  const int patch_px = options.patch_px, token_side = token_px(patch_px);
  int64_t num_token_rows = 0;
  for (size_t i = 0; i < num_jobs; ++i) num_token_rows += jobs[i].height / token_side;
  const int64_t token_rows = rows_per_part(num_token_rows, options.num_threads);
  float* const begin = out;
  std::vector<TokenRows> parts;
  for (size_t i = 0; i < num_jobs; ++i) {
    out = cut({&jobs[i], 0, jobs[i].height / token_side, out}, patch_px, token_rows, &parts);
  }
  prefer_huge_pages(begin, (out - begin) * sizeof(float));
  rows->write(parts);
}

}  // namespace vtts
