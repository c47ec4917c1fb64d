// Frame planning: handles around the core's Planner.
#include "core/plan.h"

#include <memory>
#include <string>
#include <vector>

#include "abi/clue_struct.h"
#include "abi/guard.h"
#include "abi/structs.h"
#include "core/plan_sizing.h"
#include "vtts/plan.h"

struct vtts_planner {
  vtts::Planner planner;
};

// A plan laid out as the interface shows it.
struct vtts_plan {
  int64_t round_index = 0;
  double sample_fps = 0.0;
  std::vector<vtts_plan_segment> segments;
  std::vector<vtts_plan_pair> pairs;
  std::vector<int64_t> frame_indices;
  std::vector<double> timestamps_seconds;
  std::vector<vtts_plan_view> views;
  std::vector<double> view_spans;
  std::vector<vtts_plan_region> regions;
  std::vector<std::string> notes;
  std::vector<const char*> note_texts;
};

namespace vtts::abi {
namespace {

int64_t count(size_t size) { return static_cast<int64_t>(size); }

PerceptionConfig read_config(const vtts_perception_config* config, const char* what) {
  PerceptionConfig result;
  if (config == nullptr) return result;
  const vtts_perception_config given =
      read_struct(config, vtts_perception_config_default(), what, "config");
  result.sample_fps = given.sample_fps;
  result.min_frames = given.min_frames;
  result.max_frames = given.max_frames;
  result.min_pixels = given.min_pixels;
  result.total_pixels = given.total_pixels;
  result.key_ratio = given.key_ratio;
  result.focus_frames = given.focus_frames;
  result.focus_margin_cells = given.focus_margin_cells;
  return result;
}

std::vector<VideoInfo> read_videos(const vtts_video_info* videos, int64_t num_videos,
                                   const char* what) {
  require(num_videos >= 1 && num_videos <= 1024, what, "num_videos", "in [1, 1024]", num_videos);
  checked_size<vtts_video_info>(videos, what, "videos");
  std::vector<VideoInfo> result;
  for (int64_t i = 0; i < num_videos; ++i) {
    const std::string name = "videos[" + std::to_string(i) + "]";
    const vtts_video_info given = read_element(videos, i, vtts_video_info_default(), what, name);
    VideoInfo video;
    video.is_image = given.is_image != 0;
    video.num_frames = given.num_frames;
    video.source_fps = given.source_fps;
    video.duration_seconds = given.duration_seconds;
    video.height = given.height;
    video.width = given.width;
    if (const double* times = given.timestamps_seconds; times != nullptr && !video.is_image) {
      require_aligned(times, alignof(double), what, "timestamps_seconds");
      require(given.num_frames >= 1 && given.num_frames <= kMaxVideoFrames, what,
              name + ".num_frames", "in [1, 2^30]", given.num_frames);
      video.timestamps_seconds.assign(times, times + given.num_frames);
    }
    result.push_back(std::move(video));
  }
  return result;
}

vtts_pixel_box to_box(const ViewBox& box) { return {box.x0, box.y0, box.x1, box.y1}; }

std::unique_ptr<vtts_plan> lay_out(FramePlan plan, int64_t round_index) {
  auto result = std::make_unique<vtts_plan>();
  result->round_index = round_index;
  result->sample_fps = plan.sample_fps;
  for (const PlanSegment& segment : plan.segments) {
    result->segments.push_back({segment.pairs.front().video, count(result->pairs.size()),
                                count(segment.pairs.size()), to_box(segment.box),
                                segment.size.height, segment.size.width, segment.seconds_per_grid,
                                segment.is_image ? 1 : 0});
    for (const FramePair& pair : segment.pairs) {
      result->pairs.push_back({pair.video, pair.frame_a, pair.frame_b, pair.time_seconds});
    }
  }
  result->frame_indices = std::move(plan.frame_indices);
  result->timestamps_seconds = std::move(plan.timestamps_seconds);
  for (const PlanView& view : plan.views) {
    result->views.push_back({view.video, to_box(view.box), view.size.height, view.size.width,
                             count(result->view_spans.size() / 2), count(view.spans.size()),
                             view.cell_seconds, view.level});
    for (const TimeSpan& span : view.spans) {
      result->view_spans.push_back(span.start_seconds);
      result->view_spans.push_back(span.end_seconds);
    }
  }
  for (const Region& region : plan.regions) {
    const Box& box = region.box;
    result->regions.push_back({region.video, region.span.start_seconds, region.span.end_seconds,
                               box.x0, box.y0, box.x1, box.y1});
  }
  result->notes = std::move(plan.notes);
  for (const std::string& note : result->notes) result->note_texts.push_back(note.c_str());
  return result;
}

}  // namespace
}  // namespace vtts::abi

using namespace vtts::abi;

