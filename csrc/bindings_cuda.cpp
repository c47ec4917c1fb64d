// The part of vtts_rt._C for CUDA devices: addresses of device memory, which vtts_rt.ops has
// checked.
#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/cuda_ops.h"

namespace py = pybind11;

#ifdef VTTS_WITH_CUDA

namespace {

using Frame = std::tuple<uintptr_t, int64_t, int32_t, int32_t>;  // address, row stride, H, W
using Item =
    std::tuple<Frame, Frame, std::tuple<int, int, int, int>, std::tuple<int, int>, std::string>;
using Floats = std::tuple<float, float, float>;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

vtts::FrameView view(const Frame& frame) {
  const auto [address, stride, height, width] = frame;
  return {pointer<const uint8_t>(address), stride, height, width};
}

vtts::DType parse_dtype(const std::string& name) {
  if (name == "float32") return vtts::DType::kFloat32;
  if (name == "float16") return vtts::DType::kFloat16;
  if (name == "bfloat16") return vtts::DType::kBFloat16;
  throw std::invalid_argument("dtype must be float32, float16 or bfloat16, got " + name);
}

std::vector<vtts::PatchifyJob> jobs_of(const std::vector<Item>& items) {
  std::vector<vtts::PatchifyJob> jobs;
  for (const auto& [frame_a, frame_b, box, size, resize] : items) {
    vtts::PatchifyJob job;
    job.frame_a = view(frame_a);
    job.frame_b = view(frame_b);
    std::tie(job.box.x0, job.box.y0, job.box.x1, job.box.y1) = box;
    std::tie(job.height, job.width) = size;
    job.resize = vtts::parse_resize("patchify", resize);
    jobs.push_back(job);
  }
  return jobs;
}

vtts::PatchifyOptions options_of(int patch_px, const Floats& mean, const Floats& std) {
  vtts::PatchifyOptions options;
  options.patch_px = patch_px;
  std::tie(options.mean[0], options.mean[1], options.mean[2]) = mean;
  std::tie(options.std[0], options.std[1], options.std[2]) = std;
  return options;
}

// `workspace` is called with a number of bytes and returns the address of as much device memory.
void patchify_cuda(const std::vector<Item>& items, int patch_px, const Floats& mean,
                   const Floats& std, uintptr_t places, const py::function& workspace,
                   uintptr_t out, const std::string& dtype, uintptr_t stream) {
  const auto jobs = jobs_of(items);
  const auto options = options_of(patch_px, mean, std);
  const int64_t bytes = vtts::patchify_cuda_workspace_bytes(jobs.data(), jobs.size(), options);
  void* memory = pointer<void>(workspace(bytes).cast<uintptr_t>());
  const vtts::DType type = parse_dtype(dtype);
  const py::gil_scoped_release release;
  vtts::patchify_cuda(jobs.data(), jobs.size(), options, pointer<const int32_t>(places), memory,
                      bytes, pointer<void>(out), type, pointer<void>(stream));
}

void patch_embed_cuda(const std::vector<Item>& items, int patch_px, uintptr_t weight,
                      uintptr_t bias, int64_t num_outputs, uintptr_t places,
                      const py::function& workspace, uintptr_t out, const std::string& dtype,
                      uintptr_t stream) {
  const auto jobs = jobs_of(items);
  const auto options = options_of(patch_px, {0, 0, 0}, {1, 1, 1});
  vtts::PatchEmbedCudaArgs args;
  args.weight = pointer<const void>(weight);
  args.bias = pointer<const float>(bias);
  args.num_outputs = num_outputs;
  args.type = parse_dtype(dtype);
  const int64_t bytes =
      vtts::patch_embed_cuda_workspace_bytes(jobs.data(), jobs.size(), options, args);
  void* memory = pointer<void>(workspace(bytes).cast<uintptr_t>());
  const py::gil_scoped_release release;
  vtts::patch_embed_cuda(jobs.data(), jobs.size(), options, args, pointer<const int32_t>(places),
                         memory, bytes, pointer<void>(out), pointer<void>(stream));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("HAS_CUDA") = true;
  m.def("patchify_cuda", &patchify_cuda, py::arg("jobs"), py::arg("patch_px"), py::arg("mean"),
        py::arg("std"), py::arg("places"), py::arg("workspace"), py::arg("out"), py::arg("dtype"),
        py::arg("stream"),
        "Enqueues patch rows of jobs [((address, row stride, H, W) twice, box, size, resize)].");
  m.def("patch_embed_cuda", &patch_embed_cuda, py::arg("jobs"), py::arg("patch_px"),
        py::arg("weight"), py::arg("bias"), py::arg("num_outputs"), py::arg("places"),
        py::arg("workspace"), py::arg("out"), py::arg("dtype"), py::arg("stream"),
        "Enqueues patch rows times a folded weight, jobs as for patchify_cuda.");
}

#else

void bind_cuda(py::module_& m) { m.attr("HAS_CUDA") = false; }

#endif
