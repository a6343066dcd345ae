// claim(): a fixed range, all of it or nothing; and taking back what is idle.
#include <algorithm>

#include "base/yield_point.hpp"
#include "iova/allocator_core.hpp"

namespace iovane::iova {
namespace {

// Claims of one granule come in neighbourhoods (a guest's I/O buffers): one run serves an aligned block of them, the
// block of one coarse hint.
constexpr unsigned claim_block_units = 64;

}  // namespace

Answer AllocatorCore::claim(UnitRange range) noexcept {
  ThreadCache* const me = my_cache();
  if (me == nullptr) return {Outcome::too_many_threads};
  if (claim_by_hint(*me, range)) return {Outcome::done, range};
  // Lock-free: each turn ends the call or follows a change of the map or of a slot by this or another thread, and this
  // thread's changes only take idle slots out of the range.
  for (;;) {
    bool again = false;
    const Answer answer = claim_once(*me, range, again);
    if (!again) return answer;
  }
}

// A free slot that equals the range, in a run that the hints know: most often, the range was claimed before. False:
// nothing happened.
bool AllocatorCore::claim_by_hint(ThreadCache& me, UnitRange range) noexcept {
  MapSection section{map_, me};
  Run* const run = hinted_run(bytes_of(range.first), bytes_of(range.count()));
  if (run == nullptr) return false;
  const RunShape shape = RunShape::load(*run);
  // R.shape - acquire: as in free(): a run of the section's version or an older one is kept from reuse if it is still
  // in use now, which a free slot proves as well as a live one.
  if (!shape.valid() || !shape.range().contains(range.first) ||
      run->born.load(std::memory_order_acquire) > section.version())
    return false;
  const unsigned index = shape.slot_of(range.first);
  // R.slot - acquire.
  std::uint64_t seen = run->slot(index).load(std::memory_order_acquire);
  if (SlotWord{seen}.state() != SlotState::free || shape.slot_range(index) != range || !shape.unchanged(*run) ||
      !claimable(*run))
    return false;
  base::yield_point("claim.hinted");
  // A.slot - acq_rel: linearization of a claim that equals a free slot.
  if (!run->slot(index).compare_exchange_strong(seen, SlotWord::of(SlotState::live).raw, std::memory_order_acq_rel,
                                                std::memory_order_relaxed))
    return false;
  bump(me.other_intervals, std::int64_t{1});
  bump(me.other_units, static_cast<std::int64_t>(range.count()));
  return true;
}

// Whether a free slot of the run may be handed out as it is. The caller's section protects the run.
bool AllocatorCore::claimable(const Run& run) noexcept {
  // relaxed: does not change while the section protects the run. R.doomed - seq_cst: see free().
  return run.run_kind.load(std::memory_order_relaxed) != RunKind::irregular &&
         (run.flags.load(std::memory_order_seq_cst) & Run::doomed) == 0;
}

Answer AllocatorCore::claim_once(ThreadCache& me, UnitRange range, bool& again) noexcept {
  const auto claimed = [&]() -> Answer {
    bump(me.other_intervals, std::int64_t{1});
    bump(me.other_units, static_cast<std::int64_t>(range.count()));
    return {Outcome::done, range};
  };
  // Pass one looks for what forbids the claim and changes nothing but a slot that equals the range; pass two takes idle
  // slots out of their runs.
  Run* blocking = nullptr;
  UnitRange window{};  // the free segment, if it holds the whole range
  {
    MapSection section{map_, me};
    const TreeView tree = section.tree();
    for (Unit unit = range.first;;) {
      const Segment there = tree.find(unit);
      const UnitRange common = there.range.intersection(range);
      if (there.value.is_hole()) return {Outcome::hole, common};
      if (there.value.is_run()) {
        Run& run = *arena_.at<Run>(there.value.run_id());
        const RunShape shape = RunShape::load(run);
        const unsigned last_index = shape.slot_of(common.last);
        for (unsigned i = shape.slot_of(common.first); i <= last_index; ++i) {
          // R.slot - acquire.
          std::uint64_t seen = run.slot(i).load(std::memory_order_acquire);
          const UnitRange slot = shape.slot_range(i);
          if (slot == range && SlotWord{seen}.state() == SlotState::free && claimable(run)) {
            base::yield_point("claim.slot");
            // A.slot - acq_rel: linearization of a claim that equals a free slot.
            if (run.slot(i).compare_exchange_strong(seen, SlotWord::of(SlotState::live).raw, std::memory_order_acq_rel,
                                                    std::memory_order_acquire)) {
              note_start(run, shape.first, shape.length, shape.slots, range.first);
              return claimed();
            }
          }
          if (SlotWord{seen}.state() == SlotState::live) return {Outcome::live, slot};
        }
        if (blocking == nullptr) blocking = &run;
      } else if (there.range.contains(range)) {
        window = there.range;
      }
      if (common.last == range.last) break;
      unit = common.last + 1;
    }
    if (blocking != nullptr) {
      for (Unit unit = range.first;;) {
        const Segment there = tree.find(unit);
        const UnitRange common = there.range.intersection(range);
        if (there.value.is_run()) {
          Run& run = *arena_.at<Run>(there.value.run_id());
          const RunShape shape = RunShape::load(run);
          const unsigned last_index = shape.slot_of(common.last);
          for (unsigned i = shape.slot_of(common.first); i <= last_index; ++i) {
            const Eviction result = evict(me, run, i);
            if (result == Eviction::live) return {Outcome::live, shape.slot_range(i)};
            if (result == Eviction::contended) return {Outcome::contended, shape.slot_range(i)};
          }
          // One run a turn: its slots are settled before the next is touched.
          blocking = &run;
          break;
        }
        if (common.last == range.last) break;
        unit = common.last + 1;
      }
    }
  }
  if (blocking != nullptr) {
    if (!settle(me, *blocking)) return {Outcome::no_memory, range};
    again = true;
    return {};
  }

  RunPlan plan{.length = range.count(),
               .slots = 1,
               .align_log2 = 0,
               .last_max = map_.last(),
               .kind = RunKind::claimed,
               .length_class = 0,
               .first_word = SlotWord::of(SlotState::live),
               .first_count = 1,
               .at = range.first,
               .at_slot = 0};
  const Unit block = range.first & ~Unit{claim_block_units - 1};
  if (plan.length == 1 && window.contains(UnitRange{block, block + claim_block_units - 1})) {
    plan.slots = claim_block_units;
    plan.at = block;
    plan.at_slot = static_cast<unsigned>(range.first - block);
  }
  const MadeRun made = make_run(me, plan);
  if (made.outcome == Outcome::exhausted) {
    again = true;  // the map changed since
    return {};
  }
  if (made.outcome != Outcome::done) return {made.outcome, range};
  note_start(*made.run, made.first, plan.length, plan.slots, range.first);
  return claimed();
}

void AllocatorCore::reclaim_idle() noexcept {
  if (ThreadCache* const me = my_cache()) reclaim_idle(*me);
}

// Takes every idle slot out of its run. One pass; what becomes idle behind it stays.
void AllocatorCore::reclaim_idle(ThreadCache& me) noexcept {
  Unit unit = 0;
  for (;;) {  // at most one turn per segment of the map
    Run* run = nullptr;
    Unit last;
    {
      MapSection section{map_, me};
      const Segment there = section.tree().find(unit);
      last = there.range.last;
      if (there.value.is_run()) {
        run = arena_.at<Run>(there.value.run_id());
        const RunShape shape = RunShape::load(*run);
        const unsigned last_index = shape.slot_of(there.range.last);
        for (unsigned i = shape.slot_of(there.range.first); i <= last_index; ++i) evict(me, *run, i);
      }
    }
    if (run != nullptr) settle(me, *run);
    if (last == map_.last()) return;
    unit = last + 1;
  }
}

}  // namespace iovane::iova
