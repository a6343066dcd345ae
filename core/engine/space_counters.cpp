#include "engine/space_counters.hpp"

#include <algorithm>
#include <type_traits>

namespace iovane::engine {

static_assert(std::is_standard_layout_v<SpaceCounters>, "iovane top reads it from another process");

namespace {

constexpr std::array<std::string_view, count_kinds> names{"maps",
                                                          "unmaps",
                                                          "replaces",
                                                          "failures",
                                                          "batches",
                                                          "backend_ops",
                                                          "merged_unmaps",
                                                          "cancelled_pairs",
                                                          "retries",
                                                          "combined_batches",
                                                          "handed_over",
                                                          "live_mappings",
                                                          "live_bytes",
                                                          "quarantined_mappings",
                                                          "quarantined_bytes",
                                                          "flushes",
                                                          "flushed",
                                                          "revived",
                                                          "stale_mappings",
                                                          "stale_bytes",
                                                          "stale_mappings_peak",
                                                          "stale_bytes_peak"};
static_assert(!names.back().empty(), "a name for each");

DurationSummary summary_of(const base::DurationCounts& durations) noexcept {
  return {durations.count(), durations.percentile(0.5), durations.percentile(0.99), durations.percentile(0.999),
          durations.greatest()};
}

// A gauge less another one that may be ahead of it while a batch runs.
std::uint64_t less(std::uint64_t whole, std::uint64_t part) noexcept { return whole - std::min(whole, part); }

}  // namespace

std::string_view to_string(Count count) noexcept {
  const auto index = static_cast<std::size_t>(count);
  return index < names.size() ? names[index] : "unknown";
}

Stats stats_of(const SpaceCounters& c) noexcept {
  Stats s;
  s.maps = c[Count::maps].get();
  s.unmaps = c[Count::unmaps].get();
  s.replaces = c[Count::replaces].get();
  s.failures = c[Count::failures].get();
  s.batches = c[Count::batches].get();
  s.backend_ops = c[Count::backend_ops].get();
  s.merged_unmaps = c[Count::merged_unmaps].get();
  s.cancelled_pairs = c[Count::cancelled_pairs].get();
  s.retries = c[Count::retries].get();
  s.combined_batches = c[Count::combined_batches].get();
  s.handed_over = c[Count::handed_over].get();
  s.quarantined_mappings = c[Count::quarantined_mappings].get();
  s.quarantined_bytes = Bytes{c[Count::quarantined_bytes].get()};
  s.flushes = c[Count::flushes].get();
  s.flushed = c[Count::flushed].get();
  s.revived = c[Count::revived].get();
  s.stale_mappings = c[Count::stale_mappings].get();
  s.stale_bytes = Bytes{c[Count::stale_bytes].get()};
  s.stale_mappings_peak = c[Count::stale_mappings_peak].get();
  s.stale_bytes_peak = Bytes{c[Count::stale_bytes_peak].get()};
  s.live_mappings = less(c[Count::live_mappings].get(), s.quarantined_mappings + s.stale_mappings);
  s.live_bytes = Bytes{less(c[Count::live_bytes].get(), s.quarantined_bytes.value + s.stale_bytes.value)};
  s.stale_window = summary_of(c.stale_window);
  s.batch_time = summary_of(c.batch_time);
  return s;
}

}  // namespace iovane::engine
