// vtts_rt._C: the core for Python; torch stays out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings_cuda.h"
#include "bindings_parse.h"
#include "bindings_patchify.h"
#include "core/decode_step.h"
#include "core/head_attention.h"
#include "core/linear.h"
#include "core/paged_attention.h"
#include "core/parallel.h"
#include "core/product_kernels.h"
#include "core/row_ops.h"
#include "core/sampling.h"
#include "core/segment_attention.h"
#include "cpu/cpu_features.h"

namespace py = pybind11;

namespace {

// Operations of a few microseconds take addresses: a view of a tensor through the buffer protocol
// costs 2 us an argument, an address 0.1. Their callers in vtts_rt.ops have checked what is there.
template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

vtts::DType parse_dtype(const char* what, const std::string& dtype) {
  return parse<vtts::DType>(
      what, "dtype", dtype,
      {{"float32", vtts::DType::kFloat32}, {"bfloat16", vtts::DType::kBFloat16}});
}

vtts::Matrix::Type parse_weight(const char* what, const std::string& dtype) {
  return parse<vtts::Matrix::Type>(what, "weight_dtype", dtype,
                                   {{"float32", vtts::Matrix::kFloat32},
                                    {"bfloat16", vtts::Matrix::kBFloat16},
                                    {"int8", vtts::Matrix::kInt8}});
}

// Calls `run` with a value of the storage type of that name.
template <typename Run>
void in_storage(const std::string& what, const std::string& dtype, const Run& run) {
  if (parse<bool>(what, "dtype", dtype, {{"float32", false}, {"bfloat16", true}})) {
    run(vtts::BFloat16{});
  } else {
    run(0.0f);
  }
}

void linear(uintptr_t x, int64_t x_stride, uintptr_t weight, uintptr_t scale, uintptr_t bias,
            uintptr_t out, int64_t num_rows, int64_t num_channels, int64_t num_outputs,
            const std::string& dtype, const std::string& weight_dtype, bool packed, int num_threads,
            const std::string& isa) {
  vtts::LinearArgs args;
  args.type = parse_dtype("linear", dtype);
  args.x = pointer<const void>(x);
  args.x_stride = x_stride;
  args.weight = {pointer<const void>(weight), parse_weight("linear", weight_dtype), packed,
                 pointer<const float>(scale), pointer<const void>(bias)};
  args.out = pointer<void>(out);
  args.num_rows = num_rows;
  args.num_channels = num_channels;
  args.num_outputs = num_outputs;
  const vtts::Isa chosen = parse_isa("linear", isa);
  const py::gil_scoped_release release;
  vtts::linear(args, chosen, num_threads);
}

// input_norm; values, scales and bias of qkv; q_norm, k_norm; the same three of output; post_norm;
// of gate_up; of down.
using DecodeLayerAddresses = std::array<uintptr_t, 16>;

void decode_step(const std::vector<DecodeLayerAddresses>& layers, uintptr_t final_norm,
                 const std::tuple<int64_t, int64_t, int, int, int>& sizes, float eps, float scale,
                 uintptr_t embeds, int64_t num_rows, uintptr_t cos, uintptr_t sin, uintptr_t slots,
                 uintptr_t page_table, int64_t table_stride, uintptr_t row_starts,
                 uintptr_t num_keys, int64_t num_sequences, uintptr_t pages,
                 const std::tuple<int64_t, int64_t>& pool_shape, uintptr_t out,
                 const std::string& dtype, const std::string& weight_dtype, bool packed,
                 int num_threads, const std::string& isa) {
  const vtts::Isa chosen = parse_isa("decode_step", isa);
  const vtts::Matrix::Type type = parse_weight("decode_step", weight_dtype);
  in_storage("decode_step", dtype, [&](auto storage) {
    using T = decltype(storage);
    vtts::DecodeStepArgs<T> args;
    std::tie(args.num_channels, args.num_hidden, args.num_heads, args.num_kv_heads, args.head_dim) =
        sizes;
    std::tie(args.num_pages, args.page_size) = pool_shape;
    const auto matrix = [&](const DecodeLayerAddresses& at, int first) -> vtts::Matrix {
      return {pointer<const void>(at[first]), type, packed, pointer<const float>(at[first + 1]),
              pointer<const void>(at[first + 2])};
    };
    const int64_t pool = args.num_pages * args.page_size * args.num_kv_heads * args.head_dim;
    T* next = pointer<T>(pages);
    std::vector<vtts::DecodeLayer<T>> native;
    for (const DecodeLayerAddresses& at : layers) {
      native.push_back({pointer<const T>(at[0]), matrix(at, 1), pointer<const T>(at[4]),
                        pointer<const T>(at[5]), matrix(at, 6), pointer<const T>(at[9]),
                        matrix(at, 10), matrix(at, 13), next, next + pool});
      next += 2 * pool;
    }
    args.layers = native.data();
    args.num_layers = static_cast<int>(native.size());
    args.final_norm = pointer<const T>(final_norm);
    args.eps = eps;
    args.scale = scale;
    args.embeds = pointer<const T>(embeds);
    args.num_rows = num_rows;
    args.cos = pointer<const float>(cos);
    args.sin = pointer<const float>(sin);
    args.slots = pointer<const int64_t>(slots);
    args.page_table = pointer<const int64_t>(page_table);
    args.table_stride = table_stride;
    args.row_starts = pointer<const int64_t>(row_starts);
    args.num_keys = pointer<const int64_t>(num_keys);
    args.num_sequences = num_sequences;
    args.out = pointer<T>(out);
    const py::gil_scoped_release release;
    vtts::decode_step(args, chosen, num_threads);
  });
}

void paged_attention(uintptr_t queries, int64_t query_stride, uintptr_t keys, uintptr_t values,
                     uintptr_t page_table, int64_t table_stride, uintptr_t row_starts,
                     uintptr_t num_keys, uintptr_t out, int64_t num_rows, int64_t num_sequences,
                     const std::tuple<int64_t, int64_t, int, int>& pool_shape, int num_heads,
                     float scale, int num_threads, const std::string& isa,
                     const std::string& dtype) {
  const vtts::Isa chosen = parse_isa("paged_attention", isa);
  in_storage("paged_attention", dtype, [&](auto storage) {
    using T = decltype(storage);
    vtts::PagedAttentionArgs<T> args;
    args.queries = pointer<const T>(queries);
    args.query_stride = query_stride;
    args.keys = pointer<const T>(keys);
    args.values = pointer<const T>(values);
    args.page_table = pointer<const int64_t>(page_table);
    args.table_stride = table_stride;
    args.row_starts = pointer<const int64_t>(row_starts);
    args.num_keys = pointer<const int64_t>(num_keys);
    args.out = pointer<T>(out);
    args.num_rows = num_rows;
    args.num_sequences = num_sequences;
    std::tie(args.num_pages, args.page_size, args.num_kv_heads, args.head_dim) = pool_shape;
    args.num_heads = num_heads;
    args.scale = scale;
    const py::gil_scoped_release release;
    vtts::paged_attention(args, chosen, num_threads);
  });
}

void segment_attention(uintptr_t queries, uintptr_t keys, uintptr_t values, int64_t row_stride,
                       const std::vector<int64_t>& starts, const std::vector<int64_t>& lengths,
                       uintptr_t out, const std::tuple<int64_t, int, int>& shape, float scale,
                       int num_threads, const std::string& isa, const std::string& dtype) {
  if (starts.size() != lengths.size()) {
    throw std::invalid_argument("segment_attention: lengths must be one for each start, got " +
                                std::to_string(lengths.size()));
  }
  const vtts::Isa chosen = parse_isa("segment_attention", isa);
  in_storage("segment_attention", dtype, [&](auto storage) {
    using T = decltype(storage);
    vtts::SegmentAttentionArgs<T> args;
    args.queries = pointer<const T>(queries);
    args.keys = pointer<const T>(keys);
    args.values = pointer<const T>(values);
    args.row_stride = row_stride;
    args.starts = starts.data();
    args.lengths = lengths.data();
    args.num_segments = static_cast<int64_t>(starts.size());
    std::tie(args.num_rows, args.num_heads, args.head_dim) = shape;
    args.scale = scale;
    args.out = pointer<T>(out);
    const py::gil_scoped_release release;
    vtts::segment_attention(args, chosen, num_threads);
  });
}

// A few rows take a few microseconds, on one thread: not worth giving the GIL away.
class RowsGil {
 public:
  RowsGil(int64_t num_values, int num_threads) {
    if (num_values <= vtts::kRowTaskValues) return;
    release_ = std::make_unique<py::gil_scoped_release>();
    num_threads_ = num_threads;
  }
  int num_threads() const { return num_threads_; }

