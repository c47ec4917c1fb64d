#include "core/patch_embed.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/linear.h"
#include "core/patch_rows.h"
#include "core/scratch.h"

namespace vtts {
namespace {

// Patch rows of a strip: 4.8 MB (6.3 with patches of 16 px), so that the product finds them in the
// last-level cache. Every strip packs the weight once more, at 1,280 outputs 3 % of the time of its
// products.
constexpr int64_t kStripRows = 1024;

void require(bool ok, const char* argument, const char* rule, const std::string& got) {
  if (ok) return;
  throw std::invalid_argument(std::string("patch_embed: ") + argument + " must be " + rule +
                              ", got " + got);
}

int64_t rows_of_token_row(const PatchifyJob& job, int patch_px) {
  return int64_t{job.width / token_px(patch_px)} * kPatchesPerToken;
}

}  // namespace

void patch_embed(const PatchifyJob* jobs, size_t num_jobs, const PatchifyOptions& options,
                 const PatchEmbedArgs& args) {
  const std::unique_ptr<PatchRows> rows = make_patch_rows("patch_embed", jobs, num_jobs, options);
  if (num_jobs == 0) return;
  require(args.weight != nullptr, "weight", "(num_outputs, values of a row) floats",
          "a null pointer");
  require(args.out != nullptr, "out", "(rows, num_outputs) floats", "a null pointer");
  require(args.num_outputs >= 1, "num_outputs", ">= 1", std::to_string(args.num_outputs));

  const int patch_px = options.patch_px, row_size = patch_row(patch_px);
  int64_t product_rows = 0, strip_rows = kStripRows;
  for (size_t i = 0; i < num_jobs; ++i) {
    product_rows += num_patch_rows(jobs[i], patch_px);
    strip_rows = std::max(strip_rows, rows_of_token_row(jobs[i], patch_px));
  }
  strip_rows = std::min(strip_rows, product_rows);
  thread_local Scratch scratch;
  float* const strip = scratch.floats(strip_rows * row_size);

  float* out = args.out;
  LinearArgs linear_args;
  linear_args.x = strip;
  linear_args.x_stride = row_size;
  linear_args.weight.values = args.weight;
  linear_args.weight.bias = args.bias;
  linear_args.num_channels = row_size;
  linear_args.num_outputs = args.num_outputs;

  std::vector<TokenRows> taken;  // the strip's token rows
  int64_t token_rows = 0;
  const auto flush = [&] {
    std::vector<TokenRows> parts;
    for (const TokenRows& run : taken) {
      cut(run, patch_px, rows_per_part(token_rows, options.num_threads), &parts);
    }
    rows->write(parts);
    linear_args.out = out;
    linear(linear_args, options.isa, options.num_threads);
    out += linear_args.num_rows * args.num_outputs;
    linear_args.num_rows = token_rows = 0;
    taken.clear();
  };
  for (const PatchifyJob* job = jobs; job != jobs + num_jobs; ++job) {
    const int64_t width = rows_of_token_row(*job, patch_px);
    const int token_rows_high = job->height / token_px(patch_px);
    for (int begin = 0; begin < token_rows_high;) {
      const int64_t room = (strip_rows - linear_args.num_rows) / width;
      if (room == 0) {
        flush();
        continue;
      }
      const int end = static_cast<int>(std::min<int64_t>(token_rows_high, begin + room));
      taken.push_back({job, begin, end, strip + linear_args.num_rows * row_size});
      linear_args.num_rows += (end - begin) * width;
      token_rows += end - begin;
      begin = end;
    }
  }
  flush();
}

}  // namespace vtts
