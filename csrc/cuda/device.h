// What the kernels take from the CUDA toolkit, and how the host calls it. A host compiler gets the
// same names from an emulation that runs the kernels in tests.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include "cuda/ptx.cuh"
#else
#include "tests/cuda_emulation.h"
#endif

namespace vtts {

inline void cuda_check(const char* what, const char* call, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + call +
                           " failed: " + cudaGetErrorString(error));
}

// Launches `kernel` with one struct as its argument: as many blocks as the device runs at once, at
// most `most_blocks`.
template <typename Arguments>
void launch(const char* what, void (*kernel)(Arguments), int num_threads, int shared_bytes,
            int64_t most_blocks, Arguments arguments, cudaStream_t stream) {
  int device = 0, num_processors = 0, blocks_each = 0;
  cuda_check(what, "cudaGetDevice", cudaGetDevice(&device));
  cuda_check(what, "cudaDeviceGetAttribute",
             cudaDeviceGetAttribute(&num_processors, cudaDevAttrMultiProcessorCount, device));
  cuda_check(
      what, "cudaFuncSetAttribute",
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  cuda_check(what, "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
             cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, kernel, num_threads,
                                                           shared_bytes));
  const int64_t at_once = int64_t{num_processors} * blocks_each;
  const dim3 grid(static_cast<unsigned>(at_once < most_blocks ? at_once : most_blocks));
  void* pointers[] = {&arguments};
  cuda_check(what, "cudaLaunchKernel",
             cudaLaunchKernel(kernel, grid, dim3(num_threads), pointers, shared_bytes, stream));
}

}  // namespace vtts
