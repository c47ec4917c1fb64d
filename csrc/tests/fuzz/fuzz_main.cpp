// Runs a fuzz target without libFuzzer: `fuzz_x SECONDS [SEED]` on bytes that it changes at random,
// `fuzz_x FILE...` on files. Where VTTS_FUZZ_KEEP is set, the file fuzz-last-input holds what the
// target got last. With clang, link the target with -fsanitize=fuzzer instead of this.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include "tests/fuzz/fuzz_input.h"

namespace {

using Bytes = std::vector<uint8_t>;

Bytes mutated(const std::vector<Bytes>& pool, std::mt19937_64& random) {
  const auto below = [&](size_t limit) { return static_cast<size_t>(random() % limit); };
  Bytes bytes = pool[below(pool.size())];
  const size_t num_changes = 1 + below(8);
  for (size_t i = 0; i < num_changes; ++i) {
    const size_t at = below(bytes.size() + 1);
    const auto place = bytes.begin() + static_cast<std::ptrdiff_t>(at);
    switch (random() % 5) {
      case 0:
        if (at < bytes.size()) *place = static_cast<uint8_t>(random());
        break;
      case 1:
        if (at < bytes.size()) *place ^= static_cast<uint8_t>(1u << random() % 8);
        break;
      case 2:
        bytes.insert(place, 4, 0xFF);
        break;
      case 3:
        bytes.erase(place, std::min(place + 8, bytes.end()));
        break;
      default: {
        const Bytes& other = pool[below(pool.size())];
        bytes.insert(place, other.begin(),
                     other.begin() + static_cast<std::ptrdiff_t>(below(other.size() + 1)));
      }
    }
  }
  bytes.resize(std::min<size_t>(bytes.size(), 4096));
  return bytes;
}

int replay(int count, char** files) {
  for (int i = 0; i < count; ++i) {
    std::ifstream file(files[i], std::ios::binary);
    const Bytes bytes{std::istreambuf_iterator<char>(file), {}};
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  char* end = nullptr;
  const double seconds = argc > 1 ? std::strtod(argv[1], &end) : 2.0;
  if (argc > 1 && *end != '\0') return replay(argc - 1, argv + 1);
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  std::mt19937_64 random(seed);
  std::vector<Bytes> pool = {{}};
  for (int i = 0; i < 64; ++i) {
    Bytes bytes(1 + random() % 400);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    pool.push_back(std::move(bytes));
  }
  const bool keep = std::getenv("VTTS_FUZZ_KEEP") != nullptr;
  const auto stop = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  int64_t num_runs = 0;
  while (num_runs < 16 || std::chrono::steady_clock::now() < stop) {
    Bytes bytes = mutated(pool, random);
    if (keep) {
      std::ofstream("fuzz-last-input", std::ios::binary)
          .write(reinterpret_cast<const char*>(bytes.data()),
                 static_cast<std::streamsize>(bytes.size()));
    }
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    pool[random() % 8 == 0 ? random() % pool.size() : 0] = std::move(bytes);
    ++num_runs;
  }
  std::printf("all passed (%lld inputs, seed %llu)\n", static_cast<long long>(num_runs),
              static_cast<unsigned long long>(seed));
  return 0;
}
