// Executing a phase: merge its unmaps, give everything to the backend in one call, spread the verdicts.
#include <algorithm>

#include "base/error_text.hpp"
#include "engine/batch_executor.hpp"

namespace iovane::engine {

using backends::BackendOp;
using backends::BackendOpResult;
using backends::OpKind;
using base::fail;

void BatchExecutor::flush() noexcept {
  if (maps_.empty() && unmaps_.empty()) return;
  ops_.clear();
  const std::uint32_t groups = merge_unmaps();
  for (const PendingMap& map : maps_)
    for (std::uint32_t n = 0; n < map.op_count; ++n) ops_.push_back(map_ops_[map.first_op + n]);
  if (!ops_.empty()) {
    space_.stats.backend_ops += ops_.size();
    space_.backend->execute(ops_, {results_.data(), ops_.size()});
  }
  // Maps first: undoing one and retrying unmaps use ops_-independent calls, but read results_, which they leave alone.
  finish_maps({results_.data() + groups, ops_.size() - groups});
  finish_unmaps(groups);
  maps_.clear();
  unmaps_.clear();
  map_ops_.clear();
}

// Sorts the phase's unmaps and joins neighbours with nothing mapped in between; fills ops_ and group_sizes_.
std::uint32_t BatchExecutor::merge_unmaps() noexcept {
  group_sizes_.clear();
  const auto by_start = [](const PendingUnmap& a, const PendingUnmap& b) { return a.span.start < b.span.start; };
  if (!std::is_sorted(unmaps_.begin(), unmaps_.end(), by_start)) std::sort(unmaps_.begin(), unmaps_.end(), by_start);
  MappingRecord* last = nullptr;
  for (const PendingUnmap& unmap : unmaps_) {
    if (last != nullptr) {
      // The next mapping that the backend knows of after the group: maps of this phase are not there yet.
      MappingRecord* following = MappingIndex::next_record(last);
      while (following != nullptr && following->state == MappingState::mapping)
        following = MappingIndex::next_record(following);
      if (following == unmap.first) {
        ops_.back().range.last = unmap.span.last;
        ++group_sizes_.back();
        ++space_.stats.merged_unmaps;
        last = unmap.last;
        continue;
      }
    }
    ops_.push_back({OpKind::unmap, Access::none, {}, unmap.span, 0});
    group_sizes_.push_back(1);
    last = unmap.last;
  }
  return static_cast<std::uint32_t>(group_sizes_.size());
}

void BatchExecutor::finish_unmaps(std::uint32_t groups) noexcept {
  std::size_t next = 0;
  for (std::uint32_t g = 0; g < groups; ++g) {
    const std::span<PendingUnmap> members{unmaps_.data() + next, group_sizes_[g]};
    next += members.size();
    std::uint64_t expected = 0;
    std::uint64_t mappings = 0;
    for (const PendingUnmap& unmap : members) {
      expected += unmap.bytes.value;
      mappings += unmap.mappings;
    }
    Error error = results_[g].error;
    if (!error && results_[g].bytes.value != expected)
      error =
          fail(Errc::io_error, Stage::unmap, 0, "the kernel removed {} bytes of [{:#x}, {:#x}] where {} were mapped",
               results_[g].bytes.value, ops_[g].range.start.value, ops_[g].range.last.value, expected);
    for (PendingUnmap& unmap : members) {
      if (error && mappings > 1)
        retry_one_by_one(unmap);
      else
        finish_unmap(unmap, error);
    }
  }
}

// Every mapping of the unmap shares one verdict: all gone, or (a single mapping whose own unmap failed) quarantined.
void BatchExecutor::finish_unmap(PendingUnmap& unmap, const Error& error) noexcept {
  Completion& verdict = verdicts_[unmap.operation];
  MappingRecord* record = unmap.first;
  for (std::uint32_t left = unmap.mappings; left != 0;) {
    MappingRecord* const following = left > 1 ? MappingIndex::next_record(record) : nullptr;
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
    verdict.error = error;
  else
    verdict.bytes.value += unmap.bytes.value;
}

void BatchExecutor::retry_one_by_one(PendingUnmap& unmap) noexcept {
  Completion& verdict = verdicts_[unmap.operation];
  MappingRecord* record = unmap.first;
  for (std::uint32_t left = unmap.mappings; left != 0;) {
    MappingRecord* const following = left > 1 ? MappingIndex::next_record(record) : nullptr;
    if (record->state == MappingState::unmapping) {
      --left;
      ++space_.stats.retries;
      const std::uint64_t length = record->range.length().value;
      const BackendOpResult result = execute_one({OpKind::unmap, Access::none, {}, record->range, 0});
      // not_found: the failed call had removed this one before it stopped.
      if (!result.error || result.error.code == Errc::not_found) {
        verdict.bytes.value += length;
        retire(record);
      } else {
        if (!verdict.error) verdict.error = result.error;
        quarantine(*record);
      }
    }
    record = following;
  }
}

void BatchExecutor::finish_maps(std::span<const BackendOpResult> results) noexcept {
  std::size_t next = 0;
  for (const PendingMap& map : maps_) {
    const auto own = results.subspan(next, map.op_count);
    next += map.op_count;
    if (map.op_count == 0) {  // cancelled: complete, and gone again
      verdicts_[map.operation].mapping = {};
      continue;
    }
    const auto failed = std::find_if(own.begin(), own.end(), [](const auto& r) { return !r.error.ok(); });
    if (failed == own.end()) {
      map.record->state = MappingState::live;
      continue;
    }
    Completion& verdict = verdicts_[map.operation];
    verdict.error = failed->error;
    verdict.bytes = {};
    verdict.mapping = {};
    undo_map(map, own);
  }
}

// Some pieces of a scatter list are mapped, others failed: takes the mapped ones out again.
void BatchExecutor::undo_map(const PendingMap& map, std::span<const BackendOpResult> results) noexcept {
  bool all_gone = true;
  for (std::uint32_t n = 0; n < map.op_count; ++n) {
    if (results[n].error) continue;
    const IovaRange range = map_ops_[map.first_op + n].range;
    if (execute_one({OpKind::unmap, Access::none, {}, range, 0}).error) all_gone = false;
  }
  if (all_gone)
    retire(map.record);
  else
    quarantine(*map.record);
}

BackendOpResult BatchExecutor::execute_one(const BackendOp& op) noexcept {
  BackendOpResult result;
  ++space_.stats.backend_ops;
  space_.backend->execute({&op, 1}, {&result, 1});
  return result;
}

// One call where that works; otherwise one by one, so that everything that can go is gone and the rest is quarantined.
Result<Bytes> BatchExecutor::unmap_all() noexcept {
  const Result<Bytes> all = space_.backend->unmap_all();
  std::uint64_t removed = 0;
  Error first{};
  for (MappingRecord* record = space_.index.first_record(IovaRange::everything()); record != nullptr;) {
    MappingRecord* const following = MappingIndex::next_record(record);
    const bool was_quarantined = record->state == MappingState::quarantined;
    Error error{};
    if (!all) error = execute_one({OpKind::unmap, Access::none, {}, record->range, 0}).error;
    if (error && error.code != Errc::not_found) {
      if (!first) first = error;
      if (!was_quarantined) quarantine(*record);
    } else {
      if (was_quarantined) {
        --space_.stats.quarantined_mappings;
        space_.stats.quarantined_bytes.value -= record->range.length().value;
      }
      removed += record->range.length().value;
      retire(record);
    }
    record = following;
  }
  if (first) return first;
  return Bytes{removed};
}

// The last steps of an unmap, in the contract's order: the pin, then the IOVA, which may be handed out from here on.
void BatchExecutor::retire(MappingRecord* record) noexcept {
  const IovaRange range = record->range;
  const std::uint32_t memory_index = record->region;
  space_.index.erase(record);
  drop_memory(memory_index);
  release(range);
}

void BatchExecutor::quarantine(MappingRecord& record) noexcept {
  record.state = MappingState::quarantined;
  ++space_.stats.quarantined_mappings;
  space_.stats.quarantined_bytes.value += record.range.length().value;
}

void BatchExecutor::release(IovaRange range) noexcept {
  // The allocator refuses only what it never handed out, and then there is nothing to give back.
  if (space_.allocator) (void)space_.allocator->free(range);
}

void BatchExecutor::drop_memory(std::uint32_t memory_index) noexcept {
  if (memory_index == 0) return;
  MemoryTable::Entry& entry = space_.memories.at(memory_index - 1);
  if (--entry.mappings != 0 || entry.owned) return;
  // Its Memory object is gone already; this was the last mapping. A refusal keeps the pin until the space closes.
  if (space_.backend->unregister_memory(entry.region)) space_.memories.forget(memory_index - 1);
}

}  // namespace iovane::engine
