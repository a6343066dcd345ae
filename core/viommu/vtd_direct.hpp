// VtdDirect: an emulated VT-d unit in scalable mode whose first-level tables are walked by the host's VT-d.
//
// As Vtd, but for guests that use first-level translation on a host that nests: the guest's PASID entry says where its
// table lies, and that table is the host's first stage, because guest memory lies in the host's second stage at its own
// addresses. Nothing is shadowed and no table is read; the guest's invalidations go to the host as arrays. The guest
// need not see caching mode.
//
// Requests without PASID only. A device whose tables are second-level (or legacy) cannot be attached so: it is blocked,
// and needs_shadow() says so; a Vtd serves it.
//
// Threads: one at a time.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "backends/stage1/guest_nesting.hpp"
#include "viommu/vtd.hpp"

namespace iovane::viommu {

struct VtdDirectStats {
  std::uint64_t descriptors = 0;
  std::uint64_t waits = 0;
  std::uint64_t queue_errors = 0;
  std::uint64_t forwarded = 0;  ///< invalidations that went to the host
  std::uint64_t arrays = 0;     ///< calls they took
  std::uint64_t rebound = 0;    ///< devices that were given another table
  std::uint64_t failed = 0;     ///< that the host refused; the device is blocked
};

class VtdDirect {
 public:
  /// All outlive it; the guest's RAM regions are in `memory` and in `host`.
  VtdDirect(const GuestMemory& memory, backends::stage1::GuestNesting& host, const VtdCapabilities& capabilities,
            const VtdDescriptorRules& rules, VtdEvents& events)
      : memory_{memory}, host_{host}, capabilities_{capabilities}, rules_{rules}, events_{events} {}

  /// A device that `host` has, by its source id.
  void add_endpoint(std::uint16_t source, backends::DeviceId device);
  void remove_endpoint(std::uint16_t source) noexcept { endpoints_.erase(source); }
  /// The guest's tables of the device are of a kind that is not walked directly.
  bool needs_shadow(std::uint16_t source) const noexcept;

  /// As Vtd's.
  void set_root_table(std::uint64_t rtaddr) noexcept;
  void set_translation(bool enabled) noexcept;
  bool set_queue(std::uint64_t iqa) noexcept { return queue_.set(iqa, true); }
  void write_tail(std::uint64_t iqt) noexcept;
  std::uint64_t head() const noexcept { return queue_.head(); }

  const VtdDirectStats& stats() const noexcept { return stats_; }

 private:
  using Range = backends::uapi::iommufd::HwptVtdS1Invalidate;
  struct Endpoint {
    backends::DeviceId device{};
    VtdBinding binding{};
    bool known = false;  // the binding is in effect
    bool needs_shadow = false;
  };
  void bind(const GuestMemory::View& view, std::uint16_t source, Endpoint& endpoint) noexcept;
  void bind_all() noexcept;
  void collect(const VtdDescriptor& descriptor) noexcept;
  bool flush() noexcept;

  const GuestMemory& memory_;
  backends::stage1::GuestNesting& host_;
  const VtdCapabilities capabilities_;
  const VtdDescriptorRules rules_;
  VtdEvents& events_;
  std::map<std::uint16_t, Endpoint> endpoints_;
  VtdQueue queue_;
  std::uint64_t rtaddr_ = 0;
  bool enabled_ = false;
  /// Of each host table, through a device that uses it.
  struct Pending {
    backends::DeviceId device{};
    std::vector<Range> ranges;
  };
  std::map<std::uint32_t, Pending> pending_;
  VtdDirectStats stats_;
};

}  // namespace iovane::viommu
