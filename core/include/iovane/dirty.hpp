// Dirty pages: what devices wrote to, for live migration and incremental snapshots.
#pragma once

#include <cstdint>

#include "iovane/request.hpp"
#include "iovane/types.hpp"

namespace iovane {

/// Adjacent pages that a device wrote through a mapping that is gone.
struct DirtyRun {
  IovaRange range{};  ///< where the device saw them
  /// What they led to then, of the range's length; the id of registered memory may be stale by now. A length of 0 means
  /// that this is not known: go by what you had mapped in the range. So it is for scatter lists, and for the one range
  /// that stands for everything beyond AddressSpaceConfig::dirty_runs_max, in which any page may have been written.
  MemoryPiece memory{};
};

/// A snapshot; counters only grow.
struct DirtyStats {
  bool tracking = false;
  std::uint64_t pages_read = 0;    ///< granules that reads found written
  std::uint64_t runs_kept = 0;     ///< gauge: runs of unmapped pages that nobody read yet
  std::uint64_t runs_dropped = 0;  ///< runs that did not fit and became part of one range where anything is dirty
  std::uint64_t guessed = 0;       ///< ranges that count as written because the kernel could not say
};

}  // namespace iovane