extern "C" {

vtts_perception_config vtts_perception_config_default(void) {
  const vtts::PerceptionConfig defaults;
  vtts_perception_config config = {};
  config.struct_size = sizeof config;
  config.sample_fps = defaults.sample_fps;
  config.min_frames = defaults.min_frames;
  config.max_frames = defaults.max_frames;
  config.min_pixels = defaults.min_pixels;
  config.total_pixels = defaults.total_pixels;
  config.key_ratio = defaults.key_ratio;
  config.focus_frames = defaults.focus_frames;
  config.focus_margin_cells = defaults.focus_margin_cells;
  return config;
}

vtts_video_info vtts_video_info_default(void) {
  vtts_video_info video = {};
  video.struct_size = sizeof video;
  return video;
}

vtts_plan_info vtts_plan_info_default(void) {
  vtts_plan_info info = {};
  info.struct_size = sizeof info;
  return info;
}

vtts_status vtts_planner_create(vtts_strategy strategy, const vtts_perception_config* config,
                                const vtts_video_info* videos, int64_t num_videos,
                                vtts_planner** planner) {
  return guard([&] {
    const char* what = "planner_create";
    require_pointer(planner, what, "planner");
    const int32_t number = number_of(strategy);
    require(number >= VTTS_STRATEGY_OFFICIAL && number <= VTTS_STRATEGY_APPEND, what, "strategy",
            "a vtts_strategy", number);
    constexpr vtts::Strategy kStrategies[] = {vtts::Strategy::kOfficial, vtts::Strategy::kGrid,
                                              vtts::Strategy::kRefresh, vtts::Strategy::kAppend};
    const vtts::PerceptionConfig how = read_config(config, what);
    std::vector<vtts::VideoInfo> infos = read_videos(videos, num_videos, what);
    *planner = new vtts_planner{vtts::Planner(kStrategies[number], how, std::move(infos))};
  });
}

vtts_status vtts_planner_next(vtts_planner* planner, const vtts_clue* clue, int32_t clue_is_forced,
                              vtts_plan** plan) {
  return guard([&] {
    const char* what = "planner_next";
    require_pointer(planner, what, "planner");
    require_pointer(plan, what, "plan");
    vtts::Clue given;
    if (clue != nullptr) given = from_struct(clue, what);
    const int64_t round_index = planner->planner.num_rounds();
    vtts::FramePlan next =
        planner->planner.next(clue != nullptr ? &given : nullptr, clue_is_forced != 0);
    *plan = lay_out(std::move(next), round_index).release();
  });
}

vtts_status vtts_plan_get_info(const vtts_plan* plan, vtts_plan_info* info) {
  return guard([&] {
    const char* what = "plan_get_info";
    require_pointer(plan, what, "plan");
    vtts_plan_info result = vtts_plan_info_default();
    result.round_index = plan->round_index;
    result.sample_fps = plan->sample_fps;
    result.num_segments = count(plan->segments.size());
    result.num_pairs = count(plan->pairs.size());
    result.num_frames = count(plan->frame_indices.size());
    result.num_views = count(plan->views.size());
    result.num_view_spans = count(plan->view_spans.size() / 2);
    result.num_regions = count(plan->regions.size());
    result.num_notes = count(plan->note_texts.size());
    result.segments = plan->segments.data();
    result.pairs = plan->pairs.data();
    result.frame_indices = plan->frame_indices.data();
    result.timestamps_seconds = plan->timestamps_seconds.data();
    result.views = plan->views.data();
    result.view_spans = plan->view_spans.data();
    result.regions = plan->regions.data();
    result.notes = plan->note_texts.data();
    write_struct(result, info, what, "info");
  });
}

void vtts_planner_free(vtts_planner* planner) { delete planner; }

void vtts_plan_free(vtts_plan* plan) { delete plan; }

vtts_status vtts_smart_resize(int64_t height, int64_t width, int64_t min_pixels, double max_pixels,
                              int64_t* resized_height, int64_t* resized_width) {
  return guard([&] {
    const char* what = "smart_resize";
    require_pointer(resized_height, what, "resized_height");
    require_pointer(resized_width, what, "resized_width");
    for (const int64_t side : {height, width}) {
      require(side >= 1 && side <= vtts::kMaxPlanSidePx, what, "height, width", "in [1, 2^20]",
              side);
    }
    require(min_pixels >= 1 && min_pixels <= vtts::kMaxPlanPixels, what, "min_pixels",
            "in [1, 2^50]", min_pixels);
    if (!(max_pixels >= 1.0 && max_pixels <= static_cast<double>(vtts::kMaxPlanPixels))) {
      reject(what, "max_pixels", "in [1, 2^50]", std::to_string(max_pixels));
    }
    const vtts::Size size = vtts::smart_resize(height, width, min_pixels, max_pixels);
    *resized_height = size.height;
    *resized_width = size.width;
  });
}

}  // extern "C"
