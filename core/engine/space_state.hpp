// SpaceState: everything that an address space's lane protects.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backends/backend.hpp"
#include "engine/mapping_index.hpp"
#include "engine/memory_table.hpp"
#include "engine/space_counters.hpp"
#include "engine/stale_set.hpp"
#include "iova/interval_allocator.hpp"
#include "iovane/config.hpp"
#include "iovane/types.hpp"

namespace iovane::engine {

/// MappingRecord::flags: the mapping consists of several pieces of memory, of which `memory` is the first.
inline constexpr std::uint16_t mapping_is_scattered = 1;

/// Contains no range.
inline constexpr IovaRange no_window{iova_max, Iova{0}};

/// Touched by the lane's holder only.
struct SpaceState {
  std::unique_ptr<backends::BackendSpace> backend;
  MappingIndex index;
  MemoryTable memories;
  /// Null when the caller chooses every IOVA: then the index alone says what is taken.
  std::unique_ptr<iova::IntervalAllocator> allocator{};
  std::vector<IovaRange> usable{};  ///< sorted, disjoint
  IovaRange window = no_window;     ///< the one of `usable` that the last fixed map lay in
  /// Never null; perhaps in a page that other processes read.
  SpaceCounters* counters = nullptr;
  StaleTimer* stale_timer = nullptr;  ///< null: none runs
  bool stale_timer_armed = false;
  std::unique_ptr<StaleSet> stale{};  ///< null in strict mode
  bool closed = false;
  Bytes granule{4096};       ///< of the backend's facts, as of the last attach
  Bytes unmap_hole_max{};    ///< likewise
  bool map_by_copy = false;  ///< maps of registered memory go through its pin
};

}  // namespace iovane::engine
