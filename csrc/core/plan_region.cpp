#include "core/plan_region.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace vtts {
namespace {

std::vector<TimeSpan> merge_spans(std::vector<TimeSpan> spans) {
  std::stable_sort(spans.begin(), spans.end(), [](const TimeSpan& a, const TimeSpan& b) {
    return a.start_seconds < b.start_seconds ||
           (a.start_seconds == b.start_seconds && a.end_seconds < b.end_seconds);
  });
  std::vector<TimeSpan> merged;
  for (const TimeSpan& span : spans) {
    if (!merged.empty() && span.start_seconds <= merged.back().end_seconds) {
      merged.back().end_seconds = std::max(merged.back().end_seconds, span.end_seconds);
    } else {
      merged.push_back(span);
    }
  }
  return merged;
}

std::vector<TimeSpan> clip_spans(const std::vector<TimeSpan>& spans, double duration_seconds) {
  std::vector<TimeSpan> inside;
  for (const TimeSpan& span : spans) {
    const double start = std::max(span.start_seconds, 0.0);
    const double end = std::min(span.end_seconds, duration_seconds);
    if (start <= end && start < duration_seconds) inside.push_back({start, end});
  }
  return merge_spans(std::move(inside));
}

bool ordered_side(double a, double b, double* low, double* high) {
  a = std::min(std::max(a, 0.0), 1.0);
  b = std::min(std::max(b, 0.0), 1.0);
  if (b < a) std::swap(a, b);
  *low = a;
  *high = b;
  return a < b;
}

std::pair<int64_t, int64_t> snap_side(double low, double high, int64_t size) {
  const double scale = static_cast<double>(size);
  // 1e-6 px: a box that came from whole pixels must go back to the same pixels.
  const auto floor = static_cast<int64_t>(std::floor(low * scale + 1e-6));
  const auto ceil = static_cast<int64_t>(std::ceil(high * scale - 1e-6));
  int64_t start = std::min(std::max<int64_t>(floor, 0), size - 1);
  int64_t stop = std::min(std::max(ceil, start + 1), size);
  const int64_t wanted = std::min(kMinViewPx, size);
  const int64_t missing = wanted - (stop - start);
  if (missing > 0) {
    start = std::min(std::max<int64_t>(start - missing / 2, 0), size - wanted);
    stop = start + wanted;
  }
  return {start, stop};
}

}  // namespace

std::vector<TimeSpan> usable_spans(const std::vector<RawSpan>& spans, double duration_seconds) {
  std::vector<TimeSpan> given;
  for (const RawSpan& span : spans) {
    if (span.start_seconds <= span.end_seconds && span.end_seconds >= 0.0) {
      given.push_back({span.start_seconds, span.end_seconds});
    }
  }
  return clip_spans(given, duration_seconds);
}

std::vector<TimeSpan> widen_spans(const std::vector<TimeSpan>& spans, double margin_seconds,
                                  double duration_seconds) {
  std::vector<TimeSpan> wide;
  for (const TimeSpan& span : spans) {
    wide.push_back({span.start_seconds - margin_seconds, span.end_seconds + margin_seconds});
  }
  return clip_spans(wide, duration_seconds);
}

bool clip_box(const RawBox& raw, Box* box) {
  for (const double v : {raw.x0, raw.y0, raw.x1, raw.y1}) {
    if (!std::isfinite(v)) return false;
  }
  const bool wide = ordered_side(raw.x0, raw.x1, &box->x0, &box->x1);
  const bool high = ordered_side(raw.y0, raw.y1, &box->y0, &box->y1);
  return wide && high;
}

std::vector<Box> resolve_boxes(const std::vector<RawBox>& boxes, const PlanView& view,
                               const VideoInfo& video) {
  const double left = static_cast<double>(view.box.x0), top = static_cast<double>(view.box.y0);
  const double view_width = static_cast<double>(view.box.x1 - view.box.x0);
  const double view_height = static_cast<double>(view.box.y1 - view.box.y0);
  const double frame_width = static_cast<double>(video.width);
  const double frame_height = static_cast<double>(video.height);
  std::vector<Box> resolved;
  for (const RawBox& b : boxes) {
    bool fractions = true;
    for (const double v : {b.x0, b.y0, b.x1, b.y1}) fractions &= 0.0 <= v && v <= 1.0;
    const double scale_x = fractions ? 1.0 : 1.0 / static_cast<double>(view.size.width);
    const double scale_y = fractions ? 1.0 : 1.0 / static_cast<double>(view.size.height);
    Box inside;
    if (!clip_box({b.x0 * scale_x, b.y0 * scale_y, b.x1 * scale_x, b.y1 * scale_y}, &inside)) {
      continue;
    }
    resolved.push_back({(left + inside.x0 * view_width) / frame_width,
                        (top + inside.y0 * view_height) / frame_height,
                        (left + inside.x1 * view_width) / frame_width,
                        (top + inside.y1 * view_height) / frame_height});
  }
  return resolved;
}

ViewBox snap_hull(const std::vector<Box>& boxes, int64_t height, int64_t width) {
  Box hull = boxes.front();
  for (const Box& b : boxes) {
    hull = {std::min(hull.x0, b.x0), std::min(hull.y0, b.y0), std::max(hull.x1, b.x1),
            std::max(hull.y1, b.y1)};
  }
  const auto [x0, x1] = snap_side(hull.x0, hull.x1, width);
  const auto [y0, y1] = snap_side(hull.y0, hull.y1, height);
  return {x0, y0, x1, y1};
}

std::vector<TimeSpan> Look::spans(const VideoInfo& video) const {
  return video.is_image ? std::vector<TimeSpan>()
                        : usable_spans(clue.spans, video.duration_seconds);
}

std::vector<Box> Look::boxes(int64_t index, const VideoInfo& video) const {
  if (!forced) return resolve_boxes(clue.boxes, views[static_cast<size_t>(index)], video);
  std::vector<Box> clipped;
  for (const RawBox& raw : clue.boxes) {
    Box box;
    if (clip_box(raw, &box)) clipped.push_back(box);
  }
  return clipped;
}

std::vector<Region> Look::regions(const std::vector<VideoInfo>& videos) const {
  std::vector<Region> regions;
  for (size_t i = 0; i < videos.size(); ++i) {
    const int64_t index = static_cast<int64_t>(i);
    std::vector<TimeSpan> times = spans(videos[i]);
    std::vector<Box> places = boxes(index, videos[i]);
    if (times.empty() && places.empty()) continue;
    if (times.empty()) times = views[i].spans;
    if (places.empty()) places.push_back({0.0, 0.0, 1.0, 1.0});
    for (const TimeSpan& time : times) {
      for (const Box& place : places) regions.push_back({time, place, index});
    }
  }
  return regions;
}

}  // namespace vtts
