// Windows of I/O addresses that are made and removed while an address space lives: sPAPR's dynamic windows.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "iovane/result.hpp"
#include "iovane/spapr_types.hpp"
#include "iovane/types.hpp"

namespace iovane {

namespace engine {
class SpaceCore;
}

/// The windows of one address space, from AddressSpace::windows(). Any thread; calls wait for running batches. May
/// outlive the address space: then every call answers Errc::closed. Needs an attached device (no_device); the windows
/// go with the last one.
class Windows {
 public:
  Result<WindowLimits> limits() const;
  /// Sorted by address.
  Result<std::vector<Window>> list() const;
  /// Makes one; the platform chooses its place, and usable_ranges() grows by it. Its table is charged to the process.
  /// Where the engine chooses IOVAs (LayoutPolicy::engine_managed) its page must be the granule, since any map may land
  /// in it; with a layout of the caller's each map must suit the page of its window.
  /// Errors: unsupported (version 1, page size), invalid_argument, limit_reached (no further window), memlock_exceeded,
  /// out_of_memory.
  Result<Window> create(const WindowRequest& request) const;
  /// Removes the window that begins at `start`, the default one included. Cached mappings that nobody uses are unmapped
  /// before. Errors: not_found, busy (something is mapped in it), unsupported (version 1). The window is gone also
  /// where the answer is iova_reserved: then a promise does not hold any more.
  Result<void> remove(Iova start) const;

 private:
  friend class AddressSpace;
  explicit Windows(std::shared_ptr<engine::SpaceCore> core) noexcept : core_{std::move(core)} {}
  std::shared_ptr<engine::SpaceCore> core_;
};

}  // namespace iovane
