// Looking: ownership, iteration, statistics. And the change of the usable windows.
#include <algorithm>

#include "base/yield_point.hpp"
#include "iova/allocator_core.hpp"

namespace iovane::iova {

std::optional<UnitRange> AllocatorCore::find(Unit unit) noexcept {
  // relaxed: a hint; the run is checked.
  const std::uint32_t hint = blocks_[block_index(unit)].load(std::memory_order_relaxed);
  if (hint != 0) [[likely]] {
    const Run& run = *arena_.at<Run>(hint & ((ObjectId{1} << block_id_bits) - 1));
    __builtin_prefetch(&run.slot(static_cast<unsigned>(unit >> (hint >> block_id_bits)) % Run::slots_max));
    const RunShape shape = RunShape::load(run);
    if (shape.valid() && shape.range().contains(unit)) {
      const unsigned index = shape.slot_of(unit);
      // R.slot - acquire: linearization of a find by hint. An unchanged generation proves that slot and shape belong
      // together.
      const SlotWord word{run.slot(index).load(std::memory_order_acquire)};
      if (word.state() == SlotState::live && shape.unchanged(run)) return shape.slot_range(index);
    }
  }
  ThreadCache* const me = my_cache();
  if (me == nullptr) return std::nullopt;
  MapSection section{map_, *me};
  Run* const run = locate(section, unit);
  if (run == nullptr) return std::nullopt;
  const RunShape shape = RunShape::load(*run);
  note_block(unit, arena_.id_of(run), shape.length);
  const unsigned index = shape.slot_of(unit);
  // R.slot - acquire: linearization of a find by the map.
  const SlotWord word{run->slot(index).load(std::memory_order_acquire)};
  if (word.state() != SlotState::live) return std::nullopt;
  return shape.slot_range(index);
}

std::optional<UnitRange> AllocatorCore::next_live(Unit unit) noexcept {
  ThreadCache* const me = my_cache();
  if (me == nullptr) return std::nullopt;
  MapSection section{map_, *me};
  const TreeView tree = section.tree();
  for (;;) {  // at most one turn per segment of this version
    const Segment there = tree.find(unit);
    if (there.value.is_run()) {
      const Run& run = *arena_.at<Run>(there.value.run_id());
      const RunShape shape = RunShape::load(run);
      const unsigned last_index = shape.slot_of(there.range.last);
      for (unsigned i = shape.slot_of(unit); i <= last_index; ++i) {
        // R.slot - acquire: linearization of one step of an iteration.
        if (SlotWord{run.slot(i).load(std::memory_order_acquire)}.state() == SlotState::live)
          return shape.slot_range(i);
      }
    }
    if (there.range.last == tree.last()) return std::nullopt;
    unit = there.range.last + 1;
  }
}

std::vector<UnitRange> AllocatorCore::usable() noexcept {
  ThreadCache* const me = my_cache();
  if (me == nullptr) return {};
  MapSection section{map_, *me};
  const auto windows = section.windows();
  return {windows.begin(), windows.end()};
}

CoreStats AllocatorCore::stats() noexcept {
  CoreStats s{};
  std::int64_t intervals = 0;
  std::int64_t units = 0;
  // R.cache - acquire, pairs with W.cache.
  const std::uint32_t known = std::min(cache_count_.load(std::memory_order_acquire), threads_max);
  for (std::uint32_t i = 0; i < known; ++i) {
    const ThreadCache* cache = caches_[i].load(std::memory_order_acquire);
    if (cache == nullptr) continue;
    // relaxed: counters of one moment or another.
    intervals += cache->other_intervals.load(std::memory_order_relaxed);
    units += cache->other_units.load(std::memory_order_relaxed);
    for (const auto& place : cache->magazines) {
      // R.magazine - acquire, pairs with W.magazine.
      const Magazine* magazine = place.load(std::memory_order_acquire);
      const std::int64_t net = magazine->intake.load(std::memory_order_relaxed) - magazine->size();
      intervals += net;
      units += net * static_cast<std::int64_t>(magazine->length.load(std::memory_order_relaxed) >> granule_log2_);
    }
  }
  s.live_intervals = static_cast<std::uint64_t>(std::max<std::int64_t>(intervals, 0));
  s.live_units = static_cast<std::uint64_t>(std::max<std::int64_t>(units, 0));
  // relaxed: a statistic.
  const std::uint64_t owned = run_units_.load(std::memory_order_relaxed);
  s.idle_units = owned > s.live_units ? owned - s.live_units : 0;
  s.metadata_bytes = arena_.bytes_in_use();
  s.metadata_high_water = arena_.bytes_high_water();
  ThreadCache* const me = my_cache();
  if (me == nullptr) return s;
  MapSection section{map_, *me};
  for (const UnitRange& window : section.windows()) s.usable_units += window.count();
  const TreeView tree = section.tree();
  // Free and hole segments are maximal, so few lie before the first and behind the last run: at most two per window.
  for (Unit unit = 0; run_units_.load(std::memory_order_relaxed) != 0;) {
    const Segment there = tree.find(unit);
    if (there.value.is_run()) {
      s.span = there.range;
      break;
    }
    if (there.range.last == tree.last()) break;
    unit = there.range.last + 1;
  }
  for (Unit unit = tree.last(); s.span;) {
    const Segment there = tree.find(unit);
    if (there.value.is_run()) {
      s.span->last = there.range.last;
      break;
    }
    unit = there.range.first - 1;
  }
  return s;
}

// Makes the part of `range` that is of kind `from` be `to`.
void AllocatorCore::convert(ThreadCache& me, UnitRange range, SegmentValue from, SegmentValue to) noexcept {
  MapSection section{map_, me};
  for (Unit unit = range.first;;) {
    const Segment there = section.tree().find(unit);
    const UnitRange common = there.range.intersection(range);
    if (there.value == from) {
      TreeEdit edit = section.edit(true);
      if (!edit.put(common, to)) {
        edit.abandon();
        return;
      }
      const auto result = section.commit(edit);
      if (result == ExtentMap::Commit::no_memory) return;
      section.renew();
      if (result == ExtentMap::Commit::conflict) continue;
    }
    if (common.last == range.last) return;
    unit = common.last + 1;
  }
}

// The windows change first, so that whatever goes back to the map from then on becomes free or a hole by the new ones.
// Then what is free outside becomes a hole and the reverse, and last the runs that reach outside are doomed: their idle
// slots leave now, their live ones when they are freed.
Answer AllocatorCore::set_usable(std::span<const UnitRange> windows, std::vector<UnitRange>& stranded) {
  const std::lock_guard lock{control_};
  ThreadCache* const me = my_cache();
  if (me == nullptr) return {Outcome::too_many_threads};
  const ObjectId list_id = arena_.allocate(ObjectKind::window_list, sizeof(WindowList), true);
  if (list_id == 0) return {Outcome::no_memory};
  auto& list = *arena_.at<WindowList>(list_id);
  list.kind = ObjectKind::window_list;
  list.bytes = sizeof(WindowList);
  list.count = static_cast<std::uint32_t>(windows.size());
  std::copy(windows.begin(), windows.end(), list.window);
  {
    MapSection section{map_, *me};
    for (;;) {
      list.birth = section.version() + 1;
      TreeEdit edit = section.edit(true);
      const auto result = section.commit(edit, list_id);
      if (result == ExtentMap::Commit::done) break;
      if (result == ExtentMap::Commit::no_memory) {
        arena_.release(ObjectKind::window_list, sizeof(WindowList), list_id);
        return {Outcome::no_memory};
      }
      section.renew();
    }
  }
  std::uint64_t units = 0;
  for (const UnitRange& window : windows) units += window.count();
  // relaxed: bounds what is hoarded, which need not follow at once.
  usable_units_.store(units, std::memory_order_relaxed);
  // The complement of the windows.
  std::vector<UnitRange> outside;
  Unit next = 0;
  for (const UnitRange& window : windows) {
    if (window.first > next) outside.push_back({next, window.first - 1});
    next = window.last + 1;
  }
  if (windows.empty() || windows.back().last != map_.last()) outside.push_back({next, map_.last()});

  for (const UnitRange& window : windows) convert(*me, window, SegmentValue::hole(), SegmentValue::free());
  for (const UnitRange& hole : outside) convert(*me, hole, SegmentValue::free(), SegmentValue::hole());
  for (const UnitRange& hole : outside) {
    for (Unit unit = hole.first;;) {
      Run* run = nullptr;
      Unit last;
      {
        MapSection section{map_, *me};
        const Segment there = section.tree().find(unit);
        last = there.range.last;
        if (there.value.is_run()) {
          run = arena_.at<Run>(there.value.run_id());
          const RunShape shape = RunShape::load(*run);
          // seq_cst: before its slots' incarnations are closed, so that whoever works on one by CAS sees it.
          run->flags.fetch_or(Run::doomed, std::memory_order_seq_cst);
          const unsigned last_index = shape.slot_of(there.range.last);
          for (unsigned i = shape.slot_of(there.range.first); i <= last_index; ++i) {
            const SlotWordPtr slot = &run->slot(i);
            const Eviction result = evict(*me, *run, i);
            if (result == Eviction::gone) continue;
            // R.slot - acquire. From now on it is freed by CAS, and so leaves the run. A slot that its thread is just
            // handing out or taking back counts as live; that thread finds its incarnation closed and the run doomed.
            const SlotWord word{slot->load(std::memory_order_acquire)};
            close_incarnation(*me, word.owner(), slot, false);
            const UnitRange interval = shape.slot_range(i);
            if (interval.overlaps(hole) && (stranded.empty() || stranded.back() != interval))
              stranded.push_back(interval);
          }
        }
      }
      if (run != nullptr) settle(*me, *run);
      if (last >= hole.last) break;
      unit = last + 1;
    }
  }
  return {Outcome::done};
}

}  // namespace iovane::iova
