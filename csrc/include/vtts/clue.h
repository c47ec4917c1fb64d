/* Clues: what a model's text says about where the evidence is, <think> <answer> <glue>. */
#ifndef VTTS_CLUE_H_
#define VTTS_CLUE_H_

#include "vtts/base.h"

#ifdef __cplusplus
extern "C" {
#endif

#define VTTS_MAX_CLUE_SPANS 64
#define VTTS_MAX_CLUE_BOXES 64
#define VTTS_MAX_CLUE_PROBLEMS 8

/* Bytes [begin, end) of a text; (-1, -1) where the tag never came. Never changes. */
typedef struct vtts_text_range {
  int64_t begin, end;
} vtts_text_range;

/* What one answer said. Numbers are as written: finite, not clipped, not ordered. */
typedef struct vtts_clue {
  uint32_t struct_size;
  int32_t num_spans, num_boxes, num_problems;
  vtts_text_range think, answer, glue;  /* what stood in the tags, white space stripped */
  int32_t glue_is_empty_list;           /* 1 for "[]" and "()": there is nothing to look at */
  int32_t reserved;                     /* 0 */
  double spans[VTTS_MAX_CLUE_SPANS][2]; /* start, end in seconds */
  double boxes[VTTS_MAX_CLUE_BOXES][4]; /* x0, y0, x1, y1 */
  const char* problems[VTTS_MAX_CLUE_PROBLEMS]; /* static sentences about what was of no use */
} vtts_clue;

/* An empty clue. Never fails. */
VTTS_API vtts_clue vtts_clue_default(void);

/* Reads `length` bytes of an answer into *clue, whose struct_size the caller has set. Any bytes:
 * what is no UTF-8 counts as U+FFFD. Takes time linear in the length. A text without a usable clue
 * is no error: there are no spans and no boxes then, and problems say why.
 * VTTS_ERROR_INVALID_ARGUMENT: a NULL pointer (`text` may be NULL where length is 0), a negative
 * length, an unknown struct_size. */
VTTS_API vtts_status vtts_clue_parse(const char* text, int64_t length, vtts_clue* clue);

#ifdef __cplusplus
}
#endif

#endif /* VTTS_CLUE_H_ */
