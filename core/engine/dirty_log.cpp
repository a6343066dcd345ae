#include "engine/dirty_log.hpp"

#include <algorithm>
#include <bit>
#include <new>

#include "base/fault_point.hpp"

namespace iovane::engine {
namespace {

// Runs that the backend reads or unmaps in one call: at 4 KiB a bitmap of 32 KiB.
constexpr std::uint64_t run_bytes_max = 1ULL << 30;

/// True when `next` goes on where `last` stops, in the address space and in memory.
bool continues(const DirtyRun& last, const DirtyRun& next) noexcept {
  if (!last.range.precedes_directly(next.range) || last.memory.memory != next.memory.memory) return false;
  if ((last.memory.length.value == 0) != (next.memory.length.value == 0)) return false;
  return last.memory.length.value == 0 || last.memory.offset + last.memory.length.value == next.memory.offset;
}

/// The part of `run` that lies in `range`, which overlaps it.
DirtyRun part_of(const DirtyRun& run, const IovaRange& range) noexcept {
  DirtyRun part{*run.range.intersection(range), run.memory};
  if (part.memory.length.value != 0) {
    part.memory.offset += part.range.start.value - run.range.start.value;
    part.memory.length = part.range.length();
  }
  return part;
}

}  // namespace

void DirtyBitmap::mark(const IovaRange& written) noexcept {
  const auto inside = written.intersection(range);
  if (!inside) return;
  const std::uint64_t last = (inside->last.value - range.start.value) / page_bytes;
  for (std::uint64_t bit = (inside->start.value - range.start.value) / page_bytes; bit <= last;) {
    // The bits of one word at a time.
    const std::uint64_t low = bit % 64;
    const std::uint64_t count = std::min(64 - low, last - bit + 1);
    const std::uint64_t mask = (count == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1) << low;
    fresh += static_cast<std::uint64_t>(std::popcount(mask & ~words[bit / 64]));
    words[bit / 64] |= mask;
    bit += count;
  }
}

// A mapping whose map has not been given to the backend yet is a hole.
std::optional<IovaRange> DirtyLog::mapped_run(const IovaRange& range) noexcept {
  const auto mapped = [&](const MappingRecord* r) {
    return r->range.start >= range.start && r->state != MappingState::mapping;
  };
  MappingRecord* record = space_.index.first_record(range);
  while (record != nullptr && !mapped(record)) record = MappingIndex::next_record(record);
  if (record == nullptr || record->range.start > range.last) return std::nullopt;
  IovaRange run = record->range;
  for (record = MappingIndex::next_record(record); record != nullptr && mapped(record);
       record = MappingIndex::next_record(record)) {
    if (!run.precedes_directly(record->range) || record->range.start > range.last) break;
    if (record->range.last.value - run.start.value >= run_bytes_max) break;
    run.last = record->range.last;
  }
  return run;
}

void DirtyLog::take(const IovaRange& range, std::span<const std::uint64_t> bitmap) noexcept {
  const std::uint64_t granule = space_.granule.value;
  for_each_set_run(bitmap, range.span() / granule + 1, [&](std::uint64_t first, std::uint64_t count) {
    const Iova start{range.start.value + first * granule};
    add({start, Iova{start.value + (count * granule - 1)}});
  });
}

void DirtyLog::take_all(const IovaRange& range) noexcept {
  ++stats.guessed;
  add(range);
}

// Cuts the pages at the borders of their mappings, because each has memory of its own.
void DirtyLog::add(IovaRange range) noexcept {
  for (MappingRecord* record = space_.index.first_record(range); record != nullptr && record->range.start <= range.last;
       record = MappingIndex::next_record(record)) {
    DirtyRun whole{record->range, {}};
    if ((record->flags & mapping_is_scattered) == 0) {
      whole.memory.memory = record->region != 0 ? space_.memories.id_of(record->region - 1) : MemoryId{};
      whole.memory.offset = record->memory;
      whole.memory.length = record->range.length();
    }
    append(part_of(whole, range));
  }
}

void DirtyLog::append(const DirtyRun& run) noexcept {
  if (!runs_.empty() && continues(runs_.back(), run)) {
    DirtyRun& last = runs_.back();
    last.range.last = run.range.last;
    if (last.memory.length.value != 0) last.memory.length.value += run.memory.length.value;
    return;
  }
  if (runs_.size() < runs_max_ && !base::fault_now(base::FaultKind::allocation)) {
    try {
      runs_.push_back(run);
      return;
    } catch (const std::bad_alloc&) {
      // spilled below
    }
  }
  spill(run.range);
}

void DirtyLog::spill(const IovaRange& range) noexcept {
  ++stats.runs_dropped;
  if (!spilled_)
    spilled_ = range;
  else
    spilled_ = IovaRange{std::min(spilled_->start, range.start), std::max(spilled_->last, range.last)};
}

void DirtyLog::read(DirtyBitmap& bitmap) noexcept {
  const IovaRange range = bitmap.range;
  std::vector<DirtyRun> right_parts;  // of runs that keep a part on either side: one place more than they had
  std::size_t kept = 0;
  for (std::size_t i = 0; i < runs_.size(); ++i) {
    const DirtyRun run = runs_[i];
    if (!run.range.overlaps(range)) {
      runs_[kept++] = run;
      continue;
    }
    bitmap.mark(run.range);
    const bool left = run.range.start < range.start;
    if (left) runs_[kept++] = part_of(run, {run.range.start, Iova{range.start.value - 1}});
    if (run.range.last <= range.last) continue;
    const DirtyRun rest = part_of(run, {Iova{range.last.value + 1}, run.range.last});
    if (!left) {
      runs_[kept++] = rest;
      continue;
    }
    try {
      right_parts.push_back(rest);
    } catch (const std::bad_alloc&) {
      spill(rest.range);
    }
  }
  runs_.resize(kept);
  for (const DirtyRun& rest : right_parts) append(rest);
  if (spilled_ && spilled_->overlaps(range)) {
    bitmap.mark(*spilled_);
    // A hole in the middle cannot be remembered: then all of it stays.
    const bool left = spilled_->start < range.start;
    const bool right = spilled_->last > range.last;
    if (!left && !right)
      spilled_.reset();
    else if (!left)
      spilled_->start = Iova{range.last.value + 1};
    else if (!right)
      spilled_->last = Iova{range.start.value - 1};
  }
}

std::size_t DirtyLog::take_runs(std::span<DirtyRun> out) noexcept {
  const std::size_t count = std::min(out.size(), runs_.size());
  std::copy_n(runs_.begin(), count, out.begin());
  runs_.erase(runs_.begin(), runs_.begin() + static_cast<std::ptrdiff_t>(count));
  if (count < out.size() && spilled_) {
    out[count] = {*spilled_, {}};
    spilled_.reset();
    return count + 1;
  }
  return count;
}

void DirtyLog::clear() noexcept {
  runs_.clear();
  spilled_.reset();
}

}  // namespace iovane::engine
