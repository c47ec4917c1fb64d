#include "core/sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/bfloat16.h"
#include "core/float_kernels.h"
#include "core/parallel.h"
#include "core/row_ops.h"
#include "core/scratch.h"

namespace vtts {

namespace {

constexpr int64_t kBlock = 64;        // logits with a common maximum
constexpr int64_t kSumBlock = 1024;   // summed in float32, the blocks in float64
constexpr double kMostNoise = 36.75;  // -log(-log(1 - 2^-53)), rounded up
// The reference sums 151,936 exponentials in float32: a relative error of 3e-6 where they vary at
// all, of 3e-4 where nearly all are equal, and then the cut is among tokens of small weight.
constexpr double kSumError = 5e-5;
constexpr double kSmallWeight = 6e-4;  // of all that is dropped

struct Scored {
  float score;
  int32_t token;
};

// As a stable sort by score orders them.
bool operator<(const Scored& a, const Scored& b) {
  return a.score != b.score ? a.score < b.score : a.token < b.token;
}

uint64_t high_product(uint64_t a, uint64_t b) {
#ifdef __SIZEOF_INT128__
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>(Wide{a} * b >> 64);
#else
  const uint64_t a0 = a & 0xffffffff, a1 = a >> 32, b0 = b & 0xffffffff, b1 = b >> 32;
  const uint64_t middle = a1 * b0 + (a0 * b0 >> 32);
  return a1 * b1 + (middle >> 32) + (((middle & 0xffffffff) + a0 * b1) >> 32);
#endif
}

// Four words of Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)
// for four tokens, as numpy's Philox has it with key (seed, member) and counter (0, 0, round,
// position), which it raises before it draws. noise: seed, member, round, position.
std::array<uint64_t, 4> philox(const int64_t* noise, int64_t first_token) {
  constexpr uint64_t m0 = 0xD2E7470EE14C6C93, m1 = 0xCA5A826395121157;
  uint64_t k0 = noise[0], k1 = noise[1];
  uint64_t c0 = first_token / 4 + 1, c1 = 0, c2 = noise[2], c3 = noise[3];
  for (int i = 0; i < 10; ++i) {
    const uint64_t high0 = high_product(c0, m0), high1 = high_product(c2, m1);
    const uint64_t low0 = c0 * m0, low1 = c2 * m1;
    c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += 0x9E3779B97F4A7C15, k1 += 0xBB67AE8584CAA73B;
  }
  return {c0, c1, c2, c3};
}

// The largest score with noise, so far. Noise is made only where it can raise a score to that.
class Race {
 public:
  explicit Race(const int64_t* noise) : noise_(noise) {}

  int64_t token() const { return token_; }

  void enter(Scored one) {
    if (one.score + kMostNoise < bar()) return;
    enter(one, philox(noise_, one.token)[one.token % 4] >> 11);
  }

  // Tokens from `first` on, a multiple of 4; none scores above `most`.
  void enter(const float* scores, int64_t first, int64_t count, float most) {
    const double needed = bar() - most;
    if (needed > kMostNoise) return;
    // Of uniform numbers in steps of 2^-53, less what rounding does to them here.
    const double least = std::exp(-std::exp(-needed)) - 1e-15;
    const uint64_t least_bits = least > 0.0 ? static_cast<uint64_t>(least * 0x1p53) : 0;
    for (int64_t i = 0; i < count; i += 4) {
      const std::array<uint64_t, 4> words = philox(noise_, first + i);
      for (int64_t j = i; j < std::min(i + 4, count); ++j) {
        const uint64_t bits = words[j - i] >> 11;
        if (bits >= least_bits) enter({scores[j], static_cast<int32_t>(first + j)}, bits);
      }
    }
  }

 private:
  // What stays below it with noise has not won, however the sum is rounded.
  double bar() const { return best_ - 0x1p-22 * (std::fabs(best_) + 128.0); }

  void enter(Scored one, uint64_t bits) {
    const double uniform = static_cast<double>(bits) * 0x1p-53 + 0x1p-54;
    const float noisy = one.score + static_cast<float>(-std::log(-std::log(uniform)));
    if (noisy < best_ || (noisy == best_ && one.token > token_)) return;
    best_ = noisy;
    token_ = one.token;
  }

  const int64_t* noise_;
  float best_ = -std::numeric_limits<float>::max();
  int64_t token_ = std::numeric_limits<int32_t>::max();
};

class Row {
 public:
  Row(const float* scores, int64_t size, const SweepKernels<float>& kernels)
      : scores_(scores), size_(size), kernels_(kernels), maxima_(ceil_div(size, kBlock)) {
    for (int64_t i = 0; i < size; i += kBlock) {
      maxima_[i / kBlock] = kernels.maximum(scores + i, std::min(kBlock, size - i));
    }
    const auto most = std::max_element(maxima_.begin(), maxima_.end());
    const float* block = scores + (most - maxima_.begin()) * kBlock;
    best_ = {*most, static_cast<int32_t>(std::find(block, scores + size, *most) - scores)};
    for (int64_t i = 0; i < size; i += kSumBlock) {
      total_ += kernels.sum_exp(scores + i, std::min(kSumBlock, size - i), best_.score);
    }
  }

  // False where a NaN or an infinite maximum leaves no distribution.
  bool usable() const { return std::isfinite(total_) && best_.token < size_; }
  Scored best() const { return best_; }
  double total() const { return total_; }  // of exp(score - maximum)

  void draw(Race& race) const {
    race.enter(best_);
    for (int64_t i = 0; i < size_; i += kBlock) {
      race.enter(scores_ + i, i, std::min(kBlock, size_ - i), maxima_[i / kBlock]);
    }
  }

