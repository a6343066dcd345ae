// What a sPAPR address space offers beyond the seam: windows of bus addresses, the PE's error handling, and the
// descriptors and hand-overs that in-kernel TCE tables need. BackendSpace::spapr() leads here.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "backends/spapr_tce/eeh.hpp"
#include "iovane/result.hpp"
#include "iovane/spapr_types.hpp"
#include "iovane/types.hpp"

namespace iovane::backends {

using SpaprWindow = Window;
using SpaprLimits = WindowLimits;
using SpaprWindowRequest = WindowRequest;

/// What a window's table can charge to the process's locked memory at most: for preflight, before a device is there.
/// powernv charges the hardware's entries and the kernel's list of process addresses, pseries less; further levels add
/// a fraction. SpaprWindow::table has what it was.
constexpr Bytes spapr_table_bytes_max(Bytes length, Bytes page) noexcept {
  const std::uint64_t entries = length.value / page.value;
  return Bytes{2 * entries * 8 + 2 * 65536};
}
/// What ENABLE of version 1 charges: the whole default window.
constexpr Bytes spapr_v1_charge(IovaRange default_window) noexcept { return default_window.length(); }

/// Threads: control plane, as BackendSpace. Needs an attached device unless said otherwise (no_device).
class SpaprControl {
 public:
  virtual ~SpaprControl() = default;
  SpaprControl() = default;
  SpaprControl(const SpaprControl&) = delete;
  SpaprControl& operator=(const SpaprControl&) = delete;

  virtual Result<SpaprLimits> limits() = 0;
  /// Sorted by address. Empty without a device.
  virtual std::vector<SpaprWindow> windows() const = 0;
  /// Makes a dynamic window; the platform chooses its place. Its memory is charged to the process (memlock_exceeded
  /// when there is no room). Errors: unsupported (version 1, page size), limit_reached (no further window; a create
  /// that failed in firmware can block further ones of that group until reboot), out_of_memory (at every number of
  /// levels).
  virtual Result<SpaprWindow> create_window(const SpaprWindowRequest& request) = 0;
  /// Removes the window that begins at `start`, the default one included; usable_ranges() shrinks. Walks every entry:
  /// about half a second per GiB of 4 KiB pages under emulation. Errors: not_found, busy (something is mapped in it).
  virtual Result<void> remove_window(Iova start) = 0;

  /// The kernel (KVM's table) owns the entries in `range` from now on: they are forgotten here and stay in hardware.
  /// Returns what was forgotten. Memory that they lead to stays registered as long as its region is.
  virtual Bytes hand_to_kernel(IovaRange range) noexcept = 0;
  /// Takes away what the kernel entered in `range` since it was handed over. Errors: busy (something of ours is mapped
  /// there), io_error.
  virtual Result<void> clear_handed(IovaRange range) noexcept = 0;
  /// The groups of this space, for KVM's VFIO device: borrowed descriptors, valid until the group's last device leaves.
  virtual std::vector<int> group_descriptors() const = 0;

  /// Enhanced Error Handling of all groups of this space; null when the kernel offers none.
  virtual SpaprEeh* eeh() noexcept = 0;
};

}  // namespace iovane::backends
