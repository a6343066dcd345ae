// SpaceLayout: the layout policy of one address space, kept in step with its devices and with what the host says.
//
// Order at an attach: expect() (nothing has happened yet, and a refusal names device, reserved range and what it
// conflicts with), the backend's attach, host_says() with the ranges that are usable now. A device of which the host
// tells nothing before (a bare descriptor in a sandbox) is found out by host_says(), and then taken out again.
// Control plane: under the address space's lane.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/mapping_index.hpp"
#include "iova/layout_policy.hpp"
#include "iovane/address_space.hpp"
#include "iovane/config.hpp"

namespace iovane::engine {

class SpaceLayout {
 public:
  /// `host`: the usable ranges; empty while the host does not know them. Errors: iova_reserved for a promise that the
  /// host cannot keep, invalid_argument.
  static Result<SpaceLayout> create(LayoutPolicy kind, std::span<const IovaRange> promised,
                                    std::span<const IovaRange> host);

  /// Counts a device in before it is attached. Errors: iova_reserved with the refusal's text, busy; nothing changed.
  Result<void> expect(const std::string& device, std::vector<IovaRange> reserved, const MappingIndex& live);
  /// Counts it out: the undo of expect(), and after a detach.
  void forget(const std::string& device);
  /// After every attach and detach. Answers with what no longer holds; usable() follows in any case.
  std::vector<LayoutBreach> host_says(std::span<const IovaRange> ranges, const MappingIndex& live);

  /// What the caller may map now; empty while the host does not know.
  std::vector<IovaRange> usable() const;
  /// What a guest may be told; from the first call on it holds for LayoutPolicy::host_constrained.
  Result<GuestLayout> show();

 private:
  SpaceLayout(LayoutPolicy kind, iova::LayoutPolicy policy) : kind_{kind}, policy_{std::move(policy)} {}

  LayoutPolicy kind_;
  iova::LayoutPolicy policy_;  // engine_managed until there is a promise to keep
  bool shown_ = false;
  bool host_known_ = false;
  std::vector<IovaRange> host_;
  std::vector<iova::DeviceReservations> devices_;
};

}  // namespace iovane::engine
