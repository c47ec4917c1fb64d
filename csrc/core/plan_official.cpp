#include "core/plan_official.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "core/plan_region.h"
#include "core/plan_sizing.h"

namespace vtts {
namespace {

struct Range {
  int64_t start, stop;  // frames, both inside
};

// np.linspace(start, stop, num=num, dtype=int): floor of float64 steps, the end exact.
std::vector<int64_t> integer_linspace(int64_t start, int64_t stop, int64_t num) {
  const double delta = static_cast<double>(stop - start);
  const double step = num > 1 ? delta / static_cast<double>(num - 1) : 0.0;
  std::vector<int64_t> values;
  values.reserve(static_cast<size_t>(num));
  for (int64_t i = 0; i < num; ++i) {
    const double moved = static_cast<double>(i) * step + static_cast<double>(start);
    values.push_back(static_cast<int64_t>(std::floor(moved)));
  }
  if (num > 1) values.back() = stop;
  return values;
}

// Frames of [0, total) in none of the ranges, as disjoint ascending ranges.
std::vector<Range> outside_of(std::vector<Range> ranges, int64_t total) {
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.start < b.start; });
  std::vector<Range> free;
  int64_t next = 0;
  for (const Range& range : ranges) {
    if (range.start > next) free.push_back({next, range.start - 1});
    next = std::max(next, range.stop + 1);
  }
  if (next < total) free.push_back({next, total - 1});
  return free;
}

std::string integer_text(double value) {
  char text[400];
  std::snprintf(text, sizeof text, "%.0f", value);
  return text;
}

// (frames, nominal number of samples, why the clue was not followed).
struct Samples {
  std::vector<int64_t> indices;
  int64_t num_samples = 1;
  std::string note;
};

Samples sample(const VideoInfo& video, const PerceptionConfig& config,
               const std::vector<RawSpan>* spans) {
  Samples samples;
  if (video.num_frames == 1) {
    samples.indices = {0};
    return samples;
  }
  samples.num_samples = smart_nframes(config, video.num_frames, video.source_fps);
  if (spans != nullptr) {
    const std::string why = key_indices(*spans, video.num_frames, samples.num_samples,
                                        config.key_ratio, video.source_fps, &samples.indices);
    if (why.empty()) return samples;
    samples.note = "the clue cannot be sampled (" + why + "): uniform sampling";
  }
  samples.indices = uniform_indices(video.num_frames, samples.num_samples);
  return samples;
}

}  // namespace

std::vector<int64_t> uniform_indices(int64_t num_frames, int64_t num_samples) {
  if (num_samples == 1) return {0};
  const float end = static_cast<float>(num_frames - 1);
  const double step = static_cast<double>(end / static_cast<float>(num_samples - 1));
  std::vector<int64_t> indices;
  for (int64_t i = 0; i < num_samples; ++i) {
    const double up = step * static_cast<double>(i);
    const double down = static_cast<double>(end) - step * static_cast<double>(num_samples - 1 - i);
    const float exact = static_cast<float>(i < num_samples / 2 ? up : down);
    indices.push_back(static_cast<int64_t>(round_half_even(static_cast<double>(exact))));
  }
  return indices;
}

