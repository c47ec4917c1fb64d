// Structures that grow: `uint32_t struct_size` first, known by their size.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#include "abi/guard.h"

namespace vtts::abi {

// sizeof(T) in the first release that had it; specialise where T has grown since.
template <typename T>
inline constexpr uint32_t first_size = sizeof(T);

// A larger size is a wild value rather than a newer header.
inline constexpr uint32_t kLargestStruct = 1 << 16;

inline uint32_t given_size(const void* given) {
  uint32_t size = 0;
  std::memcpy(&size, given, sizeof size);
  return size;
}

// The size that a caller gave its structure; throws unless it can be one.
template <typename T>
uint32_t checked_size(const void* given, const char* what, const std::string& argument) {
  require_pointer(given, what, argument.c_str());
  require_aligned(given, alignof(T), what, argument.c_str());
  const uint32_t size = given_size(given);
  if (size < first_size<T> || size > kLargestStruct || size % alignof(T) != 0) {
    reject(what, argument + ".struct_size",
           "set by *_default() or sizeof, at least " + std::to_string(first_size<T>),
           std::to_string(size));
  }
  return size;
}

// A caller's structure of any size: what it does not have is as in `defaults`. Throws if it has
// fields that this library does not know and they are not zero.
template <typename T>
T read_struct(const void* given, const T& defaults, const char* what, const std::string& argument) {
  const uint32_t size = checked_size<T>(given, what, argument);
  const auto* bytes = static_cast<const unsigned char*>(given);
  for (uint32_t i = sizeof(T); i < size; ++i) {
    if (bytes[i] != 0) {
      reject(what, argument, "without fields that this version of libvtts does not know",
             "one that is not zero at byte " + std::to_string(i));
    }
  }
  T value = defaults;
  std::memcpy(&value, given, std::min<size_t>(size, sizeof(T)));
  value.struct_size = sizeof(T);
  return value;
}

// Element i of a caller's array, whose elements lie as far apart as the first one is long.
template <typename T>
T read_element(const T* array, int64_t i, const T& defaults, const char* what,
               const std::string& argument) {
  const uint32_t stride = given_size(array);
  const void* element =
      reinterpret_cast<const unsigned char*>(array) + i * static_cast<int64_t>(stride);
  require(given_size(element) == stride, what, argument + ".struct_size",
          "that of the first element", given_size(element));
  return read_struct(element, defaults, what, argument);
}

}  // namespace vtts::abi
