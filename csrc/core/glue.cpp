#include "core/glue.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <system_error>

namespace vtts {
namespace {

constexpr size_t kMaxNumberChars = 64;  // a longer number is not a time or a coordinate
constexpr size_t kMaxWordChars = 12;    // what a word is compared with is shorter

bool is_digit(char c) { return c >= '0' && c <= '9'; }

bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }

bool holds(const std::string& text, char c) { return text.find(c) != std::string::npos; }

// Whether a decimal number that no double can hold is too large rather than too small.
bool overflows(const char* begin, const char* end) {
  const char* exponent = std::find(begin, end, 'e');
  int64_t scale = 0;
  if (exponent != end) {
    const bool negative = exponent[1] == '-';
    for (const char* c = exponent + 1; c != end; ++c) {
      if (is_digit(*c)) scale = std::min<int64_t>(scale * 10 + (*c - '0'), 1 << 20);
    }
    if (negative) scale = -scale;
  }
  // Place of the first digit that is not zero, counted from the point.
  const char* point = std::find(begin, exponent, '.');
  const char* first = std::find_if(begin, exponent, [](char c) { return c >= '1' && c <= '9'; });
  return scale + (point - first) > 0;
}

// What Python's float() makes of digits with at most one point and an exponent.
double decimal(const char* begin, const char* end) {
  double value = 0.0;
  const std::from_chars_result result = std::from_chars(begin, end, value);
  if (result.ec == std::errc::result_out_of_range) {
    return overflows(begin, end) ? std::numeric_limits<double>::infinity() : 0.0;
  }
  return value;
}

// Seconds or a coordinate; NaN if it has more digits than a number may have.
double value_of(std::string token) {
  if (token.size() > kMaxNumberChars) return std::numeric_limits<double>::quiet_NaN();
  for (const char* trailing : {"+-", "e", ":"}) {
    token.erase(token.find_last_not_of(trailing) + 1);
  }
  double seconds = 0.0;
  size_t begin = 0;
  while (true) {
    const size_t end = std::min(token.find(':', begin), token.size());
    seconds = seconds * 60.0 + decimal(token.data() + begin, token.data() + end);
    if (end == token.size()) return seconds;
    begin = end + 1;
  }
}

}  // namespace

void GlueScanner::scan(const char* text, int64_t length) {
  struct Sign {
    const char* utf8;  // three bytes
    Kind kind;
  };
  static constexpr Sign kSigns[] = {
      {"\xE2\x88\x92", Kind::kMinus},  // U+2212
      {"\xE2\x80\x93", Kind::kDash},   // en dash
      {"\xE2\x80\x94", Kind::kDash},   // em dash
      {"\xE5\x88\xB0", Kind::kTo},     // U+5230
      {"\xE8\x87\xB3", Kind::kTo},     // U+81F3
      {"\xEF\xBC\x8C", Kind::kComma},  // U+FF0C
      {"\xE3\x80\x81", Kind::kComma},  // U+3001
  };
  for (int64_t i = 0; i < length; ++i) {
    const char c = text[i];
    if (static_cast<unsigned char>(c) < 0x80) {
      take(Kind::kAscii, c);
      continue;
    }
    // A first byte always begins a character, so three equal bytes are that character. All others
    // mean the same wherever they come, so that they may be taken byte by byte.
    Kind kind = Kind::kOther;
    if (length - i >= 3) {
      for (const Sign& sign : kSigns) {
        if (std::memcmp(text + i, sign.utf8, 3) == 0) kind = sign.kind;
      }
    }
    if (kind != Kind::kOther) i += 2;
    take(kind, '\0');
  }
  if (!token_.empty()) end_token();
  end_group();
}

void GlueScanner::take(Kind kind, char c) {
  if (!token_.empty()) {
    if (grow(kind, c)) return;
    end_token();
  }
  begin(kind, c);
}

