/* patchify: uint8 RGB frames -> crop -> antialiased bicubic resize -> normalise -> patch rows of a
 * vision tower of the Qwen2-VL kind: patches of 14 px (Qwen2-VL, Qwen2.5-VL) or 16 px (Qwen3-VL),
 * 2 x 2 patches a token, 2 frames a pair; and patch_embed, the same followed by the tower's first
 * product. With VTTS_RESIZE_FIXED the rows are bit for bit those of transformers'
 * Qwen2VLVideoProcessor and Qwen3VLVideoProcessor on a CPU.
 *
 * Below, p is options->patch_px, 2 p the px a side of a token, and a row has 6 p^2 values.
 */
#ifndef VTTS_PATCHIFY_H_
#define VTTS_PATCHIFY_H_

#include "vtts/base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How a crop becomes the pixels of its view, always antialiased bicubic; without effect where the
 * crop has the view's size. Each kernel gives the same bits on every device. */
typedef enum vtts_resize {
  VTTS_RESIZE_FIXED = 0, /* torchvision v2 and transformers 5 on a CPU: int16 weights, rounded to
                            whole levels after each of the two passes */
  VTTS_RESIZE_FLOAT = 1, /* torchvision v1: float32 in both passes, rounded once at the end */
  VTTS_RESIZE_PIL = 2, /* Image.resize of Pillow 13: weights of 22 bits, rounded after each pass */
  VTTS_RESIZE_FORCE_INT32 = 0x7fffffff
} vtts_resize;

/* Instruction set of the CPU functions; never changes a value of patchify. */
typedef enum vtts_isa {
  VTTS_ISA_AUTO = 0, /* the best that the machine has */
  VTTS_ISA_SCALAR = 1,
  VTTS_ISA_AVX2 = 2,
  VTTS_ISA_AVX512 = 3,
  VTTS_ISA_NEON = 4,
  VTTS_ISA_FORCE_INT32 = 0x7fffffff
} vtts_isa;

typedef enum vtts_dtype {
  VTTS_FLOAT32 = 0,
  VTTS_FLOAT16 = 1,
  VTTS_BFLOAT16 = 2,
  VTTS_DTYPE_FORCE_INT32 = 0x7fffffff
} vtts_dtype;

typedef enum vtts_device {
  VTTS_DEVICE_CPU = 0,
  VTTS_DEVICE_CUDA = 1,
  VTTS_DEVICE_FORCE_INT32 = 0x7fffffff
} vtts_device;

/* A borrowed RGB frame: `height` rows of `width` packed pixels of 3 bytes, row_stride_bytes apart
 * (any value, negative too). Never changes. */
typedef struct vtts_frame {
  const uint8_t* data;
  int64_t row_stride_bytes;
  int64_t height; /* 1 to 2^20 px */
  int64_t width;
} vtts_frame;

/* Source pixels, half-open: columns [x0, x1), rows [y0, y1). Never changes. */
typedef struct vtts_pixel_box {
  int64_t x0, y0, x1, y1;
} vtts_pixel_box;

/* One frame pair through one box at one size. Elements of an array of jobs lie sizeof(job) of the
 * caller apart, so all must have one struct_size. frame_b may be frame_a. */
typedef struct vtts_patchify_job {
  uint32_t struct_size;
  vtts_resize resize;
  vtts_frame frame_a, frame_b;
  vtts_pixel_box box;     /* not empty, inside both frames; the resize sees nothing else */
  int64_t resized_height; /* px, positive multiples of 2 p */
  int64_t resized_width;
} vtts_patchify_job;

typedef struct vtts_patchify_options {
  uint32_t struct_size;
  vtts_isa isa;        /* of the CPU functions */
  int32_t num_threads; /* of the CPU functions, 1 to 1024; never changes a value */
  float mean[3];       /* a value x of channel c becomes (x - mean[c]) / std[c]; 0..255 units */
  float std[3];        /* > 0 */
  int32_t patch_px;    /* px a side of a patch, 14 or 16 */
} vtts_patchify_options;

/* The first product of a vision tower: out = rows weight^T + bias. */
typedef struct vtts_patch_embed_weights {
  uint32_t struct_size;
  uint32_t reserved;   /* 0 */
  const float* weight; /* (num_outputs, 6 p^2), contiguous, as in the checkpoint */
  const float* bias;   /* (num_outputs), or NULL */
  int64_t num_outputs; /* 1 to 65536 */
} vtts_patch_embed_weights;

/* What a launch on a GPU needs. Pointers are of the device on which cuda_stream is. */
typedef struct vtts_cuda_launch {
  uint32_t struct_size;
  vtts_dtype dtype;        /* of the output; for patch_embed of the folded weight too */
  const int32_t* places;   /* NULL: tokens in raster order. Otherwise one for each token of 4 rows:
                              row 4 t + q goes to row 4 places[t] + q (window order); a permutation,
                              which is not checked */
  void* workspace;         /* device memory, 16-byte aligned, in use until the stream has run */
  int64_t workspace_bytes; /* at least what *_workspace_bytes said */
  void* cuda_stream;       /* a cudaStream_t; NULL is the legacy default stream */
} vtts_cuda_launch;

/* A weight with the normalisation folded in, on the device, made by vtts_patch_embed_fold. */
typedef struct vtts_patch_embed_folded {
  uint32_t struct_size;
  uint32_t reserved; /* 0 */
  const void*
      weight; /* (num_outputs, 6 p^2) of the launch's dtype, on the device, 16-byte aligned */
  const float* bias;   /* (num_outputs) float32, likewise */
  int64_t num_outputs; /* a multiple of 8, 8 to 65536 */
} vtts_patch_embed_folded;

