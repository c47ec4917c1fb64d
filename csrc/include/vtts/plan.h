/* Frame plans: which frame pairs, boxes and sizes each round of a question shows. */
#ifndef VTTS_PLAN_H_
#define VTTS_PLAN_H_

#include "vtts/clue.h"
#include "vtts/patchify.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum vtts_strategy {
  VTTS_STRATEGY_OFFICIAL = 0,
  VTTS_STRATEGY_GRID = 1,
  VTTS_STRATEGY_REFRESH = 2,
  VTTS_STRATEGY_APPEND = 3,
  VTTS_STRATEGY_FORCE_INT32 = 0x7fffffff
} vtts_strategy;

/* How a question looks at its videos; defaults and meaning of vtts_rt.PerceptionConfig. */
typedef struct vtts_perception_config {
  uint32_t struct_size;
  uint32_t reserved;  /* 0 */
  double sample_fps;  /* frames a second of a first look, 1e-6 to 1000 */
  int64_t min_frames; /* bounds on the frames of a round, even, 2 to 2^20 */
  int64_t max_frames;
  int64_t min_pixels;        /* px a frame, 1 to 2^50 */
  int64_t total_pixels;      /* px a round, 1 to 2^50 */
  double key_ratio;          /* how much denser key spans are sampled, in (0, 1000) */
  int64_t focus_frames;      /* most frames of a later look of refresh and append, even; 0: half */
  double focus_margin_cells; /* how far such a look reaches beyond the spans, 0 to 1e6 */
} vtts_perception_config;

typedef struct vtts_video_info {
  uint32_t struct_size;
  int32_t is_image;                 /* 1: a still; rate, duration and times are not read */
  int64_t num_frames;               /* 1 to 2^30 */
  double source_fps;                /* average rate, 1e-6 to 1e6 */
  double duration_seconds;          /* in (0, 1e9] */
  int64_t height, width;            /* px, 1 to 2^20 */
  const double* timestamps_seconds; /* num_frames presentation times, ascending; NULL: index / rate.
                                       Copied. */
} vtts_video_info;

/* The parts of a plan. These four never change. */
typedef struct vtts_plan_pair { /* two frames, one temporal cell of the vision tower */
  int64_t video, frame_a, frame_b;
  double time_seconds;
} vtts_plan_pair;

typedef struct vtts_plan_segment { /* one vision item of the prompt */
  int64_t video;
  int64_t first_pair, num_pairs;         /* of vtts_plan_info.pairs */
  vtts_pixel_box box;                    /* source px */
  int64_t resized_height, resized_width; /* px, multiples of 28 */
  double seconds_per_grid;               /* between two pairs, for M-RoPE */
  int64_t is_image;
} vtts_plan_segment;

typedef struct vtts_plan_view { /* what a round shows of one video: what its clue refers to */
  int64_t video;
  vtts_pixel_box box;
  int64_t resized_height, resized_width;
  int64_t first_span, num_spans; /* of vtts_plan_info.view_spans */
  double cell_seconds;           /* time step of the pairs, 0 for an image */
  int64_t level;                 /* cell = 2 / sample_fps * 2^-level */
} vtts_plan_view;

typedef struct vtts_plan_region { /* the clue that led here, as geometry */
  int64_t video;
  double start_seconds, end_seconds;
  double x0, y0, x1, y1; /* fractions of the whole frame */
} vtts_plan_region;

/* A plan laid out in memory that belongs to the vtts_plan. */
typedef struct vtts_plan_info {
  uint32_t struct_size;
  uint32_t reserved;
  int64_t round_index;
  double sample_fps; /* frames a second as told to the model, of the first video */
  int64_t num_segments, num_pairs, num_frames, num_views, num_view_spans, num_regions, num_notes;
  const vtts_plan_segment* segments; /* in prompt order; none: there is nothing to show */
  const vtts_plan_pair* pairs;
  const int64_t* frame_indices; /* num_frames, in prompt order; `official` lists an odd number */
  const double* timestamps_seconds; /* num_frames */
  const vtts_plan_view* views;      /* one a video */
  const double* view_spans;         /* (num_view_spans, 2) start, end in seconds */
  const vtts_plan_region* regions;
  const char* const* notes; /* sentences about every fallback taken */
} vtts_plan_info;

typedef struct vtts_planner vtts_planner; /* the rounds of one question */
typedef struct vtts_plan vtts_plan;       /* one round */

VTTS_API vtts_perception_config vtts_perception_config_default(void);
VTTS_API vtts_video_info vtts_video_info_default(void);
VTTS_API vtts_plan_info vtts_plan_info_default(void);

/* A planner for 1 to 1024 videos (elements sizeof(vtts_video_info) of the caller apart), to
 * *planner; free it with vtts_planner_free. config: NULL takes the defaults.
 * VTTS_ERROR_INVALID_ARGUMENT: a value outside the ranges above. */
VTTS_API vtts_status vtts_planner_create(vtts_strategy strategy,
                                         const vtts_perception_config* config,
                                         const vtts_video_info* videos, int64_t num_videos,
                                         vtts_planner** planner);

/* The plan of the next round, to *plan; free it with vtts_plan_free, before or after the planner.
 * clue: NULL before the first round, then what the round before ended with (at least one call of
 * vtts_clue_parse, or filled in by hand). clue_is_forced: the clue does not come from the model
 * that saw the view, its boxes are fractions of the whole frame. The same rounds always give the
 * same plans. A clue that cannot be followed is no error: the plan's notes say what was done
 * instead. NOT thread-safe for one planner. */
VTTS_API vtts_status vtts_planner_next(vtts_planner* planner, const vtts_clue* clue,
                                       int32_t clue_is_forced, vtts_plan** plan);

/* Fills *info, whose struct_size the caller has set; its pointers live as long as the plan. */
VTTS_API vtts_status vtts_plan_get_info(const vtts_plan* plan, vtts_plan_info* info);

/* NULL is allowed. */
VTTS_API void vtts_planner_free(vtts_planner* planner);
VTTS_API void vtts_plan_free(vtts_plan* plan);

/* The rules by themselves. smart_resize: (height, width) px of a view of a frame of `height` x
 * `width` (1 to 2^20) with an area between the bounds (1 to 2^50). */
VTTS_API vtts_status vtts_smart_resize(int64_t height, int64_t width, int64_t min_pixels,
                                       double max_pixels, int64_t* resized_height,
                                       int64_t* resized_width);

#ifdef __cplusplus
}
#endif

#endif /* VTTS_PLAN_H_ */
