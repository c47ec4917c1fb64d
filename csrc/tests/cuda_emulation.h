// Runs the kernels of csrc/cuda on the host: what they use of CUDA, for a host compiler.
//
// Every thread of a block is a fiber; fibers run one at a time up to their next barrier, a warp up
// to the next barrier of the block before another warp runs, lanes and warps in random order: a
// missing barrier shows. Barriers that not all threads reach abort. Shared memory is a heap block
// of exactly the size asked for, poisoned (NaN as floats). An asynchronous copy happens at once or
// when it is waited for, by chance. Warp-wide instructions exchange registers in the documented
// layouts. A tensor core's sum is taken exactly and rounded once: how the hardware rounds inside is
// not specified.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "core/low_precision.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define VTTS_DYNAMIC_SHARED(name) uint8_t* const name = vtts::emulation::block->shared.get()

struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned x) : x(x) {}
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline dim3 threadIdx(0), blockIdx(0), gridDim(1);

namespace vtts {
namespace emulation {

enum class State { kRunning, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  int num_bytes;
};

struct Fiber {
  static constexpr size_t kStackBytes = 64 << 10;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;
  State state = State::kRunning;
  std::vector<std::vector<Copy>> groups{1};  // copies under way; the last group is open
};

struct Lane {
  const void* row;
  uint32_t a[4], b[2];
};

struct Block {
  std::unique_ptr<uint8_t[]> shared;
  std::vector<Fiber> fibers;
  std::vector<Lane> lanes;
  std::function<void()> body;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  Fiber& self() { return fibers[threadIdx.x]; }
};

inline Block* block = nullptr;
inline std::mt19937 chance(1);
inline const char* failing_call = nullptr;  // this one returns an error
inline int num_launches = 0;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

inline void leave_to(ucontext_t* from, ucontext_t* to, void** fake_stack, const void* stack,
                     size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#else
  (void)fake_stack, (void)stack, (void)bytes;
#endif
  swapcontext(from, to);
}

inline void arrive(void* fake_stack, const void** stack, size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, stack, bytes);
#else
  (void)fake_stack, (void)stack, (void)bytes;
#endif
}

inline void pause(State state) {
  Fiber& self = block->self();
  self.state = state;
  leave_to(&self.context, &block->scheduler, state == State::kDone ? nullptr : &self.fake_stack,
           block->scheduler_stack, block->scheduler_stack_bytes);
  arrive(self.fake_stack, &block->scheduler_stack, &block->scheduler_stack_bytes);
}

inline void fiber_main() {
  arrive(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
  block->body();
  pause(State::kDone);
}

inline void resume(unsigned thread) {
  threadIdx.x = thread;
  Fiber& fiber = block->self();
  fiber.state = State::kRunning;
  leave_to(&block->scheduler, &fiber.context, &block->scheduler_fake_stack, fiber.stack.get(),
           Fiber::kStackBytes);
  arrive(block->scheduler_fake_stack, nullptr, nullptr);
}

inline void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.state = State::kRunning;
  fiber.groups.assign(1, {});
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = Fiber::kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

inline void run_block(Block& of, int num_threads, size_t shared_bytes) {
  block = &of;
  of.shared.reset(new uint8_t[shared_bytes]);
  std::memset(of.shared.get(), 0xff, shared_bytes);
  of.fibers.resize(num_threads);  // stacks are kept from block to block
  of.lanes.assign(num_threads, {});
  for (Fiber& fiber : of.fibers) prepare(fiber);
  const auto all = [&](int begin, int end, State state) {
    return std::all_of(of.fibers.begin() + begin, of.fibers.begin() + end,
                       [state](const Fiber& fiber) { return fiber.state == state; });
  };
  const auto release = [&](int begin, int end) {
    for (int i = begin; i < end; ++i) of.fibers[i].state = State::kRunning;
  };
  std::vector<int> warps(num_threads / 32), lanes(32);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  while (!all(0, num_threads, State::kDone)) {
    bool moved = false;
    std::shuffle(warps.begin(), warps.end(), chance);
    for (const int warp : warps) {
      const int begin = 32 * warp, end = begin + 32;
      bool warp_moved = true;
      while (warp_moved) {
        warp_moved = false;
        std::shuffle(lanes.begin(), lanes.end(), chance);
        for (const int lane : lanes) {
          if (of.fibers[begin + lane].state != State::kRunning) continue;
          resume(begin + lane);
          warp_moved = true;
        }
        if (all(begin, end, State::kAtWarpBarrier)) release(begin, end);
        moved |= warp_moved;
      }
    }
    if (all(0, num_threads, State::kAtBlockBarrier)) release(0, num_threads);
    if (!moved) fail("a barrier that not all threads reach");
  }
  for (const Fiber& fiber : of.fibers) {
    for (const auto& group : fiber.groups) {
      if (!group.empty()) fail("copies that were not waited for");
    }
  }
}

inline void perform(const Copy& copy) {
  std::memset(copy.to, 0, 16);
  std::memcpy(copy.to, copy.from, copy.num_bytes);
}

// All 16-bit numbers of a type.
inline std::vector<float> numbers_of(DType type) {
  std::vector<float> numbers(1 << 16);
  for (int i = 0; i < 1 << 16; ++i) numbers[i] = from_16_bits(static_cast<uint16_t>(i), type);
  return numbers;
}

inline float number(uint32_t two, int which, bool is_bfloat16) {
  static const std::vector<float> bfloat16 = numbers_of(DType::kBFloat16),
                                  float16 = numbers_of(DType::kFloat16);
  return (is_bfloat16 ? bfloat16 : float16)[two >> (16 * which) & 0xffff];
}

}  // namespace emulation

inline void copy_16_async(void* shared, const void* global, int num_bytes = 16) {
  using emulation::block;
  const uint8_t* begin = block->shared.get();
  if ((reinterpret_cast<uintptr_t>(global) | (static_cast<uint8_t*>(shared) - begin)) % 16 != 0) {
    emulation::fail("a copy that is not aligned");
  }
  const emulation::Copy copy = {shared, global, num_bytes};
  if (emulation::chance() % 2 == 0) {
    emulation::perform(copy);
  } else {
    block->self().groups.back().push_back(copy);
  }
}

inline void end_copies() { emulation::block->self().groups.emplace_back(); }

template <int kPending>
void wait_copies() {
  auto& groups = emulation::block->self().groups;
  while (groups.size() > kPending + 1) {
    for (const emulation::Copy& copy : groups.front()) emulation::perform(copy);
    groups.erase(groups.begin());
  }
}

inline int dot(uint32_t w, uint32_t b, int sum) {
  return sum + static_cast<int16_t>(w) * static_cast<int>(b & 255) +
         static_cast<int16_t>(w >> 16) * static_cast<int>(b >> 8 & 255);
}
inline int dot_low(uint32_t w, uint32_t b, int sum) { return dot(w, b, sum); }
inline int dot_high(uint32_t w, uint32_t b, int sum) { return dot(w, b >> 16, sum); }

inline void load_matrices(const void* row, uint32_t (&values)[4]) {
  emulation::Block& block = *emulation::block;
  const int lane = threadIdx.x % 32, warp = threadIdx.x - lane;
  if ((static_cast<const uint8_t*>(row) - block.shared.get()) % 16 != 0) {
    emulation::fail("a matrix row that is not aligned");
  }
  block.lanes[threadIdx.x].row = row;
  emulation::pause(emulation::State::kAtWarpBarrier);
  for (int i = 0; i < 4; ++i) {
    const auto* from = static_cast<const uint8_t*>(block.lanes[warp + 8 * i + lane / 4].row);
    std::memcpy(&values[i], from + lane % 4 * 4, 4);
  }
  emulation::pause(emulation::State::kAtWarpBarrier);
}

template <bool kBFloat16>
uint32_t two_rounded(float low, float high) {
  const DType type = kBFloat16 ? DType::kBFloat16 : DType::kFloat16;
  return to_16_bits(low, type) | uint32_t{to_16_bits(high, type)} << 16;
}

inline uint32_t subtract_two(uint32_t a, uint32_t b) {
  using emulation::number;
  return two_rounded<false>(number(a, 0, false) - number(b, 0, false),
                            number(a, 1, false) - number(b, 1, false));
}

template <bool kBFloat16>
void multiply_tile(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&sums)[4]) {
  emulation::Block& block = *emulation::block;
  const int lane = threadIdx.x % 32;
  emulation::Lane* const warp = &block.lanes[threadIdx.x - lane];
  std::memcpy(warp[lane].a, a, sizeof(a));
  warp[lane].b[0] = b0;
  warp[lane].b[1] = b1;
  emulation::pause(emulation::State::kAtWarpBarrier);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = sums[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t x = warp[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
      const uint32_t y = warp[column * 4 + k % 8 / 2].b[k / 8];
      sum += static_cast<double>(emulation::number(x, k % 2, kBFloat16)) *
             emulation::number(y, k % 2, kBFloat16);
    }
    sums[i] = static_cast<float>(sum);
  }
  emulation::pause(emulation::State::kAtWarpBarrier);
}

}  // namespace vtts

