// The seed of a random test: from the environment variable IOVANE_SEED, else from the clock; printed either way.
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

}  // namespace iovane::test
