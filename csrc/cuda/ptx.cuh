// The few instructions that CUDA C++ has no function for (sm_80 and later).
#pragma once

#include <cstdint>

namespace vtts {

#define VTTS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) uint8_t name[]

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts a copy of 16 bytes, both sides aligned, from global to shared memory; of the source only
// the first `num_bytes` are read, the rest becomes zero.
__device__ __forceinline__ void copy_16_async(void* shared, const void* global,
                                              int num_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(num_bytes)
               : "memory");
}

// Ends a group of the thread's copies; waits until at most `kPending` groups are under way.
__device__ __forceinline__ void end_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// sum + w[0] * b[0] + w[1] * b[1], w two int16, b the low or high two of four uint8.
__device__ __forceinline__ int dot_low(uint32_t w, uint32_t b, int sum) {
  asm("dp2a.lo.s32.u32 %0, %1, %2, %0;\n" : "+r"(sum) : "r"(w), "r"(b));
  return sum;
}

__device__ __forceinline__ int dot_high(uint32_t w, uint32_t b, int sum) {
  asm("dp2a.hi.s32.u32 %0, %1, %2, %0;\n" : "+r"(sum) : "r"(w), "r"(b));
  return sum;
}

// Four 8 x 8 matrices of 16-bit values: lane 8 * i + r gives the address of row r of matrix i, and
// gets of matrix i the values 2 * (lane % 4) and the next of row lane / 4.
__device__ __forceinline__ void load_matrices(const void* row, uint32_t (&values)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
               : "r"(shared_address(row))
               : "memory");
}

// Two float16 less two others.
__device__ __forceinline__ uint32_t subtract_two(uint32_t a, uint32_t b) {
  uint32_t two;
  asm("sub.rn.f16x2 %0, %1, %2;\n" : "=r"(two) : "r"(a), "r"(b));
  return two;
}

// Two float32 rounded to nearest even.
template <bool kBFloat16>
__device__ __forceinline__ uint32_t two_rounded(float low, float high) {
  uint32_t two;
  if constexpr (kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(two) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(two) : "f"(high), "f"(low));
  }
  return two;
}

// sums += a b for a 16 x 16 and b 16 x 8 of float16 or bfloat16, sums 16 x 8 of float32.
template <bool kBFloat16>
__device__ __forceinline__ void multiply_tile(const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                              float (&sums)[4]) {
  if constexpr (kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace vtts
