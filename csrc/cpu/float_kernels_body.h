// Bodies of the float kernels, compiled once per instruction set.
//
// The including file is inside an anonymous namespace and has defined VTTS_TARGET and VTTS_INLINE
// (attributes of functions) and a struct Vec of kLanes floats.

// Values from `from` on, up to a vector of them, then zeros.
template <typename T>
VTTS_INLINE Vec load_up_to(const T* from, int count) {
  if (count >= Vec::kLanes) return Vec::load(from);
  return count > 0 ? Vec::load_part(from, count) : Vec::zero();
}

// Dims d up to d + 8 of eight of the keys; kWhole: all of them are there.
template <bool kWhole, typename T>
VTTS_INLINE void pack_eight(const T* const* keys, int num_keys, int d, int head_dim, float* to) {
  Vec lines[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) {
    if (kWhole) {
      lines[i] = Vec::load(keys[i] + d);
    } else {
      lines[i] = i < num_keys ? load_up_to(keys[i] + d, head_dim - d) : Vec::zero();
    }
  }
  Vec::transpose(lines);
  const int there = kWhole ? Vec::kLanes : std::min(Vec::kLanes, head_dim - d);
  for (int i = 0; i < there; ++i) lines[i].store(to + (d + i) * kPanel);
}

// Fetches the numbers of a head while other things are computed: pages lie anywhere in memory.
template <typename T>
VTTS_INLINE void prefetch_head(const T* from, int head_dim) {
  for (int d = 0; d < head_dim; d += 64 / sizeof(T)) prefetch(from + d);
}

template <typename T>
VTTS_TARGET void pack_keys(const BlockAddresses<T>& block, int first, int head_dim, float* panel) {
  const int there = std::min(block.num_keys - first, kPanel);
  for (int j = first; j < first + there; ++j) {
    prefetch_head(block.keys[std::min(j + kPanel, block.num_keys - 1)], head_dim);
    prefetch_head(block.values[j], head_dim);
  }
  for (int half = 0; half < kPanel; half += Vec::kLanes) {
    const T* const* const keys = block.keys + first + half;
    int d = 0;
    if (half + Vec::kLanes <= there) {
      for (; d + Vec::kLanes <= head_dim; d += Vec::kLanes) {
        pack_eight<true>(keys, there - half, d, head_dim, panel + half);
      }
    }
    for (; d < head_dim; d += Vec::kLanes) {
      pack_eight<false>(keys, there - half, d, head_dim, panel + half);
    }
  }
}

template <typename T>
VTTS_TARGET void pack_values(const BlockAddresses<T>& block, int first, int head_dim,
                             float* panel) {
  if (first + kPanel <= head_dim) {
    for (int j = 0; j < block.num_keys; ++j) {
      for (int i = 0; i < kPanel; i += Vec::kLanes) {
        Vec::load(block.values[j] + first + i).store(panel + j * kPanel + i);
      }
    }
    return;
  }
  for (int j = 0; j < block.num_keys; ++j) {
    for (int i = 0; i < kPanel; i += Vec::kLanes) {
      load_up_to(block.values[j] + first + i, head_dim - first - i).store(panel + j * kPanel + i);
    }
  }
}

template <typename T>
VTTS_TARGET void scale_row(const T* from, float scale, int count, float* to) {
  const Vec scales = Vec::broadcast(scale);
  for (int i = 0; i < count; i += Vec::kLanes) {
    Vec::mul(load_up_to(from + i, count - i), scales).store(to + i);
  }
}

