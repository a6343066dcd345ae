// EngineTarget: a ShadowTarget over one engine address space.
//
// A guest's notification is a batch that is there as a whole, so it does without a queue: operations are written where
// the engine reads them, and are final when submit() returns unless another thread is at work in the address space.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/direct_batch.hpp"
#include "engine/operation.hpp"
#include "iovane/address_space.hpp"
#include "viommu/guest_memory.hpp"
#include "viommu/shadow_target.hpp"

namespace iovane::viommu {

struct EngineTargetConfig {
  std::string name;                ///< for reports; empty: the backend's
  std::uint32_t batch_max = 1024;  ///< longer batches go to the engine in pieces; at least 1
  /// Registers each region of guest memory, so that it is pinned once however often it is mapped. Off: maps name
  /// addresses, and each pins what it maps.
  bool register_memory = true;
};

class EngineTarget final : public ShadowTarget {
 public:
  /// With every region that `memory` has now. The address space must outlive the target, and below the guest's IOVAs it
  /// must hold nothing else: a withdrawal covers the whole span between the guest's first and last mapping.
  static Result<std::unique_ptr<EngineTarget>> create(AddressSpace& space, const GuestMemory& memory,
                                                      const EngineTargetConfig& config = {});

  const std::string& name() const noexcept override { return name_; }
  Result<std::vector<IovaRange>> usable_ranges() const override { return space_.usable_ranges(); }
  Bytes granule() const noexcept override { return space_.facts().granule; }
  bool replace_is_atomic() const noexcept override { return space_.facts().replace_is_atomic; }
  /// The engine refuses to cut, whatever its backend could.
  bool unmap_may_cut() const noexcept override { return false; }
  Result<void> add_region(const Region& region) override;
  void remove_region(RegionId region) noexcept override;
  Progress submit(std::span<const HostOp> ops, std::vector<OpFailure>& failures) noexcept override;
  Progress poll(std::vector<OpFailure>& failures) noexcept override;
  void wait(std::chrono::nanoseconds timeout) noexcept override;
  int event_fd() noexcept override { return batch_.event_fd(); }
  /// Needs AddressSpaceConfig::dirty_tracking. What is told, and how exactly, is the engine's: docs/LIVE.md.
  Result<void> track_dirty(bool on) override;
  /// Precondition: no batch is in flight (busy). Waits for the kernel. On an error everything was visited all the same,
  /// and what could not be read counts as written.
  Result<void> take_dirty(const VisitDirty& visit) override;

 private:
  struct Place {
    RegionId region{};
    std::uint64_t base = 0;  // what offsets are told to the engine from: 0 where `memory` is
    Bytes length{};
    Memory memory;
  };

  EngineTarget(AddressSpace& space, const EngineTargetConfig& config);
  const Place* find(RegionId region) noexcept {
    if (last_place_ < places_.size() && places_[last_place_].region == region) [[likely]]
      return &places_[last_place_];
    return find_slowly(region);
  }
  const Place* find_slowly(RegionId region) noexcept;
  [[gnu::always_inline]] std::size_t fill(std::vector<OpFailure>& failures) noexcept;
  Progress hand_over(std::vector<OpFailure>& failures) noexcept;
  void take_failures(std::vector<OpFailure>& failures) const noexcept;
  std::optional<DirtyMemory> guest_memory_of(const MemoryPiece& piece) const noexcept;
  void take_dirty_of_gone(const VisitDirty& visit) const;
  Result<void> take_dirty_of_live(const MappingInfo& mapping, std::vector<std::uint64_t>& bitmap,
                                  const VisitDirty& visit) const;

  AddressSpace& space_;
  std::string name_;
  bool register_memory_;
  std::vector<Place> places_;
  std::size_t last_place_ = 0;
  std::span<const HostOp> ops_;
  std::size_t next_ = 0;      // of ops_: before it all were handed over
  std::size_t in_batch_ = 0;  // how many of them batch_ has, until its failures were taken
  std::vector<engine::Operation> operations_;
  std::vector<Completion> completions_;
  std::shared_ptr<engine::SpaceCore> core_;
  engine::DirectBatch batch_;  // ends before what it uses
};

}  // namespace iovane::viommu
