// Bytes of a fuzzer as values: structured input from unstructured bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

namespace vtts::fuzz {

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  uint8_t byte() { return position_ < size_ ? data_[position_++] : 0; }

  // 0 .. limit - 1
  int64_t below(int64_t limit) {
    return static_cast<int64_t>(raw() % static_cast<uint64_t>(limit));
  }

  bool one_in(int num) { return below(num) == 0; }

  uint64_t raw() {
    uint64_t value = 0;
    const int num = 1 + byte() % 8;
    for (int i = 0; i < num; ++i) value = value << 8 | byte();
    return value;
  }

  // Mostly small, at times at a border.
  int64_t integer() {
    constexpr int64_t kBorders[] = {0,
                                    1,
                                    -1,
                                    28,
                                    27,
                                    int64_t{1} << 20,
                                    (int64_t{1} << 20) + 1,
                                    int64_t{1} << 31,
                                    int64_t{1} << 32,
                                    int64_t{1} << 40,
                                    std::numeric_limits<int64_t>::max(),
                                    std::numeric_limits<int64_t>::min()};
    switch (byte() % 4) {
      case 0:
        return kBorders[below(sizeof kBorders / sizeof kBorders[0])];
      case 1:
        return static_cast<int64_t>(raw());
      default:
        return below(300) - 20;
    }
  }

  double real() {
    switch (byte() % 4) {
      case 0: {
        const uint64_t bits = raw();
        double value = 0.0;
        std::memcpy(&value, &bits, sizeof value);
        return value;
      }
      case 1:
        return static_cast<double>(integer());
      default:
        return static_cast<double>(below(1 << 20)) / 1024.0 - 8.0;
    }
  }

 private:
  const uint8_t* data_;
  size_t size_;
  size_t position_ = 0;
};

// A failed promise of the library ends the run.
inline void promise(bool kept) {
  if (!kept) __builtin_trap();
}

}  // namespace vtts::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
