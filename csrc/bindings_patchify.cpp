#include "bindings_patchify.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings_parse.h"
#include "core/patch_embed.h"
#include "core/patchify.h"

namespace py = pybind11;

namespace {

using Floats = std::tuple<float, float, float>;
using Pixels = py::array_t<uint8_t>;

vtts::FrameView view(const std::string& what, const Pixels& frame) {
  if (frame.ndim() != 3 || frame.shape(2) != vtts::kChannels || frame.strides(2) != 1 ||
      frame.strides(1) != vtts::kChannels) {
    throw std::invalid_argument(
        what + ": frame must be (H, W, 3) uint8 with packed pixels, got another shape or stride");
  }
  constexpr auto kTooLarge = py::ssize_t{1} << 30;
  if (frame.shape(0) > kTooLarge || frame.shape(1) > kTooLarge) {
    throw std::invalid_argument(what + ": frame must be smaller than 2^30 px a side");
  }
  return {frame.data(), frame.strides(0), static_cast<int32_t>(frame.shape(0)),
          static_cast<int32_t>(frame.shape(1))};
}

// What patchify and patch_embed take alike.
struct PatchifyCall {
  vtts::PatchifyOptions options;
  std::vector<vtts::PatchifyJob> jobs;
  std::vector<Pixels> alive;  // keeps the frames' memory while the GIL is released
  int64_t num_rows = 0;

  PatchifyCall(const char* what, const py::sequence& items, int patch_px, const Floats& mean,
               const Floats& std, const std::string& isa, int num_threads) {
    vtts::validate_patch(patch_px, what);
    options.patch_px = patch_px;
    options.isa = parse_isa(what, isa);
    options.num_threads = num_threads;
    std::tie(options.mean[0], options.mean[1], options.mean[2]) = mean;
    std::tie(options.std[0], options.std[1], options.std[2]) = std;
    for (const py::handle& item : items) {
      using Item = std::tuple<Pixels, Pixels, std::tuple<int, int, int, int>, std::tuple<int, int>,
                              std::string>;
      const auto [frame_a, frame_b, box, size, resize] = item.cast<Item>();
      vtts::PatchifyJob job;
      job.frame_a = view(what, frame_a);
      job.frame_b = view(what, frame_b);
      std::tie(job.box.x0, job.box.y0, job.box.x1, job.box.y1) = box;
      std::tie(job.height, job.width) = size;
      job.resize = vtts::parse_resize(what, resize);
      vtts::validate(job, patch_px, what);
      num_rows += vtts::num_patch_rows(job, patch_px);
      jobs.push_back(job);
      alive.push_back(frame_a);
      alive.push_back(frame_b);
    }
  }
};

// Throws unless `array` is a C-contiguous (rows, columns).
void check_matrix(const std::string& argument, const py::array& array, int64_t rows,
                  int64_t columns) {
  if (array.ndim() == 2 && array.shape(0) == rows && array.shape(1) == columns &&
      (array.size() == 0 || (array.flags() & py::array::c_style) != 0)) {
    return;
  }
  throw std::invalid_argument(argument + " must be contiguous (" + std::to_string(rows) + ", " +
                              std::to_string(columns) + ") float32, got another shape or stride");
}

void patchify(const py::sequence& jobs, py::array_t<float, 0> out, int patch_px, const Floats& mean,
              const Floats& std, const std::string& isa, int num_threads) {
  const PatchifyCall call("patchify", jobs, patch_px, mean, std, isa, num_threads);
  check_matrix("patchify: out", out, call.num_rows, vtts::patch_row(patch_px));
  float* rows = out.mutable_data();
  const py::gil_scoped_release release;
  vtts::patchify(call.jobs.data(), call.jobs.size(), call.options, rows);
}

void patch_embed(const py::sequence& jobs, const py::array_t<float, 0>& weight,
                 const std::optional<py::array_t<float, 0>>& bias, py::array_t<float, 0> out,
                 int patch_px, const Floats& mean, const Floats& std, const std::string& isa,
                 int num_threads) {
  const PatchifyCall call("patch_embed", jobs, patch_px, mean, std, isa, num_threads);
  const int64_t num_outputs = weight.ndim() == 2 ? weight.shape(0) : 0;
  check_matrix("patch_embed: weight", weight, num_outputs, vtts::patch_row(patch_px));
  if (bias && (bias->ndim() != 1 || bias->shape(0) != num_outputs ||
               (num_outputs > 1 && bias->strides(0) != sizeof(float)))) {
    throw std::invalid_argument("patch_embed: bias must be contiguous (" +
                                std::to_string(num_outputs) +
                                ") float32, got another shape or stride");
  }
  check_matrix("patch_embed: out", out, call.num_rows, num_outputs);
  vtts::PatchEmbedArgs args;
  args.weight = weight.data();
  args.bias = bias ? bias->data() : nullptr;
  args.num_outputs = num_outputs;
  args.out = out.mutable_data();
  const py::gil_scoped_release release;
  vtts::patch_embed(call.jobs.data(), call.jobs.size(), call.options, args);
}

}  // namespace

void bind_patchify(py::module_& m) {
  m.def("patchify", &patchify, py::arg("jobs"), py::arg("out").noconvert(), py::arg("patch_px"),
        py::arg("mean"), py::arg("std"), py::arg("isa") = "auto", py::arg("num_threads") = 1,
        "Writes the patch rows of jobs [(frame_a, frame_b, (x0, y0, x1, y1), (height, width), "
        "resize)] to `out`, (rows, 6 * patch_px^2) float32. The GIL is released.");
  m.def("patch_embed", &patch_embed, py::arg("jobs"), py::arg("weight").noconvert(),
        py::arg("bias").noconvert(), py::arg("out").noconvert(), py::arg("patch_px"),
        py::arg("mean"), py::arg("std"), py::arg("isa") = "auto", py::arg("num_threads") = 1,
        "patchify and linear in one: the jobs' rows times `weight` (outputs, 6 * patch_px^2), plus "
        "`bias` (outputs) or None, to `out` (rows, outputs), all float32. The GIL is released.");
}