  // Tokens that score at least `floor`, by token; *tail: sum of the others' exp(score - maximum).
  std::vector<Scored> above(float floor, double* tail) const {
    std::vector<Scored> found;
    for (int64_t i = 0; i < size_; i += kBlock) {
      const int64_t end = std::min(i + kBlock, size_);
      if (maxima_[i / kBlock] < floor) {
        *tail += kernels_.sum_exp(scores_ + i, end - i, best_.score);
        continue;
      }
      for (int64_t j = i; j < end; ++j) {
        if (scores_[j] >= floor) {
          found.push_back({scores_[j], static_cast<int32_t>(j)});
        } else {
          *tail += weight(scores_[j]);
        }
      }
    }
    return found;
  }

  // Tokens that score no less than the k-th best.
  std::vector<Scored> top_k(int64_t k) const {
    float floor = -std::numeric_limits<float>::infinity();
    if (k <= static_cast<int64_t>(maxima_.size())) {
      std::vector<float> maxima = maxima_;
      std::nth_element(maxima.begin(), maxima.end() - k, maxima.end());
      floor = maxima[maxima.size() - k];
    }
    double unused = 0.0;
    std::vector<Scored> found = above(floor, &unused);
    std::nth_element(found.begin(), found.end() - k, found.end());
    floor = (found.end() - k)->score;
    const auto is_below = [&](const Scored& one) { return one.score < floor; };
    found.erase(std::remove_if(found.begin(), found.end(), is_below), found.end());
    return found;
  }

  // Tokens that are left of `found` (empty: of all) when the least likely, which have no more than
  // `dropped` of the probability together, are gone. Empty where that is not certain.
  std::vector<Scored> top_p(std::vector<Scored> found, float dropped) const {
    double below = 0.0, bound = dropped * total_;
    if (found.empty()) {
      // All that scores less has at most half of it.
      const double span = std::log(2.0 * static_cast<double>(size_) / bound);
      found = above(best_.score - static_cast<float>(span), &below);
    } else {
      bound = dropped * sum(found.begin(), found.end());
    }
    const auto begin = found.begin(), end = found.end();
    auto low = begin, high = end;
    while (high - low > 32) {
      const auto middle = low + (high - low) / 2;
      std::nth_element(low, middle, high);
      const double more = sum(low, middle);
      if (below + more <= bound) {
        below += more;
        low = middle;
      } else {
        high = middle;
      }
    }
    std::sort(low, high);
    double kept = below;                            // sum up to the first token that stays
    for (; low != high && low + 1 != end; ++low) {  // the likeliest stays
      kept = below + weight(low->score);
      if (kept > bound) break;
      below = kept;
    }
    const bool cuts = low + 1 != end;
    const bool certain =
        below < bound * (1 - kSumError) &&
        (!cuts || (kept > bound * (1 + kSumError) && kept - below > kSmallWeight * bound));
    return certain ? std::vector<Scored>(low, end) : std::vector<Scored>();
  }

  template <typename Iterator>
  double sum(Iterator begin, Iterator end) const {
    double result = 0.0;
    for (; begin != end; ++begin) result += weight(begin->score);
    return result;
  }

 private:
  float weight(float score) const { return std::exp(score - best_.score); }

  const float* scores_;
  int64_t size_;
  const SweepKernels<float>& kernels_;
  std::vector<float> maxima_;  // of blocks
  Scored best_;
  double total_ = 0.0;
};

template <typename T>
void choose(const SampleArgs<T>& args, int64_t n, const SweepKernels<float>& kernels) {
  static thread_local Scratch scratch;
  const int64_t size = args.num_logits;
  const T* logits = args.logits + n * args.row_stride;
  const float temperature = args.temperature[n];
  const float* floats;
  if (std::is_same_v<T, float> && temperature == 0.0f) {
    floats = reinterpret_cast<const float*>(logits);
  } else {
    const float divisor = temperature == 0.0f ? 1.0f : temperature;
    float* scores = scratch.floats(size);
    for (int64_t i = 0; i < size; ++i) scores[i] = static_cast<float>(logits[i]) / divisor;
    floats = scores;
  }
  const Row row(floats, size, kernels);
  args.tokens[n] = -1;
  if (!row.usable()) return;
  const float best = row.best().score;
  double total = row.total();
  int64_t token = row.best().token;
  if (temperature != 0.0f) {
    Race race(args.noise + 4 * n);
    const bool has_k = args.top_k[n] > 0 && args.top_k[n] < size, has_p = args.top_p[n] < 1.0;
    if (has_k || has_p) {
      std::vector<Scored> kept;
      if (has_k) kept = row.top_k(args.top_k[n]);
      if (has_p) kept = row.top_p(std::move(kept), static_cast<float>(1.0 - args.top_p[n]));
      if (kept.empty()) return;
      total = row.sum(kept.begin(), kept.end());
      for (auto one = kept.rbegin(); one != kept.rend(); ++one) race.enter(*one);
    } else {
      row.draw(race);
    }
    token = race.token();
  }
  args.tokens[n] = token;
  args.logprobs[n] = static_cast<float>(floats[token] - best - std::log(total));
}

}  // namespace

template <typename T>
void sample(const SampleArgs<T>& args, Isa isa, int num_threads) {
  const auto& kernels = std::get<SweepKernels<float>>(float_kernels("sample", isa).sweeps);
  const bool is_small = args.num_rows * args.num_logits <= kRowTaskValues;
  parallel_for(args.num_rows, is_small ? 1 : num_threads,
               [&](int, size_t n) { choose(args, static_cast<int64_t>(n), kernels); });
}

template void sample(const SampleArgs<float>&, Isa, int);
template void sample(const SampleArgs<BFloat16>&, Isa, int);

}  // namespace vtts
