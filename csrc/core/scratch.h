// Memory of one thread that is kept from call to call.
#pragma once

#include <cstdint>
#include <memory>

namespace vtts {

class Scratch {
 public:
  // `count` floats, whatever they hold; those of an earlier call are gone.
  float* floats(int64_t count) {
    if (count > capacity_) {
      memory_.reset();
      capacity_ = 0;
      memory_.reset(new float[count]);
      capacity_ = count;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<float[]> memory_;
  int64_t capacity_ = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace vtts
