// Jobs and options of patchify, from the C interface's structures to the core's.
#pragma once

#include <cstdint>
#include <vector>

#include "core/low_precision.h"
#include "core/patchify.h"
#include "vtts/patchify.h"

namespace vtts::abi {

struct Jobs {
  std::vector<PatchifyJob> jobs;
  int64_t num_rows = 0;

  bool empty() const { return jobs.empty(); }
  size_t size() const { return jobs.size(); }
  const PatchifyJob* data() const { return jobs.data(); }
};

// Throws std::invalid_argument unless every job is usable with patches of `patch_px`. Does not
// touch the frames' pixels.
Jobs read_jobs(const vtts_patchify_job* jobs, int64_t num_jobs, int patch_px, const char* what);

// NULL is the default. for_cpu: threads and instruction set are read too. Throws
// std::invalid_argument, or Unsupported for an instruction set that the machine lacks.
PatchifyOptions read_options(const vtts_patchify_options* options, bool for_cpu, const char* what);

DType read_dtype(vtts_dtype dtype, const char* what);

}  // namespace vtts::abi
