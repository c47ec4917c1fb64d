// Plans on the dyadic grid: vtts_rt/perception/policy_grid.py.
#include <algorithm>
#include <cmath>
#include <iterator>

#include "core/plan.h"
#include "core/plan_region.h"
#include "core/plan_sizing.h"
#include "core/plan_timeline.h"

namespace vtts {
namespace {

using Cells = std::vector<int64_t>;

constexpr int64_t kLeastFocusPairs = 4;  // 8 frames: a short clip's later look is worth a round

Cells iota(int64_t num) {
  Cells cells(static_cast<size_t>(num));
  for (int64_t i = 0; i < num; ++i) cells[static_cast<size_t>(i)] = i;
  return cells;
}

// Both ascending.
Cells difference(const Cells& a, const Cells& b) {
  Cells rest;
  std::set_difference(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(rest));
  return rest;
}

// `num` of the cells (or all, if there are fewer), evenly spread.
Cells spread(const Cells& cells, int64_t num) {
  const int64_t size = static_cast<int64_t>(cells.size());
  if (num >= size) return cells;
  Cells some;
  for (int64_t i = 0; i < num; ++i) {
    some.push_back(cells[static_cast<size_t>((2 * i + 1) * size / (2 * num))]);
  }
  return some;
}

// All cells of the level, with some pairs moved from outside the spans to the inside.
std::vector<FramePair> denser_inside(const Timeline& timeline, int level,
                                     const std::vector<TimeSpan>& spans, double key_ratio) {
  const int64_t num = timeline.num_cells(level);
  const Cells all = iota(num);
  const Cells inside = timeline.cells(spans, level);
  const Cells outside = difference(all, inside);
  if (inside.empty() || outside.empty()) return timeline.pairs(all, level);
  const int64_t num_inside = static_cast<int64_t>(inside.size());
  const double weight = static_cast<double>(num_inside) * key_ratio;
  const double wanted =
      static_cast<double>(num) * weight / (weight + static_cast<double>(outside.size()));
  Cells after, before;
  for (const int64_t cell : outside) (cell > inside.front() ? after : before).push_back(cell);
  const int64_t most_after = static_cast<int64_t>(after.size() / 2);
  const int64_t most_before = static_cast<int64_t>(before.size() / 2);
  const int64_t extra =
      std::max<int64_t>(0, std::min(static_cast<int64_t>(round_half_even(wanted)) - num_inside,
                                    most_after + most_before));
  std::vector<FramePair> finer;
  const auto num_finer = [&] { return static_cast<int64_t>(finer.size()); };
  for (int depth = 1; num_finer() < extra && timeline.resolves(level + depth); ++depth) {
    Cells halves;  // second ones: first halves begin with the frame that their parent begins with
    for (const int64_t cell : timeline.cells(spans, level + depth)) {
      if (cell % 2 == 1) halves.push_back(cell);
    }
    for (const FramePair& pair :
         timeline.pairs(spread(halves, extra - num_finer()), level + depth)) {
      finer.push_back(pair);
    }
  }
  const int64_t num_after = std::min(num_finer(), most_after);
  Cells drop = spread(after, num_after);
  for (const int64_t cell : spread(before, num_finer() - num_after)) drop.push_back(cell);
  std::sort(drop.begin(), drop.end());
  std::vector<FramePair> pairs = timeline.pairs(difference(all, drop), level);
  pairs.insert(pairs.end(), finer.begin(), finer.end());
  std::stable_sort(pairs.begin(), pairs.end(), [](const FramePair& a, const FramePair& b) {
    return a.time_seconds < b.time_seconds;
  });
  return pairs;
}

int64_t focus_pairs(const PerceptionConfig& config, int64_t max_pairs, int64_t first_pairs) {
  const int64_t given = config.focus_frames / 2;
  return std::min(given > 0 ? given : std::max(first_pairs / 2, kLeastFocusPairs), max_pairs);
}

}  // namespace

int64_t Planner::max_pairs() const {
  const int64_t moving = std::count_if(videos_.begin(), videos_.end(),
                                       [](const VideoInfo& video) { return !video.is_image; });
  return std::max<int64_t>(1, config_.max_frames / 2 / std::max<int64_t>(moving, 1));
}

// Images share the pixels of a round; each counts as one pair.
Size Planner::image_size(const ViewBox& box) const {
  const int64_t images = std::count_if(videos_.begin(), videos_.end(),
                                       [](const VideoInfo& video) { return video.is_image; });
  return view_size(config_, box.y1 - box.y0, box.x1 - box.x0, 2 * images);
}

FramePlan Planner::plan_grid(const Look* look) const {
  FramePlan plan;
  for (size_t i = 0; i < videos_.size(); ++i) {
    const VideoInfo& video = videos_[i];
    const int64_t index = static_cast<int64_t>(i);
    const ViewBox box = {0, 0, video.width, video.height};
    if (video.is_image) {
      const Size size = image_size(box);
      plan.segments.push_back({{{index, 0, 0, 0.0}}, box, size, 1.0, true});
      plan.views.push_back({index, box, size, {}, 0.0, 0});
      continue;
    }
    const Timeline timeline(index, video, config_.sample_fps);
    const int level = timeline.first_level(config_, max_pairs());
    const std::vector<TimeSpan> spans =
        look != nullptr ? look->spans(video) : std::vector<TimeSpan>();
    if (look != nullptr && spans.empty()) {
      plan.notes.push_back("no usable time span in the clue: the frames of the first round");
    }
    std::vector<FramePair> pairs = denser_inside(timeline, level, spans, config_.key_ratio);
    const Size size =
        view_size(config_, video.height, video.width, 2 * static_cast<int64_t>(pairs.size()));
    const double step = timeline.cell_seconds(level);
    plan.segments.push_back({std::move(pairs), box, size, step, false});
    plan.views.push_back({index, box, size, {{0.0, video.duration_seconds}}, step, level});
  }
  finish_grid(&plan);
  return plan;
}

FramePlan Planner::plan_focus(const Look* look) {
  FramePlan plan;
  std::set<Content> refreshed;  // `refresh` forgets what earlier rounds have shown
  std::set<Content>& shown = strategy_ == Strategy::kAppend ? shown_ : refreshed;
  for (size_t i = 0; i < videos_.size(); ++i) {
    const int64_t index = static_cast<int64_t>(i);
    PlanView view;
    std::vector<PlanSegment> planned;
    bool fresh = false;
    if (look_at(index, look, &view, &planned, &plan.notes)) {
      for (PlanSegment& segment : planned) {
        const FramePair& pair = segment.pairs.front();
        const ViewBox& box = segment.box;
        const Content content = {
            pair.video, pair.frame_a,        pair.frame_b,      box.x0, box.y0, box.x1,
            box.y1,     segment.size.height, segment.size.width};
        if (!shown.insert(content).second) continue;
        plan.segments.push_back(std::move(segment));
        fresh = true;
      }
      if (!fresh) {
        plan.notes.push_back("video " + std::to_string(index) +
                             ": all that the clue points to has been shown");
      }
    }
    plan.views.push_back(fresh ? view : look->views[i]);
  }
  finish_grid(&plan);
  return plan;
}

// View and one-pair segments of one video, before anything is left out; false where the clue says
// nothing about it.
bool Planner::look_at(int64_t index, const Look* look, PlanView* view,
                      std::vector<PlanSegment>* segments, std::vector<std::string>* notes) const {
  const VideoInfo& video = videos_[static_cast<size_t>(index)];
  ViewBox box = {0, 0, video.width, video.height};
  std::vector<Box> boxes;
  if (look != nullptr) boxes = look->boxes(index, video);
  if (!boxes.empty()) box = snap_hull(boxes, video.height, video.width);
  const std::string number = std::to_string(index);
  if (video.is_image) {
    if (look != nullptr && boxes.empty()) {
      notes->push_back("image " + number + ": no usable box in the clue");
      return false;
    }
    const Size size = image_size(box);
    *view = {index, box, size, {}, 0.0, 0};
    segments->push_back({{{index, 0, 0, 0.0}}, box, size, 1.0, true});
    return true;
  }
  const Size size = view_size(config_, box.y1 - box.y0, box.x1 - box.x0, config_.max_frames);
  const Timeline timeline(index, video, config_.sample_fps);
  int level = timeline.first_level(config_, max_pairs());
  std::vector<TimeSpan> spans = {{0.0, video.duration_seconds}};
  if (look != nullptr) {
    const PlanView& before = look->views[static_cast<size_t>(index)];
    const std::vector<TimeSpan> clue_spans = look->spans(video);
    if (!clue_spans.empty()) {
      const double margin_seconds = config_.focus_margin_cells * before.cell_seconds;
      spans = widen_spans(clue_spans, margin_seconds, video.duration_seconds);
      const int64_t num_pairs = focus_pairs(config_, max_pairs(), timeline.num_cells(level));
      const int wanted = std::max(before.level + 1, timeline.finest_level(spans, level, num_pairs));
      level = std::min(wanted, timeline.finest_level(spans, level, max_pairs()));
    } else if (!boxes.empty()) {
      notes->push_back("video " + number + ": no usable time span in the clue, the time stays");
      spans = before.spans;
      level = before.level;
    } else {
      notes->push_back("video " + number + ": no usable time span and no usable box in the clue");
      return false;
    }
  }
  *view = {index, box, size, spans, timeline.cell_seconds(level), level};
  for (const FramePair& pair : timeline.pairs(timeline.cells(spans, level), level)) {
    segments->push_back({{pair}, box, size, 1.0, false});
  }
  return true;
}

// What follows from the segments and views of a plan on the grid.
void Planner::finish_grid(FramePlan* plan) const {
  for (const PlanSegment& segment : plan->segments) {
    for (const FramePair& pair : segment.pairs) {
      const VideoInfo& video = videos_[static_cast<size_t>(pair.video)];
      for (const int64_t frame : {pair.frame_a, pair.frame_b}) {
        plan->frame_indices.push_back(frame);
        plan->timestamps_seconds.push_back(video.is_image ? 0.0 : video.frame_time(frame));
      }
    }
  }
  plan->sample_fps = config_.sample_fps;
  for (const PlanView& view : plan->views) {
    if (view.cell_seconds > 0.0) {
      plan->sample_fps = 2.0 / view.cell_seconds;
      break;
    }
  }
  std::vector<std::string> notes;  // one of a kind
  for (std::string& note : plan->notes) {
    if (std::find(notes.begin(), notes.end(), note) == notes.end()) {
      notes.push_back(std::move(note));
    }
  }
  plan->notes = std::move(notes);
}

}  // namespace vtts