void GlueScanner::begin(Kind kind, char c) {
  if (kind == Kind::kAscii && (is_digit(c) || c == '.' || is_letter(c))) {
    token_ = c;
    is_word_ = is_letter(c);
    return;
  }
  if (kind == Kind::kAscii) {
    if (c == '-') kind = Kind::kMinus;
    if (c == '~') kind = Kind::kDash;
    if (c == ',') kind = Kind::kComma;
  }
  const bool minus = minus_;
  minus_ = false;
  if (kind == Kind::kMinus || kind == Kind::kDash || kind == Kind::kTo) {
    if (after_number_ && group_size_ > 0) {
      binding_ = true;
      after_number_ = false;
    } else if (kind == Kind::kMinus) {
      minus_ = !minus;
    }
  } else if (kind == Kind::kComma) {
    after_number_ = binding_ = false;
  } else if (kind == Kind::kAscii && c != '\0' && std::strchr("()[]{}", c) != nullptr) {
    end_group();
  } else if (kind == Kind::kAscii && (c == '\n' || c == ';') && after_number_) {
    end_group();
  }
}

bool GlueScanner::grow(Kind kind, char c) {
  if (kind != Kind::kAscii) return false;
  if (is_word_) {
    if (!is_letter(c) && !is_digit(c)) return false;
    if (token_.size() < kMaxWordChars) token_ += c;
    return true;
  }
  const char last = token_.back();
  const bool exponent = holds(token_, 'e');
  bool grows = false;
  if (is_digit(c)) {
    grows = true;
  } else if (c == '.') {
    grows = !holds(token_, '.') && !exponent && last != ':';
  } else if (c == ':') {
    grows = is_digit(last) && !holds(token_, '.') && !exponent &&
            std::count(token_.begin(), token_.end(), ':') < 2;
  } else if (c == 'e' || c == 'E') {
    c = 'e';
    grows = is_digit(last) && !exponent && !holds(token_, ':');
  } else {
    grows = (c == '+' || c == '-') && last == 'e';
  }
  if (grows && token_.size() <= kMaxNumberChars) token_ += c;
  return grows;
}

void GlueScanner::end_token() {
  std::string token;
  token.swap(token_);
  if (is_word_) {
    for (char& c : token) {
      if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    }
    if ((token == "to" || token == "till" || token == "until") && after_number_ &&
        group_size_ > 0) {
      binding_ = true;
      after_number_ = false;
    } else if (token == "nan" || token == "inf" || token == "infinity") {
      number(std::numeric_limits<double>::quiet_NaN());
    }
  } else if (std::any_of(token.begin(), token.end(), is_digit)) {
    const double value = value_of(std::move(token));
    number(minus_ ? -value : value);
  }
  minus_ = false;
}

void GlueScanner::number(double value) {
  if (binding_) {
    binding_ = false;
    const double span[] = {group_[--group_size_], value};
    keep(span, 2);
    return;
  }
  if (group_size_ < 5) group_[group_size_++] = value;
  after_number_ = true;
}

void GlueScanner::end_group() {
  const int size = group_size_;
  group_size_ = 0;
  binding_ = after_number_ = minus_ = false;
  if (size == 2 || size == 4) {
    keep(group_, size);
  } else if (size > 2) {
    note("a group has neither two nor four numbers");
  }
}

void GlueScanner::keep(const double* values, int count) {
  if (!std::all_of(values, values + count, [](double v) { return std::isfinite(v); })) {
    note("a number is not finite or too long");
  } else if (count == 2 && spans.size() < kMaxClueSpans) {
    spans.push_back({values[0], values[1]});
  } else if (count == 4 && boxes.size() < kMaxClueBoxes) {
    boxes.push_back({values[0], values[1], values[2], values[3]});
  } else {
    overflow = true;
  }
}

void GlueScanner::note(const char* problem) {
  if (std::find(problems.begin(), problems.end(), problem) == problems.end()) {
    problems.push_back(problem);
  }
}

}  // namespace vtts
