// RecordingTarget: a host that keeps the mappings it is told in a map, as strictly as a kernel would, and can be made
// to fail or to take its time. IdleTarget: a host that does nothing, to measure everything else.
#pragma once

#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "viommu/shadow_target.hpp"

namespace iovane::viommu {

class RecordingTarget : public ShadowTarget {
 public:
  struct Held {
    IovaRange range{};
    RegionId region{};
    std::uint64_t region_offset = 0;
    Access access = Access::none;
    bool operator==(const Held&) const = default;
  };
  explicit RecordingTarget(std::string name = "recorder") : name_{std::move(name)} {}

  /// Settings, changed between batches.
  std::vector<IovaRange> usable{IovaRange::everything()};
  Bytes granule_bytes{4096};
  bool may_cut = false;
  bool asynchronous = false;  ///< batches stay pending until finish()
  /// Asked for every operation; an error makes it fail and change nothing.
  std::function<Error(const HostOp&)> fault;

  /// What is mapped, by first address.
  const std::map<std::uint64_t, Held>& held() const noexcept { return held_; }
  /// Region and offset that an IOVA reaches, if any.
  const Held* find(std::uint64_t iova) const noexcept;
  /// A device writes one byte: false when it faults.
  bool device_writes(std::uint64_t iova);
  /// Lets the pending batch end.
  void finish() noexcept { may_finish_ = true; }
  std::uint64_t batches() const noexcept { return batches_; }
  std::uint64_t operations() const noexcept { return operations_; }

  const std::string& name() const noexcept override { return name_; }
  Result<std::vector<IovaRange>> usable_ranges() const override { return usable; }
  Bytes granule() const noexcept override { return granule_bytes; }
  bool replace_is_atomic() const noexcept override { return may_cut; }
  bool unmap_may_cut() const noexcept override { return may_cut; }
  Result<void> add_region(const Region&) override { return {}; }
  void remove_region(RegionId) noexcept override {}
  Result<void> track_dirty(bool on) override;
  Result<void> take_dirty(const VisitDirty& visit) override;
  Progress submit(std::span<const HostOp> ops, std::vector<OpFailure>& failures) noexcept override;
  Progress poll(std::vector<OpFailure>& failures) noexcept override;
  void wait(std::chrono::nanoseconds) noexcept override {}
  int event_fd() noexcept override { return -1; }

 private:
  Error apply(const HostOp& op);
  Error unmap(const IovaRange& range);

  std::string name_;
  std::map<std::uint64_t, Held> held_;
  std::span<const HostOp> pending_;
  bool may_finish_ = false;
  bool tracks_dirty_ = false;
  std::set<std::pair<RegionId, std::uint64_t>> dirty_;  // region and offset of each granule
  std::uint64_t batches_ = 0;
  std::uint64_t operations_ = 0;
};

class IdleTarget final : public ShadowTarget {
 public:
  std::uint64_t operations = 0;

  const std::string& name() const noexcept override { return name_; }
  Result<std::vector<IovaRange>> usable_ranges() const override { return std::vector{IovaRange::everything()}; }
  Bytes granule() const noexcept override { return {4096}; }
  bool replace_is_atomic() const noexcept override { return true; }
  bool unmap_may_cut() const noexcept override { return false; }
  Result<void> add_region(const Region&) override { return {}; }
  void remove_region(RegionId) noexcept override {}
  Progress submit(std::span<const HostOp> ops, std::vector<OpFailure>&) noexcept override {
    operations += ops.size();
    return Progress::done;
  }
  Progress poll(std::vector<OpFailure>&) noexcept override { return Progress::done; }
  void wait(std::chrono::nanoseconds) noexcept override {}
  int event_fd() noexcept override { return -1; }

 private:
  std::string name_ = "idle";
};

}  // namespace iovane::viommu
