/* Patch rows of one frame pair through a crop, printed as a count and one number. C99. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <vtts/vtts.h>

enum { kHeight = 360, kWidth = 640, kBytes = kHeight * kWidth * 3 };

/* Stands for a decoder. */
static void decode(uint8_t* pixels, uint64_t frame) {
  for (uint64_t i = 0; i < kBytes; ++i)
    pixels[i] = (uint8_t)((i * i / 7 + i * 31 + frame * 13) % 256);
}

static void check(vtts_status status) {
  if (status == VTTS_OK) return;
  fprintf(stderr, "%s: %s\n", vtts_status_name(status), vtts_last_error_message());
  exit(1);
}

int main(void) {
  static uint8_t pixels_a[kBytes], pixels_b[kBytes];
  decode(pixels_a, 720);
  decode(pixels_b, 723);
  vtts_patchify_job job = vtts_patchify_job_default();
  job.frame_a.data = pixels_a;
  job.frame_b.data = pixels_b;
  job.frame_a.row_stride_bytes = job.frame_b.row_stride_bytes = kWidth * 3;
  job.frame_a.height = job.frame_b.height = kHeight;
  job.frame_a.width = job.frame_b.width = kWidth;
  job.box.x0 = 160;
  job.box.y0 = 36;
  job.box.x1 = 384;
  job.box.y1 = 288;
  job.resized_height = 252;
  job.resized_width = 224;
  vtts_patchify_options options = vtts_patchify_options_default();
  options.num_threads = 2;

  int64_t num_rows = 0, row_size = 0;
  check(vtts_patchify_num_rows(&job, 1, &options, &num_rows));
  check(vtts_patchify_row_size(&options, &row_size));
  const size_t num_bytes = (size_t)(num_rows * row_size) * sizeof(float);
  float* rows = malloc(num_bytes);
  if (rows == NULL) return 1;
  check(vtts_patchify_cpu(&job, 1, &options, rows));

  uint64_t fingerprint = 0xcbf29ce484222325; /* FNV-1a */
  for (size_t i = 0; i < num_bytes; ++i) {
    fingerprint = (fingerprint ^ ((const uint8_t*)rows)[i]) * 0x100000001b3;
  }
  free(rows);
  printf("{\"rows\": %" PRId64 ", \"fingerprint\": \"%016" PRIx64 "\"}\n", num_rows, fingerprint);
  return 0;
}
