#include "core/clue.h"

#include <cstring>
#include <optional>

#include "core/glue.h"

namespace vtts {
namespace {

enum Tag { kThink, kAnswer, kGlue, kNumTags, kNone = kNumTags };
constexpr const char* kTagNames[kNumTags] = {"think", "answer", "glue"};
constexpr int kMaxTagSpaces = 4;  // at each place of a tag

struct TagMatch {
  Tag tag = kNone;
  bool closing = false;
  int64_t end = 0;
};

char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }

// The tag that begins at the `<` at text[at], if one does: < {0,4}/? {0,4}name {0,4}>.
TagMatch match_tag(const char* text, int64_t length, int64_t at) {
  int64_t i = at + 1;
  const auto skip_spaces = [&](int most) {
    int count = 0;
    while (count < most && i < length && text[i] == ' ') ++i, ++count;
    return count;
  };
  TagMatch match;
  const int before = skip_spaces(kMaxTagSpaces);
  if (i < length && text[i] == '/') {
    match.closing = true;
    ++i;
    skip_spaces(kMaxTagSpaces);
  } else if (before == kMaxTagSpaces) {
    skip_spaces(kMaxTagSpaces);  // without a slash both runs of spaces are one
  }
  for (int tag = 0; tag < kNumTags; ++tag) {
    const int64_t size = static_cast<int64_t>(std::strlen(kTagNames[tag]));
    int64_t same = 0;
    while (same < size && i + same < length && lower(text[i + same]) == kTagNames[tag][same]) {
      ++same;
    }
    if (same < size) continue;
    i += size;
    skip_spaces(kMaxTagSpaces);
    if (i < length && text[i] == '>') {
      match.tag = static_cast<Tag>(tag);
      match.end = i + 1;
    }
    return match;
  }
  return match;
}

// White space of Python's str.strip() in UTF-8, longest first where one could hide another.
constexpr const char* kWideSpaces[] = {
    "\xC2\x85",     "\xC2\xA0",     "\xE1\x9A\x80", "\xE2\x80\x80", "\xE2\x80\x81",
    "\xE2\x80\x82", "\xE2\x80\x83", "\xE2\x80\x84", "\xE2\x80\x85", "\xE2\x80\x86",
    "\xE2\x80\x87", "\xE2\x80\x88", "\xE2\x80\x89", "\xE2\x80\x8A", "\xE2\x80\xA8",
    "\xE2\x80\xA9", "\xE2\x80\xAF", "\xE2\x81\x9F", "\xE3\x80\x80"};

bool is_ascii_space(char c) {
  return c == ' ' || (c >= '\t' && c <= '\r') || (c >= '\x1C' && c <= '\x1F');
}

// Bytes of the white space that begins (or ends) a text; 0 if none does.
int64_t space_bytes(const char* text, TextRange range, bool at_end) {
  const int64_t left = range.end - range.begin;
  if (left > 0 && is_ascii_space(text[at_end ? range.end - 1 : range.begin])) return 1;
  for (const char* space : kWideSpaces) {
    const int64_t size = static_cast<int64_t>(std::strlen(space));
    if (left < size) continue;
    const char* at = text + (at_end ? range.end - size : range.begin);
    if (std::memcmp(at, space, static_cast<size_t>(size)) == 0) return size;
  }
  return 0;
}

TextRange strip(const char* text, TextRange range) {
  while (const int64_t bytes = space_bytes(text, range, false)) range.begin += bytes;
  while (const int64_t bytes = space_bytes(text, range, true)) range.end -= bytes;
  return range;
}

struct Section {
  TextRange range;
  bool closed = false;
};

}  // namespace

Clue parse_clue(const char* text, int64_t length) {
  std::optional<Section> best[kNumTags];
  Tag open = kNone;
  int64_t begin = 0;  // of the running section, right after the last tag
  const auto leave = [&](int64_t end, bool closed) {
    if (open != kNone) {
      std::optional<Section>& kept = best[open];
      if (!kept || closed || !kept->closed) kept = Section{{begin, end}, closed};
    }
    open = kNone;
  };
  for (int64_t at = 0; at < length;) {
    const void* found = std::memchr(text + at, '<', static_cast<size_t>(length - at));
    if (found == nullptr) break;
    at = static_cast<const char*>(found) - text;
    const TagMatch match = match_tag(text, length, at);
    if (match.tag == kNone) {
      ++at;
      continue;
    }
    // Some chat templates open the thought in the prompt.
    if (match.closing && match.tag == kThink && open == kNone) open = kThink;
    leave(at, match.closing && open == match.tag);
    if (!match.closing) open = match.tag;
    at = begin = match.end;
  }
  leave(length, false);

  Clue clue;
  TextRange* const ranges[kNumTags] = {&clue.think, &clue.answer, &clue.glue};
  for (int tag = 0; tag < kNumTags; ++tag) {
    if (best[tag]) *ranges[tag] = strip(text, best[tag]->range);
  }
  if (!best[kGlue]) {
    clue.problems.push_back("the text holds no <glue>");
    return clue;
  }
  GlueScanner scanner;
  const TextRange glue = best[kGlue]->range;
  scanner.scan(text + glue.begin, glue.end - glue.begin);
  clue.spans = std::move(scanner.spans);
  clue.boxes = std::move(scanner.boxes);
  clue.problems = std::move(scanner.problems);
  if (!best[kGlue]->closed) clue.problems.push_back("<glue> is never closed");
  if (scanner.overflow) clue.problems.push_back("only the first 64 spans and 64 boxes are kept");
  if (clue.spans.empty() && clue.boxes.empty()) {
    clue.problems.push_back("<glue> holds no span and no box");
  }
  const char* stripped = text + clue.glue.begin;
  clue.glue_is_empty_list =
      clue.glue.end - clue.glue.begin == 2 &&
      (std::memcmp(stripped, "[]", 2) == 0 || std::memcmp(stripped, "()", 2) == 0);
  return clue;
}

}  // namespace vtts
