// BatchExecutor: turns a queue's operations into the fewest backend operations that the contract allows, and the
// backend's verdicts into one completion per operation.
//
// A batch is worked off in phases. Within a phase no two operations overlap, so the phase's unmaps run first and its
// maps after them, in one call to the backend; an operation that depends on one of the phase ends it. Merging follows
// docs/ARCHITECTURE.md: unmaps whose common span holds no other mapping become one; an unmap that names a map of the
// same phase cancels it, and both complete without a backend operation; the pieces of one scatter list are merged where
// their memory is contiguous. Maps of different requests are never merged: their callers may unmap them one by one, and
// iommufd and type1 cannot cut a mapping.
//
// When a merged unmap fails, its mappings are unmapped one by one, so that each request gets its own verdict; a mapping
// whose own unmap fails is quarantined: it stays in the index, its IOVA is never handed out again, its memory stays
// registered.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "engine/direct_batch.hpp"
#include "engine/operation.hpp"
#include "engine/queue_core.hpp"
#include "engine/request_check.hpp"
#include "engine/space_state.hpp"

namespace iovane::engine {

inline constexpr std::uint32_t slice_operations_max = 256;  ///< operations planned together
inline constexpr std::uint32_t pieces_max = 256;            ///< pieces of one scatter list

/// Used by the lane's holder only.
class BatchExecutor {
 public:
  explicit BatchExecutor(SpaceState& space) noexcept : space_{space} {}

  /// Executes everything the queue has published, slice by slice, delivering each slice's completions.
  void run(QueueCore& queue, bool for_another) noexcept;
  /// Executes the batch; it and its arrays lie where they outlive a thread's end.
  void run(DirectBatch& batch, bool for_another) noexcept;
  /// After the end of the thread that executed: settles the operations that were with the backend, and gives up the one
  /// that was being planned. What was mapped is mapped again, what was unmapped is gone.
  void recover() noexcept;
  /// After recover(): goes on with what the thread was running.
  void resume(QueueCore& queue) noexcept;
  void resume(DirectBatch& batch) noexcept;
  /// Unmaps everything, quarantined mappings included in the attempt; how many bytes, and the first refusal.
  Error unmap_all(Bytes& removed) noexcept;
  /// Relaxed mode: carries out every deferred unmap; the bytes that devices can no longer reach. Not within a phase.
  Bytes flush_stale() noexcept;
  /// Relaxed mode: does so if a bound is reached by `now_ns` of the monotonic clock.
  void flush_stale_if_due(std::uint64_t now_ns) noexcept;
  /// Brings the gauges of the counters up to date.
  void publish_gauges() noexcept;

 private:
  /// A map of the current phase.
  struct PendingMap {
    std::uint32_t operation;  // index into the slice
    std::uint32_t first_op;   // its backend operations, counted from maps_begin
    std::uint32_t op_count;   // 0: cancelled by an unmap
    MappingRecord* record;
  };
  /// An unmap of the current phase: the span of the mappings that it found.
  struct PendingUnmap {
    IovaRange span;
    Bytes bytes;           // of the mappings in the span, all in state `unmapping` and all this unmap's
    MappingRecord* first;  // of those mappings, in address order
    MappingRecord* last;
    std::uint32_t operation;
    std::uint32_t mappings;
  };
  static constexpr std::uint32_t slices_per_timing = 16;  // reading the clock twice costs as much as an operation
  static constexpr std::uint32_t map_ops_max = slice_operations_max + pieces_max;
  /// Where the maps' backend operations begin in ops_; the unmaps' end there.
  static constexpr std::uint32_t maps_begin = slice_operations_max;

  /// Where a thread stands that is in a call: what recover() has to look after.
  enum class Step : std::uint8_t {
    none,       // it plans, or finished: nothing is with the backend
    executing,  // the phase
    mapping,    // maps_[cursor_] failed and is being undone
    unmapping,  // unmaps_[cursor_] is being retried
  };

  void run_slice(const Slice& slice, std::uint32_t count, bool& link_broken) noexcept;
  void run_from(std::uint32_t i) noexcept;
  void end_slice() noexcept;
  /// Completes operation `i` with an error, unless it has one.
  [[gnu::noinline]] void refuse(std::uint32_t i, const Error& error) noexcept;
  Error not_begun() const noexcept;
  void plan(std::uint32_t i, const Operation& operation) noexcept;
  void plan_map(std::uint32_t i, const Operation& operation) noexcept;
  void plan_scattered_map(std::uint32_t i, const Operation& operation) noexcept;
  void plan_unmap(std::uint32_t i, const Operation& operation) noexcept;
  void plan_wide_unmap(std::uint32_t i, IovaRange range) noexcept;
  Error check_unmap(IovaRange range, MappingRecord* first) noexcept;
  void replace(std::uint32_t i, const Operation& operation) noexcept;
  Error try_replace(std::uint32_t i, const Operation& operation) noexcept;
  Error restore_replaced(MappingRecord* record, const backends::BackendOpResult& refused) noexcept;

