// The resize of one frame's crop, row by row, by any of the kernels.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/filter.h"
#include "core/patchify.h"
#include "core/row_kernels.h"

namespace vtts {

// What the kernels differ in.
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

struct Pil {
  using Stage = uint8_t;
  using Weight = int32_t;
  static Taps<Weight> taps(int source, int target) { return pil_taps(source, target); }
  static void horizontal(const RowKernels& kernels, const uint8_t* const* source,
                         const Taps<Weight>& taps, Stage* const* target) {
    kernels.horizontal_pil(source, taps, target);
  }
  static void vertical(const RowKernels& kernels, const Stage* const* source,
                       const Taps<Weight>& taps, int row, int num_values, uint8_t* target) {
    kernels.vertical_pil(source, taps.weights_of(row), taps.counts[row], taps.precision, num_values,
                         target);
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

template <typename Use>
void with_numerics(Resize resize, const Use& use) {
  switch (resize) {
    case Resize::kFixed:
      return use(FixedPoint());
    case Resize::kFloat:
      return use(FloatingPoint());
    case Resize::kPil:
      return use(Pil());
  }
}

// Resizes the crop of one frame row by row, top to bottom. Horizontally resized rows live in a ring
// just large enough for one output row, so that they are still in L1 when they are summed.
template <typename Numerics>
class RowResizer {
 public:
  using Stage = typename Numerics::Stage;
  using AxisTaps = Taps<typename Numerics::Weight>;

  // Output rows [first, last) of `job` will be wanted, of the crop at `crop`.
  void start(const RowKernels& kernels, const PatchifyJob& job, const uint8_t* crop,
             int64_t row_stride_bytes, const AxisTaps& columns, const AxisTaps& rows, int first,
             int last) {
    kernels_ = &kernels;
    crop_ = crop;
    row_stride_bytes_ = row_stride_bytes;
    crop_row_bytes_ = static_cast<size_t>(job.box.x1 - job.box.x0) * kChannels;
    columns_ = &columns;
    rows_ = &rows;
    rows_first_ = job.resize == Resize::kPil && pil_rows_first(job);
    done_ = rows_first_ ? first : rows.starts[first];
    last_row_ = rows_first_ ? last : rows.starts[last - 1] + rows.counts[last - 1];
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
    if constexpr (std::is_same_v<Numerics, Pil>) {
      if (rows_first_) {
        if (row == done_) advance_rows_first();
        std::memcpy(target, ring_row(row), ring_row_ - kRowSlack);
        return;
      }
    }
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

  // The next output rows, each from source rows where they lie.
  void advance_rows_first() {
    const uint8_t* sources[kRowBatch];
    Stage* targets[kRowBatch];
    const int batch = std::min(kRowBatch, last_row_ - done_);
    for (int i = 0; i < kRowBatch; ++i) {
      uint8_t* padded = padded_.data() + padded_row_bytes_ * std::min(i, batch - 1);
      if (i < batch) sum_source_rows(done_ + i, padded);
      sources[i] = padded;
      targets[i] = ring_row(done_ + std::min(i, batch - 1));
    }
    Numerics::horizontal(*kernels_, sources, *columns_, targets);
    done_ += batch;
  }

  void sum_source_rows(int row, uint8_t* target) {
    const int count = rows_->counts[row];
    for (int k = 0; k < count; ++k) {
      sources_[k] = crop_ + (rows_->starts[row] + k) * row_stride_bytes_;
    }
    // Kernels read whole vectors: what is left of the rows is copied to where they may.
    const size_t whole = crop_row_bytes_ / kRowSlack * kRowSlack, rest = crop_row_bytes_ - whole;
    if (whole > 0) {
      Numerics::vertical(*kernels_, sources_.data(), *rows_, row, static_cast<int>(whole), target);
    }
    if (rest == 0) return;
    ends_.resize(static_cast<size_t>(count) * kRowSlack);
    for (int k = 0; k < count; ++k) {
      uint8_t* const end = ends_.data() + k * kRowSlack;
      std::memcpy(end, sources_[k] + whole, rest);
      sources_[k] = end;
    }
    Numerics::vertical(*kernels_, sources_.data(), *rows_, row, static_cast<int>(rest),
                       target + whole);
  }

  const RowKernels* kernels_ = nullptr;
  const uint8_t* crop_ = nullptr;
  int64_t row_stride_bytes_ = 0;
  size_t crop_row_bytes_ = 0, padded_row_bytes_ = 0, ring_row_ = 0;
  const AxisTaps *columns_ = nullptr, *rows_ = nullptr;
  bool rows_first_ = false;
  // Source rows in the ring and wanted; output rows where the resize runs along y first.
  int done_ = 0, last_row_ = 0;
  int ring_capacity_ = 0;
  std::vector<uint8_t> padded_, ends_;
  std::vector<Stage> ring_;
  std::vector<const Stage*> sources_;
};

}  // namespace vtts
