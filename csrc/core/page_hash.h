// Names for KV pages that every machine computes alike: a chain of 128-bit BLAKE2b (RFC 7693).
// vtts_rt/engine/page_hash.py says what is hashed and computes the same.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vtts {

inline constexpr int kPageHashBytes = 16;
inline constexpr int kKeyColumns = 4;  // token or content id, then M-RoPE t, h, w

// BLAKE2b of 1 to 64 bytes without a key; `person` is 16 bytes or null.
void blake2b(const void* data, size_t num_bytes, const char* person, void* out, size_t out_bytes);

// Hashes of the full pages of `keys`, (num_tokens, 4) int64: num_tokens / page_size of them,
// kPageHashBytes each, to `out`. A hash names its page and everything before it in `space`.
void page_hashes(const int64_t* keys, int64_t num_tokens, int64_t page_size, const void* space,
                 size_t space_bytes, uint8_t* out);

// What a vision token's key begins with: token i of the pair has the key content_id - i. Negative,
// the same for equal names.
int64_t content_id(const void* name, size_t name_bytes);

}  // namespace vtts
