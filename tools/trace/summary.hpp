// What a trace asks for, in numbers.
#pragma once

#include <cstdint>

#include "trace/event.hpp"

namespace iovane::trace {

struct Summary {
  std::uint64_t maps = 0;
  std::uint64_t unmaps = 0;
  std::uint64_t duration_ns = 0;        ///< from the earliest to the latest event
  std::uint32_t cpus = 0;               ///< that took part
  Bytes mapped{};                       ///< lengths of all maps together
  std::uint64_t leaf_entries = 0;       ///< the same in units of `granule`
  std::uint64_t distinct_granules = 0;  ///< of memory that is ever mapped: what a pin cache would have to hold
  std::uint64_t live_max = 0;           ///< mappings alive at once
  Bytes live_max_bytes{};
  std::uint64_t live_at_end = 0;
  std::uint64_t iova_first = 0;  ///< lowest and highest address mapped; 0 without maps
  std::uint64_t iova_last = 0;
  std::uint64_t physical_last = 0;  ///< highest byte of memory mapped
};

/// The trace fulfils its invariant.
Summary summarize(const Trace& trace);

}  // namespace iovane::trace
