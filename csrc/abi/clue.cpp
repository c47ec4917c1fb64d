// Clue parsing.
#include "vtts/clue.h"

#include <algorithm>

#include "abi/clue_struct.h"
#include "abi/guard.h"
#include "abi/structs.h"

static_assert(VTTS_MAX_CLUE_SPANS == vtts::kMaxClueSpans, "the header and the core agree");
static_assert(VTTS_MAX_CLUE_BOXES == vtts::kMaxClueBoxes, "the header and the core agree");

namespace vtts::abi {

vtts_clue to_struct(const Clue& clue) {
  vtts_clue result = vtts_clue_default();
  result.num_spans = static_cast<int32_t>(clue.spans.size());
  result.num_boxes = static_cast<int32_t>(clue.boxes.size());
  result.num_problems =
      static_cast<int32_t>(std::min<size_t>(clue.problems.size(), VTTS_MAX_CLUE_PROBLEMS));
  result.think = {clue.think.begin, clue.think.end};
  result.answer = {clue.answer.begin, clue.answer.end};
  result.glue = {clue.glue.begin, clue.glue.end};
  result.glue_is_empty_list = clue.glue_is_empty_list ? 1 : 0;
  for (size_t i = 0; i < clue.spans.size(); ++i) {
    result.spans[i][0] = clue.spans[i].start_seconds;
    result.spans[i][1] = clue.spans[i].end_seconds;
  }
  for (size_t i = 0; i < clue.boxes.size(); ++i) {
    const RawBox& box = clue.boxes[i];
    const double values[] = {box.x0, box.y0, box.x1, box.y1};
    std::copy(values, values + 4, result.boxes[i]);
  }
  std::copy_n(clue.problems.begin(), result.num_problems, result.problems);
  return result;
}

Clue from_struct(const vtts_clue* clue, const char* what) {
  const vtts_clue given = read_struct(clue, vtts_clue_default(), what, "clue");
  require(given.num_spans >= 0 && given.num_spans <= VTTS_MAX_CLUE_SPANS, what, "clue.num_spans",
          "in [0, 64]", given.num_spans);
  require(given.num_boxes >= 0 && given.num_boxes <= VTTS_MAX_CLUE_BOXES, what, "clue.num_boxes",
          "in [0, 64]", given.num_boxes);
  Clue result;
  result.glue_is_empty_list = given.glue_is_empty_list != 0;
  for (int32_t i = 0; i < given.num_spans; ++i) {
    result.spans.push_back({given.spans[i][0], given.spans[i][1]});
  }
  for (int32_t i = 0; i < given.num_boxes; ++i) {
    const double* box = given.boxes[i];
    result.boxes.push_back({box[0], box[1], box[2], box[3]});
  }
  return result;
}

}  // namespace vtts::abi

using namespace vtts::abi;

extern "C" {

vtts_clue vtts_clue_default(void) {
  vtts_clue clue = {};
  clue.struct_size = sizeof clue;
  clue.think = clue.answer = clue.glue = {-1, -1};
  return clue;
}

vtts_status vtts_clue_parse(const char* text, int64_t length, vtts_clue* clue) {
  return guard([&] {
    const char* what = "clue_parse";
    checked_size<vtts_clue>(clue, what, "clue");
    require(length >= 0, what, "length", ">= 0", length);
    if (length > 0) require_pointer(text, what, "text");
    write_struct(to_struct(vtts::parse_clue(text, length)), clue, what, "clue");
  });
}

}  // extern "C"
