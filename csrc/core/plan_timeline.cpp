#include "core/plan_timeline.h"

#include <algorithm>
#include <cmath>

namespace vtts {
namespace {

// A frame that begins this little after a time counts as begun.
constexpr double kEpsilonSeconds = 1e-6;
constexpr double kEpsilonCells = 1e-6;

}  // namespace

Timeline::Timeline(int64_t index, const VideoInfo& video, double sample_fps)
    : index_(index),
      video_(video),
      coarse_seconds_(2.0 / sample_fps),
      frame_seconds_(1.0 / video.source_fps) {}

double Timeline::cell_seconds(int level) const { return std::ldexp(coarse_seconds_, -level); }

// The bounds on durations, rates and levels keep the number of cells below 2^63.
int64_t Timeline::num_cells(int level) const {
  const double cells = video_.duration_seconds / cell_seconds(level);
  return std::max<int64_t>(1, static_cast<int64_t>(std::ceil(cells - kEpsilonCells)));
}

bool Timeline::resolves(int level) const {
  return cell_seconds(level) / 2.0 >= frame_seconds_ * (1.0 - 1e-6);
}

int Timeline::first_level(const PerceptionConfig& config, int64_t max_pairs) const {
  int level = 0;
  while (num_cells(level) > max_pairs) --level;
  int best = level;
  while (num_cells(best) < config.min_frames / 2) {
    ++level;
    if (cell_seconds(level) < frame_seconds_ * (1.0 - 1e-6)) break;
    if (num_cells(level) > max_pairs) break;
    if (num_cells(level) > num_cells(best)) best = level;
  }
  return best;
}

int Timeline::finest_level(const std::vector<TimeSpan>& spans, int start_level,
                           int64_t max_pairs) const {
  const auto count = [&](int level) {
    int64_t total = 0;
    for (const auto& [start, stop] : ranges(spans, level)) total += stop - start;
    return total;
  };
  int level = start_level;
  while (resolves(level + 1) && count(level + 1) <= max_pairs) ++level;
  return level;
}

std::vector<std::pair<int64_t, int64_t>> Timeline::ranges(const std::vector<TimeSpan>& spans,
                                                          int level) const {
  const double size = cell_seconds(level);
  const int64_t num = num_cells(level);
  std::vector<std::pair<int64_t, int64_t>> result;
  int64_t done = 0;
  for (const TimeSpan& span : spans) {
    const auto first = static_cast<int64_t>(std::floor(span.start_seconds / size + kEpsilonCells));
    const auto last = static_cast<int64_t>(std::ceil(span.end_seconds / size - kEpsilonCells));
    int64_t start = std::min(first, num - 1);
    int64_t stop = std::max(last, start + 1);
    start = std::max(start, done);
    stop = std::min(stop, num);
    if (start < stop) {
      result.emplace_back(start, stop);
      done = stop;
    }
  }
  return result;
}

std::vector<int64_t> Timeline::cells(const std::vector<TimeSpan>& spans, int level) const {
  std::vector<int64_t> result;
  for (const auto& [start, stop] : ranges(spans, level)) {
    for (int64_t cell = start; cell < stop; ++cell) result.push_back(cell);
  }
  return result;
}

std::vector<FramePair> Timeline::pairs(const std::vector<int64_t>& cells, int level) const {
  const double half = cell_seconds(level) / 2.0;
  std::vector<FramePair> result;
  result.reserve(cells.size());
  for (const int64_t cell : cells) {
    // (cell * coarse) * 2^-level: a moment has the same double at every level.
    const double start = std::ldexp(static_cast<double>(cell) * coarse_seconds_, -level);
    result.push_back({index_, frame_at(start), frame_at(start + half), start});
  }
  return result;
}

// The last frame that has begun by then.
int64_t Timeline::frame_at(double seconds) const {
  const double until = seconds + kEpsilonSeconds;
  int64_t low = 0, high = video_.num_frames;  // frames before `low` have begun
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (video_.frame_time(middle) <= until) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return std::max<int64_t>(low - 1, 0);
}

}  // namespace vtts
