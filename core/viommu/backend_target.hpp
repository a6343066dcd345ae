// BackendTarget: a ShadowTarget right on a backend's address space, without an engine: each batch is executed by the
// caller, and submit() is always done. For VMMs that want their vCPU threads to do the work themselves, and for sPAPR,
// where windows, memory and TCEs belong to one container.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "backends/backend.hpp"
#include "viommu/shadow_target.hpp"

namespace iovane::viommu {

class BackendTarget final : public ShadowTarget {
 public:
  /// `space` outlives it and has its devices attached. Threads: as ShadowTarget.
  BackendTarget(std::string name, backends::BackendSpace& space) : name_{std::move(name)}, space_{space} {}
  ~BackendTarget() override;

  backends::BackendSpace& space() const noexcept { return space_; }

  const std::string& name() const noexcept override { return name_; }
  Result<std::vector<IovaRange>> usable_ranges() const override { return space_.usable_ranges(); }
  Bytes granule() const noexcept override { return space_.facts().granule; }
  bool replace_is_atomic() const noexcept override;
  bool unmap_may_cut() const noexcept override;
  Result<void> add_region(const Region& region) override;
  void remove_region(RegionId region) noexcept override;
  Progress submit(std::span<const HostOp> ops, std::vector<OpFailure>& failures) noexcept override;
  Progress poll(std::vector<OpFailure>&) noexcept override { return Progress::done; }
  void wait(std::chrono::nanoseconds) noexcept override {}
  int event_fd() noexcept override { return -1; }

 private:
  std::string name_;
  backends::BackendSpace& space_;
  std::map<std::uint32_t, backends::RegionId> regions_;
};

}  // namespace iovane::viommu