VTTS_TARGET void weigh(float* scores, int64_t stride, int64_t num_rows, const int* seen,
                       int num_keys, float* maxima, float* sums) {
  for (int64_t n = 0; n < num_rows; ++n) {
    float* const row = scores + n * stride;
    const int whole = seen[n] / Vec::kLanes * Vec::kLanes;
    const int padded = (seen[n] + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes;
    std::fill(row + seen[n], row + padded, -INFINITY);
    Vec most = Vec::broadcast(-INFINITY);
    for (int i = 0; i < padded; i += Vec::kLanes) most = Vec::max(most, Vec::load(row + i));
    float lanes[Vec::kLanes];
    most.store(lanes);
    maxima[n] = *std::max_element(lanes, lanes + Vec::kLanes);
    most = Vec::broadcast(maxima[n]);

    Vec sum = Vec::zero();
    for (int i = 0; i < whole; i += Vec::kLanes) {
      const Vec weight = Vec::exp2(Vec::sub(Vec::load(row + i), most));
      weight.store(row + i);
      sum = Vec::add(sum, weight);
    }
    if (whole < padded) {
      Vec::exp2(Vec::sub(Vec::load(row + whole), most)).store(row + whole);
      sum = Vec::add(sum, Vec::load_part(row + whole, seen[n] - whole));
    }
    sums[n] = sum.sum();
    std::fill(row + seen[n], row + std::max(padded, num_keys), 0.0f);
  }
}

VTTS_TARGET void join(const Partials& into, const Partials& part, int64_t num_rows,
                      int64_t row_floats) {
  for (int64_t first = 0; first < num_rows; first += Vec::kLanes) {
    const Vec old = Vec::load(into.maxima + first), other = Vec::load(part.maxima + first);
    const Vec most = Vec::max(old, other);
    const Vec keep = Vec::exp2(Vec::sub(old, most)), take = Vec::exp2(Vec::sub(other, most));
    most.store(into.maxima + first);
    Vec::fma(Vec::load(part.sums + first), take, Vec::mul(Vec::load(into.sums + first), keep))
        .store(into.sums + first);
    float keeps[Vec::kLanes], takes[Vec::kLanes];
    keep.store(keeps);
    take.store(takes);
    const int64_t end = std::min<int64_t>(num_rows, first + Vec::kLanes);
    for (int64_t n = first; n < end; ++n) {
      const Vec kept = Vec::broadcast(keeps[n - first]), taken = Vec::broadcast(takes[n - first]);
      float* const to = into.out + n * row_floats;
      const float* const from = part.out + n * row_floats;
      for (int64_t d = 0; d < row_floats; d += Vec::kLanes) {
        Vec::fma(Vec::load(from + d), taken, Vec::mul(Vec::load(to + d), kept)).store(to + d);
      }
    }
  }
}

template <typename T>
VTTS_TARGET void divide_row(const float* from, float divisor, int count, T* to) {
  const Vec divisors = Vec::broadcast(divisor);
  int i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) {
    Vec::div(Vec::load(from + i), divisors).store(to + i);
  }
  for (; i < count; ++i) to[i] = static_cast<T>(from[i] / divisor);
}

template <typename T>
constexpr AttentionKernels<T> kAttention = {pack_keys<T>, pack_values<T>, scale_row<T>,
                                            weigh,        join,           divide_row<T>};

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

VTTS_INLINE Vec gelu(Vec x, Gelu form) {
  if (form != Gelu::kExact) {
    Vec slope = Vec::broadcast(form == Gelu::kTanh ? -2 * 0.797884561f : -1.702f);
    if (form == Gelu::kTanh) {
      slope = Vec::fma(Vec::mul(x, x), Vec::broadcast(-2 * 0.797884561f * 0.044715f), slope);
    }
    return Vec::div(x, Vec::add(Vec::broadcast(1.0f), Vec::exp(Vec::mul(x, slope))));
  }
  // max(x, 0) - a Q(a), a = |x|: minus is cut off at -14, beyond which Q(a) is 0 in float32.
  const Vec one = Vec::broadcast(1.0f), negated = Vec::sub(Vec::zero(), x);
  const Vec size = Vec::max(negated, x);
  const Vec minus = Vec::max(Vec::broadcast(-14.0f), Vec::sub(Vec::zero(), size));
  const Vec t = Vec::div(one, Vec::fma(Vec::broadcast(-0.28f), minus, one));
  Vec tail = Vec::broadcast(kTail[0]);
  for (int i = 1; i < 8; ++i) tail = Vec::fma(tail, t, Vec::broadcast(kTail[i]));
  const Vec density = Vec::exp(Vec::mul(Vec::mul(minus, minus), Vec::broadcast(-0.5f)));
  tail = Vec::mul(Vec::mul(tail, t), density);
  return Vec::fma(minus, tail, Vec::max(Vec::zero(), x));
}

template <typename T>
VTTS_TARGET void gelu(const T* x, int64_t count, Gelu form, T* out) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= count; i += Vec::kLanes) gelu(Vec::load(x + i), form).store(out + i);
  if (i == count) return;
  T last[Vec::kLanes];
  gelu(Vec::load_part(x + i, static_cast<int>(count - i)), form).store(last);
  std::copy(last, last + (count - i), out + i);
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
constexpr SweepKernels<T> kSweeps = {rmsnorm<T>, swiglu<T>,  gelu<T>,
                                     rotate<T>,  maximum<T>, sum_exp<T>};
