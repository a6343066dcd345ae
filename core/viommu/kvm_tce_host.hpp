// KvmTceHost over a real VM: PaprTce's tables move into KVM and back through backends/kvm_tce.
#pragma once

#include <memory>

#include "backends/kvm_tce/kvm_tce.hpp"
#include "viommu/kvm_tce.hpp"

namespace iovane::viommu {

/// Couples tables to the host address spaces of BackendTargets on sPAPR version 2; other targets keep their PHB's
/// tables in userspace. `kvm` outlives it. Threads: as PaprTce.
class KvmSpaprHost final : public KvmTceHost {
 public:
  explicit KvmSpaprHost(backends::KvmTce& kvm) noexcept : kvm_{kvm} {}

  Result<std::unique_ptr<KvmTceTable>> create(const TceWindow& window) override;
  bool can_couple(const ShadowTarget& target) const noexcept override;
  void hand_to_kernel(ShadowTarget& target, const IovaRange& range) noexcept override;
  Result<void> clear(ShadowTarget& target, const IovaRange& range) noexcept override;

 private:
  backends::KvmTce& kvm_;
};

}  // namespace iovane::viommu
