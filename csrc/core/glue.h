// Spans and boxes in free text, by the rules of vtts_rt/perception/glue.py. A run of numbers
// between brackets is a group: two numbers are a span, four a box.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/clue.h"

namespace vtts {

class GlueScanner {
 public:
  // Scans a whole text. Found items beyond the bounds are left out and `overflow` is set.
  void scan(const char* text, int64_t length);

  std::vector<RawSpan> spans;
  std::vector<RawBox> boxes;
  std::vector<const char*> problems;  // one of a kind, in the order of their first occurrence
  bool overflow = false;

 private:
  // What a character is outside numbers and words; letters and digits are chars of themselves.
  enum class Kind { kAscii, kDash, kMinus, kTo, kComma, kOther };

  void take(Kind kind, char c);
  void begin(Kind kind, char c);
  bool grow(Kind kind, char c);
  void end_token();
  void number(double value);
  void end_group();
  void keep(const double* values, int count);
  void note(const char* problem);

  double group_[5] = {};  // the first five numbers of the running group
  int group_size_ = 0;
  std::string token_;  // a number or word that may still grow
  bool is_word_ = false;
  bool minus_ = false;         // a sign right before the next number
  bool binding_ = false;       // a connector follows the last number of the group
  bool after_number_ = false;  // nothing but spaces and words since the last number
};

}  // namespace vtts