inline void __syncthreads() { vtts::emulation::pause(vtts::emulation::State::kAtBlockBarrier); }

template <typename T>
T __ldg(const T* from) {
  return *from;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    bytes |= static_cast<uint32_t>(both >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  }
  return bytes;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __fmaf_ieee_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum { cudaDevAttrMultiProcessorCount, cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaMemcpyHostToDevice };
inline constexpr int kMostSharedBytes = 163 << 10;  // of a block on sm_80, the least of ours

inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t emulated(const char* call) {
  const char* failing = vtts::emulation::failing_call;
  return failing != nullptr && std::strcmp(failing, call) == 0 ? cudaErrorInvalidValue
                                                               : cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return emulated("cudaGetDevice");
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 2;
  return emulated("cudaDeviceGetAttribute");
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, int shared_bytes) {
  return shared_bytes > kMostSharedBytes ? cudaErrorInvalidValue : emulated("cudaFuncSetAttribute");
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 2;
  return emulated("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  if (emulated("cudaMemcpyAsync") != cudaSuccess) return cudaErrorInvalidValue;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
template <typename Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 threads, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  if (emulated("cudaLaunchKernel") != cudaSuccess) return cudaErrorInvalidValue;
  ++vtts::emulation::num_launches;
  gridDim = grid;
  static vtts::emulation::Block block;
  block.body = [&] { kernel(*static_cast<Arguments*>(arguments[0])); };
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
    vtts::emulation::run_block(block, static_cast<int>(threads.x), shared_bytes);
  }
  return cudaSuccess;
}
