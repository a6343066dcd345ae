// The distance that keeps two hot variables apart.
#pragma once

#include <cstddef>

namespace iovane::base {

// Two 64-byte lines on x86-64: its adjacent-line prefetcher pulls pairs. POWER's lines are 128 bytes anyway.
// std::hardware_destructive_interference_size depends on the compiler's tuning flags and so must not enter an ABI.
inline constexpr std::size_t cacheline_bytes = 128;

}  // namespace iovane::base
