// patch_embed_cuda: bytes in, hidden states out. Patch rows exist as bytes in shared memory only.
//
// A block makes the 64 rows of 16 merged tokens (1,184 or 1,536 bytes a row, 74 or 96 KB),
// whichever jobs they are of, and multiplies them with the folded weight, 128 outputs after the
// other: pixel values are exact in every type, normalisation is in weight and bias. Blocks are of
// 128 threads; their number is what the device runs at once, and where there are fewer tiles than
// that, several blocks make the same tile for different outputs.
//
// 16-bit types: mma m16n8k16, four warps of 32 x 64 sums. A chunk of 32 columns of the weight comes
// by asynchronous copies, two chunks ahead (3 x 8 KB), and the same chunk of the rows is turned
// into 16-bit numbers (2 x 4 KB) on the way, 2.5 instructions a value. Lines of 64 bytes are stored
// with their 16-byte pieces exchanged by line number, so that neither stores nor ldmatrix meet a
// bank twice. Buffers lie where the resize has its scratch memory. Up to 39 KB of it two blocks
// share a multiprocessor of an H100 (2 x 113 KB), and one resizes while the other multiplies.
// Predicted, not measured, for 1,280 outputs: 64 rows read 3 MB of weight from the L2 for 193
// MFLOP. At some 5.5 TB/s for 132 multiprocessors that bounds it at 350 TFLOP/s, half of what
// cuBLAS reaches, against which stand the 4.7 KB a row not written and read, 1.6 of the 5 ns that
// its product takes. Better would be wgmma with 128 rows a block and the weight sent to a cluster
// of blocks by TMA multicast.
//
// float32: plain fused multiply-adds, 8 x 8 sums a thread; tensor cores would cut the weight to 11
// bits. Pixel values up to 255 make terms twice those of normalised ones: each chunk is summed
// apart, or the error would be more than twice that of the plain product.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/cuda_ops.h"
#include "cuda/resize.cuh"

namespace vtts {
namespace {

constexpr int kThreads = kResizeThreads;
constexpr int kTileTokens = 16;
constexpr int kTileRows = kTileTokens * kPatchesPerToken;
constexpr int kTileOutputs = 128;
constexpr int kChunk = 32;  // columns of the rows multiplied at once

template <typename Shape>
struct Tile {
  static constexpr int kPatchRow = Shape::kPatchRow;
  static constexpr int kNumChunks = (kPatchRow + kChunk - 1) / kChunk;
  // Bytes; behind the row lies anything, weighed zero.
  static constexpr int kRowPitch = kNumChunks * kChunk;
  static constexpr int kTileBytes = kTileRows * kRowPitch;
  // Two blocks a multiprocessor of 227 KB with patches of 14 px, and one of 163 KB with either.
  static constexpr ScratchBudget kBudget = {39 << 10, (Shape::kPatch == 14 ? 56 : 40) << 10,
                                            24 << 10};
};

struct PatchEmbedArguments {
  DeviceJobs jobs;
  const void* weight;
  const float* bias;
  void* out;
  int64_t num_outputs;
  int32_t num_splits;  // blocks that make one tile, each for some of the outputs
};

// Outputs [begin, end) in steps of kTileOutputs, for tokens from `first_token` on.
struct Product {
  int64_t first_token, begin, end;
};

// First of the columns of `out` that belong to row `row` of the tile; negative behind the last.
__device__ inline int64_t out_row(const DeviceJobs& jobs, int64_t first_token, int row) {
  const int64_t token = first_token + row / kPatchesPerToken;
  if (token >= jobs.num_tokens) return -1;
  const int64_t place = jobs.places == nullptr ? token : __ldg(jobs.places + token);
  return place * kPatchesPerToken + row % kPatchesPerToken;
}

// Lines of kChunk 16-bit numbers: four pieces of 16 bytes.
__device__ inline uint8_t* piece_at(uint8_t* lines, int line, int piece) {
  return lines + line * (2 * kChunk) + (piece ^ (line / 2 & 3)) * 16;
}

// Bytes `first` and `first` + 1 of `word` as two 16-bit numbers, exactly.
template <bool kBFloat16>
__device__ inline uint32_t two_numbers(uint32_t word, int first) {
  if constexpr (kBFloat16) {
    // 2^23 + byte, less 2^23; an integer below 256 has nothing in the lower half of a float32.
    constexpr uint32_t kHead = 0x4b000000;
    const uint32_t low = __byte_perm(word, kHead, 0x7440 | first);
    const uint32_t high = __byte_perm(word, kHead, 0x7440 | (first + 1));
    return __byte_perm(__float_as_uint(__fadd_rn(__uint_as_float(low), -8388608.0f)),
                       __float_as_uint(__fadd_rn(__uint_as_float(high), -8388608.0f)), 0x7632);
  } else {
    // 2^10 + byte, less 2^10.
    const uint32_t above = __byte_perm(word, 0x64646464, 0x4040 | (first + 1) << 8 | first);
    return subtract_two(above, 0x64006400);
  }
}

template <typename Shape, bool kBFloat16>
struct TensorCoreProduct : Tile<Shape> {
  using Tile<Shape>::kNumChunks, Tile<Shape>::kPatchRow, Tile<Shape>::kRowPitch;
  static constexpr int kStages = 3;
  static constexpr int kRowBytes = kTileRows * kChunk * 2, kWeightBytes = kTileOutputs * kChunk * 2;
  static constexpr int kBufferBytes = 2 * kRowBytes + kStages * kWeightBytes;
  static constexpr int kWarpRows = 32, kWarpOutputs = 64;

