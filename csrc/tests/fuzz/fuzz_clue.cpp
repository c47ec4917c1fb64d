// vtts_clue_parse on any bytes: ranges lie in the text, numbers are finite, counts within bounds.
#include <cmath>
#include <initializer_list>
#include <memory>

#include "tests/fuzz/fuzz_input.h"
#include "vtts/vtts.h"

using vtts::fuzz::promise;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // A copy of exactly this size, so that reading behind the text is seen.
  const std::unique_ptr<char[]> text(new char[size]);
  for (size_t i = 0; i < size; ++i) text[i] = static_cast<char>(data[i]);
  vtts_clue clue = vtts_clue_default();
  const int64_t length = static_cast<int64_t>(size);
  promise(vtts_clue_parse(text.get(), length, &clue) == VTTS_OK);
  promise(clue.num_spans >= 0 && clue.num_spans <= VTTS_MAX_CLUE_SPANS);
  promise(clue.num_boxes >= 0 && clue.num_boxes <= VTTS_MAX_CLUE_BOXES);
  for (int32_t i = 0; i < clue.num_spans; ++i) {
    promise(std::isfinite(clue.spans[i][0]) && std::isfinite(clue.spans[i][1]));
  }
  for (int32_t i = 0; i < clue.num_boxes; ++i) {
    for (const double v : clue.boxes[i]) promise(std::isfinite(v));
  }
  for (const vtts_text_range& range : {clue.think, clue.answer, clue.glue}) {
    promise((range.begin == -1 && range.end == -1) ||
            (0 <= range.begin && range.begin <= range.end && range.end <= length));
  }
  promise(clue.num_problems > 0 || clue.num_spans + clue.num_boxes > 0);
  return 0;
}
