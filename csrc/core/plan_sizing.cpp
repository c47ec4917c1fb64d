#include "core/plan_sizing.h"

#include <algorithm>
#include <cmath>

#include "core/patchify.h"

namespace vtts {
namespace {

constexpr double kMaxFramePixels = 768.0 * kTokenPx * kTokenPx;  // qwen-vl-utils
constexpr int64_t kMaxAspect = 200;                              // transformers

int64_t tokens_to_px(double tokens) { return static_cast<int64_t>(tokens) * kTokenPx; }

}  // namespace

double round_half_even(double value) {
  const double low = std::floor(value);
  const double rest = value - low;  // exact
  if (rest != 0.5) return rest < 0.5 ? low : low + 1.0;
  return std::fmod(low, 2.0) == 0.0 ? low : low + 1.0;
}

Size smart_resize(int64_t height, int64_t width, int64_t min_pixels, double max_pixels) {
  const int64_t shorter = std::min(height, width);
  height = std::min(height, shorter * kMaxAspect);
  width = std::min(width, shorter * kMaxAspect);
  const double high = static_cast<double>(height), wide = static_cast<double>(width);
  int64_t h = tokens_to_px(round_half_even(high / kTokenPx));
  int64_t w = tokens_to_px(round_half_even(wide / kTokenPx));
  if (static_cast<double>(h * w) > max_pixels) {
    const double beta = std::sqrt(high * wide / max_pixels);
    h = std::max<int64_t>(kTokenPx, tokens_to_px(std::floor(high / beta / kTokenPx)));
    w = std::max<int64_t>(kTokenPx, tokens_to_px(std::floor(wide / beta / kTokenPx)));
  } else if (h * w < min_pixels) {
    const double beta = std::sqrt(static_cast<double>(min_pixels) / (high * wide));
    h = tokens_to_px(std::ceil(high * beta / kTokenPx));
    w = tokens_to_px(std::ceil(wide * beta / kTokenPx));
  }
  return {std::max<int64_t>(h, kTokenPx), std::max<int64_t>(w, kTokenPx)};
}

double frame_cap(const PerceptionConfig& config, int64_t num_frames) {
  const double share =
      static_cast<double>(config.total_pixels) / static_cast<double>(num_frames) * 2.0;
  return std::max(std::min(kMaxFramePixels, share),
                  std::trunc(static_cast<double>(config.min_pixels) * 1.05));
}

Size view_size(const PerceptionConfig& config, int64_t height, int64_t width, int64_t num_frames) {
  return smart_resize(height, width, config.min_pixels, frame_cap(config, num_frames));
}

int64_t smart_nframes(const PerceptionConfig& config, int64_t num_frames, double source_fps) {
  const double wanted = static_cast<double>(num_frames) / source_fps * config.sample_fps;
  const double least = static_cast<double>(config.min_frames);
  const double most = static_cast<double>(std::min(config.max_frames, num_frames));
  const double within = std::min(std::max(wanted, least), most);
  return static_cast<int64_t>(std::floor(within / 2.0)) * 2;
}

}  // namespace vtts
