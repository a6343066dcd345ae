// The seed of a random test, from the environment variable IOVANE_SEED, else from the clock, printed either way; and a
// generator that is the same everywhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace iovane::test {

inline std::uint64_t seed() {
  static const std::uint64_t value = [] {
    const char* given = std::getenv("IOVANE_SEED");
    const std::uint64_t s =
        given != nullptr ? std::strtoull(given, nullptr, 0)
                         : static_cast<std::uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
    std::printf("IOVANE_SEED=%llu repeats this run\n", static_cast<unsigned long long>(s));
    return s;
  }();
  return value;
}

__extension__ typedef unsigned __int128 Wide;  // -Wpedantic

/// Small, fast, and the same everywhere (the distributions of <random> are not).
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
