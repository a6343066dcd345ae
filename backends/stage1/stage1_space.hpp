// One address space whose mappings lie in first-stage tables of our own.
//
// Registered memory lies in the nesting parent at fixed intermediate addresses, so a map is a store of an entry and an
// unmap a clear with a share of one invalidation per batch. Everything an entry can reach is bounded by the parent,
// which the kernel keeps: a wrong entry reaches memory of this process that was registered, nothing else.
//
// A failed invalidation leaves a debt: what was cleared may still be reachable. The unmaps of that batch fail, and no
// later batch does anything before an invalidation of the whole space has gone through.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "backends/stage1/invalidation.hpp"
#include "backends/stage1/map_run.hpp"
#include "backends/stage1/nesting_unit.hpp"
#include "backends/stage1/own_pins.hpp"
#include "backends/stage1/table_editor.hpp"

namespace iovane::backends::stage1 {

class Stage1Space final : public BackendSpace, private TableWalkers, private TableMemory {
 public:
  Stage1Space(SharedNesting& shared, const SpaceOptions& options);
  ~Stage1Space() override;

  const SpaceFacts& facts() const noexcept override { return facts_; }
  void execute(std::span<const BackendOp> ops, std::span<BackendOpResult> results) noexcept override;
  Result<Bytes> unmap_all() noexcept override;
  Result<RegionId> register_memory(const MemoryRange& memory) override;
  Result<void> unregister_memory(RegionId region) override;
  Result<AttachedDevice> attach(const DeviceSource& source) override;
  Result<void> detach(DeviceId device) override;
  Result<std::vector<IovaRange>> usable_ranges() override { return usable_; }
  Result<void> promise(std::span<const IovaRange> ranges) override;
  Headroom headroom() noexcept override;
  Bytes table_memory() const noexcept override { return pool_.pinned(); }
  int fault_record_fd() const noexcept override;
  Result<std::size_t> read_fault_records(std::span<FaultRecord> out) noexcept override;

  /// Takes an attached device over from another space of the same descriptor, without a gap.
  Result<AttachedDevice> take_over(Stage1Space& from, DeviceId device);
  /// Makes the tables before a device comes, where an earlier one of the descriptor showed what they look like.
  Result<void> open_early();
  const SharedNesting* shared() const noexcept { return &shared_; }

 private:
  struct Batch {
    explicit Batch(TableEditor& editor) noexcept : session{editor} {}
    /// A page in the window where the operation before it was: what has a fast path.
    bool is_page_nearby(IovaRange range) const noexcept {
      return range.last.value - range.start.value == page_bytes - 1 && (range.start.value & (page_bytes - 1)) == 0 &&
             window.contains(range);
    }
    TableEditor::Session session;
    IovaRange window{Iova{1}, Iova{0}};
    MapRun run;
    PendingRanges pending;
    OwnPins::Dying dying;
    std::size_t first = 0;  // the oldest operation that waits for `pending`
  };
  /// A nested table on one unit.
  struct Nested {
    NestingUnit* unit;
    std::uint32_t table;
  };

  // TableWalkers, TableMemory.
  bool forget(IovaRange range) noexcept override;
  int pin(std::uint64_t address, std::byte* memory, std::uint64_t bytes) noexcept override;

  BackendOpResult map(const BackendOp& op, Batch& batch) noexcept;
  BackendOpResult unmap(IovaRange range, Batch& batch) noexcept;
  bool clear(IovaRange range, Batch& batch, std::uint64_t& bytes) noexcept;
  Result<std::uint64_t> intermediate(const BackendOp& op, std::uint64_t& mark) noexcept;
  Error map_error(int os_errno, const BackendOp& op) noexcept;
  Error no_table_memory(Stage stage) noexcept;
  Error owing() const noexcept;
  const IovaRange* window_of(IovaRange range) const noexcept;
  /// Invalidates what the batch has cleared; operations up to `count` that wait for it fail if that fails.
  void settle(Batch& batch, std::span<const BackendOp> ops, std::span<BackendOpResult> results,
              std::size_t count) noexcept;
  bool invalidate_all() noexcept;
  bool pay_debt() noexcept;
  const iommufd::StagedMemory* region_of(const BackendOp& op) const noexcept;

  // stage1_attach.cpp.
  Result<void> open_tables(const NestingUnit& unit);
  Result<std::uint32_t> nested_table(const NestedDevice& device);
  Result<void> connect(const NestedDevice& device);
  Result<void> check_reserved(const NestedDevice& device);
  void pass_through(const IovaRange& window) noexcept;
  void devices_changed();
  AttachedDevice describe(const NestedDevice& device) const;

  SharedNesting& shared_;
  const SpaceOptions options_;
  SpaceFacts facts_;
  OwnPins own_pins_;
  TablePool pool_;
  std::optional<IovaRange> pool_room_;
  int table_node_ = -1;  // of the IOMMU that walks: the first device's
  std::optional<TableEditor> editor_;
  FirstStage first_stage_;
  Table* context_page_ = nullptr;  // SMMUv3: the context descriptor
  std::uint16_t asid_ = 0;
  // Written by the control plane only.
  std::vector<NestedDevice> devices_;
  std::vector<Nested> tables_;
  std::vector<InvalidationTarget> targets_;            // every IOMMU that ever walked the tables
  std::vector<IovaRange> usable_;                      // sorted, disjoint
  std::vector<IovaRange> passed_;                      // reserved windows that lead to the parent's same addresses
  std::vector<const iommufd::StagedMemory*> regions_;  // index = RegionId - 1
  std::atomic<bool> debt_{false};
  FaultInbox inbox_;
  bool hears_faults_ = false;  // one of its IOMMUs has an event queue
};

}  // namespace iovane::backends::stage1
