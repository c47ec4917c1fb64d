/* Names for KV pages that every machine computes alike, so that a service can send a request to the
 * machine that holds its prefix. BLAKE2b, 16 bytes; vtts_rt/engine/page_hash.py computes the same.
 *
 *   h[-1] = H("vtts-kv-space-v1", name space)
 *   h[i]  = H("vtts-kv-page-v1", h[i-1] followed by the keys of page i, little-endian)
 */
#ifndef VTTS_PAGE_HASH_H_
#define VTTS_PAGE_HASH_H_

#include "vtts/patchify.h"

#ifdef __cplusplus
extern "C" {
#endif

#define VTTS_PAGE_HASH_BYTES 16

/* Hashes of the num_tokens / page_size full pages, 16 bytes each, to `out`.
 * keys: (num_tokens, 4) int64, aligned to 8 bytes: token or content id, then M-RoPE t, h, w.
 * page_size: 1 to 2^20 tokens. space: bytes that name what must not share KV, such as a version of
 * the weights; NULL where space_bytes is 0.
 * VTTS_ERROR_INVALID_ARGUMENT: a NULL pointer, a negative or too large count. */
VTTS_API vtts_status vtts_page_hashes(const int64_t* keys, int64_t num_tokens, int64_t page_size,
                                      const void* space, int64_t space_bytes, uint8_t* out);

/* The content id of a frame pair, to *content_id: token i < 2^20 of the pair has the key
 * content_id - i. Negative, so no token id can equal it; 43 bits of a hash of the text
 * "<video_id> frame_a frame_b x0 y0 x1 y1 height width", so a machine still verifies a hit.
 * video_id: num_bytes bytes. */
VTTS_API vtts_status vtts_pair_content_id(const char* video_id, int64_t num_bytes, int64_t frame_a,
                                          int64_t frame_b, vtts_pixel_box box,
                                          int64_t resized_height, int64_t resized_width,
                                          int64_t* content_id);

#ifdef __cplusplus
}
#endif

#endif /* VTTS_PAGE_HASH_H_ */