  __device__ static void fetch_weight(const PatchEmbedArguments& arguments, int64_t first_output,
                                      int chunk, uint8_t* to) {
    const int piece = threadIdx.x % 4, k = chunk * kChunk + piece * 8;
    const auto* const weight = static_cast<const uint16_t*>(arguments.weight);
    for (int line = threadIdx.x / 4; line < kTileOutputs; line += kThreads / 4) {
      const int64_t output = first_output + line;
      const bool is_there = output < arguments.num_outputs && k < kPatchRow;
      copy_16_async(piece_at(to, line, piece), is_there ? weight + output * kPatchRow + k : weight,
                    is_there ? 16 : 0);
    }
  }

  __device__ static void convert_rows(const uint8_t* tile, int chunk, uint8_t* to) {
    const int row = threadIdx.x / 2, half = threadIdx.x % 2;
    const uint4 bytes =
        *reinterpret_cast<const uint4*>(tile + row * kRowPitch + chunk * kChunk + half * 16);
    const auto numbers = [](uint32_t a, uint32_t b) {
      return make_uint4(two_numbers<kBFloat16>(a, 0), two_numbers<kBFloat16>(a, 2),
                        two_numbers<kBFloat16>(b, 0), two_numbers<kBFloat16>(b, 2));
    };
    *reinterpret_cast<uint4*>(piece_at(to, row, 2 * half)) = numbers(bytes.x, bytes.y);
    *reinterpret_cast<uint4*>(piece_at(to, row, 2 * half + 1)) = numbers(bytes.z, bytes.w);
  }

  __device__ static void run(const PatchEmbedArguments& arguments, const Product& product,
                             const uint8_t* tile, uint8_t* buffers) {
    uint8_t* const weights = buffers + 2 * kRowBytes;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp / 2 * kWarpRows, warp_output = warp % 2 * kWarpOutputs;
    const int num_steps =
        static_cast<int>((product.end - product.begin + kTileOutputs - 1) / kTileOutputs) *
        kNumChunks;
    const auto fetch_step = [&](int step) {
      if (step < num_steps) {
        fetch_weight(arguments, product.begin + int64_t{step / kNumChunks} * kTileOutputs,
                     step % kNumChunks, weights + step % kStages * kWeightBytes);
      }
      end_copies();
    };
    for (int step = 0; step < kStages - 1; ++step) fetch_step(step);

    float sums[2][8][4] = {};
    for (int step = 0; step < num_steps; ++step) {
      uint8_t* const rows = buffers + step % 2 * kRowBytes;
      uint8_t* const weight = weights + step % kStages * kWeightBytes;
      convert_rows(tile, step % kNumChunks, rows);
      wait_copies<kStages - 2>();
      __syncthreads();
      fetch_step(step + kStages - 1);
#pragma unroll
      for (int k = 0; k < kChunk / 16; ++k) {
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          load_matrices(piece_at(rows, warp_row + m * 16 + lane % 16, 2 * k + lane / 16), a[m]);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          uint32_t b[4];
          load_matrices(piece_at(weight, warp_output + n * 16 + lane / 16 * 8 + lane % 8,
                                 2 * k + lane / 8 % 2),
                        b);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            multiply_tile<kBFloat16>(a[m], b[0], b[1], sums[m][2 * n]);
            multiply_tile<kBFloat16>(a[m], b[2], b[3], sums[m][2 * n + 1]);
          }
        }
      }
      if (step % kNumChunks < kNumChunks - 1) continue;
      store(arguments, product.first_token, warp_row,
            product.begin + int64_t{step / kNumChunks} * kTileOutputs + warp_output, sums);
    }
  }

