// Counters of an address space.
#pragma once

#include <cstdint>

#include "iovane/types.hpp"

namespace iovane {

/// Percentiles of a duration, in nanoseconds; at most an eighth above the true value.
struct DurationSummary {
  std::uint64_t count = 0;
  std::uint64_t p50_ns = 0;
  std::uint64_t p99_ns = 0;
  std::uint64_t p999_ns = 0;
  std::uint64_t greatest_ns = 0;  ///< exact
};

/// A snapshot, taken without a lock while batches run; exact, and consistent in itself, when none does. Counters only
/// grow, gauges are of the moment.
struct Stats {
  std::uint64_t maps = 0;                  ///< completed without error
  std::uint64_t unmaps = 0;                ///< completed without error
  std::uint64_t replaces = 0;              ///< completed without error
  std::uint64_t failures = 0;              ///< operations that completed with an error
  std::uint64_t batches = 0;               ///< batches executed
  std::uint64_t backend_ops = 0;           ///< operations given to the backend
  std::uint64_t merged_unmaps = 0;         ///< unmaps that rode along in another one's backend operation
  std::uint64_t cancelled_pairs = 0;       ///< maps that their unmap overtook in the same batch: no call at all
  std::uint64_t retries = 0;               ///< backend operations repeated in parts after a merged one failed
  std::uint64_t combined_batches = 0;      ///< batches that another thread's submit() executed
  std::uint64_t handed_over = 0;           ///< times that a worker took the lane over from a caller
  std::uint64_t live_mappings = 0;         ///< gauge
  Bytes live_bytes{};                      ///< gauge
  std::uint64_t quarantined_mappings = 0;  ///< gauge: unmaps that the kernel failed
  Bytes quarantined_bytes{};               ///< gauge

  // Relaxed mode only:
  std::uint64_t flushes = 0;         ///< times that stale mappings were unmapped
  std::uint64_t flushed = 0;         ///< stale mappings that were unmapped
  std::uint64_t revived = 0;         ///< stale mappings that a map of the same range and memory found and took
  std::uint64_t stale_mappings = 0;  ///< gauge: unmapped for the caller, still reachable for devices
  Bytes stale_bytes{};               ///< gauge
  std::uint64_t stale_mappings_peak = 0;
  Bytes stale_bytes_peak{};
  DurationSummary stale_window{};  ///< from a relaxed unmap's completion until no device could reach the memory

  DurationSummary batch_time{};  ///< planning and executing a batch; one in sixteen is timed
};

/// A snapshot of an address space's cache; all zero while none is open. Hits are not counted: that would cost more than
/// a hit.
struct CacheStats {
  std::uint64_t misses = 0;         ///< acquisitions that found something missing
  std::uint64_t waits = 0;          ///< of those: waited for another thread's pin of the same memory
  std::uint64_t mappings_made = 0;  ///< chunks pinned and mapped
  std::uint64_t evictions = 0;      ///< mappings unmapped to make room
  std::uint64_t invalidations = 0;  ///< mappings that left because their memory changed
  std::uint64_t stale_in_use = 0;   ///< of those: seen in use, quarantined until released
  std::uint64_t mappings_lost = 0;  ///< gauge: the unmap failed; pinned and charged for good
  std::uint64_t retired = 0;        ///< gauge: out of the cache, waiting for their leases
  Bytes bytes_pinned{};             ///< gauge, as charged to memlock
};

}  // namespace iovane
