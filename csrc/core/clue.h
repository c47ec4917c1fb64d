// Clues in a model's text: the spans, boxes, ranges and problems of vtts_rt/perception/clue.py.
//
// Equal to the bit: tests/csrc/golden.json and a fuzz test hold the two together.
#pragma once

#include <cstdint>
#include <vector>

namespace vtts {

inline constexpr int kMaxClueSpans = 64;
inline constexpr int kMaxClueBoxes = 64;

// As written in the text: finite, neither clipped nor ordered.
struct RawSpan {
  double start_seconds = 0.0, end_seconds = 0.0;
};
struct RawBox {
  double x0 = 0.0, y0 = 0.0, x1 = 0.0, y1 = 0.0;
};

// Bytes [begin, end) of a text; (-1, -1) where there is no such part.
struct TextRange {
  int64_t begin = -1, end = -1;
};

struct Clue {
  TextRange think, answer, glue;      // what stood in the tags, white space stripped
  std::vector<RawSpan> spans;         // at most kMaxClueSpans
  std::vector<RawBox> boxes;          // at most kMaxClueBoxes
  std::vector<const char*> problems;  // string literals
  bool glue_is_empty_list = false;    // "[]" or "()": the model says that nothing is to be seen
};

// Reads any bytes; what is no UTF-8 counts as U+FFFD, which means nothing in a clue. Linear time.
Clue parse_clue(const char* text, int64_t length);

}  // namespace vtts
