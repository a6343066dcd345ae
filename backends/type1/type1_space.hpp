// One VFIO container behind the seam.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "backends/backend.hpp"
#include "backends/kernel_call.hpp"
#include "backends/kernel_error.hpp"
#include "backends/type1/type1_info.hpp"
#include "backends/type1/vfio_groups.hpp"

namespace iovane::backends::type1 {

/// The live mappings of a version 1 container, which unmaps by first address: a span has to be unmapped one mapping at
/// a time. Nodes of removed mappings are kept, so that a steady state allocates nothing.
class LiveStarts {
 public:
  /// Makes a node ready, so that insert() cannot fail; false when there is no memory.
  bool prepare() noexcept;
  void insert(IovaRange range) noexcept;
  void erase(Iova start) noexcept;
  void clear() noexcept;
  /// The first mapping that begins at or after `from`; nothing when there is none up to `last`.
  std::optional<IovaRange> next(Iova from, Iova last) const noexcept;
  /// True when a mapping crosses either border of `range`.
  bool cut_by(const IovaRange& range) const noexcept;

 private:
  using Map = std::map<std::uint64_t, std::uint64_t>;
  Map live_;  // start -> last
  std::vector<Map::node_type> spare_;
};

class Type1Space final : public BackendSpace {
 public:
  /// `ioas`: the IOAS behind the compatibility interface, 0 on a real container.
  Type1Space(Kernel& kernel, KernelFd container, Interface interface, std::uint32_t ioas, const SpaceOptions& options);
  ~Type1Space() override;

  const SpaceFacts& facts() const noexcept override { return facts_; }
  void execute(std::span<const BackendOp> ops, std::span<BackendOpResult> results) noexcept override;
  Result<Bytes> unmap_all() noexcept override;
  Result<RegionId> register_memory(const MemoryRange& memory) override;
  Result<void> unregister_memory(RegionId region) override;
  Result<AttachedDevice> attach(const DeviceSource& source) override;
  Result<void> detach(DeviceId device) override;
  Result<std::vector<IovaRange>> usable_ranges() override;
  Result<void> promise(std::span<const IovaRange> ranges) override;
  Headroom headroom() noexcept override;
  Result<void> start_dirty_tracking(DirtyHarvest& harvest) override;
  Result<void> stop_dirty_tracking() override;
  Result<void> read_dirty(const IovaRange& range, std::span<std::uint64_t> bitmap) noexcept override;

 private:
  BackendOpResult run(const BackendOp& op) noexcept;
  BackendOpResult map(const BackendOp& op) noexcept;
  BackendOpResult unmap(IovaRange range) noexcept;
  BackendOpResult unmap_each(IovaRange range) noexcept;
  BackendOpResult unmap_once(IovaRange range) noexcept;
  // type1_dirty.cpp.
  int set_tracking(bool on) noexcept;
  BackendOpResult unmap_tracked(IovaRange range) noexcept;
  BackendOpResult unmap_run(IovaRange run) noexcept;
  Result<Bytes> unmap_windows() noexcept;
  bool locate(const BackendOp& op, std::uint64_t& address) const noexcept;
  Error bad_map(const BackendOp& op) const noexcept;
  Error map_error(int os_errno, const BackendOp& op, std::uint64_t address) noexcept;
  bool compat() const noexcept { return ioas_ != 0; }
  bool version_1() const noexcept {
    return facts_.interface == Interface::type1_v1 || facts_.interface == Interface::compat_v1;
  }
  /// type1 adds start and size of an unmap without looking (before Linux 6.19): with the last granule the sum is 0, and
  /// the unmap finds nothing.
  Iova last_mappable() const noexcept { return Iova{iova_max.value - facts_.granule.value}; }
  MemlockAccount account() const noexcept {
    return compat() ? MemlockAccount::user_pinned : MemlockAccount::process_locked;
  }
  Result<AttachedDevice> settle(const GroupDevice& device);
  void devices_changed() noexcept;
  void follow(const ContainerInfo& info) noexcept;

  Kernel& kernel_;
  KernelFd container_;
  std::uint32_t ioas_;
  SpaceOptions options_;
  SpaceFacts facts_;
  Iova map_last_ = iova_max;  // no map may go beyond
  VfioGroups groups_;
  DirtyHarvest* harvest_ = nullptr;  // not null: tracking is on
  std::uint64_t live_bytes_ = 0;
  LiveStarts starts_;                 // version 1 only
  std::vector<MemoryRange> regions_;  // index = RegionId - 1; length 0 where a region was unregistered
};

}  // namespace iovane::backends::type1