 private:
  std::unique_ptr<py::gil_scoped_release> release_;
  int num_threads_ = 1;
};

void rmsnorm(uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride,
             uintptr_t weight, float eps, int64_t num_rows, int64_t num_channels, uintptr_t y,
             uintptr_t h, int num_threads, const std::string& isa, const std::string& dtype) {
  const vtts::Isa chosen = parse_isa("rmsnorm", isa);
  in_storage("rmsnorm", dtype, [&](auto storage) {
    using T = decltype(storage);
    vtts::RmsnormArgs<T> args;
    args.x = pointer<const T>(x);
    args.x_stride = x_stride;
    args.residual = pointer<const T>(residual);
    args.residual_stride = residual_stride;
    args.weight = pointer<const T>(weight);
    args.eps = eps;
    args.num_rows = num_rows;
    args.num_channels = num_channels;
    args.y = pointer<T>(y);
    args.h = pointer<T>(h);
    const RowsGil gil(num_rows * num_channels, num_threads);
    vtts::rmsnorm(args, chosen, gil.num_threads());
  });
}

void swiglu(uintptr_t gate_up, int64_t num_rows, int64_t num_hidden, uintptr_t out, int num_threads,
            const std::string& isa, const std::string& dtype) {
  const vtts::Isa chosen = parse_isa("swiglu", isa);
  in_storage("swiglu", dtype, [&](auto storage) {
    using T = decltype(storage);
    const RowsGil gil(2 * num_rows * num_hidden, num_threads);
    vtts::swiglu(pointer<const T>(gate_up), num_rows, num_hidden, pointer<T>(out), chosen,
                 gil.num_threads());
  });
}

void rotary(uintptr_t x, int64_t row_stride, int64_t num_rows, int64_t num_heads, int64_t head_dim,
            uintptr_t cos, uintptr_t sin, int num_threads, const std::string& isa,
            const std::string& dtype) {
  const vtts::Isa chosen = parse_isa("rotary", isa);
  in_storage("rotary", dtype, [&](auto storage) {
    const RowsGil gil(num_rows * num_heads * head_dim, num_threads);
    vtts::rotary(pointer<decltype(storage)>(x), row_stride, num_rows, num_heads, head_dim,
                 pointer<const float>(cos), pointer<const float>(sin), chosen, gil.num_threads());
  });
}

void rotary_kv(uintptr_t qkv, int64_t row_stride, int64_t num_rows, int64_t num_heads,
               uintptr_t cos, uintptr_t sin, uintptr_t slots,
               const std::tuple<int64_t, int64_t, int64_t>& pool_shape, uintptr_t keys,
               uintptr_t values, int num_threads, const std::string& isa,
               const std::string& dtype) {
  const vtts::Isa chosen = parse_isa("rotary_kv", isa);
  in_storage("rotary_kv", dtype, [&](auto storage) {
    using T = decltype(storage);
    vtts::RotaryKvArgs<T> args;
    args.qkv = pointer<T>(qkv);
    args.row_stride = row_stride;
    args.num_rows = num_rows;
    args.num_heads = num_heads;
    std::tie(args.num_slots, args.num_kv_heads, args.head_dim) = pool_shape;
    args.cos = pointer<const float>(cos);
    args.sin = pointer<const float>(sin);
    args.slots = pointer<const int64_t>(slots);
    args.keys = pointer<T>(keys);
    args.values = pointer<T>(values);
    const RowsGil gil(num_rows * row_stride, num_threads);
    vtts::rotary_kv(args, chosen, gil.num_threads());
  });
}

void sample(uintptr_t logits, const std::tuple<int64_t, int64_t, int64_t>& shape,
            uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t noise,
            uintptr_t tokens, uintptr_t logprobs, int num_threads, const std::string& isa,
            const std::string& dtype) {
  const vtts::Isa chosen = parse_isa("sample", isa);
  in_storage("sample", dtype, [&](auto storage) {
    vtts::SampleArgs<decltype(storage)> args;
    args.logits = pointer<decltype(storage)>(logits);
    std::tie(args.num_rows, args.num_logits, args.row_stride) = shape;
    args.temperature = pointer<const float>(temperature);
    args.top_k = pointer<const int64_t>(top_k);
    args.top_p = pointer<const double>(top_p);
    args.noise = pointer<const int64_t>(noise);
    args.tokens = pointer<int64_t>(tokens);
    args.logprobs = pointer<float>(logprobs);
    const py::gil_scoped_release release;
    vtts::sample(args, chosen, num_threads);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  vtts::prepare_for_fork();
  bind_cuda(m);
  bind_patchify(m);
  m.attr("PANEL") = vtts::kPanel;
  m.attr("MAX_HEAD_DIM") = vtts::kMaxHeadDim;
  m.doc() = "Native kernels of vtts_rt; see vtts_rt.ops for the public functions.";
  m.def(
      "linear", &linear, py::arg("x"), py::arg("x_stride"), py::arg("weight"), py::arg("scale"),
      py::arg("bias"), py::arg("out"), py::arg("num_rows"), py::arg("num_channels"),
      py::arg("num_outputs"), py::arg("dtype"), py::arg("weight_dtype"), py::arg("packed"),
      py::arg("num_threads"), py::arg("isa") = "auto",
      "out = scale (x weight^T) + bias: addresses, scale (float32) and bias 0 for none. dtype: of "
      "x, bias and out, float32 or bfloat16; weight_dtype: the same or int8; packed: in panels. "
      "vtts_rt.ops.linear checks them. The GIL is released.");
  m.def("decode_step", &decode_step, py::arg("layers"), py::arg("final_norm"), py::arg("sizes"),
        py::arg("eps"), py::arg("scale"), py::arg("embeds"), py::arg("num_rows"), py::arg("cos"),
        py::arg("sin"), py::arg("slots"), py::arg("page_table"), py::arg("table_stride"),
        py::arg("row_starts"), py::arg("num_keys"), py::arg("num_sequences"), py::arg("pages"),
        py::arg("pool_shape"), py::arg("out"), py::arg("dtype"), py::arg("weight_dtype"),
        py::arg("packed"), py::arg("num_threads"), py::arg("isa") = "auto",
        "All layers of a language model for a few rows: addresses of int64 data, float32 angles, "
        "matrices of weight_dtype and other data of dtype; vtts_rt.ops.decode_step checks them. "
        "The GIL is released.");
  m.def(
      "paged_attention", &paged_attention, py::arg("queries"), py::arg("query_stride"),
      py::arg("keys"), py::arg("values"), py::arg("page_table"), py::arg("table_stride"),
      py::arg("row_starts"), py::arg("num_keys"), py::arg("out"), py::arg("num_rows"),
      py::arg("num_sequences"), py::arg("pool_shape"), py::arg("num_heads"), py::arg("scale"),
      py::arg("num_threads"), py::arg("isa") = "auto", py::arg("dtype") = "float32",
      "Attention of the rows of each sequence to keys in pages of (num_pages, page_size, kv heads, "
      "head_dim): addresses of int64 data and of data of a dtype, float32 or bfloat16; "
      "vtts_rt.ops.paged_attention checks them. The GIL is released.");
  m.def(
      "segment_attention", &segment_attention, py::arg("queries"), py::arg("keys"),
      py::arg("values"), py::arg("row_stride"), py::arg("starts"), py::arg("lengths"),
      py::arg("out"), py::arg("shape"), py::arg("scale"), py::arg("num_threads"),
      py::arg("isa") = "auto", py::arg("dtype") = "float32",
      "Attention inside segments of rows of shape (rows, heads, head_dim): addresses of data of a "
      "dtype; vtts_rt.ops.segment_attention checks them. The GIL is released.");
  m.def("rmsnorm", &rmsnorm, py::arg("x"), py::arg("x_stride"), py::arg("residual"),
        py::arg("residual_stride"), py::arg("weight"), py::arg("eps"), py::arg("num_rows"),
        py::arg("num_channels"), py::arg("y"), py::arg("h"), py::arg("num_threads"),
        py::arg("isa") = "auto", py::arg("dtype") = "float32",
        "h = x + residual (0: none, h is not written); y = weight * (h / rms(h)), row by row: "
        "addresses of data of a dtype, float32 or bfloat16.");
  m.def("swiglu", &swiglu, py::arg("gate_up"), py::arg("num_rows"), py::arg("num_hidden"),
        py::arg("out"), py::arg("num_threads"), py::arg("isa") = "auto",
        py::arg("dtype") = "float32",
        "out = silu(gate) * up, rows of gate_up being [gate; up]: addresses of data of a dtype.");
  m.def("rotary", &rotary, py::arg("x"), py::arg("row_stride"), py::arg("num_rows"),
        py::arg("num_heads"), py::arg("head_dim"), py::arg("cos"), py::arg("sin"),
        py::arg("num_threads"), py::arg("isa") = "auto", py::arg("dtype") = "float32",
        "Turns pairs (i, i + head_dim / 2) of every head in place: addresses of float32 angles and "
        "of heads of a dtype.");
  m.def("rotary_kv", &rotary_kv, py::arg("qkv"), py::arg("row_stride"), py::arg("num_rows"),
        py::arg("num_heads"), py::arg("cos"), py::arg("sin"), py::arg("slots"),
        py::arg("pool_shape"), py::arg("keys"), py::arg("values"), py::arg("num_threads"),
        py::arg("isa") = "auto", py::arg("dtype") = "float32",
        "rotary of queries and keys, then keys and values to their slots of pools of (slots, kv "
        "heads, head_dim): addresses of int64 slots, float32 angles and data of a dtype.");
  m.def("sample", &sample,
        "Chooses a token of each of shape[0] rows of shape[1] logits, shape[2] apart, as "
        "vtts_rt.ops.sampling says, which checks the addresses. The GIL is released.");
  m.def(
      "isa_supported",
      [](const std::string& isa) { return vtts::isa_supported(parse_isa("isa_supported", isa)); },
      py::arg("isa"),
      "Whether this build and this machine can run `isa` (auto, scalar, avx2, avx512, avx512_bf16, "
      "amx, neon).");
}
