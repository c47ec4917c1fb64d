// The boundary of the C interface: arguments are checked with named errors, exceptions end here.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "vtts/base.h"

namespace vtts::abi {

struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Keeps the sentence for vtts_last_error_message of this thread; allocates nothing.
vtts_status fail(vtts_status status, const char* message) noexcept;

// Runs `body` and turns what it throws into a status; `on_runtime_error` is that of a
// std::runtime_error, which CUDA's failures are.
template <typename Body>
vtts_status guard(Body&& body, vtts_status on_runtime_error = VTTS_ERROR_INTERNAL) noexcept {
  try {
    body();
    return VTTS_OK;
  } catch (const std::invalid_argument& error) {
    return fail(VTTS_ERROR_INVALID_ARGUMENT, error.what());
  } catch (const Unsupported& error) {
    return fail(VTTS_ERROR_UNSUPPORTED, error.what());
  } catch (const std::runtime_error& error) {
    return fail(on_runtime_error, error.what());
  } catch (const std::bad_alloc&) {
    return fail(VTTS_ERROR_OUT_OF_MEMORY, "the host is out of memory");
  } catch (const std::length_error&) {
    return fail(VTTS_ERROR_OUT_OF_MEMORY, "more memory was asked for than can be addressed");
  } catch (const std::exception& error) {
    return fail(VTTS_ERROR_INTERNAL, error.what());
  } catch (...) {
    return fail(VTTS_ERROR_INTERNAL, "an unknown exception");
  }
}

// std::invalid_argument "<what>: <argument> must be <rule>, got <got>".
[[noreturn]] void reject(const std::string& what, const std::string& argument,
                         const std::string& rule, const std::string& got);

inline void require(bool ok, const char* what, const std::string& argument, const char* rule,
                    int64_t got) {
  if (!ok) reject(what, argument, rule, std::to_string(got));
}

inline void require_pointer(const void* pointer, const char* what, const char* argument) {
  if (pointer == nullptr) reject(what, argument, "a pointer", "NULL");
}

inline void require_aligned(const void* pointer, uintptr_t bytes, const char* what,
                            const char* argument) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes == 0) return;
  reject(what, argument, "aligned to " + std::to_string(bytes) + " bytes", "another address");
}

// An enumeration of a caller as a number: it may hold any.
template <typename Enum>
int32_t number_of(const Enum& value) {
  static_assert(sizeof(Enum) == sizeof(int32_t), "enumerations of the interface are int32");
  int32_t number = 0;
  std::memcpy(&number, &value, sizeof number);
  return number;
}

}  // namespace vtts::abi
