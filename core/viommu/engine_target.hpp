// EngineTarget: a ShadowTarget over one engine address space and a queue of it.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "iovane/address_space.hpp"
#include "viommu/guest_memory.hpp"
#include "viommu/shadow_target.hpp"

namespace iovane::viommu {

struct EngineTargetConfig {
  std::string name;                  ///< for reports; empty: the backend's
  std::uint32_t queue_depth = 1024;  ///< larger batches go through it in pieces
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
  int event_fd() noexcept override { return queue_.event_fd(); }
  /// Needs AddressSpaceConfig::dirty_tracking. What is told, and how exactly, is the engine's: docs/LIVE.md.
  Result<void> track_dirty(bool on) override;
  /// Precondition: no batch is in flight (busy). Waits for the kernel. On an error everything was visited all the same,
  /// and what could not be read counts as written.
  Result<void> take_dirty(const VisitDirty& visit) override;

 private:
  struct Place {
    RegionId region{};
    std::uint64_t address = 0;  // of this process, when the region is not registered
    Bytes length{};
    Memory memory;
  };

  EngineTarget(AddressSpace& space, Queue queue, const EngineTargetConfig& config);
  const Place* find(RegionId region) noexcept;
  bool stage(const HostOp& op, std::uint64_t index, std::vector<OpFailure>& failures) noexcept;
  std::optional<DirtyMemory> guest_memory_of(const MemoryPiece& piece) const noexcept;
  void take_dirty_of_gone(const VisitDirty& visit) const;
  Result<void> take_dirty_of_live(const MappingInfo& mapping, std::vector<std::uint64_t>& bitmap,
                                  const VisitDirty& visit) const;
  void take(std::span<const Completion> completions, std::vector<OpFailure>& failures) noexcept;

  AddressSpace& space_;
  Queue queue_;
  std::string name_;
  bool register_memory_;
  std::vector<Place> places_;
  std::size_t last_place_ = 0;
  std::span<const HostOp> ops_;
  std::size_t staged_ = 0;
  std::size_t finished_ = 0;
  std::vector<Completion> completions_;  // room to take them
  std::vector<OpFailure> early_;         // of completions that wait() took
};

}  // namespace iovane::viommu
