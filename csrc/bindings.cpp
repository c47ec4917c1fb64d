// vtts_rt._C: the core for Python. Arrays come and go through the buffer protocol; torch stays out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/patchify.h"
#include "cpu/cpu_features.h"

namespace py = pybind11;

namespace {

using Floats = std::tuple<float, float, float>;
using Pixels = py::array_t<uint8_t>;

vtts::FrameView view(const Pixels& frame) {
  if (frame.ndim() != 3 || frame.shape(2) != vtts::kChannels || frame.strides(2) != 1 ||
      frame.strides(1) != vtts::kChannels) {
    throw std::invalid_argument(
        "patchify: frame must be (H, W, 3) uint8 with packed pixels, got another shape or stride");
  }
  constexpr auto kTooLarge = py::ssize_t{1} << 30;
  if (frame.shape(0) > kTooLarge || frame.shape(1) > kTooLarge) {
    throw std::invalid_argument("patchify: frame must be smaller than 2^30 px a side");
  }
  return {frame.data(), frame.strides(0), static_cast<int32_t>(frame.shape(0)),
          static_cast<int32_t>(frame.shape(1))};
}

template <typename Enum>
Enum parse(const std::string& argument, const std::string& value,
           const std::vector<std::pair<std::string, Enum>>& choices) {
  std::string names;
  for (const auto& [name, choice] : choices) {
    if (name == value) return choice;
    names += (names.empty() ? "" : ", ") + name;
  }
  throw std::invalid_argument("patchify: " + argument + " must be one of " + names + ", got " +
                              value);
}

vtts::Isa parse_isa(const std::string& isa) {
  return parse<vtts::Isa>(
      "isa", isa,
      {{"auto", vtts::Isa::kAuto}, {"scalar", vtts::Isa::kScalar}, {"avx2", vtts::Isa::kAvx2}});
}

void patchify(const py::sequence& jobs, py::array_t<float, 0> out, const Floats& mean,
              const Floats& std, const std::string& rounding, const std::string& isa,
              int num_threads) {
  vtts::PatchifyOptions options;
  options.rounding = parse<vtts::Rounding>(
      "rounding", rounding, {{"cpu", vtts::Rounding::kCpu}, {"cuda", vtts::Rounding::kCuda}});
  options.isa = parse_isa(isa);
  options.num_threads = num_threads;
  std::tie(options.mean[0], options.mean[1], options.mean[2]) = mean;
  std::tie(options.std[0], options.std[1], options.std[2]) = std;

  std::vector<vtts::PatchifyJob> native;
  std::vector<Pixels> alive;  // keeps the frames' memory while the GIL is released
  int64_t num_rows = 0;
  for (const py::handle& item : jobs) {
    using Item = std::tuple<Pixels, Pixels, std::tuple<int, int, int, int>, std::tuple<int, int>>;
    const auto [frame_a, frame_b, box, size] = item.cast<Item>();
    vtts::PatchifyJob job;
    job.frame_a = view(frame_a);
    job.frame_b = view(frame_b);
    std::tie(job.box.x0, job.box.y0, job.box.x1, job.box.y1) = box;
    std::tie(job.height, job.width) = size;
    vtts::validate(job);
    num_rows += vtts::num_patch_rows(job);
    native.push_back(job);
    alive.push_back(frame_a);
    alive.push_back(frame_b);
  }
  if (out.ndim() != 2 || out.shape(0) != num_rows || out.shape(1) != vtts::kPatchRow ||
      (out.size() > 0 && (out.strides(1) != sizeof(float) ||
                          out.strides(0) != vtts::kPatchRow * py::ssize_t{sizeof(float)}))) {
    throw std::invalid_argument("patchify: out must be contiguous (" + std::to_string(num_rows) +
                                ", 1176) float32, got another shape or stride");
  }
  float* rows = out.mutable_data();
  const py::gil_scoped_release release;
  vtts::patchify(native.data(), native.size(), options, rows);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of vtts_rt; see vtts_rt.ops for the public functions.";
  m.def("patchify", &patchify, py::arg("jobs"), py::arg("out").noconvert(), py::arg("mean"),
        py::arg("std"), py::arg("rounding") = "cpu", py::arg("isa") = "auto",
        py::arg("num_threads") = 1,
        "Writes the patch rows of jobs [(frame_a, frame_b, (x0, y0, x1, y1), (height, width))] to "
        "`out`, (rows, 1176) float32. The GIL is released.");
  m.def(
      "isa_supported", [](const std::string& isa) { return vtts::isa_supported(parse_isa(isa)); },
      py::arg("isa"), "Whether this build and this machine can run `isa` (auto, scalar, avx2).");
}
