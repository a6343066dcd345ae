// Making, finding, emptying and burying runs.
#include <algorithm>
#include <bit>

#include "base/asymmetric_barrier.hpp"
#include "base/yield_point.hpp"
#include "iova/allocator_core.hpp"

namespace iovane::iova {

// A run whose fields are set and which the map does not know yet.
Run* AllocatorCore::prepare_run(const RunPlan& plan) noexcept {
  const ObjectId id = arena_.allocate(run_object_kind(plan.slots), Run::bytes_for(plan.slots));
  if (id == 0) return nullptr;
  Run& run = *arena_.at<Run>(id);
  run.kind = run_object_kind(plan.slots);
  run.bytes = static_cast<std::uint16_t>(Run::bytes_for(plan.slots));
  // Before any word is written: revalidate() must not take a word for that of the object's former run. 0 is nobody's
  // identity, since class codes are not 0.
  run.identity.store(0, std::memory_order_release);
  // The tag is closed: by bury(), or because the memory is fresh.
  // W.shape - release each, pairs with R.shape: who reads one of these also finds the generation odd or newer.
  run.flags.store(0, std::memory_order_release);
  run.slots.store(static_cast<std::uint8_t>(plan.slots), std::memory_order_release);
  run.length.store(plan.length, std::memory_order_release);
  run.reciprocal.store(reciprocal_of(plan.length, plan.slots), std::memory_order_release);
  run.slots_left.store(plan.slots, std::memory_order_release);
  // A slot that was put back while its run was buried counts for the former class to the end.
  // relaxed: the object is ours.
  const ObjectId former_class = run.length_class.load(std::memory_order_relaxed);
  run.length_class.store(plan.length_class, std::memory_order_release);
  run.run_kind.store(plan.kind, std::memory_order_release);
  std::uint64_t free_bits = 0;
  for (unsigned i = 0; i < plan.slots; ++i) {
    const bool first = plan.at                             ? i == plan.at_slot
                       : direction_ == Direction::top_down ? plan.slots - 1 - i < plan.first_count
                                                           : i < plan.first_count;
    const SlotWord word = first ? plan.first_word : SlotWord::of(SlotState::free);
    if (!first) free_bits |= std::uint64_t{1} << i;
    run.slot(i).store(word.raw, std::memory_order_release);
  }
  // relaxed: who puts slots back meanwhile found the object's former life, see below.
  const std::uint64_t bits_left =
      run.bits.exchange(plan.kind == RunKind::shelved ? free_bits : 0, std::memory_order_release);
  // relaxed: a statistic.
  if (bits_left != 0 && former_class != 0)
    class_at(former_class)->slots_free.fetch_sub(std::popcount(bits_left), std::memory_order_relaxed);
  std::uint32_t position = Run::no_position;
  if (plan.length_class != 0) {
    if (const auto p = class_at(plan.length_class)->shelf.put(arena_, id)) position = *p;
  }
  run.position.store(position, std::memory_order_release);
  return &run;
}

void AllocatorCore::discard_run(Run& run) noexcept {
  // relaxed: never published.
  const std::uint32_t position = run.position.load(std::memory_order_relaxed);
  if (position != Run::no_position)
    class_at(run.length_class.load(std::memory_order_relaxed))->shelf.remove(arena_, position);
  run.bits.store(0, std::memory_order_relaxed);  // they were never counted
  arena_.release(run.kind, run.bytes, arena_.id_of(&run));
}

AllocatorCore::MadeRun AllocatorCore::make_run(ThreadCache& me, const RunPlan& plan) noexcept {
  Run* run = prepare_run(plan);
  if (run == nullptr) return {Outcome::no_memory, nullptr, 0};
  const ObjectId id = arena_.id_of(run);
  const std::uint64_t units = plan.slots * plan.length;
  // relaxed: still ours. After the commit the run may be emptied and reused by others at any time, so nothing is read
  // from it then.
  std::uint64_t tag = run->tag.load(std::memory_order_relaxed);
  const std::uint32_t position = run->position.load(std::memory_order_relaxed);
  std::optional<Unit> start;
  MapSection section{map_, me};
  for (;;) {  // lock-free: repeats only after another thread's commit
    start = plan.at;
    if (start) {
      const Segment there = section.tree().find(*start);
      if (!there.value.is_free() || !there.range.contains(UnitRange{*start, *start + units - 1})) start.reset();
    } else {
      start = section.tree().search({units, plan.align_log2, plan.last_max, direction_});
    }
    if (!start) {
      discard_run(*run);
      return {Outcome::exhausted, nullptr, 0};
    }
    const std::uint64_t birth = section.version() + 1;
    run->birth = birth;
    // W.shape - release, as in prepare_run().
    run->born.store(birth, std::memory_order_release);
    run->identity.store(RunIdentity::of(*start, plan.length_class == 0 ? 0 : class_at(plan.length_class)->code).raw,
                        std::memory_order_release);
    // W.shape - release: from here on the fields may be read as this run's. Its slots can only be reached by way of
    // the map or of the shelf's ready bit, both later; a stale hint may lead here earlier and finds a true answer only
    // if it asks for units that the commit below has given to us or is about to.
    TreeEdit edit = section.edit();
    if (!edit.put({*start, *start + units - 1}, SegmentValue::run(id))) {
      edit.abandon();
      discard_run(*run);
      return {Outcome::no_memory, nullptr, 0};
    }
    const auto result = section.commit(edit);
    if (result == ExtentMap::Commit::done) break;
    if (result == ExtentMap::Commit::no_memory) {
      discard_run(*run);
      return {Outcome::no_memory, nullptr, 0};
    }
    section.renew();
  }
  base::yield_point("run.open");
  // W.open - release, pairs with R.shape: the tag opens after the commit, so readers without a section never trust a
  // run that the map does not have. It fails if the run was buried already.
  run->tag.compare_exchange_strong(tag, RunTag::open(RunTag{tag}.generation(), plan.slots).raw,
                                   std::memory_order_release, std::memory_order_relaxed);
  // relaxed: statistics.
  run_units_.fetch_add(units, std::memory_order_relaxed);
  if (plan.length_class != 0) {
    LengthClass& c = *class_at(plan.length_class);
    c.slots.fetch_add(plan.slots, std::memory_order_relaxed);
    c.slots_free.fetch_add(plan.slots - plan.first_count, std::memory_order_relaxed);
    if (plan.slots > plan.first_count && position != Run::no_position) c.shelf.set_ready(arena_, position);
  }
  return {Outcome::done, run, *start};
}

Run* AllocatorCore::locate(MapSection& section, Unit unit) noexcept {
  const Segment there = section.tree().find(unit);
  if (!there.value.is_run()) return nullptr;
  return arena_.at<Run>(there.value.run_id());
}

// Tells the map about the run's settled slots, whoever settled them. False without memory: they stay settled, and
// whoever wants the units tries again.
bool AllocatorCore::settle(ThreadCache& me, Run& run) noexcept {
  const SegmentValue mine = SegmentValue::run(arena_.id_of(&run));
  constexpr unsigned ranges_most = 16;
  unsigned ranges_max = ranges_most;
  for (;;) {  // lock-free: repeats after a commit, its own (bounded by the run's slots) or another thread's
    MapSection section{map_, me};
    const RunShape shape = RunShape::load(run);
    const TreeView tree = section.tree();
    std::array<UnitRange, ranges_most> ranges;
    unsigned count = 0;
    unsigned slots = 0;
    std::optional<Segment> there;  // where the last slot looked at begins
    for (unsigned i = 0; i < shape.slots && i < Run::slots_max; ++i) {
      const UnitRange range = shape.slot_range(i);
      if (range.first > range.last || range.last > tree.last()) break;  // being made into another run
      // From here a wrong shape does no harm: if the map gives any of its units to this run, it is the right one.
      // R.slot - acquire, pairs with the settling CAS.
      if (SlotWord{run.slot(i).load(std::memory_order_acquire)}.state() != SlotState::settled) continue;
      if (!there || !there->range.contains(range.first)) there = tree.find(range.first);
      if (!(there->value == mine)) continue;
      if (count > 0 && ranges[count - 1].last + 1 == range.first) {
        ranges[count - 1].last = range.last;
      } else if (count == ranges_max) {
        break;
      } else {
        ranges[count++] = range;
      }
      ++slots;
    }
    if (count == 0) return true;
    TreeEdit edit = section.edit(true);
    bool fits = true;
    for (unsigned r = 0; r < count && fits; ++r) {
      Unit next = ranges[r].first;
      for (const UnitRange& window : section.windows()) {
        if (!fits || window.last < next) continue;
        if (window.first > ranges[r].last) break;
        const UnitRange usable = window.intersection({next, ranges[r].last});
        if (usable.first > next) fits = edit.put({next, usable.first - 1}, SegmentValue::hole());
        fits = fits && edit.put(usable, SegmentValue::free());
        next = usable.last + 1;
      }
      if (fits && next <= ranges[r].last) fits = edit.put({next, ranges[r].last}, SegmentValue::hole());
    }
    if (!fits) {
      edit.abandon();
      if (ranges_max == 1) return false;
      ranges_max = 1;  // many ranges among many windows are too much for one edit
      continue;
    }
    base::yield_point("run.settle");
    const auto result = section.commit(edit);
    if (result == ExtentMap::Commit::no_memory) return false;
    if (result == ExtentMap::Commit::conflict) continue;
    // relaxed: statistics.
    run_units_.fetch_sub(slots * shape.length, std::memory_order_relaxed);
    if (const ObjectId c = run.length_class.load(std::memory_order_relaxed); c != 0)
      class_at(c)->slots.fetch_sub(slots, std::memory_order_relaxed);
    base::yield_point("run.count");
    // A.left - acq_rel: who takes the last slot comes after all who took others.
    if (run.slots_left.fetch_sub(slots, std::memory_order_acq_rel) == slots) {
      bury(me, run);
      return true;
    }
  }
}

void AllocatorCore::bury(ThreadCache& me, Run& run) noexcept {
  // seq_cst: sections that found the run fit for use before this announced a version that retire() respects.
  run.flags.fetch_or(Run::doomed, std::memory_order_seq_cst);
  note_taken_slots(run, ~std::uint64_t{0});
  // relaxed: nobody else changes them now.
  const std::uint32_t position = run.position.load(std::memory_order_relaxed);
  const ObjectId c = run.length_class.load(std::memory_order_relaxed);
  if (position != Run::no_position) class_at(c)->shelf.remove(arena_, position);
  // relaxed: the value to start from.
  std::uint64_t tag = run.tag.load(std::memory_order_relaxed);
  // W.closed - release, pairs with R.shape: readers without a section see the run end. The next generation, so that a
  // maker that was stopped before W.open does not open the object's next incarnation. Repeats at most once: only that
  // maker changes it too.
  while (!run.tag.compare_exchange_weak(tag, RunTag::closed(RunTag{tag}.generation() + 1).raw,
                                        std::memory_order_release, std::memory_order_relaxed)) {
  }
  base::yield_point("run.bury");
  map_.retire(me, run, arena_.id_of(&run));
}

// Makes sure that `owner` does nothing to the slot any more. False when its thread is in the middle of just that.
bool AllocatorCore::close_incarnation(ThreadCache& me, Incarnation owner, SlotWordPtr word, bool to_free) noexcept {
  if (owner.nobody()) return true;
  if (owner == me.incarnation()) {
    // Ours: nothing of ours is in progress.
    reopen(me);
    return true;
  }
  // R.cache - acquire: an incarnation that a slot names exists.
  ThreadCache& cache = *caches_[owner.cache_index()].load(std::memory_order_acquire);
  constexpr unsigned looks_max = 64;
  for (unsigned look = 0; look < looks_max; ++look) {
    // R.reopen - seq_cst: part of the handshake; a later generation brings all plain stores of the older with it.
    std::uint64_t state = cache.state.load(std::memory_order_seq_cst);
    if ((state & ~std::uint64_t{7}) != owner.raw) return true;
    if ((state & 7) == ThreadCache::open) {
      // relaxed: a hint.
      if (to_free) cache.freed_by_others.store(1, std::memory_order_relaxed);
      base::yield_point("cache.close");
      // A.close - seq_cst: the revoker's store of the handshake.
      if (!cache.state.compare_exchange_strong(state, owner.raw | ThreadCache::closing, std::memory_order_seq_cst))
        continue;
      state = owner.raw | ThreadCache::closing;
    }
    if ((state & 7) == ThreadCache::closing) {
      base::yield_point("cache.barrier");
      base::heavy_barrier();
      // seq_cst: tells the others that the barrier is done. If it fails somebody told them, or the owner went on.
      cache.state.compare_exchange_strong(state, owner.raw | ThreadCache::closed, std::memory_order_seq_cst);
    }
    base::yield_point("cache.look");
    // R.busy - seq_cst: the revoker's load of the handshake; pairs with the release stores that clear it.
    if (cache.busy.load(std::memory_order_seq_cst) != word) return true;
    // The owner may only be looking: then it finds its state closed and clears `busy` in a few instructions.
  }
  // R.reopen - seq_cst: the owner may have gone on to the next generation with the same slot announced.
  return (cache.state.load(std::memory_order_seq_cst) & ~std::uint64_t{7}) != owner.raw;
}

// Takes a slot that is not live out of its run. The caller keeps the run from being reused and settles it afterwards.
AllocatorCore::Eviction AllocatorCore::evict(ThreadCache& me, Run& run, unsigned index) noexcept {
  const SlotWordPtr word = &run.slot(index);
  // R.slot - acquire.
  std::uint64_t seen = word->load(std::memory_order_acquire);
  for (;;) {  // lock-free: repeats after another thread changed the word
    const SlotWord now{seen};
    if (now.state() == SlotState::settled) return Eviction::gone;
    if (now.state() == SlotState::live) return Eviction::live;
    if (now.state() == SlotState::hoarded && !close_incarnation(me, now.owner(), word, false))
      return Eviction::contended;
    base::yield_point("slot.evict");
    // A.slot - acq_rel: settles the slot. Linearization of its leaving the run.
    if (word->compare_exchange_strong(seen, SlotWord::of(SlotState::settled).raw, std::memory_order_acq_rel,
                                      std::memory_order_acquire)) {
      if (now.state() == SlotState::free) note_taken_slots(run, std::uint64_t{1} << index);
      return Eviction::gone;
    }
  }
}

}  // namespace iovane::iova
