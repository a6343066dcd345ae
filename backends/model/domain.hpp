// An I/O page table with the devices that translate through it, and the invalidation that makes an unmap final.
//
// Roles. The owner (an IOAS or a container, under its mutex) maps, unmaps, attaches and detaches. Devices walk.
// Invariant. When invalidate() returns, no device of this domain uses a translation of that range that was read before
//   the owner's last edit: none is cached and no transfer through one is still moving bytes. That is what an IOMMU's
//   invalidation with drain promises, and what makes a strict unmap final.
//   A nested domain is also invalidated by those who write its tables, several at a time: they only have to keep
//   devices from coming and going meanwhile.
// Edges. A device announces itself (`may_hold_`) and then passes a full barrier; the owner edits the table, passes a
//   full barrier, and then looks at the announcements. Barriers are totally ordered: if the device's came first, the
//   owner sees its announcement and waits on its mutex; if the owner's came first, the device's walk sees the edit.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "backends/model/first_stage.hpp"
#include "backends/model/options.hpp"
#include "backends/model/page_table.hpp"
#include "backends/model/spapr_windows.hpp"
#include "base/asymmetric_barrier.hpp"

namespace iovane::backends::model {

class EventPort;
class FaultQueue;
class SimulatedDevice;

class Domain {
 public:
  /// `faults`: where devices ask for pages that are not there; none: they fail.
  explicit Domain(const IommuOptions& iommu, std::shared_ptr<FaultQueue> faults = nullptr) noexcept;
  /// Devices translate through sPAPR windows, which outlive it; its own table stays empty.
  Domain(const IommuOptions& iommu, const TceWindows& windows) noexcept;
  /// A first stage, written by whoever owns it, on top of `parent`, which outlives it. Its own table stays empty.
  /// `events`: where its faults are recorded; null: nowhere.
  Domain(const IommuOptions& iommu, Domain& parent, const FirstStage& first_stage, std::shared_ptr<EventPort> events);
  ~Domain();
  Domain(const Domain&) = delete;
  Domain& operator=(const Domain&) = delete;

  const IommuOptions& iommu() const noexcept { return iommu_; }
  /// What devices can address.
  IovaRange aperture() const noexcept;

  /// As PageTable::map(). Owner.
  [[nodiscard]] int map(IovaRange range, std::byte* memory, Access access, bool large_leaves) noexcept {
    return table_.map(range, memory, access, large_leaves);
  }
  /// As PageTable::unmap(), final when it returns. Owner; waits for transfers of at most one os_page per device.
  [[nodiscard]] std::int64_t unmap(IovaRange range) noexcept;
  /// Only edits the table: what devices have cached stays usable for them until invalidate(). Owner.
  [[nodiscard]] std::int64_t unmap_without_invalidation(IovaRange range) noexcept { return table_.unmap(range); }
  /// `tables`: also what walkers remember of a first stage's tables. Reaches everything nested on this domain too.
  void invalidate(IovaRange range, bool tables = true) noexcept;

  /// Device writes are recorded from now on (or no longer). Owner.
  void set_dirty_tracking(bool on) noexcept;
  // relaxed: a device may notice late, as hardware may; enabling clears and invalidates, which orders it.
  bool dirty_tracking() const noexcept { return dirty_tracking_.load(std::memory_order_relaxed); }
  /// As PageTable::read_dirty(), with the invalidation that makes devices mark again.
  template <typename Record>
  void read_dirty(IovaRange range, bool clear, Record&& record) noexcept {
    table_.read_dirty(range, clear, record);
    if (clear) invalidate(range);
  }

  /// Owner; the device then translates here until leave().
  void join(SimulatedDevice& device);
  void leave(SimulatedDevice& device) noexcept;
  /// For a device that has joined another domain already: no moment in which it translates through neither.
  void forget(SimulatedDevice& device) noexcept;

  /// Device: orders its announcement before its walk.
  static void enter_walk() noexcept { base::full_barrier(); }
  /// `known`: what the device remembers of a first stage for this address; comes back as what this walk used.
  Translation walk(Iova address, FirstStage::Walk& known) const noexcept {
    if (parent_ != nullptr) return first_stage_.walk(parent_->table_, address, known);
    return windows_ == nullptr ? table_.walk(address) : windows_->walk(address);
  }
  /// The second stage alone, of a nested domain.
  Translation walk_parent(Iova address) const noexcept { return parent_->table_.walk(address); }
  bool nested() const noexcept { return parent_ != nullptr; }
  const FirstStage& first_stage() const noexcept { return first_stage_; }
  EventPort* events() const noexcept { return events_.get(); }
  /// The number that tags a nested domain's translations, as its context says now.
  std::uint16_t asid() const noexcept { return first_stage_.asid(parent_->table_); }
  const PageTable& table() const noexcept { return table_; }
  const std::shared_ptr<FaultQueue>& faults() const noexcept { return faults_; }

 private:
  const IommuOptions iommu_;
  const std::shared_ptr<FaultQueue> faults_;
  PageTable table_;
  const TceWindows* windows_ = nullptr;
  Domain* const parent_ = nullptr;
  const FirstStage first_stage_{};
  const std::shared_ptr<EventPort> events_;
  std::vector<Domain*> nested_;
  std::vector<SimulatedDevice*> devices_;
  std::atomic<bool> dirty_tracking_{false};
};

}  // namespace iovane::backends::model
