// Bodies of the product kernels, compiled once per instruction set.
//
// The including file is inside an anonymous namespace and has defined VTTS_TARGET and VTTS_INLINE
// (attributes of functions), kTileRows and kAccumulators (vectors of sums that registers hold) and
// a struct Vec of kLanes floats.

constexpr int kPanelVecs = kPanel / Vec::kLanes;
// Channels of one sum, which is then added to those before it: longer ones would err more than
// twice as much as torch's products of few rows, which are as short.
constexpr int64_t kTerms = 32;
constexpr int64_t kAheadBytes = 1024;  // of the weights that few rows fetch before they need them

// Panels multiplied together with so many rows: what accumulators there are for.
constexpr int panels_with(int rows) {
  int panels = 4;
  while (panels > 1 && rows * panels * kPanelVecs > kAccumulators) panels /= 2;
  return panels;
}

// How a sum takes its channels: one after the other, weights widened as they are loaded.
template <typename Weight>
struct ByChannel {
  using Row = float;
  using Value = Weight;
  static constexpr int kSteps = sizeof(Weight) == 2 ? 2 : 1;  // for what one load covers
  static constexpr int kChannels = kSteps;

  VTTS_INLINE static Vec weights(const Weight* line, int step) {
    return Vec::load_weights(line, step);
  }
  VTTS_INLINE static Vec input(const float* x, int step) { return Vec::broadcast(x[step]); }
  VTTS_INLINE static Vec add(Vec input, Vec weights, Vec sum) {
    return Vec::fma(input, weights, sum);
  }
};

template <typename Step, int kRows, int kPanels>
VTTS_TARGET void tile(const typename Step::Row* x, int64_t x_stride,
                      const typename Step::Value* panels, int64_t panel_stride,
                      int64_t num_channels, float* sums, int64_t sums_stride, bool adds) {
  int64_t begin = 0;
  do {
    Vec acc[kRows][kPanels * kPanelVecs];
#pragma GCC unroll 16
    for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 16
      for (int i = 0; i < kPanels * kPanelVecs; ++i) acc[n][i] = Vec::zero();
    }
    const int64_t end = std::min(num_channels, begin + kTerms);
    for (int64_t c = begin; c < end; c += Step::kChannels) {
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) {
        const typename Step::Value* const line = panels + p * panel_stride + c * kPanel;
        // Few rows wait for weights from memory.
        if constexpr (kRows < kTileRows) prefetch(line + kAheadBytes / sizeof(*line));
#pragma GCC unroll 2
        for (int step = 0; step < Step::kSteps; ++step) {
          Vec weights[kPanelVecs];
#pragma GCC unroll 4
          for (int i = 0; i < kPanelVecs; ++i) {
            weights[i] = Step::weights(line + i * Vec::kLanes * Step::kChannels, step);
          }
#pragma GCC unroll 16
          for (int n = 0; n < kRows; ++n) {
            const Vec input = Step::input(x + n * x_stride + c, step);
#pragma GCC unroll 4
            for (int i = 0; i < kPanelVecs; ++i) {
              Vec& sum = acc[n][p * kPanelVecs + i];
              sum = Step::add(input, weights[i], sum);
            }
          }
        }
      }
    }
#pragma GCC unroll 16
    for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 16
      for (int i = 0; i < kPanels * kPanelVecs; ++i) {
        float* const to = sums + n * sums_stride + i * Vec::kLanes;
        (adds ? Vec::add(Vec::load(to), acc[n][i]) : acc[n][i]).store(to);
      }
    }
    begin = end;
    adds = true;
  } while (begin < num_channels);
}

// As a Multiply, of the rows of one tile.
template <typename Step, int kRows>
VTTS_TARGET void tile_rows(const typename Step::Row* x, int64_t x_stride,
                           const typename Step::Value* panels, int64_t panel_stride, int num_panels,
                           int64_t num_channels, float* sums, int64_t sums_stride, bool adds) {
  constexpr int kPanels = panels_with(kRows);
  int p = 0;
  for (; p + kPanels <= num_panels; p += kPanels) {
    tile<Step, kRows, kPanels>(x, x_stride, panels + p * panel_stride, panel_stride, num_channels,
                               sums + p * kPanel, sums_stride, adds);
  }
  for (; p < num_panels; ++p) {
    tile<Step, kRows, 1>(x, x_stride, panels + p * panel_stride, panel_stride, num_channels,
                         sums + p * kPanel, sums_stride, adds);
  }
}

// The same of `rows` <= kRows rows.
template <typename Step, int kRows, typename... Args>
void tile_of(int64_t rows, Args... args) {
  if (rows == kRows) return tile_rows<Step, kRows>(args...);
  if constexpr (kRows > 1) tile_of<Step, kRows - 1>(rows, args...);
}

