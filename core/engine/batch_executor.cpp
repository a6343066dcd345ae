// Planning: what each operation means for the index, and which backend operations it needs. Executing a phase and
// spreading its verdicts is in batch_flush.cpp, replacing in batch_replace.cpp.
#include "engine/batch_executor.hpp"

#include <algorithm>

#include "base/error_text.hpp"
#include "engine/engine_event.hpp"
#include "engine/monotonic.hpp"

namespace iovane::engine {

using backends::BackendOp;
using backends::OpKind;
using base::fail;

void BatchExecutor::run(QueueCore& queue, bool for_another) noexcept {
  if (for_another) (*space_.counters)[Count::combined_batches].add();
  for_another_ = for_another;
  const std::uint64_t published = queue.take_published();
  while (queue.executed() != published) {
    const auto count =
        static_cast<std::uint32_t>(std::min<std::uint64_t>(published - queue.executed(), slice_operations_max));
    run_slice(queue.next_slice(), count, queue.link_broken);
    queue.deliver(count);
  }
}

void BatchExecutor::run(DirectBatch& batch, bool for_another) noexcept {
  if (for_another) (*space_.counters)[Count::combined_batches].add();
  for_another_ = for_another;
  while (batch.left() != 0) {
    const auto count = static_cast<std::uint32_t>(std::min<std::size_t>(batch.left(), slice_operations_max));
    run_slice(batch.next_slice(), count, batch.link_broken);
    batch.executed(count, refused_);
  }
}

void BatchExecutor::run_slice(const Slice& slice, std::uint32_t count, bool& link_broken) noexcept {
  const bool timed = (slices_++ & (slices_per_timing - 1)) == 0;
  const std::uint64_t begun_ns = timed ? monotonic_ns() : 0;
  slice_ = slice;
  count_ = count;
  link_broken_ = &link_broken;
  succeeded_ = {};
  refused_ = 0;
  slice_ns_ = 0;
  at_ = 0;
  slice_open_ = true;
  run_from(0);
  if (timed) space_.counters->batch_time.record(monotonic_ns() - begun_ns);
  slice_open_ = false;
}

// Plans the slice's operations from `i` on, and ends it.
void BatchExecutor::run_from(std::uint32_t i) noexcept {
  for (; i < count_; ++i) {
    const Operation& operation = slice_.operation(i);
    slice_.completion(i) = Completion{operation.user_data, {}, operation.start, {}, {}};
    ++succeeded_[static_cast<unsigned>(operation.kind)];  // until refuse() says otherwise
    at_ = i;
    if (space_.closed || *link_broken_) [[unlikely]]
      refuse(i, not_begun());
    else
      plan(i, operation);
    *link_broken_ = false;
    if (operation.order == Order::link) [[unlikely]] {
      planned_ = true;
      flush();  // the next operation needs this one's verdict
      *link_broken_ = !slice_.completion(i).ok();
      planned_ = false;
    }
  }
  at_ = count_;
  flush();
  SpaceCounters& counters = *space_.counters;
  counters[Count::batches].add();
  counters[Count::maps].add(succeeded_[static_cast<unsigned>(OperationKind::map)]);
  counters[Count::unmaps].add(succeeded_[static_cast<unsigned>(OperationKind::unmap)]);
  counters[Count::replaces].add(succeeded_[static_cast<unsigned>(OperationKind::replace)]);
  if (space_.stale && !space_.stale->empty()) flush_stale_if_due(slice_ns_ != 0 ? slice_ns_ : monotonic_ns());
  publish_gauges();
  if (space_.memories.has_orphans()) [[unlikely]]
    forget_orphans();
  IOVANE_TRACE(base::TraceLevel::batch, EngineEvent, batch_done, space_.number, count_,
               succeeded_[static_cast<unsigned>(OperationKind::map)], for_another_);
}

void BatchExecutor::publish_gauges() noexcept {
  (*space_.counters)[Count::live_mappings].set(space_.index.size());
  (*space_.counters)[Count::live_bytes].set(space_.index.bytes().value);
  if (!space_.stale) return;
  (*space_.counters)[Count::stale_mappings].set(space_.stale->count());
  (*space_.counters)[Count::stale_bytes].set(space_.stale->bytes());
}

void BatchExecutor::refuse(std::uint32_t i, const Error& error) noexcept {
  Completion& verdict = slice_.completion(i);
  if (!verdict.ok()) return;
  verdict.error = error;
  ++refused_;
  --succeeded_[static_cast<unsigned>(slice_.operation(i).kind)];
  (*space_.counters)[Count::failures].add();
  IOVANE_TRACE(base::TraceLevel::error, EngineEvent, operation_failed, space_.number, verdict.user_data, error.code,
               error.os_errno);
}

Error BatchExecutor::not_begun() const noexcept {
  return space_.closed ? make_error(Errc::closed, Stage::validate, "the address space has been destroyed")
                       : make_error(Errc::cancelled, Stage::validate, "the operation it was linked to failed");
}

[[gnu::always_inline]] inline void BatchExecutor::plan(std::uint32_t i, const Operation& operation) noexcept {
  switch (operation.kind) {
    case OperationKind::map: return plan_map(i, operation);
    case OperationKind::unmap: return plan_unmap(i, operation);
    case OperationKind::replace: return replace(i, operation);
    case OperationKind::fence: return flush();
    case OperationKind::flush:
      flush();
      slice_.completion(i).bytes = flush_stale();
      return;
  }
}

[[gnu::always_inline]] inline void BatchExecutor::plan_map(std::uint32_t i, const Operation& operation) noexcept {
  if (!is_access(operation.access)) [[unlikely]]
    return refuse(i, unknown_access());
  if (operation.piece_count != 0) return plan_scattered_map(i, operation);
  ResolvedPiece piece;
  if (!resolve_piece(space_, operation.one_piece(), piece)) [[unlikely]]
    return refuse(i, bad_piece(space_, operation.one_piece()));
  if (map_op_count_ == map_ops_max) [[unlikely]]
    flush();
  if (space_.stale && revive(i, operation, piece)) return;
  IovaRange range;
  if (!reserve(i, operation, operation.length, range)) [[unlikely]]
    return;
  put_map_op(ops_[maps_begin + map_op_count_], piece, range, operation.access);
  enter_map(i, operation.access, range, piece, 1, 0);
}

void BatchExecutor::plan_scattered_map(std::uint32_t i, const Operation& operation) noexcept {
  if (operation.piece_count > pieces_max)
    return refuse(i, fail(Errc::limit_reached, Stage::validate, 0,
                          "a scatter list has {} pieces; at most {} are one unit", operation.piece_count, pieces_max));
  const std::span<const MemoryPiece> pieces{operation.pieces, operation.piece_count};
  const auto length = total_length(space_, pieces);
  if (!length) return refuse(i, length.error());
  if (map_op_count_ + pieces.size() > map_ops_max) flush();
  IovaRange range;
  if (!reserve(i, operation, *length, range)) return;

  Error refused{};
  ResolvedPiece first;
  std::uint32_t op_count = 0;
  Iova at = range.start;
  for (std::size_t p = 0; p < pieces.size(); ++p) {
    ResolvedPiece piece;
    if (!resolve_piece(space_, pieces[p], piece)) {
      refused = bad_piece(space_, pieces[p]);
      break;
    }
    if (p == 0) {
      first = piece;
    } else if (piece.memory_index != first.memory_index) {
      refused = make_error(Errc::unsupported, Stage::validate,
                           "a scatter list mixes pieces of different registered memories; map them as separate units");
      break;
    }
    const IovaRange part{at, Iova{at.value + (pieces[p].length.value - 1)}};
    BackendOp* const ops = &ops_[maps_begin + map_op_count_];
    if (p != 0 && ops[op_count - 1].memory + ops[op_count - 1].range.length().value == piece.memory)
      ops[op_count - 1].range.last = part.last;
    else
      put_map_op(ops[op_count++], piece, part, operation.access);
    at = Iova{part.last.value + 1};  // may wrap after the last piece; not used then
  }
  if (refused) {
    release(range);
    return refuse(i, refused);
  }
  enter_map(i, operation.access, range, first, op_count, pieces.size() > 1 ? mapping_is_scattered : 0);
}

// Enters a map whose IOVA is reserved and whose backend operations stand behind the phase's others.
[[gnu::always_inline]] inline void BatchExecutor::enter_map(std::uint32_t i, Access access, IovaRange range,
                                                            const ResolvedPiece& piece, std::uint32_t op_count,
                                                            std::uint16_t flags) noexcept {
  MappingRecord* record = space_.index.try_insert(range);
  if (record == nullptr) [[unlikely]] {
    record = enter_after_flush(i, range, op_count);
    if (record == nullptr) return;
  }
  record->memory = piece.memory;
  record->region = piece.memory_index;
  record->access = access;
  record->state = MappingState::mapping;
  record->flags = flags;
  record->tag = map_count_;
  if (piece.memory_index != 0) ++space_.memories.at(piece.memory_index - 1).mappings;
  PendingMap& map = maps_[map_count_++];
  map.operation = i;
  map.first_op = map_op_count_;
  map.op_count = op_count;
  map.record = record;
  map_op_count_ += op_count;
  Completion& verdict = slice_.completion(i);
  verdict.iova = range.start;
  verdict.bytes = range.length();
  verdict.mapping = space_.index.id_of(record);
}

// Chooses or claims the IOVA range of a map; false when it was refused.
[[gnu::always_inline]] inline bool BatchExecutor::reserve(std::uint32_t i, const Operation& operation, Bytes length,
                                                          IovaRange& range) noexcept {
  if (operation.placement == Placement::Kind::anywhere) return allocate(i, operation, length, range);
  range.start = operation.start;
  range.last.value = operation.start.value + (length.value - 1);
  if (!is_placeable(space_, range)) [[unlikely]]
    return refuse(i, bad_place(space_, operation.start, length)), false;
  return !space_.allocator || claim(i, range);
}

// Takes a range that the caller chose from the allocator.
bool BatchExecutor::claim(std::uint32_t i, IovaRange range) noexcept {
  // What this phase unmaps there is free only after its flush, what was deferred there after that one's.
  if (phase_touches(range)) flush();
  if (touches_stale(range)) make_room();
  if (const auto claimed = space_.allocator->claim(range); !claimed) return refuse(i, claimed.error()), false;
  return true;
}

// Lets the engine choose.
bool BatchExecutor::allocate(std::uint32_t i, const Operation& operation, Bytes length, IovaRange& range) noexcept {
  if (!space_.allocator) [[unlikely]]
    return refuse(i, nowhere()), false;
  auto taken = space_.allocator->allocate(length, {operation.align, operation.last});
  if (!taken) [[unlikely]] {
    if (!make_room()) return refuse(i, taken.error()), false;
    taken = space_.allocator->allocate(length, {operation.align, operation.last});
    if (!taken) return refuse(i, taken.error()), false;
  }
  range = *taken;
  return true;
}

Error BatchExecutor::nowhere() const noexcept {
  if (space_.usable.empty()) return not_usable(space_, {});
  return make_error(Errc::invalid_argument, Stage::reserve,
                    "this address space's layout is the caller's: give the map a fixed placement");
}

// A range that an operation of this phase touches ends the phase, so that what counts is the outcome of everything
// before; one that a deferred unmap left there, or a full index, makes that unmap happen. The map's backend operations
// move along. Nullptr when the map was refused.
MappingRecord* BatchExecutor::enter_after_flush(std::uint32_t i, IovaRange range, std::uint32_t op_count) noexcept {
  const bool in_phase = phase_touches(range);
  const bool behind_stale = touches_stale(range) || space_.index.size() == space_.index.mappings_max();
  MappingRecord* record = nullptr;
  if (in_phase || behind_stale) {
    const std::uint32_t planned = map_op_count_;
    held_ = range;
    flush();
    if (behind_stale) (void)flush_stale();
    held_ = nothing_held;
    std::copy_n(&ops_[maps_begin + planned], op_count, &ops_[maps_begin]);
    record = space_.index.try_insert(range);
  }
  if (record == nullptr) {
    release(range);
    refuse(i, cannot_enter(range));
  }
  return record;
}

// Carries out deferred unmaps for the sake of what they hold; false when there were none.
bool BatchExecutor::make_room() noexcept {
  if (!space_.stale || space_.stale->empty()) return false;
  flush();
  (void)flush_stale();
  return true;
}

Error BatchExecutor::cannot_enter(IovaRange range) const noexcept {
  const MappingRecord* const other = space_.index.first_record(range);
  if (other == nullptr || other->state != MappingState::quarantined) return space_.index.why_not(range);
  return fail(Errc::quarantined, Stage::reserve, 0,
              "[{:#x}, {:#x}] touches [{:#x}, {:#x}], which is out of use since the kernel failed to unmap it",
              range.start.value, range.last.value, other->range.start.value, other->range.last.value);
}

bool BatchExecutor::phase_touches(IovaRange range) noexcept {
  if (map_count_ == 0 && unmap_count_ == 0) return false;
  for (MappingRecord* record = space_.index.first_record(range); record != nullptr && record->range.start <= range.last;
       record = MappingIndex::next_record(record))
    if (record->state == MappingState::mapping || record->state == MappingState::unmapping) return true;
  return false;
}

inline void BatchExecutor::add_unmap(std::uint32_t i, IovaRange span, Bytes bytes, MappingRecord* first,
                                     MappingRecord* last, std::uint32_t mappings) noexcept {
  if (unmap_count_ != 0 && span.start < unmaps_[unmap_count_ - 1].span.start) unmaps_sorted_ = false;
  unmaps_[unmap_count_++] = {span, bytes, first, last, i, mappings};
}

[[gnu::always_inline]] inline void BatchExecutor::plan_unmap(std::uint32_t i, const Operation& operation) noexcept {
  IovaRange range = operation.range();
  MappingRecord* record = nullptr;
  if (operation.memory != 0) {
    record = space_.index.find(MappingId{operation.memory});
    if (record == nullptr || record->state == MappingState::unmapping || record->state == MappingState::stale)
        [[unlikely]]
      return refuse(i, make_error(Errc::stale_handle, Stage::validate, "the mapping it names is gone"));
    range = record->range;
    slice_.completion(i).iova = range.start;
  } else {
    if (!is_granular(space_, range)) [[unlikely]]
      return refuse(i, bad_range(space_, range));
    record = space_.index.exact(range);
  }
  if (record != nullptr && record->state == MappingState::live) [[likely]] {
    const bool defer = space_.stale && may_defer(1);
    record->state = MappingState::unmapping;
    if (defer) return defer_unmap(i, record, 1);
    add_unmap(i, range, range.length(), record, record, 1);
    if (space_.stale) [[unlikely]]
      flush();  // a phase of relaxed mode holds maps only
  } else {
    plan_wide_unmap(i, range);
  }
}

// Everything but one live mapping exactly. First look, then touch: nothing is undone when the range turns out to cut a
// mapping.
void BatchExecutor::plan_wide_unmap(std::uint32_t i, IovaRange range) noexcept {
  MappingRecord* record = space_.index.first_record(range);
  bool defer = false;
  if (space_.stale) {
    std::uint32_t found = 0;
    for (MappingRecord* r = record; r != nullptr && r->range.start <= range.last; r = MappingIndex::next_record(r))
      found += r->state != MappingState::stale ? 1 : 0;
    defer = may_defer(found);
    record = space_.index.first_record(range);
  }
  if (const Error refused = check_unmap(range, record)) {
    if (refused.code != Errc::busy) return refuse(i, refused);
    flush();  // something in the range is being unmapped already; look again when it is gone
    record = space_.index.first_record(range);
    if (const Error still = check_unmap(range, record)) return refuse(i, still);
  }

  PendingUnmap unmap{};
  std::uint64_t cancelled = 0;
  while (record != nullptr && record->range.start <= range.last) {
    MappingRecord* const following = MappingIndex::next_record(record);
    const Bytes length = record->range.length();
    if (record->state == MappingState::mapping) {
      cancelled += length.value;
      cancel(record);
    } else if (record->state != MappingState::stale) {  // that one is gone for the caller
      if (unmap.mappings++ == 0) unmap.first = record;
      unmap.last = record;
      unmap.bytes.value += length.value;
      record->state = MappingState::unmapping;
    }
    record = following;
  }
  slice_.completion(i).bytes = Bytes{cancelled};
  if (unmap.mappings != 0 && defer) {
    defer_unmap(i, unmap.first, unmap.mappings);
  } else if (unmap.mappings != 0) {
    add_unmap(i, {unmap.first->range.start, unmap.last->range.last}, unmap.bytes, unmap.first, unmap.last,
              unmap.mappings);
    if (space_.stale) flush();  // as in plan_unmap()
  } else if (cancelled == 0 && range != IovaRange::everything()) {
    refuse(i, fail(Errc::not_found, Stage::validate, 0, "nothing is mapped in [{:#x}, {:#x}]", range.start.value,
                   range.last.value));
  }
}

// Whether the range cuts nothing and holds nothing that must not be touched; Errc::busy (without a text, and never
// seen by a caller) when an unmap of this phase is at it already.
Error BatchExecutor::check_unmap(IovaRange range, MappingRecord* first) noexcept {
  for (MappingRecord* record = first; record != nullptr && record->range.start <= range.last;
       record = MappingIndex::next_record(record)) {
    if (record->state == MappingState::stale) continue;
    if (record->state == MappingState::unmapping) return Error{Errc::busy, Stage::validate, 0, 0};
    if (!range.contains(record->range))
      return fail(Errc::would_bisect, Stage::validate, 0,
                  "unmapping [{:#x}, {:#x}] would cut the mapping [{:#x}, {:#x}]; unmap whole mappings",
                  range.start.value, range.last.value, record->range.start.value, record->range.last.value);
    if (record->state == MappingState::quarantined)
      return fail(Errc::quarantined, Stage::validate, 0,
                  "[{:#x}, {:#x}] holds [{:#x}, {:#x}], which is out of use since the kernel failed to unmap it",
                  range.start.value, range.last.value, record->range.start.value, record->range.last.value);
  }
  return {};
}

// A map of this phase that its unmap overtook: the device can never have used it, so the backend never hears of it.
void BatchExecutor::cancel(MappingRecord* record) noexcept {
  maps_[record->tag].op_count = 0;
  maps_cancelled_ = true;
  (*space_.counters)[Count::cancelled_pairs].add();
  retire(record);
}

}  // namespace iovane::engine
