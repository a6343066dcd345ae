// BackendTarget: a ShadowTarget right on a backend's address space, without an engine: each batch is executed by the
// caller, and submit() is always done. For VMMs that want their vCPU threads to do the work themselves, and for sPAPR,
// where windows, memory and TCEs belong to one container.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backends/backend.hpp"
#include "viommu/backend_dirty_log.hpp"
#include "viommu/shadow_target.hpp"

namespace iovane::viommu {

class BackendTarget final : public ShadowTarget {
 public:
  enum class Dirty : std::uint8_t {
    untracked,
    tracked,  ///< the space was made with SpaceOptions::dirty_tracking; costs an ordered map of what is mapped
  };

  /// `space` outlives it and has its devices attached. Threads: as ShadowTarget.
  BackendTarget(std::string name, backends::BackendSpace& space, Dirty dirty = Dirty::untracked);
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
  /// What is told, and how exactly, is the interface's: docs/LIVE.md. Errors: unsupported for Dirty::untracked and by
  /// the backend.
  Result<void> track_dirty(bool on) override;
  /// Waits for the kernel. On an error everything was visited all the same, and what could not be read counts as
  /// written.
  Result<void> take_dirty(const VisitDirty& visit) override;

 private:
  struct Known {
    Region region{};
    backends::RegionId id{};
  };
  void execute(std::span<const HostOp> ops, std::uint32_t first, std::vector<OpFailure>& failures) noexcept;

  std::string name_;
  backends::BackendSpace& space_;
  std::map<std::uint32_t, Known> regions_;
  std::unique_ptr<BackendDirtyLog> dirty_;  // Dirty::tracked only
  bool tracking_ = false;
};

}  // namespace iovane::viommu
