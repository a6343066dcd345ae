// The vIOMMU front ends as replay targets: each event is written as a guest's driver writes it, and comes to the host
// through the front end and the engine.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "iovane/engine.hpp"
#include "replay/front_end_guest.hpp"
#include "replay/guest_memory.hpp"
#include "replay/host.hpp"
#include "replay/target.hpp"
#include "viommu/engine_target.hpp"
#include "viommu/guest_memory.hpp"

namespace iovane::replay {

/// One guest with one IOMMU and one device, on one address space. What the guest itself writes (requests, page table
/// entries and invalidations, hypercalls) is timed too: a few nanoseconds per entry.
class FrontEndTarget final : public ReplayTarget {
 public:
  /// `name`: virtio-iommu, vtd or papr. `host` and `memory` outlive it; batches have at most `batch_max` operations.
  static Result<std::unique_ptr<FrontEndTarget>> open(std::string_view name, Host& host, const GuestMemory& memory,
                                                      std::size_t batch_max);
  ~FrontEndTarget() override;

  /// Drivers of VT-d and PAPR wait for each event; virtio-iommu's can put several requests into one notification.
  bool batches() const noexcept override { return guest_->batches(); }
  /// A page table's runs end where a table does.
  bool may_split() const noexcept override { return true; }
  void run(std::span<const Operation> batch, std::span<Verdict> verdicts) noexcept override;
  /// The guest's device leaves its domain.
  Result<Bytes> unmap_all() noexcept override;
  bool visit_index(const Visit& visit) const override;

 private:
  FrontEndTarget() = default;
  Result<void> open_host(Host& host, const GuestMemory& memory);

  // In this order: each needs those above it.
  Engine engine_;
  AddressSpace space_;
  std::unique_ptr<GuestTables> tables_;
  viommu::GuestMemory memory_;
  std::unique_ptr<viommu::EngineTarget> target_;
  std::unique_ptr<FrontEndGuest> guest_;
};

}  // namespace iovane::replay
