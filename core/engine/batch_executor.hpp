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

#include <cstdint>
#include <span>
#include <vector>

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
  /// Allocates its scratch space; throws std::bad_alloc.
  explicit BatchExecutor(SpaceState& space);

  /// Executes everything the queue has published, slice by slice, delivering each slice's completions.
  void run(QueueCore& queue) noexcept;
  /// Executes one operation. `link_broken` as in QueueCore.
  Completion run_one(const Operation& operation) noexcept;
  /// Unmaps everything, quarantined mappings included in the attempt.
  Result<Bytes> unmap_all() noexcept;

 private:
  /// A map of the current phase.
  struct PendingMap {
    std::uint32_t operation;  // index into the slice; its completion is in verdicts_
    std::uint32_t first_op;   // its backend operations in map_ops_
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
  struct OperationSource {
    const QueueCore* queue;
    std::uint64_t first;
    const Operation* single;
    const Operation& operator[](std::uint32_t i) const noexcept {
      return queue != nullptr ? queue->operation(first + i) : *single;
    }
  };

  void run_slice(const OperationSource& operations, std::uint32_t count, bool& link_broken) noexcept;
  void plan(std::uint32_t i, const Operation& operation) noexcept;
  Error plan_map(std::uint32_t i, const Operation& operation) noexcept;
  Error plan_unmap(std::uint32_t i, const Operation& operation) noexcept;
  Error check_unmap(IovaRange range, MappingRecord* first) noexcept;
  Error replace(std::uint32_t i, const Operation& operation) noexcept;

  Result<IovaRange> reserve(const Operation& operation, Bytes length) noexcept;
  Result<MappingRecord*> enter_mapping(const MappingRecord& record) noexcept;
  bool phase_touches(IovaRange range) noexcept;
  void cancel(MappingRecord* record) noexcept;

  void flush() noexcept;
  std::uint32_t merge_unmaps() noexcept;
  void finish_unmaps(std::uint32_t groups) noexcept;
  void finish_unmap(PendingUnmap& unmap, const Error& error) noexcept;
  void retry_one_by_one(PendingUnmap& unmap) noexcept;
  void finish_maps(std::span<const backends::BackendOpResult> results) noexcept;
  void undo_map(const PendingMap& map, std::span<const backends::BackendOpResult> results) noexcept;
  backends::BackendOpResult execute_one(const backends::BackendOp& op) noexcept;

  void retire(MappingRecord* record) noexcept;
  void quarantine(MappingRecord& record) noexcept;
  void release(IovaRange range) noexcept;
  void drop_memory(std::uint32_t memory_index) noexcept;
  backends::BackendOp map_op(const ResolvedPiece& piece, IovaRange range, Access access) const noexcept;

  SpaceState& space_;
  std::vector<Completion> verdicts_;
  std::vector<PendingMap> maps_;
  std::vector<PendingUnmap> unmaps_;
  std::vector<backends::BackendOp> map_ops_;
  std::vector<backends::BackendOp> ops_;  // what goes to the backend: merged unmaps, then maps
  std::vector<backends::BackendOpResult> results_;
  std::vector<std::uint32_t> group_sizes_;  // how many of unmaps_ each merged unmap stands for
};

}  // namespace iovane::engine
