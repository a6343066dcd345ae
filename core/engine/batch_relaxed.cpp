// Relaxed unmaps: answered at once, carried out together a bounded time later.
//
// A mapping whose relaxed unmap was answered is `stale`: gone for the caller, still reachable for devices. It keeps its
// record, and with it its IOVA and its hold on registered memory, until the flush: what the contract calls holding the
// IOVA and the pin. So nothing new can be put there early; a map that wants the place makes the flush happen first. The
// one exception is a map of the same range, memory and access, which takes the mapping over as it stands (revive): the
// device sees what it would have seen in strict mode after the map.
#include <algorithm>

#include "base/error_text.hpp"
#include "engine/batch_executor.hpp"
#include "engine/monotonic.hpp"

namespace iovane::engine {

using backends::BackendOpResult;
using backends::OpKind;

// Before an unmap touches anything: makes room for so many mappings, and reads the clock. False: it is carried out at
// once, since not even an empty set has the room.
bool BatchExecutor::may_defer(std::uint32_t mappings) noexcept {
  if (slice_ns_ == 0) slice_ns_ = monotonic_ns();
  if (!space_.stale->has_room(mappings)) [[unlikely]] {
    flush();
    (void)flush_stale();
  }
  return space_.stale->has_room(mappings);
}

// Answers an unmap: everything that it found (all live) is stale from here on. After may_defer().
void BatchExecutor::defer_unmap(std::uint32_t i, MappingRecord* first, std::uint32_t mappings) noexcept {
  StaleSet& stale = *space_.stale;
  std::uint64_t bytes = 0;
  MappingRecord* record = first;
  for (std::uint32_t left = mappings; left != 0; record = MappingIndex::next_record(record)) {
    if (record->state != MappingState::unmapping) continue;
    --left;
    record->state = MappingState::stale;
    bytes += record->range.length().value;
    stale.add(*record, slice_ns_);
  }
  slice_.completion(i).bytes.value += bytes;
  SpaceCounters& counters = *space_.counters;
  counters[Count::stale_mappings_peak].raise_to(stale.count());
  counters[Count::stale_bytes_peak].raise_to(stale.bytes());
}

bool BatchExecutor::touches_stale(IovaRange range) noexcept {
  if (!space_.stale || space_.stale->empty()) return false;
  for (MappingRecord* record = space_.index.first_record(range); record != nullptr && record->range.start <= range.last;
       record = MappingIndex::next_record(record))
    if (record->state == MappingState::stale) return true;
  return false;
}

// A stale mapping of exactly this range, memory and access becomes this map's.
bool BatchExecutor::revive(std::uint32_t i, const Operation& operation, ResolvedPiece piece) noexcept {
  if (space_.stale->empty() || operation.placement != Placement::Kind::fixed) return false;
  const auto range = IovaRange::from_length(operation.start, operation.length);
  if (!range) return false;
  MappingRecord* const record = space_.index.exact(*range);
  if (record == nullptr || record->state != MappingState::stale || record->memory != piece.memory ||
      record->region != piece.memory_index || record->access != operation.access ||
      (record->flags & mapping_is_scattered) != 0)
    return false;
  space_.stale->take_out(*record);
  record->state = MappingState::live;
  (*space_.counters)[Count::revived].add();
  Completion& verdict = slice_.completion(i);
  verdict.iova = range->start;
  verdict.bytes = operation.length;
  verdict.mapping = space_.index.rename(record);  // the old name died with its unmap
  return true;
}

void BatchExecutor::flush_stale_if_due(std::uint64_t now_ns) noexcept {
  if (space_.stale->empty()) return;
  if (space_.stale->is_due(now_ns)) {
    (void)flush_stale();
  } else if (!space_.stale_timer_armed && space_.stale_timer != nullptr) {
    space_.stale_timer_armed = true;
    space_.stale_timer->arm();
  }
}

// Carries out every deferred unmap: in address order, those with nothing else mapped in between in one operation.
// Precondition: no phase is pending (its operations lie where these go).
Bytes BatchExecutor::flush_stale() noexcept {
  if (!space_.stale || space_.stale->empty()) {
    if (space_.stale) space_.stale->clear();
    return {};
  }
  auto& members = space_.stale->members();
  std::erase_if(members, [](const StaleSet::Member& member) { return member.record == nullptr; });
  std::sort(members.begin(), members.end(), [](const StaleSet::Member& a, const StaleSet::Member& b) {
    return a.record->range.start < b.record->range.start;
  });
  std::uint64_t removed = 0;
  flushing_stale_ = true;
  for (std::size_t next = 0; next < members.size();) next = flush_stale_part(next, removed);
  flushing_stale_ = false;
  SpaceCounters& counters = *space_.counters;
  counters[Count::flushes].add();
  counters[Count::flushed].add(members.size());
  space_.stale->clear();
  publish_gauges();
  if (space_.memories.has_orphans()) forget_orphans();
  return Bytes{removed};
}

// As many members from `next` on as fill the backend's list of operations; says where to go on.
std::size_t BatchExecutor::flush_stale_part(std::size_t next, std::uint64_t& removed) noexcept {
  auto& members = space_.stale->members();
  const std::size_t first = next;
  std::uint32_t groups = 0;
  MappingRecord* last = nullptr;
  for (; next < members.size(); ++next) {
    MappingRecord* const record = members[next].record;
    if (last != nullptr && MappingIndex::next_record(last) == record && is_worth_joining(last->range, record->range)) {
      ops_[groups - 1].range.last = record->range.last;
      ++group_sizes_[groups - 1];
      (*space_.counters)[Count::merged_unmaps].add();
    } else {
      if (groups == slice_operations_max) break;
      ops_[groups] = {OpKind::unmap, Access::none, {}, record->range, 0};
      group_sizes_[groups++] = 1;
    }
    last = record;
  }
  (*space_.counters)[Count::backend_ops].add(groups);
  space_.backend->execute({ops_.data(), groups}, {results_.data(), groups});
  const std::uint64_t now_ns = monotonic_ns();

  std::size_t member = first;
  for (std::uint32_t g = 0; g < groups; ++g) {
    std::uint64_t expected = 0;
    for (std::uint32_t n = 0; n < group_sizes_[g]; ++n) expected += members[member + n].record->range.length().value;
    const bool whole = !results_[g].error && results_[g].bytes.value == expected;
    for (std::uint32_t n = 0; n < group_sizes_[g]; ++n, ++member) {
      MappingRecord* const record = members[member].record;
      const std::uint64_t length = record->range.length().value;
      bool gone = whole;
      // Each alone, so that everything that can go is gone. Of a flush in which a thread ended, some is gone already.
      if (!whole && (group_sizes_[g] > 1 || recovering_ || may_have_taken_effect(results_[g].error))) {
        (*space_.counters)[Count::retries].add();
        gone = take_out(record->range).ok();
      }
      members[member].record = nullptr;  // done with, should this thread end
      if (!gone) {                       // nobody waits for a verdict any more: quarantine tells
        quarantine(*record);
        continue;
      }
      space_.counters->stale_window.record(now_ns - std::min(now_ns, members[member].since_ns));
      removed += length;
      retire(record);
    }
  }
  return next;
}

}  // namespace iovane::engine
