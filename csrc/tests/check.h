// What the test programs share: a failed check is reported and counted, and the others go on.
#pragma once

#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>

namespace testing {

inline int num_failures = 0;

inline void check(bool ok, const std::string& what) {
  if (ok) return;
  ++num_failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// `call` throws an Error that says `message`.
template <typename Error = std::invalid_argument>
void check_refused(const std::string& message, const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    check(std::string(error.what()).find(message) != std::string::npos,
          "message '" + std::string(error.what()) + "' holds '" + message + "'");
    return;
  }
  check(false, "refused: " + message);
}

}  // namespace testing
