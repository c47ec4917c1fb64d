// Geometry of regions: vtts_rt/perception/region.py.
#pragma once

#include <vector>

#include "core/plan.h"

namespace vtts {

inline constexpr int64_t kMinViewPx = 56;  // a cropped view keeps this many source px a side

// What of a clue's raw spans can be looked at: disjoint, ascending, inside the video.
std::vector<TimeSpan> usable_spans(const std::vector<RawSpan>& spans, double duration_seconds);

// Every span longer by the margin at both ends, clipped to the video and merged.
std::vector<TimeSpan> widen_spans(const std::vector<TimeSpan>& spans, double margin_seconds,
                                  double duration_seconds);

// Fractions of the frame: ends in order, clipped to [0, 1]; false without area.
bool clip_box(const RawBox& raw, Box* box);

// Boxes in a model's text as boxes on the whole frame.
std::vector<Box> resolve_boxes(const std::vector<RawBox>& boxes, const PlanView& view,
                               const VideoInfo& video);

// The smallest box of whole source pixels around the boxes' hull, at least kMinViewPx a side.
ViewBox snap_hull(const std::vector<Box>& boxes, int64_t height, int64_t width);

}  // namespace vtts
