// What the kernels take from the CUDA toolkit, and how the host calls it. A host compiler gets the
// same names from an emulation that runs the kernels in tests.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

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

// Allows `kernel` its shared memory; the number of its blocks that the device runs at once.
template <typename Arguments>
int64_t blocks_at_once(const char* what, void (*kernel)(Arguments), int num_threads,
                       int shared_bytes) {
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
  return int64_t{num_processors} * blocks_each;
}

template <typename Arguments>
void launch(const char* what, void (*kernel)(Arguments), int64_t num_blocks, int num_threads,
            int shared_bytes, Arguments arguments, cudaStream_t stream) {
  void* pointers[] = {&arguments};
  cuda_check(what, "cudaLaunchKernel",
             cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(num_blocks)), dim3(num_threads),
                              pointers, shared_bytes, stream));
}

// The head of the workspace. Memory of the host that is not pinned may go once the call returns.
inline void send(const char* what, const std::vector<uint8_t>& blob, void* workspace,
                 cudaStream_t stream) {
  cuda_check(what, "cudaMemcpyAsync",
             cudaMemcpyAsync(workspace, blob.data(), blob.size(), cudaMemcpyHostToDevice, stream));
}

}  // namespace vtts
