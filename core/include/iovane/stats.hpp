// Counters of an address space.
#pragma once

#include <cstdint>

#include "iovane/types.hpp"

namespace iovane {

/// A snapshot; counters only grow, gauges are of the moment. Counters of one address space are mutually consistent.
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
  std::uint64_t live_mappings = 0;         ///< gauge
  Bytes live_bytes{};                      ///< gauge
  std::uint64_t quarantined_mappings = 0;  ///< gauge: unmaps that the kernel failed
  Bytes quarantined_bytes{};               ///< gauge
};

}  // namespace iovane
