// Planners of random questions: what a plan names exists, whatever the clue was.
#include <algorithm>
#include <cmath>
#include <vector>

#include "tests/fuzz/fuzz_input.h"
#include "vtts/vtts.h"

using vtts::fuzz::Input;
using vtts::fuzz::promise;

namespace {

struct Question {
  vtts_perception_config config = vtts_perception_config_default();
  std::vector<vtts_video_info> videos;
  std::vector<std::vector<double>> times;
};

Question read_question(Input& input) {
  Question question;
  vtts_perception_config& config = question.config;
  config.max_frames = 2 * (1 + input.below(40));
  config.min_frames = std::min<int64_t>(config.max_frames, 2 * (1 + input.below(4)));
  if (input.one_in(8)) config.max_frames = input.integer();
  if (input.one_in(4)) config.sample_fps = input.real();
  if (input.one_in(4)) config.min_pixels = input.integer();
  if (input.one_in(4)) config.total_pixels = input.integer();
  if (input.one_in(4)) config.key_ratio = input.real();
  if (input.one_in(4)) config.focus_frames = input.integer();
  if (input.one_in(4)) config.focus_margin_cells = input.real();
  if (input.one_in(32)) config.struct_size = static_cast<uint32_t>(input.below(80));
  const int64_t num_videos = 1 + input.below(3);
  for (int64_t i = 0; i < num_videos; ++i) {
    vtts_video_info video = vtts_video_info_default();
    video.is_image = input.one_in(4) ? 1 : 0;
    video.num_frames = 1 + input.below(3000);
    video.source_fps = 0.5 + static_cast<double>(input.below(600)) / 10.0;
    video.duration_seconds = static_cast<double>(video.num_frames) / video.source_fps;
    video.height = 1 + input.below(2000);
    video.width = 1 + input.below(2000);
    if (input.one_in(8)) video.num_frames = input.integer();
    if (input.one_in(8)) video.source_fps = input.real();
    if (input.one_in(8)) video.duration_seconds = input.real();
    if (input.one_in(8)) video.height = input.integer();
    if (input.one_in(8)) video.width = input.integer();
    if (video.num_frames >= 1 && video.num_frames <= 3000 && input.one_in(3)) {
      std::vector<double> times;
      double time = 0.0;
      for (int64_t k = 0; k < video.num_frames; ++k) {
        times.push_back(time);
        time += static_cast<double>(input.below(64)) / 64.0;
      }
      question.times.push_back(std::move(times));
      video.timestamps_seconds = question.times.back().data();
    }
    question.videos.push_back(video);
  }
  return question;
}

vtts_clue read_clue(Input& input) {
  vtts_clue clue = vtts_clue_default();
  clue.num_spans = static_cast<int32_t>(input.below(5));
  clue.num_boxes = static_cast<int32_t>(input.below(3));
  for (int32_t i = 0; i < clue.num_spans; ++i) {
    clue.spans[i][0] = input.real();
    clue.spans[i][1] = input.one_in(2) ? input.real() : clue.spans[i][0] + 3.0;
  }
  for (int32_t i = 0; i < clue.num_boxes; ++i) {
    for (double& v : clue.boxes[i]) v = input.one_in(2) ? input.real() : input.real() / 1024.0;
  }
  clue.glue_is_empty_list = input.one_in(4) ? 1 : 0;
  if (input.one_in(32)) clue.num_spans = static_cast<int32_t>(input.integer());
  return clue;
}

void check_plan(const vtts_plan_info& plan, const Question& question) {
  promise(plan.num_views == static_cast<int64_t>(question.videos.size()));
  for (int64_t i = 0; i < plan.num_segments; ++i) {
    const vtts_plan_segment& segment = plan.segments[i];
    const vtts_video_info& video = question.videos[static_cast<size_t>(segment.video)];
    const vtts_pixel_box& box = segment.box;
    promise(0 <= box.x0 && box.x0 < box.x1 && box.x1 <= video.width);
    promise(0 <= box.y0 && box.y0 < box.y1 && box.y1 <= video.height);
    promise(segment.resized_height > 0 && segment.resized_height % VTTS_TOKEN_PX == 0);
    promise(segment.resized_width > 0 && segment.resized_width % VTTS_TOKEN_PX == 0);
    promise(segment.num_pairs > 0 && segment.first_pair + segment.num_pairs <= plan.num_pairs);
    for (int64_t k = 0; k < segment.num_pairs; ++k) {
      const vtts_plan_pair& pair = plan.pairs[segment.first_pair + k];
      promise(pair.video == segment.video && std::isfinite(pair.time_seconds));
      promise(0 <= pair.frame_a && pair.frame_a < std::max<int64_t>(video.num_frames, 1));
      promise(0 <= pair.frame_b && pair.frame_b < std::max<int64_t>(video.num_frames, 1));
    }
  }
  for (int64_t i = 0; i < plan.num_views; ++i) {
    promise(plan.views[i].first_span + plan.views[i].num_spans <= plan.num_view_spans);
  }
  for (int64_t i = 0; i < plan.num_notes; ++i) promise(plan.notes[i][0] != '\0');
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  const auto strategy = static_cast<vtts_strategy>(input.byte() % 5);  // one too many
  const Question question = read_question(input);
  vtts_planner* planner = nullptr;
  const vtts_status made =
      vtts_planner_create(strategy, &question.config, question.videos.data(),
                          static_cast<int64_t>(question.videos.size()), &planner);
  promise((made == VTTS_OK) == (planner != nullptr));
  promise(made == VTTS_OK || made == VTTS_ERROR_INVALID_ARGUMENT);
  if (made != VTTS_OK) return 0;
  for (int round = 0; round < 4; ++round) {
    const vtts_clue clue = read_clue(input);
    vtts_plan* plan = nullptr;
    const vtts_status status =
        vtts_planner_next(planner, round == 0 ? nullptr : &clue, input.one_in(3) ? 1 : 0, &plan);
    promise(status == VTTS_OK || status == VTTS_ERROR_INVALID_ARGUMENT);
    promise((status == VTTS_OK) == (plan != nullptr));
    if (plan == nullptr) continue;
    vtts_plan_info info = vtts_plan_info_default();
    promise(vtts_plan_get_info(plan, &info) == VTTS_OK);
    check_plan(info, question);
    vtts_plan_free(plan);
  }
  vtts_planner_free(planner);
  return 0;
}