  bool reserve(std::uint32_t i, const Operation& operation, Bytes length, IovaRange& range) noexcept;
  [[gnu::noinline]] bool allocate(std::uint32_t i, const Operation& operation, Bytes length, IovaRange& range) noexcept;
  [[gnu::noinline]] bool claim(std::uint32_t i, IovaRange range) noexcept;
  Error nowhere() const noexcept;
  void enter_map(std::uint32_t i, Access access, IovaRange range, const ResolvedPiece& piece, std::uint32_t op_count,
                 std::uint16_t flags) noexcept;
  [[gnu::noinline]] MappingRecord* enter_after_flush(std::uint32_t i, IovaRange range, std::uint32_t op_count) noexcept;
  bool make_room() noexcept;
  Error cannot_enter(IovaRange range) const noexcept;
  void add_unmap(std::uint32_t i, IovaRange span, Bytes bytes, MappingRecord* first, MappingRecord* last,
                 std::uint32_t mappings) noexcept;
  bool phase_touches(IovaRange range) noexcept;
  bool touches_stale(IovaRange range) noexcept;
  [[gnu::noinline]] bool revive(std::uint32_t i, const Operation& operation, ResolvedPiece piece) noexcept;
  bool may_defer(std::uint32_t mappings) noexcept;
  void defer_unmap(std::uint32_t i, MappingRecord* first, std::uint32_t mappings) noexcept;
  std::size_t flush_stale_part(std::size_t next, std::uint64_t& removed) noexcept;
  void cancel(MappingRecord* record) noexcept;

  void flush() noexcept;
  std::uint32_t merge_unmaps() noexcept;
  /// Whether one call for both costs less than two: the backend may have to walk what lies between.
  bool is_worth_joining(IovaRange lower, IovaRange upper) const noexcept {
    return upper.start.value - lower.last.value - 1 <= space_.unmap_hole_max.value;
  }
  void drop_cancelled_maps() noexcept;
  void end_phase() noexcept;
  void finish_unmaps(std::uint32_t groups) noexcept;
  void finish_unmap(PendingUnmap& unmap, const Error& error) noexcept;
  void retry_one_by_one(PendingUnmap& unmap) noexcept;
  void finish_maps(std::uint32_t m) noexcept;
  void fail_map(const PendingMap& map) noexcept;
  bool undo_map(const PendingMap& map) noexcept;
  /// EFAULT is also what Linux says when it did what was asked and could not write its answer back
  /// (tests/conformance/fail_nth_test.cpp makes it). Nothing else failed with something done.
  static bool may_have_taken_effect(const Error& error) noexcept;
  bool clear_of(const backends::BackendOpResult& mapped, IovaRange range) noexcept;
  Error take_out(IovaRange range) noexcept;
  bool map_again(const PendingMap& map) noexcept;
  backends::BackendOpResult execute_one(const backends::BackendOp& op) noexcept;

  /// The last steps of an unmap, in the contract's order: the pin, then the IOVA, which may be handed out from here on.
  void retire(MappingRecord* record) noexcept {
    const IovaRange range = record->range;
    const std::uint32_t memory_index = record->region;
    space_.index.erase(record);
    drop_memory(memory_index);
    release(range);
  }
  void release(IovaRange range) noexcept {
    // The allocator refuses only what it never handed out, and then there is nothing to give back.
    if (space_.allocator) (void)space_.allocator->free(range);
  }
  void drop_memory(std::uint32_t memory_index) noexcept {
    if (memory_index == 0) return;
    MemoryTable::Entry& entry = space_.memories.at(memory_index - 1);
    if (--entry.mappings == 0 && !entry.owned) [[unlikely]]
      space_.memories.orphan(memory_index - 1);
  }
  /// Unregisters memory whose owner and last mapping went. No call in the middle of retire(), so that it is done whole.
  void forget_orphans() noexcept;
  void quarantine(MappingRecord& record) noexcept;
  void put_map_op(backends::BackendOp& op, const ResolvedPiece& piece, IovaRange range, Access access) const noexcept {
    const bool copy = piece.region.value != 0 && space_.map_by_copy;
    op.kind = copy ? backends::OpKind::copy : backends::OpKind::map;
    op.access = access;
    op.region = piece.region;
    op.range = range;
    op.memory = piece.memory;
  }
  backends::BackendOp map_op(const ResolvedPiece& piece, IovaRange range, Access access) const noexcept {
    backends::BackendOp op;
    put_map_op(op, piece, range, access);
    return op;
  }

  SpaceState& space_;
  Slice slice_{};
  // The slice, for resume().
  bool slice_open_ = false;
  bool planned_ = false;  // at_ is, and what follows waits for its verdict
  std::uint32_t at_ = 0;  // the operation that is being planned
  std::uint32_t count_ = 0;
  bool* link_broken_ = nullptr;
  std::uint32_t refused_ = 0;  // of this slice
  // The call that is being made, for recover().
  Step step_ = Step::none;
  bool recovering_ = false;
  bool flushing_stale_ = false;
  std::uint32_t cursor_ = 0;
  std::uint32_t groups_ = 0;
  MappingRecord* replacing_ = nullptr;
  IovaRange held_ = nothing_held;  // reserved for the operation that is being planned, beyond a flush
  static constexpr IovaRange nothing_held{iova_max, Iova{0}};
  std::uint32_t slices_ = 0;
  std::array<std::uint32_t, operation_kinds> succeeded_{};  // of this slice, by OperationKind
  // The phase so far.
  std::uint32_t map_count_ = 0;
  std::uint32_t map_op_count_ = 0;
  std::uint32_t unmap_count_ = 0;
  bool unmaps_sorted_ = true;    // by address
  std::uint64_t slice_ns_ = 0;   // when the slice planned its first relaxed unmap, 0 before
  bool maps_cancelled_ = false;  // some of maps_ have no operation any more
  std::array<PendingMap, slice_operations_max> maps_;
  std::array<PendingUnmap, slice_operations_max> unmaps_;
  std::array<std::uint32_t, slice_operations_max> group_sizes_;  // how many of unmaps_ each merged unmap stands for
  // What goes to the backend: merged unmaps up to maps_begin, maps from there on.
  std::array<backends::BackendOp, maps_begin + map_ops_max> ops_;
  std::array<backends::BackendOpResult, maps_begin + map_ops_max> results_;
};

}  // namespace iovane::engine