  // Adds the bias, writes, and sets the sums to zero.
  __device__ static void store(const PatchEmbedArguments& arguments, int64_t first_token,
                               int warp_row, int64_t warp_output, float (&sums)[2][8][4]) {
    const int lane = threadIdx.x % 32;
    const int64_t output = warp_output + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row =
            out_row(arguments.jobs, first_token, warp_row + m * 16 + half * 8 + lane / 4);
        auto* const out = static_cast<uint16_t*>(arguments.out) + row * arguments.num_outputs;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          float* const two = &sums[m][n][2 * half];
          const int64_t o = output + n * 8;
          if (row >= 0 && o < arguments.num_outputs) {
            const float low = two[0] + __ldg(arguments.bias + o);
            const float high = two[1] + __ldg(arguments.bias + o + 1);
            *reinterpret_cast<uint32_t*>(out + o) = two_rounded<kBFloat16>(low, high);
          }
          two[0] = two[1] = 0.0f;
        }
      }
    }
  }
};

template <typename Shape>
struct Float32Product : Tile<Shape> {
  using Tile<Shape>::kNumChunks, Tile<Shape>::kPatchRow, Tile<Shape>::kRowPitch;
  // Columns of both factors lie one after the other: lines of rows, and of outputs.
  static constexpr int kRowLine = kTileRows + 4, kWeightLine = kTileOutputs + 4;
  static constexpr int kBufferBytes = kChunk * (kRowLine + kWeightLine) * int{sizeof(float)};

  __device__ static void run(const PatchEmbedArguments& arguments, const Product& product,
                             const uint8_t* tile, uint8_t* buffers) {
    auto* const rows = reinterpret_cast<float*>(buffers);
    float* const weights = rows + kChunk * kRowLine;
    const auto* const weight = static_cast<const float*>(arguments.weight);
    // A thread has rows 8 * (thread / 16) .. + 7 and outputs 4 * (thread % 16) .. + 3, twice, 64
    // apart.
    const int first_row = threadIdx.x / 16 * 8, first_column = threadIdx.x % 16 * 4;
    for (int64_t begin = product.begin; begin < product.end; begin += kTileOutputs) {
      float totals[8][8] = {};
      for (int chunk = 0; chunk < kNumChunks; ++chunk) {
        __syncthreads();
        for (int i = threadIdx.x; i < kTileRows * kChunk / 4; i += kThreads) {
          const int row = i % kTileRows, k = i / kTileRows * 4;
          const uint32_t bytes =
              *reinterpret_cast<const uint32_t*>(tile + row * kRowPitch + chunk * kChunk + k);
          for (int b = 0; b < 4; ++b) {
            rows[(k + b) * kRowLine + row] = static_cast<float>(bytes >> (8 * b) & 255);
          }
        }
        for (int i = threadIdx.x; i < kTileOutputs * kChunk / 4; i += kThreads) {
          const int line = i / (kChunk / 4), k = i % (kChunk / 4) * 4;
          const int64_t output = begin + line;
          float4 four = {};
          if (output < arguments.num_outputs && chunk * kChunk + k < kPatchRow) {
            four =
                *reinterpret_cast<const float4*>(weight + output * kPatchRow + chunk * kChunk + k);
          }
          float* const to = weights + k * kWeightLine + line;
          to[0] = four.x;
          to[kWeightLine] = four.y;
          to[2 * kWeightLine] = four.z;
          to[3 * kWeightLine] = four.w;
        }
        __syncthreads();
        float sums[8][8] = {};
#pragma unroll 4
        for (int k = 0; k < kChunk; ++k) {
          float a[8], b[8];
          for (int half = 0; half < 2; ++half) {
            *reinterpret_cast<float4*>(a + 4 * half) =
                *reinterpret_cast<const float4*>(rows + k * kRowLine + first_row + 4 * half);
            *reinterpret_cast<float4*>(b + 4 * half) = *reinterpret_cast<const float4*>(
                weights + k * kWeightLine + first_column + 64 * half);
          }
#pragma unroll
          for (int r = 0; r < 8; ++r) {
#pragma unroll
            for (int c = 0; c < 8; ++c) sums[r][c] = __fmaf_ieee_rn(a[r], b[c], sums[r][c]);
          }
        }
#pragma unroll
        for (int r = 0; r < 8; ++r) {
#pragma unroll
          for (int c = 0; c < 8; ++c) totals[r][c] += sums[r][c];
        }
      }
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const int64_t row = out_row(arguments.jobs, product.first_token, first_row + r);
        if (row < 0) continue;
        auto* const out = static_cast<float*>(arguments.out) + row * arguments.num_outputs;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const int64_t o = begin + first_column + c / 4 * 64 + c % 4;
          if (o < arguments.num_outputs) out[o] = totals[r][c] + __ldg(arguments.bias + o);
        }
      }
    }
  }
};

