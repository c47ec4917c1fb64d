#include "core/page_hash.h"

#include <algorithm>
#include <cstring>

namespace vtts {
namespace {

constexpr size_t kBlockBytes = 128;
constexpr uint64_t kInitial[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b,
                                  0xa54ff53a5f1d36f1, 0x510e527fade682d1, 0x9b05688c2b3e6c1f,
                                  0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
constexpr uint8_t kSigma[10][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                    {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
                                    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
                                    {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
                                    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
                                    {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
                                    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
                                    {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
                                    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
                                    {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

uint64_t read_little(const uint8_t* bytes) {
  uint64_t word = 0;
  for (int i = 7; i >= 0; --i) word = word << 8 | bytes[i];
  return word;
}

void write_little(uint64_t word, uint8_t* bytes) {
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<uint8_t>(word >> (8 * i));
}

uint64_t rotate(uint64_t word, int right) { return word >> right | word << (64 - right); }

// RFC 7693, section 3; messages shorter than 2^64 bytes.
class Blake2b {
 public:
  Blake2b(size_t out_bytes, const char* person) {
    std::copy(kInitial, kInitial + 8, state_);
    state_[0] ^= 0x01010000 ^ out_bytes;
    if (person != nullptr) {
      const auto* bytes = reinterpret_cast<const uint8_t*>(person);
      state_[6] ^= read_little(bytes);
      state_[7] ^= read_little(bytes + 8);
    }
  }

  void update(const void* data, size_t num_bytes) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    while (num_bytes > 0) {
      if (filled_ == kBlockBytes) compress(false);  // the last block waits for `finish`
      const size_t part = std::min(num_bytes, kBlockBytes - filled_);
      std::memcpy(block_ + filled_, bytes, part);
      filled_ += part;
      bytes += part;
      num_bytes -= part;
    }
  }

  // Numbers as little-endian bytes, whatever the machine's order is.
  void update_little(const int64_t* words, int64_t num_words) {
    uint8_t bytes[kBlockBytes];
    constexpr int64_t kWords = kBlockBytes / 8;
    for (int64_t i = 0; i < num_words; i += kWords) {
      const int64_t num = std::min(kWords, num_words - i);
      for (int64_t k = 0; k < num; ++k) {
        write_little(static_cast<uint64_t>(words[i + k]), bytes + 8 * k);
      }
      update(bytes, static_cast<size_t>(8 * num));
    }
  }

  void finish(void* out, size_t out_bytes) {
    std::memset(block_ + filled_, 0, kBlockBytes - filled_);
    compress(true);
    uint8_t digest[64];
    for (int i = 0; i < 8; ++i) write_little(state_[i], digest + 8 * i);
    std::memcpy(out, digest, out_bytes);
  }

 private:
  void compress(bool last) {
    total_ += filled_;
    filled_ = 0;
    uint64_t m[16], v[16];
    for (int i = 0; i < 16; ++i) m[i] = read_little(block_ + 8 * i);
    for (int i = 0; i < 8; ++i) {
      v[i] = state_[i];
      v[i + 8] = kInitial[i];
    }
    v[12] ^= total_;
    if (last) v[14] = ~v[14];
    for (int round = 0; round < 12; ++round) {
      const uint8_t* s = kSigma[round % 10];
      const auto mix = [&](int a, int b, int c, int d, int i) {
        v[a] = v[a] + v[b] + m[s[i]];
        v[d] = rotate(v[d] ^ v[a], 32);
        v[c] = v[c] + v[d];
        v[b] = rotate(v[b] ^ v[c], 24);
        v[a] = v[a] + v[b] + m[s[i + 1]];
        v[d] = rotate(v[d] ^ v[a], 16);
        v[c] = v[c] + v[d];
        v[b] = rotate(v[b] ^ v[c], 63);
      };
      for (int i = 0; i < 4; ++i) mix(i, 4 + i, 8 + i, 12 + i, 2 * i);
      for (int i = 0; i < 4; ++i) {
        mix(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, 8 + 2 * i);
      }
    }
    for (int i = 0; i < 8; ++i) state_[i] ^= v[i] ^ v[i + 8];
  }

  uint64_t state_[8];
  uint64_t total_ = 0;
  uint8_t block_[kBlockBytes] = {};
  size_t filled_ = 0;
};

constexpr char kSpacePerson[17] = "vtts-kv-space-v1";
constexpr char kPagePerson[17] = "vtts-kv-page-v1";
constexpr char kContentPerson[17] = "vtts-content-v1";

}  // namespace

void blake2b(const void* data, size_t num_bytes, const char* person, void* out, size_t out_bytes) {
  Blake2b hash(out_bytes, person);
  hash.update(data, num_bytes);
  hash.finish(out, out_bytes);
}

void page_hashes(const int64_t* keys, int64_t num_tokens, int64_t page_size, const void* space,
                 size_t space_bytes, uint8_t* out) {
  uint8_t chain[kPageHashBytes];
  blake2b(space, space_bytes, kSpacePerson, chain, sizeof chain);
  const int64_t num_words = page_size * kKeyColumns;
  for (int64_t page = 0; page < num_tokens / page_size; ++page) {
    Blake2b hash(sizeof chain, kPagePerson);
    hash.update(chain, sizeof chain);
    hash.update_little(keys + page * num_words, num_words);
    hash.finish(chain, sizeof chain);
    std::memcpy(out + page * kPageHashBytes, chain, sizeof chain);
  }
}

int64_t content_id(const void* name, size_t name_bytes) {
  uint8_t digest[8];
  blake2b(name, name_bytes, kContentPerson, digest, sizeof digest);
  return -1 - static_cast<int64_t>(read_little(digest) >> 21 << 20);
}

}  // namespace vtts
