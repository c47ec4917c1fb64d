// patchify and patch_embed on the CPU, and folding.
#include "vtts/patchify.h"

#include "abi/guard.h"
#include "abi/jobs.h"
#include "abi/structs.h"
#include "core/patch_embed.h"

namespace vtts::abi {
namespace {

vtts_patch_embed_weights read_weights(const vtts_patch_embed_weights* weights, const char* what) {
  const vtts_patch_embed_weights given =
      read_struct(weights, vtts_patch_embed_weights_default(), what, "weights");
  require_pointer(given.weight, what, "weights.weight");
  require_aligned(given.weight, alignof(float), what, "weights.weight");
  require_aligned(given.bias, alignof(float), what, "weights.bias");
  require(given.num_outputs >= 1 && given.num_outputs <= 65536, what, "weights.num_outputs",
          "in [1, 65536]", given.num_outputs);
  return given;
}

void check_output(const float* out, const Jobs& jobs, const char* what) {
  if (!jobs.empty()) require_pointer(out, what, "out");
  require_aligned(out, alignof(float), what, "out");
}

}  // namespace
}  // namespace vtts::abi

using namespace vtts::abi;

extern "C" {

vtts_patchify_job vtts_patchify_job_default(void) {
  vtts_patchify_job job = {};
  job.struct_size = sizeof job;
  return job;
}

vtts_patchify_options vtts_patchify_options_default(void) {
  vtts_patchify_options options = {};
  options.struct_size = sizeof options;
  options.num_threads = 1;
  options.patch_px = 14;
  // OPENAI_CLIP_MEAN and OPENAI_CLIP_STD of transformers, times 255 in float32 as there.
  const float mean[] = {0.48145466f, 0.4578275f, 0.40821073f};
  const float std[] = {0.26862954f, 0.26130258f, 0.27577711f};
  for (int c = 0; c < vtts::kChannels; ++c) {
    options.mean[c] = mean[c] * 255.0f;
    options.std[c] = std[c] * 255.0f;
  }
  return options;
}

vtts_patch_embed_weights vtts_patch_embed_weights_default(void) {
  vtts_patch_embed_weights weights = {};
  weights.struct_size = sizeof weights;
  return weights;
}

vtts_status vtts_patchify_num_rows(const vtts_patchify_job* jobs, int64_t num_jobs,
                                   const vtts_patchify_options* options, int64_t* num_rows) {
  return guard([&] {
    const char* what = "patchify_num_rows";
    require_pointer(num_rows, what, "num_rows");
    const vtts::PatchifyOptions how = read_options(options, false, what);
    *num_rows = read_jobs(jobs, num_jobs, how.patch_px, what).num_rows;
  });
}

vtts_status vtts_patchify_row_size(const vtts_patchify_options* options, int64_t* row_size) {
  return guard([&] {
    const char* what = "patchify_row_size";
    require_pointer(row_size, what, "row_size");
    *row_size = vtts::patch_row(read_options(options, false, what).patch_px);
  });
}

vtts_status vtts_patchify_cpu(const vtts_patchify_job* jobs, int64_t num_jobs,
                              const vtts_patchify_options* options, float* out) {
  return guard([&] {
    const char* what = "patchify_cpu";
    const vtts::PatchifyOptions how = read_options(options, true, what);
    const Jobs native = read_jobs(jobs, num_jobs, how.patch_px, what);
    check_output(out, native, what);
    vtts::patchify(native.data(), native.size(), how, out);
  });
}

vtts_status vtts_patch_embed_cpu(const vtts_patchify_job* jobs, int64_t num_jobs,
                                 const vtts_patchify_options* options,
                                 const vtts_patch_embed_weights* weights, float* out) {
  return guard([&] {
    const char* what = "patch_embed_cpu";
    const vtts::PatchifyOptions how = read_options(options, true, what);
    const Jobs native = read_jobs(jobs, num_jobs, how.patch_px, what);
    const vtts_patch_embed_weights given = read_weights(weights, what);
    check_output(out, native, what);
    vtts::PatchEmbedArgs args;
    args.weight = given.weight;
    args.bias = given.bias;
    args.num_outputs = given.num_outputs;
    args.out = out;
    vtts::patch_embed(native.data(), native.size(), how, args);
  });
}

vtts_status vtts_patch_embed_fold(const vtts_patch_embed_weights* weights,
                                  const vtts_patchify_options* options, vtts_dtype dtype,
                                  void* folded, float* folded_bias) {
  return guard([&] {
    const char* what = "patch_embed_fold";
    const vtts_patch_embed_weights given = read_weights(weights, what);
    const vtts::PatchifyOptions how = read_options(options, false, what);
    const vtts::DType type = read_dtype(dtype, what);
    require_pointer(folded, what, "folded");
    require_aligned(folded, static_cast<uintptr_t>(vtts::bytes_of(type)), what, "folded");
    require_pointer(folded_bias, what, "folded_bias");
    require_aligned(folded_bias, alignof(float), what, "folded_bias");
    vtts::fold_patch_embed(given.weight, given.bias, given.num_outputs, how, type, folded,
                           folded_bias);
  });
}

}  // extern "C"
