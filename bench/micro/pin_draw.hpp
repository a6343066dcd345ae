// Which region a lookup asks for: drawn inside the clock, for a list of keys long enough to reach a million regions
// would itself push the tables out of the cache. The row "harness" says what drawing costs.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>

namespace iovane::bench {

/// The value must be there, in a register. benchmark::DoNotOptimize() leaves the compiler the choice of memory, and
/// then g++ 12 names the table's own element and never loads it.
inline void use(std::uint64_t value) noexcept { asm volatile("" : : "r"(value) : "memory"); }

/// Argument 0: regions; argument 1: 0: 64 of them reused, 1: uniform over all, 2: uniform over this thread's own share.
class Draw {
 public:
  explicit Draw(const benchmark::State& state) noexcept {
    const auto regions = static_cast<std::uint64_t>(state.range(0));
    const auto thread = static_cast<std::uint64_t>(state.thread_index());
    state_ = 0x9e37'79b9'7f4a'7c15U * (thread + 1);
    count_ = regions;
    if (state.range(1) == 0) count_ = std::min<std::uint64_t>(64, regions);
    if (state.range(1) == 2) {
      count_ = std::max<std::uint64_t>(1, regions / static_cast<std::uint64_t>(state.threads()));
      first_ = thread * count_;
    }
  }
  /// The number of a region. A linear congruential generator; its upper half, scaled.
  std::uint64_t next() noexcept {
    state_ = state_ * 6364136223846793005U + 1442695040888963407U;
    return first_ + ((state_ >> 32) * count_ >> 32);
  }

 private:
  std::uint64_t state_ = 0;
  std::uint64_t first_ = 0;
  std::uint64_t count_ = 0;
};

}  // namespace iovane::bench
