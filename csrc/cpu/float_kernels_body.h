// Bodies of the float kernels, compiled once per instruction set.
//
// The including file is inside an anonymous namespace and has defined VTTS_TARGET and VTTS_INLINE
// (attributes of functions) and a struct Vec of kLanes floats.

constexpr int kCacheLine = 16;  // floats

constexpr int kScores = kKeyRange * kAttentionRows;
constexpr int kKeysAhead = 16;  // how far ahead keys are fetched: pages lie anywhere in memory

// Fetches key `j + kKeysAhead` and the value of key `j`, which is wanted when all scores are there.
VTTS_INLINE void prefetch_key(const AttentionBlock& block, int j) {
  const float* ahead = block.keys[std::min(j + kKeysAhead, block.num_keys - 1)];
  const float* value = block.keys[j] + block.values_behind_keys;
  for (int d = 0; d < block.head_dim; d += kCacheLine) {
    prefetch(ahead + d);
    prefetch(value + d);
  }
}

// scores[j * kAttentionRows + r] = scale * query_r . key_j for kKeys keys.
template <int kKeys>
VTTS_TARGET void score_keys(const AttentionBlock& block, int first, float* scores) {
  Vec sums[kKeys][kAttentionRows];
  for (int j = 0; j < kKeys; ++j) {
    prefetch_key(block, first + j);
    for (int r = 0; r < kAttentionRows; ++r) sums[j][r] = Vec::zero();
  }
  for (int d = 0; d < block.head_dim; d += Vec::kLanes) {
    Vec keys[kKeys];
    for (int j = 0; j < kKeys; ++j) keys[j] = Vec::load(block.keys[first + j] + d);
    for (int r = 0; r < kAttentionRows; ++r) {
      const Vec query = Vec::load(block.queries[r] + d);
      for (int j = 0; j < kKeys; ++j) sums[j][r] = Vec::fma(query, keys[j], sums[j][r]);
    }
  }
  for (int j = 0; j < kKeys; ++j) {
    float* to = scores + (first + j) * kAttentionRows;
    store_four_sums(sums[j][0], sums[j][1], sums[j][2], sums[j][3], to);
    for (int r = 0; r < kAttentionRows; ++r) to[r] *= block.scale;
  }
}

// The weighted values of kVecs vectors from dimension d on.
template <int kVecs>
VTTS_TARGET void weigh_values(const AttentionBlock& block, const float* weights, int d) {
  Vec sums[kAttentionRows][kVecs];
  for (auto& row : sums) {
    for (int i = 0; i < kVecs; ++i) row[i] = Vec::zero();
  }
  for (int j = 0; j < block.num_keys; ++j) {
    const float* value = block.keys[j] + block.values_behind_keys + d;
    Vec values[kVecs];
    for (int i = 0; i < kVecs; ++i) values[i] = Vec::load(value + i * Vec::kLanes);
    for (int r = 0; r < kAttentionRows; ++r) {
      const Vec weight = Vec::broadcast(weights[j * kAttentionRows + r]);
      for (int i = 0; i < kVecs; ++i) sums[r][i] = Vec::fma(weight, values[i], sums[r][i]);
    }
  }
  for (int r = 0; r < kAttentionRows; ++r) {
    for (int i = 0; i < kVecs; ++i) sums[r][i].store(block.partials[r] + d + i * Vec::kLanes);
  }
}

