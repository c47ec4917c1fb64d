// What ctypes cannot see of the C interface: structures that grow, and that nothing is thrown.
#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "abi/structs.h"
#include "tests/check.h"
#include "vtts/vtts.h"

namespace {

using testing::check;
using testing::num_failures;

// A structure of three releases; the library that runs is of the second.
struct First {
  uint32_t struct_size;
  int32_t a;
};
struct Second {
  uint32_t struct_size;
  int32_t a;
  int32_t b, c;
};
struct Third {
  uint32_t struct_size;
  int32_t a;
  int32_t b, c;
  int32_t d;
};

}  // namespace

template <>
inline constexpr uint32_t vtts::abi::first_size<Second> = sizeof(First);

namespace {

void test_structures_grow() {
  const Second defaults = {sizeof(Second), -1, -2, -3};
  const First old = {sizeof(First), 7};
  Second read = vtts::abi::read_struct(&old, defaults, "test", "old");
  check(read.a == 7 && read.b == -2 && read.c == -3, "an older caller gets defaults");
  check(read.struct_size == sizeof(Second), "the size is the library's afterwards");
  Third later = {sizeof(Third), 1, 2, 3, 0};
  read = vtts::abi::read_struct(&later, defaults, "test", "later");
  check(read.a == 1 && read.c == 3, "a newer caller that asks for nothing new is understood");
  later.d = 1;
  try {
    vtts::abi::read_struct(&later, defaults, "test", "later");
    check(false, "an unknown field is refused");
  } catch (const std::invalid_argument& error) {
    check(std::strstr(error.what(), "at byte 16") != nullptr, "and named by its place");
  }
}

void test_nothing_is_thrown() {
  using vtts::abi::guard;
  check(guard([] { throw std::bad_alloc(); }) == VTTS_ERROR_OUT_OF_MEMORY, "bad_alloc");
  check(guard([] { throw std::length_error("x"); }) == VTTS_ERROR_OUT_OF_MEMORY, "length_error");
  check(guard([] { throw std::runtime_error("x"); }) == VTTS_ERROR_INTERNAL, "runtime_error");
  check(guard([] { throw std::runtime_error("cudaMalloc failed"); }, VTTS_ERROR_CUDA) ==
            VTTS_ERROR_CUDA,
        "CUDA's errors");
  check(std::strcmp(vtts_last_error_message(), "cudaMalloc failed") == 0, "with their message");
  check(guard([] { throw vtts::abi::Unsupported("x"); }, VTTS_ERROR_CUDA) == VTTS_ERROR_UNSUPPORTED,
        "unsupported");
  check(guard([] { throw 1; }) == VTTS_ERROR_INTERNAL, "anything");
  check(guard([] { throw std::invalid_argument(std::string(5000, 'x')); }) ==
            VTTS_ERROR_INVALID_ARGUMENT,
        "a long message");
  check(std::strlen(vtts_last_error_message()) < 5000, "is cut");
}

}  // namespace

int main() {
  test_structures_grow();
  test_nothing_is_thrown();
  std::printf("%s\n", num_failures == 0 ? "all passed" : "failed");
  return num_failures == 0 ? 0 : 1;
}
