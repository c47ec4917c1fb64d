// Versions, and the last error of each thread.
#include <cstdio>

#include "abi/guard.h"
#include "core/parallel.h"

#ifndef VTTS_VERSION
#define VTTS_VERSION "unknown"
#endif

namespace vtts::abi {
namespace {

thread_local char last_error[1024] = "";

// A process that loads the library and forks must know it before its first loop over threads.
[[maybe_unused]] const bool prepared = (prepare_for_fork(), true);

}  // namespace

vtts_status fail(vtts_status status, const char* message) noexcept {
  std::snprintf(last_error, sizeof last_error, "%s", message);
  return status;
}

void reject(const std::string& what, const std::string& argument, const std::string& rule,
            const std::string& got) {
  throw std::invalid_argument(what + ": " + argument + " must be " + rule + ", got " + got);
}

}  // namespace vtts::abi

extern "C" {

uint32_t vtts_abi_version(void) { return VTTS_ABI_VERSION; }

const char* vtts_version(void) { return VTTS_VERSION; }

int32_t vtts_has_cuda(void) {
#ifdef VTTS_WITH_CUDA
  return 1;
#else
  return 0;
#endif
}

const char* vtts_status_name(vtts_status status) {
  switch (vtts::abi::number_of(status)) {
    case VTTS_OK:
      return "VTTS_OK";
    case VTTS_ERROR_INVALID_ARGUMENT:
      return "VTTS_ERROR_INVALID_ARGUMENT";
    case VTTS_ERROR_UNSUPPORTED:
      return "VTTS_ERROR_UNSUPPORTED";
    case VTTS_ERROR_CUDA:
      return "VTTS_ERROR_CUDA";
    case VTTS_ERROR_OUT_OF_MEMORY:
      return "VTTS_ERROR_OUT_OF_MEMORY";
    case VTTS_ERROR_INTERNAL:
      return "VTTS_ERROR_INTERNAL";
    default:
      return "unknown";
  }
}

const char* vtts_last_error_message(void) { return vtts::abi::last_error; }

}  // extern "C"
