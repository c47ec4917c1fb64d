// How many frames and pixels a view gets: vtts_rt/perception/sizing.py.
#pragma once

#include "core/plan.h"

namespace vtts {

// Multiples of 28 px with the aspect of height x width and an area between the bounds.
Size smart_resize(int64_t height, int64_t width, int64_t min_pixels, double max_pixels);

// Most pixels of one of `num_frames` frames that share the budget of a round.
double frame_cap(const PerceptionConfig& config, int64_t num_frames);

Size view_size(const PerceptionConfig& config, int64_t height, int64_t width, int64_t num_frames);

// Frames sampled from a video: even, within the bounds.
int64_t smart_nframes(const PerceptionConfig& config, int64_t num_frames, double source_fps);

// Python's round(): half to even, as floating-point environments come.
double round_half_even(double value);

}  // namespace vtts
