// Planning: what each operation means for the index, and which backend operations it needs. Executing a phase and
// spreading its verdicts is in batch_flush.cpp.
#include "engine/batch_executor.hpp"

#include <algorithm>

#include "base/error_text.hpp"

namespace iovane::engine {

using backends::BackendOp;
using backends::OpKind;
using base::fail;

namespace {
constexpr std::uint32_t map_ops_max = slice_operations_max + pieces_max;
}

BatchExecutor::BatchExecutor(SpaceState& space) : space_{space} {
  verdicts_.resize(slice_operations_max);
  maps_.reserve(slice_operations_max);
  unmaps_.reserve(slice_operations_max);
  map_ops_.reserve(map_ops_max);
  ops_.reserve(slice_operations_max + map_ops_max);
  results_.resize(slice_operations_max + map_ops_max);
  group_sizes_.reserve(slice_operations_max);
}

void BatchExecutor::run(QueueCore& queue) noexcept {
  const std::uint64_t published = queue.take_published();
  while (queue.executed() != published) {
    const auto count =
        static_cast<std::uint32_t>(std::min<std::uint64_t>(published - queue.executed(), slice_operations_max));
    run_slice({&queue, queue.executed(), nullptr}, count, queue.link_broken);
    for (std::uint32_t i = 0; i < count; ++i) queue.complete(verdicts_[i]);
    queue.deliver();
  }
}

Completion BatchExecutor::run_one(const Operation& operation) noexcept {
  bool link_broken = false;
  run_slice({nullptr, 0, &operation}, 1, link_broken);
  return verdicts_[0];
}

void BatchExecutor::run_slice(const OperationSource& operations, std::uint32_t count, bool& link_broken) noexcept {
  ++space_.stats.batches;
  for (std::uint32_t i = 0; i < count; ++i) {
    const Operation& operation = operations[i];
    Completion& verdict = verdicts_[i];
    verdict = Completion{operation.user_data, {}, operation.start, {}, {}};
    if (space_.closed) {
      verdict.error = make_error(Errc::closed, Stage::validate, "the address space has been destroyed");
    } else if (link_broken) {
      verdict.error = make_error(Errc::cancelled, Stage::validate, "the operation it was linked to failed");
    } else {
      plan(i, operation);
    }
    if (operation.order == Order::link) {
      flush();  // the next operation needs this one's verdict
      link_broken = !verdict.ok();
    } else {
      link_broken = false;
    }
  }
  flush();
  for (std::uint32_t i = 0; i < count; ++i) {
    if (!verdicts_[i].ok()) {
      ++space_.stats.failures;
      continue;
    }
    switch (operations[i].kind) {
      case OperationKind::map: ++space_.stats.maps; break;
      case OperationKind::unmap: ++space_.stats.unmaps; break;
      case OperationKind::replace: ++space_.stats.replaces; break;
      case OperationKind::fence: break;
    }
  }
}

void BatchExecutor::plan(std::uint32_t i, const Operation& operation) noexcept {
  Completion& verdict = verdicts_[i];
  switch (operation.kind) {
    case OperationKind::map: verdict.error = plan_map(i, operation); return;
    case OperationKind::unmap: verdict.error = plan_unmap(i, operation); return;
    case OperationKind::replace: verdict.error = replace(i, operation); return;
    case OperationKind::fence: flush(); return;
  }
}

BackendOp BatchExecutor::map_op(const ResolvedPiece& piece, IovaRange range, Access access) const noexcept {
  const bool copy = piece.region.value != 0 && space_.map_by_copy;
  return {copy ? OpKind::copy : OpKind::map, access, piece.region, range, piece.memory};
}

Error BatchExecutor::plan_map(std::uint32_t i, const Operation& operation) noexcept {
  if (operation.access == Access::none || !includes(Access::read_write, operation.access))
    return make_error(Errc::invalid_argument, Stage::validate,
                      "the access right is none or unknown; ask for read, write or both");
  if (operation.piece_count > pieces_max)
    return fail(Errc::limit_reached, Stage::validate, 0, "a scatter list has {} pieces; at most {} are one unit",
                operation.piece_count, pieces_max);
  MemoryPiece single;
  const std::span<const MemoryPiece> pieces = operation.piece_list(single);
  const auto length = total_length(space_, pieces);
  if (!length) return length.error();
  if (map_ops_.size() + pieces.size() > map_ops_max) flush();

  const auto range = reserve(operation, *length);
  if (!range) return range.error();

  const auto first_op = static_cast<std::uint32_t>(map_ops_.size());
  Error refused{};
  std::uint32_t memory_index = 0;
  std::uint64_t first_memory = 0;
  Iova at = range->start;
  for (std::size_t p = 0; p < pieces.size(); ++p) {
    const auto piece = resolve_piece(space_, pieces[p]);
    if (!piece) {
      refused = piece.error();
      break;
    }
    if (p == 0) {
      memory_index = piece->memory_index;
      first_memory = piece->memory;
    } else if (piece->memory_index != memory_index) {
      refused = make_error(Errc::unsupported, Stage::validate,
                           "a scatter list mixes pieces of different registered memories; map them as separate units");
      break;
    }
    const IovaRange part{at, Iova{at.value + (pieces[p].length.value - 1)}};
    if (p != 0) {
      BackendOp& before = map_ops_.back();
      if (before.memory + before.range.length().value == piece->memory) {
        before.range.last = part.last;
        at = Iova{part.last.value + 1};
        continue;
      }
    }
    map_ops_.push_back(map_op(*piece, part, operation.access));
    at = Iova{part.last.value + 1};  // may wrap after the last piece; not used then
  }
  if (refused) {
    map_ops_.resize(first_op);
    release(*range);
    return refused;
  }

  MappingRecord record;
  record.range = *range;
  record.memory = first_memory;
  record.region = memory_index;
  record.access = operation.access;
  record.state = MappingState::mapping;
  record.flags = pieces.size() > 1 ? mapping_is_scattered : 0;
  record.tag = static_cast<std::uint32_t>(maps_.size());
  const auto entered = enter_mapping(record);
  if (!entered) {
    map_ops_.resize(first_op);
    release(*range);
    return entered.error();
  }
  if (memory_index != 0) ++space_.memories.at(memory_index - 1).mappings;
  maps_.push_back({i, first_op, static_cast<std::uint32_t>(map_ops_.size()) - first_op, *entered});
  verdicts_[i].iova = range->start;
  verdicts_[i].bytes = *length;
  verdicts_[i].mapping = space_.index.id_of(*entered);
  return {};
}

// Chooses or claims the IOVA range of a map. A fixed range that an operation of this phase touches ends the phase, so
// that what is checked is the outcome of everything before.
Result<IovaRange> BatchExecutor::reserve(const Operation& operation, Bytes length) noexcept {
  if (operation.placement == Placement::Kind::anywhere) {
    if (!space_.allocator && space_.usable.empty()) return check_usable(space_, {operation.start, operation.start});
    if (!space_.allocator)
      return make_error(Errc::invalid_argument, Stage::reserve,
                        "this address space's layout is the caller's: give the map a fixed placement");
    iova::AllocateOptions options;
    options.align = operation.align;
    options.ceiling = operation.last;
    return space_.allocator->allocate(length, options);
  }
  const auto range = IovaRange::from_length(operation.start, length);
  if (!range)
    return fail(Errc::overflow, Stage::validate, 0, "{} bytes at IOVA {:#x} pass 2^64-1", length.value,
                operation.start.value);
  if (const Error bad = check_range(space_, *range)) return bad;
  if (const Error bad = check_usable(space_, *range)) return bad;
  if (phase_touches(*range)) flush();
  if (space_.allocator) {
    if (const auto claimed = space_.allocator->claim(*range); !claimed) return claimed.error();
  }
  return *range;
}

Result<MappingRecord*> BatchExecutor::enter_mapping(const MappingRecord& record) noexcept {
  const auto mapping = space_.index.insert(record);
  if (mapping) [[likely]]
    return space_.index.find(*mapping);
  if (mapping.error().code != Errc::iova_busy) return mapping.error();
  const MappingRecord* const other = space_.index.first_record(record.range);
  if (other == nullptr || other->state != MappingState::quarantined) return mapping.error();
  return fail(Errc::quarantined, Stage::reserve, 0,
              "[{:#x}, {:#x}] touches [{:#x}, {:#x}], which is out of use since the kernel failed to unmap it",
              record.range.start.value, record.range.last.value, other->range.start.value, other->range.last.value);
}

bool BatchExecutor::phase_touches(IovaRange range) noexcept {
  if (maps_.empty() && unmaps_.empty()) return false;
  for (MappingRecord* record = space_.index.first_record(range); record != nullptr && record->range.start <= range.last;
       record = MappingIndex::next_record(record))
    if (record->state == MappingState::mapping || record->state == MappingState::unmapping) return true;
  return false;
}

Error BatchExecutor::plan_unmap(std::uint32_t i, const Operation& operation) noexcept {
  IovaRange range = operation.range();
  if (operation.memory != 0) {
    const MappingRecord* const named = space_.index.find(MappingId{operation.memory});
    if (named == nullptr || named->state == MappingState::unmapping)
      return make_error(Errc::stale_handle, Stage::validate, "the mapping it names is gone");
    range = named->range;
    verdicts_[i].iova = range.start;
  } else if (const Error bad = check_range(space_, range)) {
    return bad;
  }

  // First look, then touch: nothing is undone when the range turns out to cut a mapping.
  MappingRecord* record = space_.index.first_record(range);
  if (const Error refused = check_unmap(range, record)) {
    if (refused.code != Errc::busy) return refused;
    flush();  // something in the range is being unmapped already; look again when it is gone
    record = space_.index.first_record(range);
    if (const Error still = check_unmap(range, record)) return still;
  }

  PendingUnmap unmap{range, {}, nullptr, nullptr, i, 0};
  std::uint64_t cancelled = 0;
  while (record != nullptr && record->range.start <= range.last) {
    MappingRecord* const following = MappingIndex::next_record(record);
    const Bytes length = record->range.length();
    if (record->state == MappingState::mapping) {
      cancelled += length.value;
      cancel(record);
    } else {
      if (unmap.mappings++ == 0) unmap.first = record;
      unmap.last = record;
      unmap.bytes.value += length.value;
      record->state = MappingState::unmapping;
    }
    record = following;
  }
  verdicts_[i].bytes = Bytes{cancelled};
  if (unmap.mappings != 0) {
    unmap.span = {unmap.first->range.start, unmap.last->range.last};
    unmaps_.push_back(unmap);
    return {};
  }
  if (cancelled != 0 || range == IovaRange::everything()) return {};
  return fail(Errc::not_found, Stage::validate, 0, "nothing is mapped in [{:#x}, {:#x}]", range.start.value,
              range.last.value);
}

// Whether the range cuts nothing and holds nothing that must not be touched; Errc::busy (without a text, and never
// seen by a caller) when an unmap of this phase is at it already.
Error BatchExecutor::check_unmap(IovaRange range, MappingRecord* first) noexcept {
  for (MappingRecord* record = first; record != nullptr && record->range.start <= range.last;
       record = MappingIndex::next_record(record)) {
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
  ++space_.stats.cancelled_pairs;
  retire(record);
}

Error BatchExecutor::replace(std::uint32_t i, const Operation& operation) noexcept {
  flush();
  const IovaRange range = operation.range();
  if (const Error bad = check_range(space_, range)) return bad;
  if (operation.access == Access::none || !includes(Access::read_write, operation.access))
    return make_error(Errc::invalid_argument, Stage::validate,
                      "the access right is none or unknown; ask for read, write or both");
  MappingRecord* const record = space_.index.first_record(range);
  if (record == nullptr || record->range != range || record->state != MappingState::live)
    return fail(Errc::not_found, Stage::validate, 0, "no mapping is exactly [{:#x}, {:#x}]", range.start.value,
                range.last.value);
  if ((record->flags & mapping_is_scattered) != 0)
    return make_error(Errc::unsupported, Stage::validate, "a scatter list cannot be replaced; unmap it and map anew");
  const MemoryPiece wanted{MemoryId{operation.memory}, operation.offset, operation.length};
  const auto length = total_length(space_, {&wanted, 1});
  if (!length) return length.error();
  if (*length != range.length())
    return fail(Errc::invalid_argument, Stage::validate, 0, "the new memory has {} bytes, the mapping {}",
                length->value, range.length().value);
  const auto piece = resolve_piece(space_, wanted);
  if (!piece) return piece.error();

  const BackendOp new_op = map_op(*piece, range, operation.access);
  if (has(space_.backend->facts().capabilities, backends::Capability::replace_in_place)) {
    BackendOp op = new_op;
    op.kind = OpKind::replace;
    if (const auto result = execute_one(op); result.error) return result.error;
  } else {
    const auto removed = execute_one({OpKind::unmap, Access::none, {}, range, 0});
    if (removed.error) {
      quarantine(*record);
      return removed.error;
    }
    if (const auto result = execute_one(new_op); result.error) {
      const std::uint32_t old_index = record->region;
      const backends::RegionId old_region =
          old_index != 0 ? space_.memories.at(old_index - 1).region : backends::RegionId{};
      const auto restored = execute_one(map_op({old_region, record->memory, old_index}, range, record->access));
      if (!restored.error) return result.error;
      retire(record);
      return fail(result.error.code, Stage::map, result.error.os_errno,
                  "{}; mapping the old memory again failed too ({}), so [{:#x}, {:#x}] is unmapped now",
                  result.error.detail(), restored.error.detail(), range.start.value, range.last.value);
    }
  }
  if (piece->memory_index != record->region) {
    if (piece->memory_index != 0) ++space_.memories.at(piece->memory_index - 1).mappings;
    drop_memory(record->region);
  }
  record->region = piece->memory_index;
  record->memory = piece->memory;
  record->access = operation.access;
  verdicts_[i].bytes = *length;
  verdicts_[i].mapping = space_.index.id_of(record);
  return {};
}

}  // namespace iovane::engine
