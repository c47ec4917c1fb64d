#include "cuda/plan.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>

#include "core/filter.h"
#include "core/patch_rows.h"

namespace vtts {
namespace {

constexpr int64_t kAlignment = 16;
constexpr int64_t kTableEntries = kChannels * 256;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

bool same_extents(const PatchifyJob& job) {
  return job.box.x1 - job.box.x0 == job.width && job.box.y1 - job.box.y0 == job.height;
}

bool same_frames(const PatchifyJob& job) {
  return job.frame_a.data == job.frame_b.data &&
         job.frame_a.row_stride_bytes == job.frame_b.row_stride_bytes;
}

struct AxisKey {
  int source, target;
  bool columns;
  Resize resize;
  bool operator<(const AxisKey& other) const {
    return std::tie(source, target, columns, resize) <
           std::tie(other.source, other.target, other.columns, other.resize);
  }
};

AxisKey columns_of(const PatchifyJob& job) {
  return {job.box.x1 - job.box.x0, job.width, true, job.resize};
}

AxisKey rows_of(const PatchifyJob& job) {
  return {job.box.y1 - job.box.y0, job.height, false, job.resize};
}

// Starts, counts and at most one word a tap; an output has at most 2 * support + 1 taps, support
// being 2 * max(scale, 1) (core/filter.cpp), made a multiple of four.
int64_t axis_bytes(const AxisKey& key) {
  const int64_t most_taps =
      4 * std::max<int64_t>(1, (key.source + key.target - 1) / key.target) + 4;
  return aligned(int64_t{key.target} * (2 + most_taps) * int64_t{sizeof(uint32_t)}) +
         2 * kAlignment;
}

// The starts and counts stay on the host too: they say how much shared memory a job needs.
struct PlannedAxis {
  DeviceAxis device;
  std::vector<int32_t> starts, counts;

  // Source pixels [begin, end) of outputs [first, first + num).
  std::pair<int64_t, int64_t> source(int first, int num) const {
    const int last = first + num - 1;
    return {starts[first], starts[last] + counts[last]};
  }

  // The widest source of `step` outputs from a multiple of `step` inside every token on, a token
  // being `side` px.
  int64_t widest(int step, int side) const {
    int64_t most = 0;
    for (int token = 0; token < device.extent; token += side) {
      for (int first = 0; first < side; first += step) {
        const auto [begin, end] = source(token + first, std::min(step, side - first));
        most = std::max(most, end - begin);
      }
    }
    return most;
  }
};

class Planner {
 public:
  explicit Planner(const void* workspace) : base_(static_cast<const uint8_t*>(workspace)) {}

  // Appends; returns the device address.
  template <typename T>
  const T* append(const std::vector<T>& values) {
    const size_t begin = blob_.size();
    blob_.resize(begin + static_cast<size_t>(aligned(values.size() * sizeof(T))));
    std::memcpy(blob_.data() + begin, values.data(), values.size() * sizeof(T));
    return reinterpret_cast<const T*>(base_ + begin);
  }

  const PlannedAxis& axis(const AxisKey& key) {
    const auto [found, is_new] = axes_.try_emplace(key);
    if (is_new) {
      switch (key.resize) {
        case Resize::kFixed:
          found->second = planned(key, fixed_point_taps(key.source, key.target));
          break;
        case Resize::kFloat:
          found->second = planned(key, float_taps(key.source, key.target));
          break;
        case Resize::kPil:
          found->second = planned(key, pil_taps(key.source, key.target));
      }
    }
    return found->second;
  }

  std::vector<uint8_t> take_blob() { return std::move(blob_); }

 private:
  template <typename Integer>
  static void words_of(const Integer* weights, int stride, bool, uint32_t* words) {
    std::memcpy(words, weights, stride * sizeof(Integer));
  }

  static void words_of(const float* weights, int stride, bool columns, uint32_t* words) {
    for (int k = 0; k < stride; ++k) {
      const float weight = columns ? weights[k] * kColumnScale : weights[k];
      std::memcpy(words + k, &weight, sizeof(weight));
    }
  }

