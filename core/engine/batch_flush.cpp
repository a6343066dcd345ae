// Executing a phase: merge its unmaps, give everything to the backend in one call, spread the verdicts.
#include <algorithm>
#include <cerrno>

#include "base/error_text.hpp"
#include "engine/batch_executor.hpp"

namespace iovane::engine {

using backends::BackendOp;
using backends::BackendOpResult;
using backends::OpKind;
using base::fail;

namespace {

[[gnu::cold, gnu::noinline]] Error wrong_count(IovaRange range, Bytes removed, Bytes expected) noexcept {
  return fail(Errc::io_error, Stage::unmap, 0, "the kernel removed {} bytes of [{:#x}, {:#x}] where {} were mapped",
              removed.value, range.start.value, range.last.value, expected.value);
}

bool is_shortage(Errc code) noexcept {
  return code == Errc::memlock_exceeded || code == Errc::entry_limit || code == Errc::out_of_memory;
}

}  // namespace

bool BatchExecutor::may_have_taken_effect(const Error& error) noexcept { return error.os_errno == EFAULT; }

void BatchExecutor::flush() noexcept {
  if (map_count_ + unmap_count_ == 0) return;
  if (maps_cancelled_) drop_cancelled_maps();
  groups_ = merge_unmaps();
  const std::uint32_t count = groups_ + map_op_count_;
  if (count != 0) {
    (*space_.counters)[Count::backend_ops].add(count);
    step_ = Step::executing;
    space_.backend->execute({&ops_[maps_begin - groups_], count}, {&results_[maps_begin - groups_], count});
    step_ = Step::none;
  }
  // Undoing a map and retrying unmaps execute operations of their own and leave ops_ and results_ alone.
  finish_maps(0);
  finish_unmaps(groups_);
  end_phase();
}

void BatchExecutor::end_phase() noexcept {
  map_count_ = map_op_count_ = unmap_count_ = 0;
  unmaps_sorted_ = true;
  maps_cancelled_ = false;
}

// Closes the gaps that cancelled maps left in ops_.
void BatchExecutor::drop_cancelled_maps() noexcept {
  std::uint32_t kept = 0;
  for (std::uint32_t m = 0; m < map_count_; ++m) {
    PendingMap& map = maps_[m];
    for (std::uint32_t n = 0; n < map.op_count; ++n) ops_[maps_begin + kept + n] = ops_[maps_begin + map.first_op + n];
    map.first_op = kept;
    kept += map.op_count;
  }
  map_op_count_ = kept;
}

// Sorts the phase's unmaps and joins neighbours with nothing mapped in between, and not too much of it; fills ops_ up
// to maps_begin, and group_sizes_, and says how many there are.
std::uint32_t BatchExecutor::merge_unmaps() noexcept {
  if (unmap_count_ == 0) return 0;
  const std::span<PendingUnmap> unmaps{unmaps_.data(), unmap_count_};
  if (!unmaps_sorted_)
    std::sort(unmaps.begin(), unmaps.end(),
              [](const PendingUnmap& a, const PendingUnmap& b) { return a.span.start < b.span.start; });
  // From the highest down, so that the operations end at maps_begin whatever their number.
  std::uint32_t groups = 0;
  const MappingRecord* above = nullptr;  // the first mapping of the group so far
  for (std::size_t u = unmaps.size(); u-- != 0;) {
    const PendingUnmap& unmap = unmaps[u];
    if (above != nullptr && is_worth_joining(unmap.span, above->range)) {
      // The next mapping that the backend knows of: maps of this phase are not there yet.
      MappingRecord* following = MappingIndex::next_record(unmap.last);
      while (following != nullptr && following->state == MappingState::mapping)
        following = MappingIndex::next_record(following);
      if (following == above) {
        ops_[maps_begin - groups].range.start = unmap.span.start;
        ++group_sizes_[groups - 1];
        (*space_.counters)[Count::merged_unmaps].add();
        above = unmap.first;
        continue;
      }
    }
    group_sizes_[groups++] = 1;
    ops_[maps_begin - groups] = {OpKind::unmap, Access::none, {}, unmap.span, 0};
    above = unmap.first;
  }
  return groups;
}

void BatchExecutor::finish_unmaps(std::uint32_t groups) noexcept {
  PendingUnmap* next = unmaps_.data();
  for (std::uint32_t g = groups; g-- != 0;) {  // group_sizes_ counts from the highest
    const BackendOpResult& result = results_[maps_begin - 1 - g];
    const std::span<PendingUnmap> members{next, group_sizes_[g]};
    next += members.size();
    std::uint64_t expected = 0;
    std::uint64_t mappings = 0;
    for (const PendingUnmap& unmap : members) {
      expected += unmap.bytes.value;
      mappings += unmap.mappings;
    }
    Error error = result.error;
    if (!error && result.bytes.value != expected) [[unlikely]]
      error = wrong_count(ops_[maps_begin - 1 - g].range, result.bytes, Bytes{expected});
    for (PendingUnmap& unmap : members) {
      if (!error && unmap.mappings == 1) [[likely]] {
        slice_.completion(unmap.operation).bytes.value += unmap.bytes.value;
        retire(unmap.first);
      } else if (error && (mappings > 1 || may_have_taken_effect(error))) {
        cursor_ = static_cast<std::uint32_t>(&unmap - unmaps_.data());
        retry_one_by_one(unmap);
      } else {
        finish_unmap(unmap, error);
      }
    }
  }
}

// Every mapping of the unmap shares one verdict: all gone, or (a single mapping whose own unmap failed) quarantined.
void BatchExecutor::finish_unmap(PendingUnmap& unmap, const Error& error) noexcept {
  MappingRecord* record = unmap.first;
  for (std::uint32_t left = unmap.mappings; left != 0;) {
    MappingRecord* const following = MappingIndex::next_record(record);
    if (record->state == MappingState::unmapping) {
      if (error)
        quarantine(*record);
      else
        retire(record);
      --left;
    }
    record = following;
  }
  if (error)
    refuse(unmap.operation, error);
  else
    slice_.completion(unmap.operation).bytes.value += unmap.bytes.value;
}

// Keeps in `unmap` what is still to be done, should this thread end.
void BatchExecutor::retry_one_by_one(PendingUnmap& unmap) noexcept {
  Completion& verdict = slice_.completion(unmap.operation);
  step_ = Step::unmapping;
  while (unmap.mappings != 0) {
    MappingRecord* const record = unmap.first;
    MappingRecord* const following = MappingIndex::next_record(record);
    if (record->state == MappingState::unmapping) {
      (*space_.counters)[Count::retries].add();
      const std::uint64_t length = record->range.length().value;
      // Not finding it is success: the failed call had removed this one before it stopped.
      if (const Error error = take_out(record->range)) {
        refuse(unmap.operation, error);
        quarantine(*record);
      } else {
        verdict.bytes.value += length;
        retire(record);
      }
      --unmap.mappings;
    }
    unmap.first = following;
  }
  step_ = Step::none;
}

void BatchExecutor::finish_maps(std::uint32_t m) noexcept {
  for (; m < map_count_; ++m) {
    const PendingMap& map = maps_[m];
    const std::span<const BackendOpResult> own{&results_[maps_begin + map.first_op], map.op_count};
    if (own.size() == 1 && own[0].error.ok()) [[likely]]
      map.record->state = MappingState::live;
    else if (own.empty())  // cancelled: complete, and gone again
      slice_.completion(map.operation).mapping = {};
    else if (std::all_of(own.begin(), own.end(), [](const auto& r) { return r.error.ok(); }))
      map.record->state = MappingState::live;
    else
      cursor_ = m, fail_map(map);
  }
}

// Takes a failed map out again, unless deferred unmaps held what it lacked.
void BatchExecutor::fail_map(const PendingMap& map) noexcept {
  const BackendOpResult* const results = &results_[maps_begin + map.first_op];
  const auto refusal = [&] {
    return std::find_if(results, results + map.op_count, [](const auto& r) { return !r.error.ok(); })->error;
  };
  step_ = Step::mapping;
  Error error = refusal();
  bool all_gone = undo_map(map);
  const bool made_room = all_gone && is_shortage(error.code) && space_.stale && !space_.stale->empty();
  if (made_room) (void)flush_stale();
  if (made_room || (all_gone && recovering_)) {
    if (map_again(map)) {
      map.record->state = MappingState::live;
      step_ = Step::none;
      return;
    }
    error = refusal();
    all_gone = undo_map(map);
  }
  step_ = Step::none;
  Completion& verdict = slice_.completion(map.operation);
  verdict.bytes = {};
  verdict.mapping = {};
  refuse(map.operation, error);
  if (all_gone)
    retire(map.record);
  else
    quarantine(*map.record);
}

// Unmaps what may stand of a failed map: the other pieces of a scatter list, and a piece that failed with its mapping
// made. False when one would not go. The index says that nothing else of ours lies there.
bool BatchExecutor::undo_map(const PendingMap& map) noexcept {
  bool all_gone = true;
  for (std::uint32_t n = map.first_op; n < map.first_op + map.op_count; ++n)
    if (!clear_of(results_[maps_begin + n], ops_[maps_begin + n].range)) all_gone = false;
  return all_gone;
}

// Makes sure that nothing stands of a map that ended so and is not wanted; false when it would not go.
bool BatchExecutor::clear_of(const BackendOpResult& mapped, IovaRange range) noexcept {
  if (mapped.error && !may_have_taken_effect(mapped.error)) return true;
  return take_out(range).ok();
}

// Unmaps what may be mapped at `range`, which may be nothing.
Error BatchExecutor::take_out(IovaRange range) noexcept {
  Error error = execute_one({OpKind::unmap, Access::none, {}, range, 0}).error;
  if (may_have_taken_effect(error)) error = execute_one({OpKind::unmap, Access::none, {}, range, 0}).error;
  return error.code == Errc::not_found ? Error{} : error;
}

bool BatchExecutor::map_again(const PendingMap& map) noexcept {
  bool all_mapped = true;
  for (std::uint32_t n = map.first_op; n < map.first_op + map.op_count; ++n) {
    results_[maps_begin + n] = execute_one(ops_[maps_begin + n]);
    if (results_[maps_begin + n].error) all_mapped = false;
  }
  return all_mapped;
}

BackendOpResult BatchExecutor::execute_one(const BackendOp& op) noexcept {
  BackendOpResult result;
  (*space_.counters)[Count::backend_ops].add();
  space_.backend->execute({&op, 1}, {&result, 1});
  return result;
}

// One call where that works; otherwise one by one, so that everything that can go is gone and the rest is quarantined.
Error BatchExecutor::unmap_all(Bytes& removed) noexcept {
  const Result<Bytes> all = space_.backend->unmap_all();
  removed = {};
  Error first{};
  for (MappingRecord* record = space_.index.first_record(IovaRange::everything()); record != nullptr;) {
    MappingRecord* const following = MappingIndex::next_record(record);
    const bool was_quarantined = record->state == MappingState::quarantined;
    Error error{};
    if (!all) error = take_out(record->range);
    if (error) {
      if (!first) first = error;
      if (!was_quarantined) quarantine(*record);
    } else {
      if (was_quarantined) {
        (*space_.counters)[Count::quarantined_mappings].subtract();
        (*space_.counters)[Count::quarantined_bytes].subtract(record->range.length().value);
      }
      if (record->state != MappingState::stale) removed.value += record->range.length().value;
      retire(record);
    }
    record = following;
  }
  if (space_.stale) space_.stale->clear();
  publish_gauges();
  forget_orphans();
  return first;
}

void BatchExecutor::quarantine(MappingRecord& record) noexcept {
  record.state = MappingState::quarantined;
  (*space_.counters)[Count::quarantined_mappings].add();
  (*space_.counters)[Count::quarantined_bytes].add(record.range.length().value);
}

// A refusal keeps the pin until the space closes.
void BatchExecutor::forget_orphans() noexcept {
  while (space_.memories.has_orphans()) {
    const std::uint32_t index = space_.memories.take_orphan();
    const MemoryTable::Entry& entry = space_.memories.at(index);
    if (entry.used && !entry.owned && entry.mappings == 0 && space_.backend->unregister_memory(entry.region))
      space_.memories.forget(index);
  }
}

}  // namespace iovane::engine