// The float32 panel that `panel` stands for; values of fewer bytes are widened exactly.
template <typename Step>
VTTS_TARGET void widen_panel(const typename Step::Value* panel, int64_t num_channels, float* to) {
  for (int64_t c = 0; c < num_channels; c += Step::kChannels) {
    for (int step = 0; step < Step::kSteps; ++step) {
      for (int i = 0; i < kPanelVecs; ++i) {
        Step::weights(panel + c * kPanel + i * Vec::kLanes * Step::kChannels, step)
            .store(to + (c + step) * kPanel + i * Vec::kLanes);
      }
    }
  }
}

// Rows in tiles of nearly equal size; each panel, or few of them, for all rows: they stay in cache.
template <typename Step>
void multiply(const typename Step::Row* x, int64_t x_stride, int64_t num_rows,
              const typename Step::Value* panels, int64_t panel_stride, int num_panels,
              int64_t num_channels, float* sums, int64_t sums_stride, bool adds) {
  const int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  if (num_tiles == 0) return;
  if constexpr (!std::is_same_v<typename Step::Value, typename Step::Row>) {
    if (num_tiles > 3) {  // what is widened once serves all of them
      alignas(64) float wide[kRun * kPanel];
      for (int p = 0; p < num_panels; ++p) {
        widen_panel<Step>(panels + p * panel_stride, num_channels, wide);
        multiply<ByChannel<float>>(x, x_stride, num_rows, wide, 0, 1, num_channels,
                                   sums + p * kPanel, sums_stride, adds);
      }
      return;
    }
  }
  const int together = panels_with(static_cast<int>((num_rows + num_tiles - 1) / num_tiles));
  for (int p = 0; p < num_panels; p += together) {
    for (int64_t i = 0; i < num_tiles; ++i) {
      const int64_t n = i * num_rows / num_tiles;
      const int64_t rows = (i + 1) * num_rows / num_tiles - n;
      tile_of<Step, kTileRows>(rows, x + n * x_stride, x_stride, panels + p * panel_stride,
                               panel_stride, std::min(together, num_panels - p), num_channels,
                               sums + n * sums_stride + p * kPanel, sums_stride, adds);
    }
  }
}

template <typename Out>
VTTS_TARGET void finish(const float* sums, int64_t sums_stride, int64_t num_rows,
                        const float* scale, const Out* bias, int num_outputs, Out* out,
                        int64_t out_stride) {
  for (int o = 0; o < num_outputs; o += Vec::kLanes) {
    const int there = std::min(num_outputs - o, int{Vec::kLanes});
    const Vec scales = scale == nullptr ? Vec::broadcast(1.0f) : Vec::load_part(scale + o, there);
    const Vec biases = bias == nullptr ? Vec::zero() : Vec::load_part(bias + o, there);
    for (int64_t n = 0; n < num_rows; ++n) {
      // A product with 1 is the sum itself.
      const Vec sum = Vec::mul(Vec::load(sums + n * sums_stride + o), scales);
      const Vec result = bias == nullptr ? sum : Vec::add(sum, biases);
      if (there == Vec::kLanes) {
        result.store(out + n * out_stride + o);
      } else {
        Out last[Vec::kLanes];
        result.store(last);
        std::copy(last, last + there, out + n * out_stride + o);
      }
    }
  }
}

VTTS_TARGET void widen(const BFloat16* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) Vec::load(from + i).store(to + i);
  for (; i < count; ++i) to[i] = from[i];
}

VTTS_TARGET void pack(const float* from, int64_t stride, int num_lines, int64_t num_channels,
                      float* to) {
  int64_t c = 0;
  for (; c + Vec::kLanes <= num_channels; c += Vec::kLanes) {
    for (int n = 0; n < kPanel; n += Vec::kLanes) {
      Vec lines[Vec::kLanes];
      for (int i = 0; i < Vec::kLanes; ++i) {
        lines[i] = n + i < num_lines ? Vec::load(from + (n + i) * stride + c) : Vec::zero();
      }
      Vec::transpose(lines);
      for (int i = 0; i < Vec::kLanes; ++i) lines[i].store(to + (c + i) * kPanel + n);
    }
  }
  for (; c < num_channels; ++c) {
    for (int n = 0; n < kPanel; ++n) {
      to[c * kPanel + n] = n < num_lines ? from[n * stride + c] : 0.0f;
    }
  }
}

// A template, so that a file that does not name it does not compile it.
template <typename = void>
constexpr ProductKernels kProducts = {multiply<ByChannel<float>>,
                                      multiply<ByChannel<int8_t>>,
                                      multiply<ByChannel<BFloat16>>,
                                      nullptr,
                                      finish<float>,
                                      finish<BFloat16>,
                                      widen,
                                      pack,
                                      kTileRows};
