// The dyadic time grid of one video: vtts_rt/perception/timeline.py.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "core/plan.h"

namespace vtts {

// Cells of 2 / sample_fps * 2^-level seconds from t = 0. The video must outlive it.
class Timeline {
 public:
  Timeline(int64_t index, const VideoInfo& video, double sample_fps);

  double cell_seconds(int level) const;
  int64_t num_cells(int level) const;
  bool resolves(int level) const;
  int first_level(const PerceptionConfig& config, int64_t max_pairs) const;
  int finest_level(const std::vector<TimeSpan>& spans, int start_level, int64_t max_pairs) const;
  // Ascending indices of the cells that the spans touch; an instant touches one.
  std::vector<int64_t> cells(const std::vector<TimeSpan>& spans, int level) const;
  std::vector<FramePair> pairs(const std::vector<int64_t>& cells, int level) const;

 private:
  std::vector<std::pair<int64_t, int64_t>> ranges(const std::vector<TimeSpan>& spans,
                                                  int level) const;
  int64_t frame_at(double seconds) const;

  int64_t index_;
  const VideoInfo& video_;
  double coarse_seconds_, frame_seconds_;
};

}  // namespace vtts
