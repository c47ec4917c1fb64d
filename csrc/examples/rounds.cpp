// Two rounds of one question without a model. Plan the first look, read a clue, plan the second
// look, make patch rows of its first pair, name the KV pages of its tokens. Prints JSON, a line
// each.
#include <vtts/vtts.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

namespace {

constexpr int64_t kHeight = 360, kWidth = 640;

void check(vtts_status status) {
  if (status == VTTS_OK) return;
  std::fprintf(stderr, "%s: %s\n", vtts_status_name(status), vtts_last_error_message());
  std::exit(1);
}

struct Free {
  void operator()(vtts_planner* planner) const { vtts_planner_free(planner); }
  void operator()(vtts_plan* plan) const { vtts_plan_free(plan); }
};

using Planner = std::unique_ptr<vtts_planner, Free>;
using Plan = std::unique_ptr<vtts_plan, Free>;

Planner make_planner() {
  vtts_perception_config config = vtts_perception_config_default();
  config.max_frames = 16;
  vtts_video_info video = vtts_video_info_default();
  video.num_frames = 1800;
  video.source_fps = 30000.0 / 1001.0;
  video.duration_seconds = 60.06;
  video.height = kHeight;
  video.width = kWidth;
  vtts_planner* planner = nullptr;
  check(vtts_planner_create(VTTS_STRATEGY_APPEND, &config, &video, 1, &planner));
  return Planner(planner);
}

Plan next(const Planner& planner, const vtts_clue* clue, vtts_plan_info* info) {
  vtts_plan* plan = nullptr;
  check(vtts_planner_next(planner.get(), clue, 0, &plan));
  *info = vtts_plan_info_default();
  check(vtts_plan_get_info(plan, info));
  return Plan(plan);
}

void print(const vtts_plan_info& plan) {
  std::printf("{\"round\": %" PRId64 ", \"frames\": [", plan.round_index);
  const char* comma = "";
  for (int64_t i = 0; i < plan.num_frames; ++i, comma = ", ") {
    std::printf("%s[%" PRId64 ", %.17g]", comma, plan.frame_indices[i], plan.timestamps_seconds[i]);
  }
  const vtts_plan_segment& first = plan.segments[0];
  const vtts_pixel_box& box = first.box;
  std::printf("], \"box\": [%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64 "]", box.x0, box.y0,
              box.x1, box.y1);
  std::printf(", \"resized_hw\": [%" PRId64 ", %" PRId64 "]}\n", first.resized_height,
              first.resized_width);
}

// Stands for a decoder.
std::vector<uint8_t> decode(int64_t frame) {
  std::vector<uint8_t> pixels(kHeight * kWidth * 3);
  for (size_t i = 0; i < pixels.size(); ++i) {
    pixels[i] = static_cast<uint8_t>((i * i / 7 + i * 31 + static_cast<size_t>(frame) * 13) % 256);
  }
  return pixels;
}

std::vector<float> patch_rows(const vtts_plan_segment& segment, const vtts_plan_pair& pair) {
  const std::vector<uint8_t> a = decode(pair.frame_a), b = decode(pair.frame_b);
  vtts_patchify_job job = vtts_patchify_job_default();
  job.frame_a = {a.data(), kWidth * 3, kHeight, kWidth};
  job.frame_b = {b.data(), kWidth * 3, kHeight, kWidth};
  job.box = segment.box;
  job.resized_height = segment.resized_height;
  job.resized_width = segment.resized_width;
  vtts_patchify_options options = vtts_patchify_options_default();
  options.num_threads = 2;
  int64_t num_rows = 0;
  check(vtts_patchify_num_rows(&job, 1, &num_rows));
  std::vector<float> rows(static_cast<size_t>(num_rows) * VTTS_PATCH_ROW);
  check(vtts_patchify_cpu(&job, 1, &options, rows.data()));
  return rows;
}

// FNV-1a, to print many numbers as one.
uint64_t fingerprint(const std::vector<float>& values) {
  uint64_t hash = 0xcbf29ce484222325;
  const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(float); ++i) {
    hash = (hash ^ bytes[i]) * 0x100000001b3;
  }
  return hash;
}

void print_pages(const vtts_plan_segment& segment, const vtts_plan_pair& pair) {
  const std::string video_id = "blake2b:example";
  int64_t content = 0;
  check(vtts_pair_content_id(video_id.data(), static_cast<int64_t>(video_id.size()), pair.frame_a,
                             pair.frame_b, segment.box, segment.resized_height,
                             segment.resized_width, &content));
  const int64_t num_columns = segment.resized_width / VTTS_TOKEN_PX;
  const int64_t num_tokens = segment.resized_height / VTTS_TOKEN_PX * num_columns;
  std::vector<int64_t> keys;
  for (int64_t i = 0; i < num_tokens; ++i) {
    keys.insert(keys.end(), {content - i, 0, i / num_columns, i % num_columns});
  }
  constexpr int64_t kPageSize = 16;
  std::vector<uint8_t> hashes(static_cast<size_t>(num_tokens / kPageSize * VTTS_PAGE_HASH_BYTES));
  check(vtts_page_hashes(keys.data(), num_tokens, kPageSize, nullptr, 0, hashes.data()));
  std::printf("{\"pages\": [");
  for (size_t i = 0; i < hashes.size(); ++i) {
    const bool first = i % VTTS_PAGE_HASH_BYTES == 0;
    std::printf("%s%s%02x", first && i > 0 ? "\", " : "", first ? "\"" : "", hashes[i]);
  }
  std::printf("\"]}\n");
}

}  // namespace

int main() {
  const Planner planner = make_planner();
  vtts_plan_info info;
  const Plan first = next(planner, nullptr, &info);
  print(info);

  const std::string answer =
      "<think>the card turns over</think><glue>[(24.0, 27.5)] [0.25, 0.1, 0.6, 0.8]</glue>";
  vtts_clue clue = vtts_clue_default();
  check(vtts_clue_parse(answer.data(), static_cast<int64_t>(answer.size()), &clue));
  std::printf("{\"span\": [%.17g, %.17g]}\n", clue.spans[0][0], clue.spans[0][1]);

  const Plan second = next(planner, &clue, &info);
  print(info);
  const std::vector<float> rows = patch_rows(info.segments[0], info.pairs[0]);
  std::printf("{\"rows\": %zu, \"fingerprint\": \"%016" PRIx64 "\"}\n",
              rows.size() / VTTS_PATCH_ROW, fingerprint(rows));
  print_pages(info.segments[0], info.pairs[0]);
  return 0;
}