VTTS_TARGET void attend(const AttentionBlock& block) {
  static_assert(Vec::kLanes == 2 * kAttentionRows, "a vector is two keys of scores");
  alignas(64) float scores[kScores];
  int j = 0;
  for (; j + 3 <= block.num_keys; j += 3) score_keys<3>(block, j, scores);
  for (; j < block.num_keys; ++j) score_keys<1>(block, j, scores);

  // What a row does not see lies behind what it sees; an odd number of keys is filled up.
  const int num_scores = block.num_keys * kAttentionRows;
  const int padded = (num_scores + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes;
  const int seen_by_all = *std::min_element(block.visible, block.visible + kAttentionRows);
  const auto hide = [&](float value) {
    for (int key = seen_by_all; key * kAttentionRows < padded; ++key) {
      for (int r = 0; r < kAttentionRows; ++r) {
        if (key >= block.visible[r]) scores[key * kAttentionRows + r] = value;
      }
    }
  };
  hide(-INFINITY);
  Vec maxima = Vec::load(scores);
  for (int i = Vec::kLanes; i < padded; i += Vec::kLanes) {
    maxima = Vec::max(maxima, Vec::load(scores + i));
  }
  maxima = Vec::max(maxima, maxima.halves_swapped());
  for (int i = 0; i < padded; i += Vec::kLanes) {
    Vec::exp(Vec::sub(Vec::load(scores + i), maxima)).store(scores + i);
  }
  hide(0.0f);
  Vec sums = Vec::load(scores);
  for (int i = Vec::kLanes; i < padded; i += Vec::kLanes) {
    sums = Vec::add(sums, Vec::load(scores + i));
  }
  sums = Vec::add(sums, sums.halves_swapped());

  int d = 0;
  for (; d + 2 * Vec::kLanes <= block.head_dim; d += 2 * Vec::kLanes) {
    weigh_values<2>(block, scores, d);
  }
  for (; d < block.head_dim; d += Vec::kLanes) weigh_values<1>(block, scores, d);
  float last[2][Vec::kLanes];
  maxima.store(last[0]);
  sums.store(last[1]);
  for (int r = 0; r < kAttentionRows; ++r) {
    block.partials[r][block.head_dim] = last[0][r];
    block.partials[r][block.head_dim + 1] = last[1][r];
  }
}

template <int kVecs>
VTTS_TARGET void weigh_vectors(float* scores, int64_t num_keys, int64_t width, float* maxima,
                               float* sums, float* shares) {
  Vec most[kVecs], sum[kVecs];
  for (int i = 0; i < kVecs; ++i) most[i] = Vec::load(maxima + i * Vec::kLanes);
  for (int64_t j = 0; j < num_keys; ++j) {
    for (int i = 0; i < kVecs; ++i) {
      most[i] = Vec::max(most[i], Vec::load(scores + j * width + i * Vec::kLanes));
    }
  }
  for (int i = 0; i < kVecs; ++i) {
    const Vec share = Vec::exp(Vec::sub(Vec::load(maxima + i * Vec::kLanes), most[i]));
    share.store(shares + i * Vec::kLanes);
    most[i].store(maxima + i * Vec::kLanes);
    sum[i] = Vec::mul(share, Vec::load(sums + i * Vec::kLanes));
  }
  for (int64_t j = 0; j < num_keys; ++j) {
    for (int i = 0; i < kVecs; ++i) {
      float* const at = scores + j * width + i * Vec::kLanes;
      const Vec weight = Vec::exp(Vec::sub(Vec::load(at), most[i]));
      weight.store(at);
      sum[i] = Vec::add(sum[i], weight);
    }
  }
  for (int i = 0; i < kVecs; ++i) sum[i].store(sums + i * Vec::kLanes);
}

VTTS_TARGET void weigh_columns(float* scores, int64_t num_keys, int64_t width, float* maxima,
                               float* sums, float* shares) {
  static_assert(Vec::kLanes == 8, "a vector is 8 columns");
  switch (width / Vec::kLanes) {
    case 4:
      weigh_vectors<4>(scores, num_keys, width, maxima, sums, shares);
      break;
    case 2:
      weigh_vectors<2>(scores, num_keys, width, maxima, sums, shares);
      break;
    default:
      weigh_vectors<1>(scores, num_keys, width, maxima, sums, shares);
  }
}

template <typename T>
VTTS_INLINE Vec rounded(Vec v) {
  if constexpr (std::is_same_v<T, BFloat16>) return v.rounded();
  return v;
}

template <typename T>
VTTS_TARGET void rmsnorm(const T* x, const T* residual, const T* weight, float eps, int64_t count,
                         T* y, T* h) {
  Vec squares = Vec::zero();
  float sum = 0.0f;
  int64_t i = 0;
  if (residual != nullptr) {
    for (; i + Vec::kLanes <= count; i += Vec::kLanes) {
      Vec::add(Vec::load(x + i), Vec::load(residual + i)).store(h + i);
    }
    for (; i < count; ++i) h[i] = T(float{x[i]} + float{residual[i]});
    x = h;
  }
  for (i = 0; i + Vec::kLanes <= count; i += Vec::kLanes) {
    const Vec part = Vec::load(x + i);
    squares = Vec::fma(part, part, squares);
  }
  for (int64_t j = i; j < count; ++j) sum += float{x[j]} * float{x[j]};
  const float mean = (squares.sum() + sum) / static_cast<float>(count);
  const float scale = 1.0f / std::sqrt(mean + eps);
  const Vec scales = Vec::broadcast(scale);
  for (i = 0; i + Vec::kLanes <= count; i += Vec::kLanes) {
    Vec::mul(Vec::load(weight + i), rounded<T>(Vec::mul(Vec::load(x + i), scales))).store(y + i);
  }
  for (; i < count; ++i) y[i] = T(float{weight[i]} * float{T(x[i] * scale)});
}

template <typename T>
VTTS_TARGET void swiglu(const T* gate, const T* up, int64_t count, T* out) {
  const Vec one = Vec::broadcast(1.0f);
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) {
    const Vec x = Vec::load(gate + i);
    const Vec decayed = Vec::add(one, Vec::exp(Vec::sub(Vec::zero(), x)));
    Vec::mul(Vec::div(x, decayed), Vec::load(up + i)).store(out + i);
  }
  if (i == count) return;
  // The rest through the same arithmetic: values do not depend on where they stand.
  const int left = static_cast<int>(count - i);
  const Vec x = Vec::load_part(gate + i, left);
  const Vec decayed = Vec::add(one, Vec::exp(Vec::sub(Vec::zero(), x)));
  T last[Vec::kLanes];
  Vec::mul(Vec::div(x, decayed), Vec::load_part(up + i, left)).store(last);
  std::copy(last, last + left, out + i);
}

