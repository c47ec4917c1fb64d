// Body of a tile kernel, compiled once per instruction set.
//
// The including file is inside an anonymous namespace and has defined VTTS_TARGET (an attribute of
// functions), VTTS_PACK (what packs for it), kTileRows, kTileVecs and a struct Vec of kLanes
// floats.

constexpr int kTileOutputs = kTileVecs * Vec::kLanes;

VTTS_TARGET void run_tile(const float* x, const float* weight, int64_t num_channels,
                          const float* bias, bool starts, int rows_there, int outputs_there,
                          float* out, int64_t out_stride) {
  const auto part = [outputs_there](int i) {
    return std::clamp(outputs_there - i * Vec::kLanes, 0, Vec::kLanes);
  };
  Vec sums[kTileRows][kTileVecs];
#pragma GCC unroll 16
  for (int n = 0; n < kTileRows; ++n) {
#pragma GCC unroll 4
    for (int i = 0; i < kTileVecs; ++i) sums[n][i] = Vec::zero();
  }
  for (int64_t c = 0; c < num_channels; ++c) {
    Vec weights[kTileVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kTileVecs; ++i) weights[i] = Vec::load(weight + i * Vec::kLanes);
#pragma GCC unroll 16
    for (int n = 0; n < kTileRows; ++n) {
      const Vec input = Vec::broadcast(x[n]);
#pragma GCC unroll 4
      for (int i = 0; i < kTileVecs; ++i) sums[n][i] = Vec::fma(input, weights[i], sums[n][i]);
    }
    x += kTileRows;
    weight += kTileOutputs;
  }
#pragma GCC unroll 16
  for (int n = 0; n < kTileRows; ++n) {
    if (n < rows_there) {
#pragma GCC unroll 4
      for (int i = 0; i < kTileVecs; ++i) {
        float* to = out + n * out_stride + i * Vec::kLanes;
        const Vec before = starts ? Vec::load(bias + i * Vec::kLanes) : Vec::load_part(to, part(i));
        Vec::add(before, sums[n][i]).store_part(to, part(i));
      }
    }
  }
}

constexpr TileKernel kKernel = {kTileRows, kTileOutputs, run_tile, VTTS_PACK};
