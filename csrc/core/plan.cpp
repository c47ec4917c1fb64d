#include "core/plan.h"

#include <cmath>
#include <stdexcept>
#include <utility>

namespace vtts {
namespace {

void require(const char* argument, const std::string& got, bool ok, const char* rule) {
  if (ok) return;
  throw std::invalid_argument(std::string("plan_round: ") + argument + " must be " + rule +
                              ", got " + got);
}

void require(const char* argument, int64_t got, bool ok, const char* rule) {
  require(argument, std::to_string(got), ok, rule);
}

void require(const char* argument, double got, bool ok, const char* rule) {
  require(argument, std::to_string(got), ok, rule);
}

bool is_even(int64_t value) { return value % 2 == 0; }

void validate(const PerceptionConfig& c) {
  require("sample_fps", c.sample_fps, c.sample_fps >= 1e-6 && c.sample_fps <= 1e3,
          "in [1e-6, 1000]");
  require("min_frames", c.min_frames, c.min_frames >= 2 && is_even(c.min_frames), "even and >= 2");
  require("max_frames", c.max_frames,
          c.max_frames >= c.min_frames && c.max_frames <= kMaxRoundFrames && is_even(c.max_frames),
          "even, >= min_frames and <= 1048576");
  require("min_pixels", c.min_pixels, c.min_pixels >= 1 && c.min_pixels <= kMaxPlanPixels,
          "in [1, 2^50]");
  require("total_pixels", c.total_pixels, c.total_pixels >= 1 && c.total_pixels <= kMaxPlanPixels,
          "in [1, 2^50]");
  require("key_ratio", c.key_ratio, c.key_ratio > 0.0 && c.key_ratio < 1e3, "in (0, 1000)");
  require("focus_frames", c.focus_frames, c.focus_frames >= 0 && is_even(c.focus_frames),
          "even and >= 0");
  require("focus_margin_cells", c.focus_margin_cells,
          c.focus_margin_cells >= 0.0 && c.focus_margin_cells <= 1e6, "in [0, 1e6]");
}

void validate(const VideoInfo& v) {
  require("num_frames", v.num_frames, v.num_frames >= 1 && v.num_frames <= kMaxVideoFrames,
          "in [1, 2^30]");
  for (const int64_t side : {v.height, v.width}) {
    require("height, width", side, side >= 1 && side <= kMaxPlanSidePx, "in [1, 1048576]");
  }
  if (v.is_image) return;
  require("source_fps", v.source_fps, v.source_fps >= 1e-6 && v.source_fps <= kMaxSourceFps,
          "in [1e-6, 1e6]");
  require("duration_seconds", v.duration_seconds,
          v.duration_seconds > 0.0 && v.duration_seconds <= kMaxDurationSeconds, "in (0, 1e9]");
  double before = 0.0;
  bool first = true;
  for (const double time : v.timestamps_seconds) {
    require("timestamps_seconds", time, std::isfinite(time) && (first || time >= before),
            "finite and ascending");
    before = time;
    first = false;
  }
}

void validate(const Clue& clue) {
  const bool few = clue.spans.size() <= kMaxClueSpans && clue.boxes.size() <= kMaxClueBoxes;
  require("clue", "more", few, "at most 64 spans and 64 boxes");
  for (const RawSpan& s : clue.spans) {
    for (const double v : {s.start_seconds, s.end_seconds}) {
      require("clue", v, std::isfinite(v), "of finite numbers");
    }
  }
  for (const RawBox& b : clue.boxes) {
    for (const double v : {b.x0, b.y0, b.x1, b.y1}) {
      require("clue", v, std::isfinite(v), "of finite numbers");
    }
  }
}

}  // namespace

Planner::Planner(Strategy strategy, const PerceptionConfig& config, std::vector<VideoInfo> videos)
    : strategy_(strategy), config_(config), videos_(std::move(videos)) {
  validate(config_);
  require("videos", "none", !videos_.empty(), "at least one video");
  for (const VideoInfo& video : videos_) validate(video);
}

FramePlan Planner::next(const Clue* clue, bool forced) {
  require("clue", "a clue", clue == nullptr || num_rounds_ > 0, "null before the first round");
  require("clue", "null", clue != nullptr || num_rounds_ == 0, "that of the round before");
  Look look;
  if (clue != nullptr) {
    validate(*clue);
    look = {views_, *clue, forced};
  }
  const Look* before = clue != nullptr ? &look : nullptr;
  FramePlan plan = strategy_ == Strategy::kOfficial ? plan_official(before)
                   : strategy_ == Strategy::kGrid   ? plan_grid(before)
                                                    : plan_focus(before);
  if (before != nullptr) plan.regions = before->regions(videos_);
  views_ = plan.views;
  ++num_rounds_;
  return plan;
}

}  // namespace vtts
