// Frame plans: the pairs, boxes and sizes of a round, as vtts_rt/perception/policy.py decides.
//
// Indices, boxes, sizes and times are equal to the bit: tests/csrc/golden.json and a fuzz test hold
// the two together.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "core/clue.h"

namespace vtts {

// Bounds on what can be planned; they keep every integer exact in a double.
inline constexpr int64_t kMaxVideoFrames = int64_t{1} << 30;
inline constexpr int64_t kMaxRoundFrames = int64_t{1} << 20;
inline constexpr int64_t kMaxPlanSidePx = int64_t{1} << 20;
inline constexpr int64_t kMaxPlanPixels = int64_t{1} << 50;
inline constexpr double kMaxDurationSeconds = 1e9;
inline constexpr double kMaxSourceFps = 1e6;  // and 1e-6 is the least

enum class Strategy { kOfficial, kGrid, kRefresh, kAppend };

// As vtts_rt.PerceptionConfig, with its defaults.
struct PerceptionConfig {
  double sample_fps = 2.0;
  int64_t min_frames = 4, max_frames = 512;  // even
  int64_t min_pixels = 128 * 28 * 28, total_pixels = 128 * 12 * 28 * 28;
  double key_ratio = 1.5;
  int64_t focus_frames = 0;  // even
  double focus_margin_cells = 0.0;
};

struct VideoInfo {
  bool is_image = false;
  int64_t num_frames = 0;
  double source_fps = 0.0, duration_seconds = 0.0;  // not read of an image
  int64_t height = 0, width = 0;
  std::vector<double> timestamps_seconds;  // ascending, one a frame; empty: index / source_fps

  double frame_time(int64_t frame) const {
    return timestamps_seconds.empty() ? static_cast<double>(frame) / source_fps
                                      : timestamps_seconds[static_cast<size_t>(frame)];
  }
};

struct TimeSpan {
  double start_seconds = 0.0, end_seconds = 0.0;
};
struct Box {  // fractions of the whole frame
  double x0 = 0.0, y0 = 0.0, x1 = 0.0, y1 = 0.0;
};
struct ViewBox {  // source pixels, half-open
  int64_t x0 = 0, y0 = 0, x1 = 0, y1 = 0;
};
struct Size {
  int64_t height = 0, width = 0;
};

struct FramePair {
  int64_t video = 0, frame_a = 0, frame_b = 0;
  double time_seconds = 0.0;
};

struct PlanSegment {
  std::vector<FramePair> pairs;
  ViewBox box;
  Size size;
  double seconds_per_grid = 1.0;
  bool is_image = false;
};

struct PlanView {
  int64_t video = 0;
  ViewBox box;
  Size size;
  std::vector<TimeSpan> spans;
  double cell_seconds = 0.0;
  int level = 0;
};

struct Region {
  TimeSpan span;
  Box box;
  int64_t video = 0;
};

struct FramePlan {
  std::vector<PlanSegment> segments;
  std::vector<int64_t> frame_indices;
  std::vector<double> timestamps_seconds;
  double sample_fps = 0.0;
  std::vector<PlanView> views;
  std::vector<Region> regions;
  std::vector<std::string> notes;
};

// What a finished round left behind: its plan's views, and the clue that it ended with. forced: the
// boxes are fractions of the whole frame instead of places in the view.
struct Look {
  std::vector<PlanView> views;
  Clue clue;
  bool forced = false;

  std::vector<TimeSpan> spans(const VideoInfo& video) const;
  std::vector<Box> boxes(int64_t index, const VideoInfo& video) const;
  std::vector<Region> regions(const std::vector<VideoInfo>& videos) const;
};

// The rounds of one question, planned one after the other.
class Planner {
 public:
  // Throws std::invalid_argument ("plan_round: <argument> must be ...").
  Planner(Strategy strategy, const PerceptionConfig& config, std::vector<VideoInfo> videos);

  // The next round's plan; `clue` is what the round before ended with, null before the first.
  FramePlan next(const Clue* clue, bool forced);

  int64_t num_rounds() const { return num_rounds_; }

 private:
  // What makes two pairs of a question the same picture: video, frames, box, size.
  using Content =
      std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

  FramePlan plan_official(const Look* look) const;
  FramePlan plan_grid(const Look* look) const;
  FramePlan plan_focus(const Look* look);
  bool look_at(int64_t index, const Look* look, PlanView* view, std::vector<PlanSegment>* segments,
               std::vector<std::string>* notes) const;
  void finish_grid(FramePlan* plan) const;
  int64_t max_pairs() const;
  Size image_size(const ViewBox& box) const;

  Strategy strategy_;
  PerceptionConfig config_;
  std::vector<VideoInfo> videos_;
  std::vector<PlanView> views_;  // of the last round
  std::set<Content> shown_;      // by the rounds so far, of `append`
  int64_t num_rounds_ = 0;
};

}  // namespace vtts
