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
#include "core/huge_pages.h"
#include "core/linear.h"
#include "core/paged_attention.h"
#include "core/parallel.h"
#include "core/product_kernels.h"
#include "core/row_ops.h"
#include "core/sampling.h"
#include "core/segment_attention.h"
#include "cpu/cpu_features.h"

namespace py = pybind11;

// Operations of a few microseconds take addresses: a view of a tensor through the buffer protocol
// costs 2 us an argument, an address 0.1. Their callers in vtts_rt.ops have checked what is there.
struct Address {
  uintptr_t at;
  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(at);
  }
};

namespace pybind11::detail {

template <>
struct type_caster<Address> {
  PYBIND11_TYPE_CASTER(Address, const_name("int"));
  bool load(handle from, bool convert) {
    make_caster<uintptr_t> number;
    if (!number.load(from, convert)) return false;
    value.at = cast_op<uintptr_t>(number);
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

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

void linear(Address x, int64_t x_stride, Address weight, Address scale, Address bias, Address out,
            int64_t num_rows, int64_t num_channels, int64_t num_outputs, const std::string& dtype,
            const std::string& weight_dtype, bool packed, int num_threads, const std::string& isa) {
  const vtts::Matrix matrix = {weight, parse_weight("linear", weight_dtype), packed, scale, bias};
  const vtts::LinearArgs args = {
      parse_dtype("linear", dtype), x, x_stride, matrix, out, num_rows, num_channels, num_outputs};
  const vtts::Isa chosen = parse_isa("linear", isa);
  const py::gil_scoped_release release;
  vtts::linear(args, chosen, num_threads);
}

// input_norm; values, scales and bias of qkv; q_norm, k_norm; the same three of output; post_norm;
// of gate_up; of down.
using DecodeLayerAddresses = std::array<Address, 16>;

void decode_step(const std::vector<DecodeLayerAddresses>& layers, Address final_norm,
                 const std::tuple<int64_t, int64_t, int, int, int>& sizes, float eps, float scale,
                 Address embeds, int64_t num_rows, Address cos, Address sin, Address slots,
                 Address page_table, int64_t table_stride, Address row_starts, Address num_keys,
                 int64_t num_sequences, Address pages,
                 const std::tuple<int64_t, int64_t>& pool_shape, Address out,
                 const std::string& dtype, const std::string& weight_dtype, bool packed,
                 int num_threads, const std::string& isa) {
  const vtts::Isa chosen = parse_isa("decode_step", isa);
  const vtts::Matrix::Type type = parse_weight("decode_step", weight_dtype);
  in_storage("decode_step", dtype, [&](auto storage) {
    using T = decltype(storage);
    const auto [channels, hidden, heads, kv_heads, head_dim] = sizes;
    const auto [num_pages, page_size] = pool_shape;
    const int64_t pool = num_pages * page_size * kv_heads * head_dim;
    T* next = pages;
    std::vector<vtts::DecodeLayer<T>> native;
    for (const DecodeLayerAddresses& at : layers) {
      const auto matrix = [&](int i) -> vtts::Matrix {
        return {at[i], type, packed, at[i + 1], at[i + 2]};
      };
      native.push_back({at[0], matrix(1), at[4], at[5], matrix(6), at[9], matrix(10), matrix(13),
                        next, next + pool});
      next += 2 * pool;
    }
    const vtts::DecodeStepArgs<T> args = {native.data(),
                                          static_cast<int>(native.size()),
                                          final_norm,
                                          channels,
                                          hidden,
                                          heads,
                                          kv_heads,
                                          head_dim,
                                          eps,
                                          scale,
                                          embeds,
                                          num_rows,
                                          cos,
                                          sin,
                                          slots,
                                          page_table,
                                          table_stride,
                                          row_starts,
                                          num_keys,
                                          num_sequences,
                                          num_pages,
                                          page_size,
                                          out};
    const py::gil_scoped_release release;
    vtts::decode_step(args, chosen, num_threads);
  });
}

void paged_attention(Address queries, int64_t query_stride, Address keys, Address values,
                     Address page_table, int64_t table_stride, Address row_starts, Address num_keys,
                     Address out, int64_t num_rows, int64_t num_sequences,
                     const std::tuple<int64_t, int64_t, int, int>& pool_shape, int num_heads,
                     float scale, int num_threads, const std::string& isa,
                     const std::string& dtype) {
  const vtts::Isa chosen = parse_isa("paged_attention", isa);
  in_storage("paged_attention", dtype, [&](auto storage) {
    const auto [num_pages, page_size, kv_heads, head_dim] = pool_shape;
    const vtts::PagedAttentionArgs<decltype(storage)> args = {
        queries,    query_stride, keys,     values,   page_table,    table_stride,
        row_starts, num_keys,     out,      num_rows, num_sequences, num_pages,
        page_size,  num_heads,    kv_heads, head_dim, scale};
    const py::gil_scoped_release release;
    vtts::paged_attention(args, chosen, num_threads);
  });
}

void segment_attention(Address queries, Address keys, Address values, int64_t row_stride,
                       const std::vector<int64_t>& starts, const std::vector<int64_t>& lengths,
                       Address out, const std::tuple<int64_t, int, int>& shape, float scale,
                       int num_threads, const std::string& isa, const std::string& dtype) {
  if (starts.size() != lengths.size()) {
    throw std::invalid_argument("segment_attention: lengths must be one for each start, got " +
                                std::to_string(lengths.size()));
  }
  const vtts::Isa chosen = parse_isa("segment_attention", isa);
  in_storage("segment_attention", dtype, [&](auto storage) {
    const auto [num_rows, num_heads, head_dim] = shape;
    const vtts::SegmentAttentionArgs<decltype(storage)> args = {queries,
                                                                keys,
                                                                values,
                                                                row_stride,
                                                                starts.data(),
                                                                lengths.data(),
                                                                static_cast<int64_t>(starts.size()),
                                                                num_rows,
                                                                num_heads,
                                                                head_dim,
                                                                scale,
                                                                out};
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

void rmsnorm(Address x, int64_t x_stride, Address residual, int64_t residual_stride, Address weight,
             float eps, int64_t num_rows, int64_t num_channels, Address y, Address h,
             int num_threads, const std::string& isa, const std::string& dtype) {
  const vtts::Isa chosen = parse_isa("rmsnorm", isa);
  in_storage("rmsnorm", dtype, [&](auto storage) {
    const vtts::RmsnormArgs<decltype(storage)> args = {
        x, x_stride, residual, residual_stride, weight, eps, num_rows, num_channels, y, h};
    const RowsGil gil(num_rows * num_channels, num_threads);
    vtts::rmsnorm(args, chosen, gil.num_threads());
  });
}

void swiglu(Address gate_up, int64_t num_rows, int64_t num_hidden, Address out, int num_threads,
            const std::string& isa, const std::string& dtype) {
  const vtts::Isa chosen = parse_isa("swiglu", isa);
  in_storage("swiglu", dtype, [&](auto storage) {
    using T = decltype(storage);
    const RowsGil gil(2 * num_rows * num_hidden, num_threads);
    vtts::swiglu<T>(gate_up, num_rows, num_hidden, out, chosen, gil.num_threads());
  });
}

void gelu(Address x, int64_t num_rows, int64_t num_channels, const std::string& form, Address out,
          int num_threads, const std::string& isa, const std::string& dtype) {
  const vtts::Isa chosen = parse_isa("gelu", isa);
  const vtts::Gelu how = parse<vtts::Gelu>("gelu", "form", form,
                                           {{"exact", vtts::Gelu::kExact},
                                            {"tanh", vtts::Gelu::kTanh},
                                            {"sigmoid", vtts::Gelu::kSigmoid}});
  in_storage("gelu", dtype, [&](auto storage) {
    using T = decltype(storage);
    const RowsGil gil(num_rows * num_channels, num_threads);
    vtts::gelu<T>(x, num_rows, num_channels, how, out, chosen, gil.num_threads());
  });
}

void rotary(Address x, int64_t row_stride, int64_t num_rows, int64_t num_heads, int64_t head_dim,
            Address cos, Address sin, int num_threads, const std::string& isa,
            const std::string& dtype) {
  const vtts::Isa chosen = parse_isa("rotary", isa);
  in_storage("rotary", dtype, [&](auto storage) {
    const RowsGil gil(num_rows * num_heads * head_dim, num_threads);
    vtts::rotary<decltype(storage)>(x, row_stride, num_rows, num_heads, head_dim, cos, sin, chosen,
                                    gil.num_threads());
  });
}

void rotary_kv(Address qkv, int64_t row_stride, int64_t num_rows, int64_t num_heads, Address cos,
               Address sin, Address slots, const std::tuple<int64_t, int64_t, int64_t>& pool_shape,
               Address keys, Address values, int num_threads, const std::string& isa,
               const std::string& dtype) {
  const vtts::Isa chosen = parse_isa("rotary_kv", isa);
  in_storage("rotary_kv", dtype, [&](auto storage) {
    const auto [num_slots, kv_heads, head_dim] = pool_shape;
    const vtts::RotaryKvArgs<decltype(storage)> args = {qkv,      row_stride, num_rows, num_heads,
                                                        kv_heads, head_dim,   cos,      sin,
                                                        slots,    num_slots,  keys,     values};
    const RowsGil gil(num_rows * row_stride, num_threads);
    vtts::rotary_kv(args, chosen, gil.num_threads());
  });
}

void sample(Address logits, const std::tuple<int64_t, int64_t, int64_t>& shape, Address temperature,
            Address top_k, Address top_p, Address noise, Address tokens, Address logprobs,
            int num_threads, const std::string& isa, const std::string& dtype) {
  const vtts::Isa chosen = parse_isa("sample", isa);
  in_storage("sample", dtype, [&](auto storage) {
    const auto [num_rows, num_logits, row_stride] = shape;
    const vtts::SampleArgs<decltype(storage)> args = {logits,      num_rows, num_logits, row_stride,
                                                      temperature, top_k,    top_p,      noise,
                                                      tokens,      logprobs};
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
  // Addresses, in the order of the functions above, of what vtts_rt.ops checks. dtype: of all data,
  // float32 or bfloat16, but of angles and scales, which are float32, and of integers, int64.
  m.def("linear", &linear,
        "out = scale (x weight^T) + bias, scale and bias 0 for none. weight_dtype: dtype or int8; "
        "packed: in panels. The GIL is released.");
  m.def("decode_step", &decode_step,
        "All layers of a language model for a few rows; matrices are of weight_dtype. The GIL is "
        "released.");
  m.def("paged_attention", &paged_attention,
        "Attention of the rows of each sequence to keys in pages of (num_pages, page_size, kv "
        "heads, head_dim). The GIL is released.");
  m.def("segment_attention", &segment_attention,
        "Attention inside segments of rows of shape (rows, heads, head_dim). The GIL is released.");
  m.def("rmsnorm", &rmsnorm,
        "h = x + residual (0: none, h is not written); y = weight * (h / rms(h)), row by row.");
  m.def("swiglu", &swiglu, "out = silu(gate) * up, rows of gate_up being [gate; up].");
  m.def("gelu", &gelu, "out = gelu(x), row by row; form: exact, tanh or sigmoid.");
  m.def("rotary", &rotary, "Turns pairs (i, i + head_dim / 2) of every head in place.");
  m.def("rotary_kv", &rotary_kv,
        "rotary of queries and keys, then keys and values to their slots of pools of (slots, kv "
        "heads, head_dim).");
  m.def("sample", &sample,
        "Chooses a token of each of shape[0] rows of shape[1] logits, shape[2] apart. The GIL is "
        "released.");
  m.def("prefer_huge_pages",
        [](Address begin, size_t num_bytes) { vtts::prefer_huge_pages(begin, num_bytes); });
  m.def(
      "isa_supported",
      [](const std::string& isa) { return vtts::isa_supported(parse_isa("isa_supported", isa)); },
      py::arg("isa"),
      "Whether this build and this machine can run `isa` (auto, scalar, avx2, avx512, avx512_bf16, "
      "amx, neon).");
}