/* Defaults: VTTS_RESIZE_FIXED, auto, 1 thread, and what Qwen2-VL and Qwen2.5-VL take: patches of 14
 * px, OpenAI CLIP's mean and std times 255; zeros elsewhere. Never fail. */
VTTS_API vtts_patchify_job vtts_patchify_job_default(void);
VTTS_API vtts_patchify_options vtts_patchify_options_default(void);
VTTS_API vtts_patch_embed_weights vtts_patch_embed_weights_default(void);
VTTS_API vtts_cuda_launch vtts_cuda_launch_default(void);
VTTS_API vtts_patch_embed_folded vtts_patch_embed_folded_default(void);

/* Rows that `num_jobs` jobs produce together, to *num_rows. Checks the jobs.
 * options: NULL takes the defaults; isa and num_threads are not read.
 * VTTS_ERROR_INVALID_ARGUMENT: a NULL pointer, a negative count, a box that is empty or outside a
 * frame, a size that is no positive multiple of 2 p, an unknown resize, another patch size, more
 * than 2^40 rows. */
VTTS_API vtts_status vtts_patchify_num_rows(const vtts_patchify_job* jobs, int64_t num_jobs,
                                            const vtts_patchify_options* options,
                                            int64_t* num_rows);

/* Values of a patch row, 6 p^2 (1176 or 1536), to *row_size. Otherwise as
 * vtts_patchify_num_rows. */
VTTS_API vtts_status vtts_patchify_row_size(const vtts_patchify_options* options,
                                            int64_t* row_size);

/* Writes the rows of all jobs, one job after the other, to `out`, float32 (rows, 6 p^2), aligned to
 * 4 bytes. Frames and `out` are host memory and do not overlap. Blocks until it is done.
 * Row r of a job: r = ((bh * (W' / 2p) + bw) * 2 + mh) * 2 + mw is the patch at patch row 2 bh +
 * mh, patch column 2 bw + mw; its column ((c * 2 + frame) * p + y) * p + x.
 * options: NULL takes the defaults. No jobs: nothing is written.
 * VTTS_ERROR_INVALID_ARGUMENT as vtts_patchify_num_rows, or a bad option or a misaligned `out`;
 * VTTS_ERROR_UNSUPPORTED: an instruction set that the machine lacks. */
VTTS_API vtts_status vtts_patchify_cpu(const vtts_patchify_job* jobs, int64_t num_jobs,
                                       const vtts_patchify_options* options, float* out);

/* The rows times a weight: `out` is float32 (rows, num_outputs), host memory. Normalised rows are
 * never written to memory. Otherwise as vtts_patchify_cpu. */
VTTS_API vtts_status vtts_patch_embed_cpu(const vtts_patchify_job* jobs, int64_t num_jobs,
                                          const vtts_patchify_options* options,
                                          const vtts_patch_embed_weights* weights, float* out);

/* The functions on a GPU. Frames, `out`, places, workspace and folded weights are device memory of
 * the current device; jobs and options are host memory, read before the call returns. The work is
 * enqueued on launch->cuda_stream and not waited for: device memory must stay until it has run.
 * Calls on different streams need workspaces of their own. mean, std and patch_px are as on the
 * CPU; isa and num_threads are not read. Without CUDA in the build: VTTS_ERROR_UNSUPPORTED. */

/* Bytes of workspace that a call with these jobs needs, to *num_bytes. */
VTTS_API vtts_status vtts_patchify_cuda_workspace_bytes(const vtts_patchify_job* jobs,
                                                        int64_t num_jobs,
                                                        const vtts_patchify_options* options,
                                                        int64_t* num_bytes);

/* `out`: (rows, 6 p^2) of launch->dtype, 16-byte aligned. VTTS_ERROR_CUDA: CUDA failed. */
VTTS_API vtts_status vtts_patchify_cuda(const vtts_patchify_job* jobs, int64_t num_jobs,
                                        const vtts_patchify_options* options,
                                        const vtts_cuda_launch* launch, void* out);

/* Folds the normalisation of `options` into a weight, once a model, all in host memory:
 * folded = weight / std rounded to dtype, folded_bias = bias - sum of mean * folded, so that
 * patch_embed multiplies whole pixel values. folded: (num_outputs, 6 p^2) of dtype; folded_bias:
 * (num_outputs) float32. */
VTTS_API vtts_status vtts_patch_embed_fold(const vtts_patch_embed_weights* weights,
                                           const vtts_patchify_options* options, vtts_dtype dtype,
                                           void* folded, float* folded_bias);

VTTS_API vtts_status vtts_patch_embed_cuda_workspace_bytes(const vtts_patchify_job* jobs,
                                                           int64_t num_jobs,
                                                           const vtts_patchify_options* options,
                                                           const vtts_patch_embed_folded* folded,
                                                           vtts_dtype dtype, int64_t* num_bytes);

/* `out`: (rows, num_outputs) of launch->dtype, 16-byte aligned. */
VTTS_API vtts_status vtts_patch_embed_cuda(const vtts_patchify_job* jobs, int64_t num_jobs,
                                           const vtts_patchify_options* options,
                                           const vtts_patch_embed_folded* folded,
                                           const vtts_cuda_launch* launch, void* out);

#ifdef __cplusplus
}
#endif

#endif /* VTTS_PATCHIFY_H_ */
