// Page hashes and content ids.
#include "core/page_hash.h"

#include <string>

#include "abi/guard.h"
#include "vtts/page_hash.h"

static_assert(VTTS_PAGE_HASH_BYTES == vtts::kPageHashBytes, "the header and the core agree");

using namespace vtts::abi;

extern "C" {

vtts_status vtts_page_hashes(const int64_t* keys, int64_t num_tokens, int64_t page_size,
                             const void* space, int64_t space_bytes, uint8_t* out) {
  return guard([&] {
    const char* what = "page_hashes";
    constexpr int64_t kMaxTokens = int64_t{1} << 40, kMaxPage = int64_t{1} << 20;
    require(num_tokens >= 0 && num_tokens <= kMaxTokens, what, "num_tokens", "in [0, 2^40]",
            num_tokens);
    require(page_size >= 1 && page_size <= kMaxPage, what, "page_size", "in [1, 2^20]", page_size);
    require(space_bytes >= 0, what, "space_bytes", ">= 0", space_bytes);
    if (space_bytes > 0) require_pointer(space, what, "space");
    require_aligned(keys, alignof(int64_t), what, "keys");
    if (num_tokens >= page_size) {
      require_pointer(keys, what, "keys");
      require_pointer(out, what, "out");
    }
    vtts::page_hashes(keys, num_tokens, page_size, space, static_cast<size_t>(space_bytes), out);
  });
}

vtts_status vtts_pair_content_id(const char* video_id, int64_t num_bytes, int64_t frame_a,
                                 int64_t frame_b, vtts_pixel_box box, int64_t resized_height,
                                 int64_t resized_width, int64_t* content_id) {
  return guard([&] {
    const char* what = "pair_content_id";
    require_pointer(content_id, what, "content_id");
    require(num_bytes >= 0, what, "num_bytes", ">= 0", num_bytes);
    if (num_bytes > 0) require_pointer(video_id, what, "video_id");
    std::string name;
    if (num_bytes > 0) name.assign(video_id, static_cast<size_t>(num_bytes));
    for (const int64_t number :
         {frame_a, frame_b, box.x0, box.y0, box.x1, box.y1, resized_height, resized_width}) {
      name += ' ' + std::to_string(number);
    }
    *content_id = vtts::content_id(name.data(), name.size());
  });
}

}  // extern "C"
