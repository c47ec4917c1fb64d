// The rows of patchify in parts: for a caller that uses them up before it asks for the next.
#pragma once

#include <memory>
#include <vector>

#include "core/patchify.h"
#include "core/row_kernels.h"

namespace vtts {

// Token rows [begin, end) of one job, and where the first of their patch rows goes.
struct TokenRows {
  const PatchifyJob* job;
  int begin, end;
  float* out;
};

// Taps, table and scratch memory of one call; the jobs must outlive it. A part's rows have the same
// bits however the jobs are cut.
class PatchRows {
 public:
  virtual ~PatchRows() = default;
  // All parts, on the threads of the options.
  virtual void write(const std::vector<TokenRows>& parts) = 0;
};

// Throws std::invalid_argument, in the name of `what`, on a bad job or option.
std::unique_ptr<PatchRows> make_patch_rows(const char* what, const PatchifyJob* jobs,
                                           size_t num_jobs, const PatchifyOptions& options);

// Adds `rows` to `parts` in pieces of about `rows_per_part` token rows; returns the end of their
// output.
float* cut(const TokenRows& rows, int patch_px, int64_t rows_per_part,
           std::vector<TokenRows>* parts);

// Token rows a part, for `num_token_rows` on `num_threads`.
int64_t rows_per_part(int64_t num_token_rows, int num_threads);

Normalisation make_normalisation(const PatchifyOptions& options);

}  // namespace vtts
