// Seeds of random tests: printed with every failure, given back through IOVANE_SEED.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <random>

namespace iovane::test {

/// IOVANE_SEED when it is set, otherwise a fresh one. Put it into SCOPED_TRACE.
inline std::uint64_t seed_of_run() {
  if (const char* given = std::getenv("IOVANE_SEED"); given != nullptr) return std::strtoull(given, nullptr, 0);
  return std::random_device{}();
}

/// Small, fast, and the same everywhere (the distributions of <random> are not).
__extension__ typedef unsigned __int128 Wide;  // -Wpedantic

class Random {
 public:
  explicit Random(std::uint64_t seed) noexcept : state_{seed * 2 + 1} {}
  /// Uniform below n (n > 0), by multiplication; the bias is far below what a test can see.
  std::uint64_t below(std::uint64_t n) noexcept {
    return static_cast<std::uint64_t>((static_cast<Wide>(next()) * n) >> 64);
  }
  bool one_in(std::uint64_t n) noexcept { return below(n) == 0; }
  std::uint64_t next() noexcept {  // splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators")
    std::uint64_t z = (state_ += 0x9e37'79b9'7f4a'7c15U);
    z = (z ^ (z >> 30)) * 0xbf58'476d'1ce4'e5b9U;
    z = (z ^ (z >> 27)) * 0x94d0'49bb'1331'11ebU;
    return z ^ (z >> 31);
  }

 private:
  std::uint64_t state_;
};

}  // namespace iovane::test
