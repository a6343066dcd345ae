// Reading dirty pages: mapping by mapping, in turns that are short enough for batches to run in between.
#include <algorithm>
#include <new>

#include "base/checked_math.hpp"
#include "base/error_text.hpp"
#include "base/fault_point.hpp"
#include "engine/space_core.hpp"

namespace iovane::engine {

using base::fail;

namespace {

// One turn at the lane: this many backend calls, or this many bytes (more only where one mapping is larger and the
// kernel reads whole mappings).
constexpr int turn_runs_max = 32;
constexpr std::uint64_t turn_bytes_max = 1ULL << 30;

}  // namespace

Result<void> SpaceCore::start_dirty_tracking() {
  const LaneHold held{lane_};
  if (state_.closed) return closed_error();
  if (!dirty_) {
    if (base::fault_now(base::FaultKind::allocation))
      return make_error(Errc::out_of_memory, Stage::query, "no memory to keep dirty pages");
    try {
      dirty_ = std::make_unique<DirtyLog>(state_, config_.dirty_runs_max);
    } catch (const std::bad_alloc&) {
      return make_error(Errc::out_of_memory, Stage::query, "no memory to keep dirty pages");
    }
  }
  const auto started = state_.backend->start_dirty_tracking(*dirty_);
  if (!started) return started;
  dirty_->clear();
  dirty_->stats.tracking = true;
  return {};
}

Result<void> SpaceCore::stop_dirty_tracking() {
  const LaneHold held{lane_};
  if (state_.closed) return closed_error();
  if (!dirty_ || !dirty_->stats.tracking)
    return make_error(Errc::invalid_argument, Stage::query, "dirty tracking has not been started");
  dirty_->clear();
  dirty_->stats.tracking = false;
  return state_.backend->stop_dirty_tracking();
}

// The first run of mappings in `rest` that one call can read; it may begin before `rest` where mappings must be read
// whole.
std::optional<IovaRange> SpaceCore::next_dirty_run(const IovaRange& rest, bool& quarantined) noexcept {
  const bool whole = state_.backend->facts().dirty_reads_whole_mappings;
  MappingRecord* record = state_.index.first_record(rest);
  while (record != nullptr && record->state == MappingState::mapping) record = MappingIndex::next_record(record);
  if (record == nullptr || record->range.start > rest.last) return std::nullopt;
  IovaRange run = record->range;
  quarantined = record->state == MappingState::quarantined;
  if (!whole) run.start = std::max(run.start, rest.start);
  for (MappingRecord* next = MappingIndex::next_record(record); next != nullptr;
       next = MappingIndex::next_record(next)) {
    if (next->range.start > rest.last || !run.precedes_directly(next->range)) break;
    if (next->state == MappingState::mapping || (next->state == MappingState::quarantined) != quarantined) break;
    if (next->range.last.value - run.start.value >= turn_bytes_max) break;
    run.last = next->range.last;
  }
  if (!whole)
    run.last = std::min({run.last, rest.last, Iova{run.start.value + std::min(run.span(), turn_bytes_max - 1)}});
  return run;
}

// One turn. The lane is held.
Error SpaceCore::read_dirty_runs(IovaRange& rest, DirtyBitmap& bitmap, std::vector<std::uint64_t>& words, bool& more) {
  const std::uint64_t granule = state_.granule.value;
  Error first{};
  std::uint64_t bytes = 0;
  for (int runs = 0; runs < turn_runs_max && bytes < turn_bytes_max; ++runs) {
    bool quarantined = false;
    const auto run = next_dirty_run(rest, quarantined);
    if (!run) {
      more = false;
      return first;
    }
    const std::uint64_t count = backends::bitmap_words(*run, state_.granule);
    if (words.size() < count) words.resize(count);
    std::fill_n(words.begin(), count, 0);
    const std::span<std::uint64_t> used{words.data(), count};
    const auto read = state_.backend->read_dirty(*run, used);
    if (read) {
      for_each_set_run(used, run->span() / granule + 1, [&](std::uint64_t bit, std::uint64_t length) {
        const Iova start{run->start.value + bit * granule};
        dirty_->stats.pages_read += length;
        bitmap.mark({start, Iova{start.value + (length * granule - 1)}});
      });
      // Where mappings are read whole, marks outside the range asked for are dropped here: such a kernel names every
      // mapped page again in the next read.
    } else {
      // A quarantined mapping may be half gone, which the kernel refuses to read.
      ++dirty_->stats.guessed;
      bitmap.mark(*run);
      if (!quarantined && !first) first = read.error();
    }
    bytes += run->span();
    if (run->last >= rest.last) {
      more = false;
      return first;
    }
    rest.start = Iova{run->last.value + 1};
  }
  return first;
}

Result<std::uint64_t> SpaceCore::read_dirty(const IovaRange& range, Bytes page_size, std::span<std::uint64_t> words) {
  const std::uint64_t page = page_size.value;
  if (!base::is_power_of_two(page) || !range.well_formed() || range == IovaRange::everything() ||
      ((range.start.value | (range.span() + 1)) & (page - 1)) != 0)
    return fail(
        Errc::invalid_argument, Stage::validate, 0,
        "[{:#x}, {:#x}] cannot be read in pages of {}: that must be a power of two that divides start and length",
        range.start.value, range.last.value, page);
  if (words.size() < backends::bitmap_words(range, page_size))
    return fail(Errc::invalid_argument, Stage::validate, 0, "the bitmap has {} words, [{:#x}, {:#x}] needs {}",
                words.size(), range.start.value, range.last.value, backends::bitmap_words(range, page_size));
  DirtyBitmap bitmap{range, page, words, 0};
  std::vector<std::uint64_t> scratch;
  Error first{};
  IovaRange rest = range;
  try {
    for (bool more = true; more;) {  // each turn passes at least one mapping
      const LaneHold held{lane_};
      if (state_.closed) return closed_error();
      if (!dirty_ || !dirty_->stats.tracking)
        return make_error(Errc::invalid_argument, Stage::query, "dirty tracking has not been started");
      if (page < state_.granule.value)
        return fail(Errc::invalid_argument, Stage::validate, 0, "a page of {} bytes is smaller than the granule of {}",
                    page, state_.granule.value);
      const Error error = read_dirty_runs(rest, bitmap, scratch, more);
      if (!first) first = error;
      // Last, so that what was unmapped between two turns is found here.
      if (!more) dirty_->read(bitmap);
    }
  } catch (const std::bad_alloc&) {
    return make_error(Errc::out_of_memory, Stage::query, "no memory to read dirty pages; what was not read is kept");
  }
  if (first) return first;
  return bitmap.fresh;
}

std::size_t SpaceCore::take_unmapped_dirty(std::span<DirtyRun> out) noexcept {
  const LaneHold held{lane_};
  return dirty_ ? dirty_->take_runs(out) : 0;
}

DirtyStats SpaceCore::dirty_stats() noexcept {
  const LaneHold held{lane_};
  return dirty_ ? dirty_->snapshot() : DirtyStats{};
}

}  // namespace iovane::engine
