// The counters behind Stats: written by the lane's holder, read by anybody.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/counter.hpp"
#include "base/duration_counts.hpp"
#include "iovane/stats.hpp"

namespace iovane::engine {

enum class Count : std::uint8_t {
  maps,
  unmaps,
  replaces,
  failures,
  batches,
  backend_ops,
  merged_unmaps,
  cancelled_pairs,
  retries,
  combined_batches,
  handed_over,
  live_mappings,
  live_bytes,
  quarantined_mappings,
  quarantined_bytes,
  flushes,
  flushed,
  revived,
  stale_mappings,
  stale_bytes,
  stale_mappings_peak,
  stale_bytes_peak,
};
inline constexpr std::size_t count_kinds = static_cast<std::size_t>(Count::stale_bytes_peak) + 1;
std::string_view to_string(Count count) noexcept;

/// Of one address space. Standard layout without pointers: it may lie in memory that another process reads. `live_`
/// here includes what is quarantined or stale; stats_of() takes it out.
struct SpaceCounters {
  std::array<base::Counter, count_kinds> counts;
  base::DurationCounts stale_window;
  base::DurationCounts batch_time;

  base::Counter& operator[](Count count) noexcept { return counts[static_cast<std::size_t>(count)]; }
  const base::Counter& operator[](Count count) const noexcept { return counts[static_cast<std::size_t>(count)]; }
};

/// Any thread.
Stats stats_of(const SpaceCounters& counters) noexcept;

}  // namespace iovane::engine