template <typename Shape, typename Multiply>
__global__ void __launch_bounds__(kThreads, 2) patch_embed_kernel(PatchEmbedArguments arguments) {
  constexpr int kRowPitch = Multiply::kRowPitch;
  VTTS_DYNAMIC_SHARED(shared);
  uint8_t* const tile = shared;
  uint8_t* const scratch = tile + Multiply::kTileBytes;
  const DeviceJobs& jobs = arguments.jobs;
  const int64_t num_splits = arguments.num_splits;
  const int64_t num_units = (jobs.num_tokens + kTileTokens - 1) / kTileTokens * num_splits;
  const int64_t output_tiles = (arguments.num_outputs + kTileOutputs - 1) / kTileOutputs;
  for (int64_t unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
    const int64_t first_token = unit / num_splits * kTileTokens, split = unit % num_splits;
    const int64_t end_token = first_token + kTileTokens;
    resize_tokens<Shape, kThreads>(
        jobs, first_token, end_token < jobs.num_tokens ? end_token : jobs.num_tokens, 1, scratch,
        kRowPitch,
        [&](uint32_t token) {
          return tile + (token - first_token) * (kPatchesPerToken * kRowPitch);
        },
        [](uint32_t) {});  // the last token ends with a barrier
    Multiply::run(arguments,
                  {first_token, output_tiles * split / num_splits * kTileOutputs,
                   output_tiles * (split + 1) / num_splits * kTileOutputs},
                  tile, scratch);
    __syncthreads();
  }
}

struct Variant {
  void (*kernel)(PatchEmbedArguments);
  int buffer_bytes;
};

template <typename Shape>
Variant variant_of(DType type) {
  using BFloat16 = TensorCoreProduct<Shape, true>;
  using Float16 = TensorCoreProduct<Shape, false>;
  using Float32 = Float32Product<Shape>;
  switch (type) {
    case DType::kBFloat16:
      return {patch_embed_kernel<Shape, BFloat16>, BFloat16::kBufferBytes};
    case DType::kFloat16:
      return {patch_embed_kernel<Shape, Float16>, Float16::kBufferBytes};
    default:
      return {patch_embed_kernel<Shape, Float32>, Float32::kBufferBytes};
  }
}

void validate_weight(const PatchEmbedCudaArgs& args) {
  const auto require = [](bool ok, const char* argument, const char* rule, const std::string& got) {
    if (ok) return;
    throw std::invalid_argument(std::string("patch_embed: ") + argument + " must be " + rule +
                                ", got " + got);
  };
  require(args.num_outputs >= 8 && args.num_outputs % 8 == 0 && args.num_outputs <= 1 << 20,
          "num_outputs", "a multiple of 8 up to 2^20", std::to_string(args.num_outputs));
  for (const auto& [name, pointer] :
       {std::pair<const char*, const void*>{"weight", args.weight}, {"bias", args.bias}}) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    require(address != 0, name, "device memory", "a null pointer");
    require(address % 16 == 0, name, "aligned to 16 bytes",
            "an address " + std::to_string(address % 16) + " bytes beyond");
  }
}

}  // namespace

int64_t patch_embed_cuda_workspace_bytes(const PatchifyJob* jobs, size_t num_jobs,
                                         const PatchifyOptions& options,
                                         const PatchEmbedCudaArgs&) {
  return blob_bytes("patch_embed", jobs, num_jobs, options.patch_px);
}

void patch_embed_cuda(const PatchifyJob* jobs, size_t num_jobs, const PatchifyOptions& options,
                      const PatchEmbedCudaArgs& args, const int32_t* places, void* workspace,
                      int64_t workspace_bytes, void* out, void* stream) {
  validate_weight(args);
  if (num_jobs == 0) return;
  validate_call("patch_embed", jobs, num_jobs, options.patch_px, workspace, workspace_bytes, out);
  with_patch(options.patch_px, [&](auto shape) {
    using Shape = decltype(shape);
    const Plan plan =
        make_plan(jobs, num_jobs, options, std::nullopt, Tile<Shape>::kBudget, workspace);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    send("patch_embed", plan.blob, workspace, cuda_stream);

    const auto [kernel, buffer_bytes] = variant_of<Shape>(args.type);
    const int shared_bytes = Tile<Shape>::kTileBytes + std::max(buffer_bytes, plan.scratch_bytes);
    const int64_t at_once = blocks_at_once("patch_embed", kernel, kThreads, shared_bytes);
    const int64_t num_tiles = (plan.num_tokens + kTileTokens - 1) / kTileTokens;
    const int64_t output_tiles = (args.num_outputs + kTileOutputs - 1) / kTileOutputs;
    const int64_t num_splits = std::clamp<int64_t>(at_once / num_tiles, 1, output_tiles);
    const PatchEmbedArguments arguments = {
        {plan.jobs, plan.num_jobs, plan.stage_offset_bytes, plan.num_tokens, places},
        args.weight,
        args.bias,
        out,
        args.num_outputs,
        static_cast<int32_t>(num_splits)};
    launch("patch_embed", kernel, std::min(at_once, num_tiles * num_splits), kThreads, shared_bytes,
           arguments, cuda_stream);
  });
}

}  // namespace vtts
