// The frame sampler of VideoChat-R1.5: vtts_rt/perception/policy_official.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/plan.h"

namespace vtts {

// torch.linspace(0, num_frames - 1, num_samples).round(), bit for bit.
std::vector<int64_t> uniform_indices(int64_t num_frames, int64_t num_samples);

// Frames with `key_ratio` times the density inside the spans (raw seconds, finite), into `indices`.
// Returns why the published sampler cannot follow them; empty where it can.
std::string key_indices(const std::vector<RawSpan>& spans, int64_t num_frames, int64_t num_samples,
                        double key_ratio, double source_fps, std::vector<int64_t>* indices);

}  // namespace vtts