std::string key_indices(const std::vector<RawSpan>& spans, int64_t num_frames, int64_t num_samples,
                        double key_ratio, double source_fps, std::vector<int64_t>* indices) {
  const int64_t total = num_frames - 1;
  // Integers of any size, as doubles: bounded only once they are known to be frames.
  double lowest = 0.0;
  std::vector<std::pair<double, double>> wanted;
  for (const RawSpan& span : spans) {
    const double start = std::trunc(span.start_seconds * source_fps);
    const double end = std::trunc(span.end_seconds * source_fps);
    if (std::isinf(start) || std::isinf(end)) return "cannot convert float infinity to integer";
    const double stop = std::min(end, static_cast<double>(total - 1));
    if (start <= stop) {
      lowest = wanted.empty() ? start : std::min(lowest, start);
      wanted.emplace_back(start, stop);
    }
  }
  if (lowest < static_cast<double>(-num_frames)) {
    return "key_indices: start must be a frame of the video, got " + integer_text(lowest);
  }
  std::vector<Range> ranges;
  int64_t num_key = 0;
  for (const auto& [start, stop] : wanted) {
    ranges.push_back({static_cast<int64_t>(start), static_cast<int64_t>(stop)});
    num_key += ranges.back().stop - ranges.back().start + 1;
  }
  const double dense = static_cast<double>(num_key) * key_ratio;
  const double weight = dense + static_cast<double>(total - num_key) * 1.0;
  if (weight == 0.0) return "float division by zero";
  const double samples = static_cast<double>(num_samples);
  const double inside = round_half_even(samples * dense / weight);
  const double asked = std::max(inside, samples - inside);
  if (asked > 4.0 * samples) {
    return "key_indices: samples must be <= 4 x frames, got " + integer_text(asked);
  }
  const auto num_inside = static_cast<int64_t>(inside);
  const int64_t num_outside = num_samples - num_inside;
  std::vector<int64_t> chosen;
  for (const Range& range : ranges) {
    const double share = static_cast<double>(num_inside * (range.stop - range.start + 1));
    const auto num =
        static_cast<int64_t>(std::max(1.0, round_half_even(share / static_cast<double>(num_key))));
    for (const int64_t i : integer_linspace(range.start, range.stop, num)) chosen.push_back(i);
  }
  const std::vector<Range> free = outside_of(ranges, total);
  int64_t num_free = 0;
  for (const Range& range : free) num_free += range.stop - range.start + 1;
  if (num_outside > 0 && num_free > 0) {
    size_t at = 0;
    int64_t before = 0;  // free frames in the ranges before `at`
    for (const int64_t pick : integer_linspace(0, num_free - 1, num_outside)) {
      while (pick - before > free[at].stop - free[at].start) {
        before += free[at].stop - free[at].start + 1;
        ++at;
      }
      chosen.push_back(free[at].start + (pick - before));
    }
  }
  std::sort(chosen.begin(), chosen.end());
  chosen.erase(std::unique(chosen.begin(), chosen.end()), chosen.end());
  for (int64_t& i : chosen) i = i >= 0 ? i : i + num_frames;
  *indices = std::move(chosen);
  return "";
}

FramePlan Planner::plan_official(const Look* look) const {
  FramePlan plan;
  const std::vector<RawSpan>* spans = nullptr;
  if (look != nullptr) {
    if (!look->clue.spans.empty() || look->clue.glue_is_empty_list) {
      spans = &look->clue.spans;
    } else {
      plan.notes.push_back("no time span in the clue: uniform sampling");
    }
  }
  plan.sample_fps = config_.sample_fps;
  bool first = true;
  for (size_t i = 0; i < videos_.size(); ++i) {
    const VideoInfo& video = videos_[i];
    const int64_t index = static_cast<int64_t>(i);
    const ViewBox box = {0, 0, video.width, video.height};
    if (video.is_image) {
      const Size size = view_size(config_, video.height, video.width, 2);
      plan.segments.push_back({{{index, 0, 0, 0.0}}, box, size, 1.0, true});
      plan.views.push_back({index, box, size, {}, 0.0, 0});
      plan.frame_indices.push_back(0);
      plan.timestamps_seconds.push_back(0.0);
      continue;
    }
    Samples samples = sample(video, config_, spans);
    const std::vector<int64_t>& indices = samples.indices;
    if (!samples.note.empty()) plan.notes.push_back(samples.note);
    const Size size =
        view_size(config_, video.height, video.width, static_cast<int64_t>(indices.size()));
    const double sample_fps = static_cast<double>(samples.num_samples) /
                              static_cast<double>(video.num_frames) * video.source_fps;
    if (first) plan.sample_fps = sample_fps;
    first = false;
    std::vector<FramePair> pairs;
    for (size_t k = 0; k < indices.size(); k += 2) {
      const int64_t second = k + 1 < indices.size() ? indices[k + 1] : indices[k];
      pairs.push_back({index, indices[k], second, video.frame_time(indices[k])});
    }
    plan.segments.push_back({std::move(pairs), box, size, 2.0 / sample_fps, false});
    plan.views.push_back({index, box, size, {{0.0, video.duration_seconds}}, 2.0 / sample_fps, 0});
    for (const int64_t frame : indices) {
      plan.frame_indices.push_back(frame);
      plan.timestamps_seconds.push_back(video.frame_time(frame));
    }
  }
  return plan;
}

}  // namespace vtts