  template <typename Weight>
  PlannedAxis planned(const AxisKey& key, const Taps<Weight>& taps) {
    const int words_of_four = 4 * static_cast<int>(sizeof(Weight)) / 4;
    const int num_words = taps.stride * words_of_four / 4;
    const int num_groups = (taps.stride + 3) / 4;
    std::vector<uint32_t> weights(static_cast<size_t>(key.target) *
                                  (key.columns ? num_groups * words_of_four : num_words));
    std::vector<uint32_t> words(num_words);
    for (int i = 0; i < key.target; ++i) {
      words_of(taps.weights_of(i), taps.stride, key.columns, words.data());
      for (int k = 0; k < num_words; ++k) {
        const int64_t group = int64_t{k / words_of_four} * key.target + i;
        weights[key.columns ? group * words_of_four + k % words_of_four
                            : int64_t{i} * num_words + k] = words[k];
      }
    }
    return {{append(taps.starts), append(taps.counts), append(weights), taps.stride, taps.precision,
             key.target},
            taps.starts,
            taps.counts};
  }

  const uint8_t* const base_;
  std::vector<uint8_t> blob_;
  std::map<AxisKey, PlannedAxis> axes_;
};

DeviceFrame device_frame(const FrameView& frame, const PixelBox& box) {
  const int64_t stride = frame.row_stride_bytes;
  const uint8_t* last_row = frame.data + (frame.height - 1) * stride;
  return {frame.data + box.y0 * stride + int64_t{kChannels} * box.x0,
          std::min(frame.data, last_row),
          std::max(frame.data, last_row) + int64_t{kChannels} * frame.width, stride};
}

// Bytes of a source row in shared memory: whole aligned 16 bytes from wherever the row begins.
int64_t raw_pitch(int64_t num_px) { return aligned(kChannels * num_px + kAlignment - 1); }

// The reciprocal is exact as long as both factors are below 2^16, and a pitch of one piece cannot
// be.
void set_raw_pitch(int64_t bytes, DeviceJob* job) {
  job->raw_pitch_bytes = static_cast<int32_t>(bytes);
  job->piece_reciprocal = static_cast<uint32_t>((int64_t{1} << 32) / (bytes / 16) + 1);
}

struct ScratchBytes {
  int64_t raw = 0, stage = 0;
};

// Chooses kind and groups; returns the shared memory that the job needs.
ScratchBytes lay_out(const PlannedAxis& columns, const PlannedAxis& rows, int64_t stage_value_bytes,
                     const ScratchBudget& budget, bool rows_first, int patch_px, DeviceJob* job) {
  const int side = token_px(patch_px);
  const int64_t pitch = raw_pitch(columns.widest(side, side));
  // Taps of weight zero may lie behind the last row, there and among the resized ones.
  const int64_t slack = aligned(int64_t{kChannels} * columns.device.stride + 8);
  for (int group = side; group > 0; group = group == 1 ? 0 : (group + 1) / 2) {
    const int64_t num_rows = rows.widest(group, side);
    const ScratchBytes bytes = {num_rows * pitch + slack,
                                aligned((num_rows + 1) * kChannels * side * stage_value_bytes)};
    const bool fits = bytes.raw <= budget.source_bytes && bytes.stage <= budget.stage_bytes &&
                      (group < patch_px || bytes.raw + bytes.stage <= budget.good_bytes);
    if (!fits || rows_first) continue;
    job->kind = JobKind::kBanded;
    job->rows_per_group = group;
    set_raw_pitch(pitch, job);
    return bytes;
  }
  job->kind = rows_first ? JobKind::kDirectRowsFirst : JobKind::kDirect;
  job->rows_per_group = side;
  return {};
}

const void* append_table(const PatchifyOptions& options, DType type, Planner* planner) {
  const Normalisation normalisation = make_normalisation(options);
  const float* values = normalisation.table[0];
  if (type == DType::kFloat32) {
    return planner->append(std::vector<float>(values, values + kTableEntries));
  }
  std::vector<uint16_t> table(kTableEntries);
  std::transform(values, values + kTableEntries, table.begin(),
                 [type](float value) { return to_16_bits(value, type); });
  return planner->append(table);
}

}  // namespace

int64_t blob_bytes(const char* what, const PatchifyJob* jobs, size_t num_jobs, int patch_px) {
  validate_patch(patch_px, what);
  constexpr int64_t kMostTokens = INT32_MAX;  // places are int32
  int64_t num_tokens = 0;
  std::set<AxisKey> axes;
  int64_t bytes = aligned(kTableEntries * int64_t{sizeof(float)}) +
                  aligned(static_cast<int64_t>(num_jobs * sizeof(DeviceJob)));
  for (size_t i = 0; i < num_jobs; ++i) {
    validate(jobs[i], patch_px, what);
    num_tokens += num_patch_rows(jobs[i], patch_px) / kPatchesPerToken;
    if (num_tokens > kMostTokens) {
      throw std::invalid_argument(
          std::string(what) + ": jobs must be of fewer than 2^31 merged tokens, got " +
          std::to_string(num_tokens) + " in the first " + std::to_string(i + 1));
    }
    if (same_extents(jobs[i])) continue;
    for (const AxisKey& key : {columns_of(jobs[i]), rows_of(jobs[i])}) {
      if (axes.insert(key).second) bytes += axis_bytes(key);
    }
  }
  return bytes;
}

Plan make_plan(const PatchifyJob* jobs, size_t num_jobs, const PatchifyOptions& options,
               std::optional<DType> table_type, const ScratchBudget& budget,
               const void* workspace) {
  Planner planner(workspace);
  Plan plan;
  const int side = token_px(options.patch_px);
  if (table_type) plan.table = append_table(options, *table_type, &planner);
  std::vector<DeviceJob> device_jobs(num_jobs);
  ScratchBytes scratch;
  for (size_t i = 0; i < num_jobs; ++i) {
    const PatchifyJob& from = jobs[i];
    DeviceJob& job = device_jobs[i];
    job = {};
    job.frames[0] = device_frame(from.frame_a, from.box);
    job.frames[1] = device_frame(from.frame_b, from.box);
    job.first_token = static_cast<uint32_t>(plan.num_tokens);
    job.resize = from.resize;
    job.tokens_wide = from.width / side;
    job.num_frames = same_frames(from) ? 1 : kFramesPerPair;
    if (same_extents(from)) {
      job.kind = JobKind::kCopy;
      job.rows_per_group = side;
      set_raw_pitch(raw_pitch(side), &job);
      scratch.raw = std::max(scratch.raw, int64_t{side} * job.raw_pitch_bytes);
    } else {
      const PlannedAxis& columns = planner.axis(columns_of(from));
      const PlannedAxis& rows = planner.axis(rows_of(from));
      job.columns = columns.device;
      job.rows = rows.device;
      const int64_t stage_value_bytes = from.resize == Resize::kFloat ? sizeof(float) : 1;
      const bool rows_first = from.resize == Resize::kPil && pil_rows_first(from);
      const ScratchBytes needed =
          lay_out(columns, rows, stage_value_bytes, budget, rows_first, options.patch_px, &job);
      scratch.raw = std::max(scratch.raw, needed.raw);
      scratch.stage = std::max(scratch.stage, needed.stage);
    }
    plan.num_tokens += num_patch_rows(from, options.patch_px) / kPatchesPerToken;
  }
  plan.jobs = planner.append(device_jobs);
  plan.num_jobs = static_cast<int32_t>(num_jobs);
  plan.stage_offset_bytes = static_cast<int32_t>(scratch.raw);
  plan.scratch_bytes = static_cast<int32_t>(scratch.raw + scratch.stage);
  plan.blob = planner.take_blob();
  return plan;
}

void validate_call(const char* what, const PatchifyJob* jobs, size_t num_jobs, int patch_px,
                   const void* workspace, int64_t workspace_bytes, const void* out) {
  const auto require = [what](bool ok, const char* argument, const std::string& rule,
                              const std::string& got) {
    if (ok) return;
    throw std::invalid_argument(std::string(what) + ": " + argument + " must be " + rule +
                                ", got " + got);
  };
  const int64_t needed = blob_bytes(what, jobs, num_jobs, patch_px);
  for (const auto& [argument, pointer] :
       {std::pair<const char*, const void*>{"workspace", workspace}, {"out", out}}) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    require(address != 0, argument, "device memory", "a null pointer");
    require(address % kAlignment == 0, argument, "aligned to 16 bytes",
            "an address " + std::to_string(address % kAlignment) + " bytes beyond");
  }
  require(workspace_bytes >= needed, "workspace_bytes", ">= " + std::to_string(needed),
          std::to_string(workspace_bytes));
}

}  // namespace vtts