template <typename T>
VTTS_TARGET void rotate(T* low, T* high, const float* cos, const float* sin, int64_t count) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) {
    const Vec l = Vec::load(low + i), h = Vec::load(high + i);
    const Vec c = Vec::load(cos + i), s = Vec::load(sin + i);
    Vec::sub(Vec::mul(l, c), Vec::mul(h, s)).store(low + i);
    Vec::add(Vec::mul(h, c), Vec::mul(l, s)).store(high + i);
  }
  for (; i < count; ++i) {
    const float l = low[i], h = high[i];
    low[i] = T(l * cos[i] - h * sin[i]);
    high[i] = T(h * cos[i] + l * sin[i]);
  }
}

template <typename T>
VTTS_TARGET float maximum(const T* x, int64_t count) {
  Vec most = Vec::broadcast(-INFINITY);
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) most = Vec::max(most, Vec::load(x + i));
  float lanes[Vec::kLanes];
  most.store(lanes);
  float result = *std::max_element(lanes, lanes + Vec::kLanes);
  for (; i < count; ++i) result = std::max(result, float{x[i]});
  return result;
}

template <typename T>
VTTS_TARGET float sum_exp(const T* x, int64_t count, float shift) {
  const Vec shifts = Vec::broadcast(shift);
  Vec sums = Vec::zero();
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) {
    sums = Vec::add(sums, Vec::exp(Vec::sub(Vec::load(x + i), shifts)));
  }
  float sum = sums.sum();
  for (; i < count; ++i) sum += std::exp(x[i] - shift);
  return sum;
}

template <typename T>
constexpr SweepKernels<T> kSweeps = {rmsnorm<T>, swiglu<T>, rotate<T>, maximum<T>, sum_exp<T>};
