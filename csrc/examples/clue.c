/* Reads an answer from stdin and prints where it says the evidence is. */
#include <stdio.h>
#include <vtts/vtts.h>

static char text[1 << 16];

int main(void) {
  const size_t length = fread(text, 1, sizeof text, stdin);
  vtts_clue clue = vtts_clue_default();
  if (vtts_clue_parse(text, (int64_t)length, &clue) != VTTS_OK) {
    fprintf(stderr, "%s\n", vtts_last_error_message());
    return 1;
  }
  for (int32_t i = 0; i < clue.num_spans; ++i) {
    printf("span %.17g %.17g\n", clue.spans[i][0], clue.spans[i][1]);
  }
  for (int32_t i = 0; i < clue.num_boxes; ++i) {
    const double* box = clue.boxes[i];
    printf("box %.17g %.17g %.17g %.17g\n", box[0], box[1], box[2], box[3]);
  }
  for (int32_t i = 0; i < clue.num_problems; ++i) printf("problem %s\n", clue.problems[i]);
  if (clue.answer.begin >= 0) {
    printf("answer %.*s\n", (int)(clue.answer.end - clue.answer.begin), text + clue.answer.begin);
  }
  return 0;
}
