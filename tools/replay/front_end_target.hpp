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
/// entries and descriptors, lists) is written before the clock starts: its own processors do that. The clock runs from
/// its notification until it has its answers.
class FrontEndTarget final : public ReplayTarget {
 public:
  /// `name`: virtio-iommu, vtd, vtd-each or papr. `host` and `memory` outlive it; batches have at most `batch_max`
  /// operations.
  static Result<std::unique_ptr<FrontEndTarget>> open(std::string_view name, Host& host, const GuestMemory& memory,
                                                      std::size_t batch_max);
  ~FrontEndTarget() override;

  /// A hypercall is one event. The queues of the others can hold many; vtd-each is a guest that notifies after each.
  bool batches() const noexcept override { return guest_->batches(); }
  /// A page table's runs end where a table does.
  bool may_split() const noexcept override { return true; }
  void prepare(std::span<const Operation> batch) noexcept override;
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
  bool prepared_ = false;  // the first part of the batch is written
};

}  // namespace iovane::replay
