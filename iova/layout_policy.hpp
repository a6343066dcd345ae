// Who decides which IOVAs exist: the three layouts of an address space, and what each says to a device that comes.
//
// engine_managed    What the host offers less what the attached devices reserve. A device may come if it reserves
//                   nothing that is live.
// fixed             The caller's ranges are a promise, for live migration: checked against host and devices at
//                   creation and against every device that comes, and handed to the kernel where it can hold it
//                   (IOMMU_IOAS_ALLOW_IOVAS).
// host_constrained  Made once, from the devices present at creation; then it does not change, because a guest's
//                   firmware tables were made from it. A device that reserves any of it is refused before it is
//                   attached.
//
// Pure logic: reads no host and changes no mapping. One thread at a time (the address space's control plane);
// allocates.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "iova/usable_ranges.hpp"
#include "iovane/result.hpp"
#include "iovane/types.hpp"

namespace iovane::iova {

enum class Layout : std::uint8_t { engine_managed, fixed, host_constrained };

/// A device and the IOVAs that it cannot use: MSI windows, RMRR, direct-mapped firmware regions.
struct DeviceReservations {
  std::string name;
  std::vector<IovaRange> reserved{};
};

struct LayoutConfig {
  Layout layout = Layout::engine_managed;
  /// What the host's IOMMU can translate.
  std::vector<IovaRange> aperture{};
  /// Of the devices present.
  std::vector<DeviceReservations> devices{};
  /// Only for `fixed`: the ranges that are promised.
  std::vector<IovaRange> promised{};
};

/// Why a device or a promise is refused.
struct LayoutRefusal {
  enum class Against : std::uint8_t {
    live_mapping,  ///< `other` is mapped
    promise,       ///< `other` was promised by the caller
    layout,        ///< `other` was shown to the guest
    aperture,      ///< `reserved` is a promised range's part that the host cannot translate; no device is to blame
  };
  std::string device;
  IovaRange reserved;
  Against against;
  IovaRange other;

  /// A sentence with all of it.
  std::string text() const;
  bool operator==(const LayoutRefusal&) const = default;
};

/// A hole that the guest must be told about, for firmware tables (reserved-memory entries of a virtio-iommu PROBE, VT-d
/// RMRR, device tree).
struct ExportedHole {
  IovaRange range;
  /// The devices that reserve some of it, by name; empty where the host translates nothing.
  std::vector<std::string> devices;
  bool operator==(const ExportedHole&) const = default;
};

class LayoutPolicy {
 public:
  /// Errors: invalid_argument (a promise without `fixed` or the reverse, a malformed range, a device twice, nothing
  /// usable), iova_reserved (a promise that host or devices cannot keep: the detail is the refusal's text).
  static Result<LayoutPolicy> create(LayoutConfig config);

  Layout layout() const noexcept { return layout_; }
  /// What may be handed out now: for IntervalAllocator::set_usable().
  const UsableRanges& usable() const noexcept { return usable_; }
  /// What to give to IOMMU_IOAS_ALLOW_IOVAS; nothing unless the layout is a promise.
  std::optional<UsableRanges> promise() const;
  /// The complement of the layout, with reasons. For host_constrained and fixed it does not change while devices come
  /// and go.
  std::vector<ExportedHole> exported_holes() const;

  /// What speaks against attaching the device; nothing: it may be attached. `live`: the mappings that exist.
  std::optional<LayoutRefusal> refuses(const DeviceReservations& device, std::span<const IovaRange> live) const;
  /// Checks, then counts the device in; usable() may shrink (engine_managed). Call before the kernel's attach.
  /// Errors: busy (attached already), iova_reserved with the refusal's text; nothing changed then.
  Result<void> attach(DeviceReservations device, std::span<const IovaRange> live);
  /// Counts it out; usable() may grow (engine_managed). Also the undo of attach(). Errors: not_found.
  Result<void> detach(const std::string& name);
  /// What the kernel says after an attach or detach (IOMMU_IOAS_IOVA_RANGES), which counts more than what devices were
  /// said to reserve. Answers with what breaks: promised or shown ranges that vanished, and live mappings in ranges
  /// that did. usable() follows in any case.
  std::vector<LayoutRefusal> host_says(std::span<const IovaRange> ranges, std::span<const IovaRange> live);

 private:
  LayoutPolicy() = default;
  void refresh();

  Layout layout_ = Layout::engine_managed;
  UsableRanges aperture_;            ///< or what host_says() said last
  UsableRanges base_;                ///< the promise, or the layout as it was made
  std::vector<ExportedHole> holes_;  ///< of host_constrained, as they were at creation
  std::vector<DeviceReservations> devices_;
  UsableRanges usable_;
};

}  // namespace iovane::iova
