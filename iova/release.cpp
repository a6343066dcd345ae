// free(): retire the interval's word, then keep or give back its slot.
#include <algorithm>

#include "base/asymmetric_barrier.hpp"
#include "base/yield_point.hpp"
#include "iova/allocator_core.hpp"

namespace iovane::iova {

Answer AllocatorCore::free(UnitRange range) noexcept {
  ThreadCache* const me = my_cache();
  if (me == nullptr) [[unlikely]]
    return {Outcome::too_many_threads};
  const std::uint64_t length = range.last - range.first + 1;
  Run* const run = hinted(range.first);
  if (run == nullptr || length == 0 || length > direct_magazines) return free_slow(*me, range);
  // relaxed: only the owner writes the place.
  Magazine* const magazine = me->magazines[length - 1].load(std::memory_order_relaxed);
  const RunShape shape = RunShape::load(*run);
  const bool fits = shape.valid() && shape.length == length && shape.range().contains(range.first);
  if (!fits || magazine == nullptr || magazine->count >= magazine->capacity) return free_slow(*me, range);
  const unsigned index = shape.slot_of(range.first);
  const SlotRef slot = SlotRef::of(*run, index);
  // relaxed: it does not change while the generation does not.
  const bool same_class = run->length_class.load(std::memory_order_relaxed) == magazine->class_id;
  if (!same_class || shape.first + index * length != range.first) return free_slow(*me, range);

  base::yield_point("free.announce");
  base::announce(me->busy, slot.raw);
  base::yield_point("free.check");
  // R.state - seq_cst: the owner's load of the handshake (thread_cache.hpp, I1).
  const std::uint64_t state = me->state.load(std::memory_order_seq_cst);
  std::atomic<std::uint64_t>& word = slot.word();
  // R.slot - acquire: from here on a slot that is live and biased to us stays so until we change it, and its run with
  // it; so a generation that is unchanged after this load makes the shape true.
  const std::uint64_t seen = word.load(std::memory_order_acquire);
  const bool ours = state == magazine->incarnation.raw &&
                    seen == SlotWord::of(SlotState::live, magazine->incarnation).raw && shape.unchanged(*run);
  if (!ours) {
    // W.idle - release, pairs with R.busy.
    me->busy.store(0, std::memory_order_release);
    return free_slow(*me, range);
  }
  base::yield_point("free.hoard");
  // W.slot - release: linearization of a free into a magazine.
  word.store(SlotWord::of(SlotState::hoarded, magazine->incarnation).raw, std::memory_order_release);
  base::yield_point("free.idle");
  // W.idle - release, pairs with R.busy: who finds the announcement gone finds the slot hoarded.
  me->busy.store(0, std::memory_order_release);
  magazine->entries[magazine->count++] = {range.first, slot};
  bump(magazine->net_live, std::int64_t{-1});
  return {Outcome::done, range};
}

Answer AllocatorCore::free_slow(ThreadCache& me, UnitRange range) noexcept {
  enum class After { stow, put_back, park, settle } after;
  MagazineEntry entry{};
  Incarnation owner;
  {
    MapSection section{map_, me};
    Run* const run = locate(section, range.first);
    if (run == nullptr) return {Outcome::not_live};
    const RunShape shape = RunShape::load(*run);
    const unsigned index = shape.slot_of(range.first);
    const UnitRange interval = shape.slot_range(index);
    const SlotRef slot = SlotRef::of(*run, index);
    std::atomic<std::uint64_t>& word = slot.word();
    // R.slot - acquire, pairs with W.slot.
    std::uint64_t seen = word.load(std::memory_order_acquire);
    for (;;) {  // lock-free: repeats after another thread changed the word
      const SlotWord now{seen};
      if (now.state() != SlotState::live) return {Outcome::not_live};
      if (interval != range) return {Outcome::partial, interval};
      if (!close_incarnation_unless_mine(me, now.owner(), slot)) return {Outcome::contended, interval};
      // R.bits - seq_cst: see revalidate().
      const bool doomed = (run->bits.load(std::memory_order_seq_cst) & Run::doomed) != 0;
      // relaxed: neither changes while the section protects the run.
      const RunKind kind = run->run_kind.load(std::memory_order_relaxed);
      SlotWord next;
      if (doomed || kind == RunKind::irregular) {
        after = After::settle;
        next = SlotWord::of(SlotState::settled);
      } else if (kind == RunKind::claimed) {
        after = After::park;
        next = SlotWord::of(SlotState::free);
      } else {
        after = magazines_ ? After::stow : After::put_back;
        owner = me.incarnation();
        next = SlotWord::of(SlotState::hoarded, owner);
      }
      base::yield_point("free.retire");
      // A.slot - acq_rel: linearization of a free that is not into a magazine at once.
      if (word.compare_exchange_weak(seen, next.raw, std::memory_order_acq_rel, std::memory_order_acquire)) break;
    }
    entry = {range.first, slot};
    if (me.unbiased_frees_left > 0 && --me.unbiased_frees_left == 0)
      me.live_word = SlotWord::of(SlotState::live, me.incarnation());
  }
  // Behind this point the run may be reused at any time unless the slot is hoarded by us.
  Run& run = entry.slot.run();
  switch (after) {
    case After::stow: stow(me, entry, owner); return {Outcome::done, range};
    case After::put_back: put_back(me, {&entry, 1}, owner); break;
    case After::park: park(me, run); break;
    case After::settle: settle(me, run); break;
  }
  bump(me.other_intervals, std::int64_t{-1});
  bump(me.other_units, -static_cast<std::int64_t>(range.count()));
  return {Outcome::done, range};
}

bool AllocatorCore::close_incarnation_unless_mine(ThreadCache& me, Incarnation owner, SlotRef slot) noexcept {
  // Ours, open or closed: we are not in the middle of anything, and others leave open ones to us; if it is closed the
  // CAS decides.
  return owner == me.incarnation() || close_incarnation(me, owner, slot, true);
}

// Into the magazine of the slot's class, making room if needed. The slot is hoarded by `owner`, an incarnation of ours.
void AllocatorCore::stow(ThreadCache& me, const MagazineEntry& entry, Incarnation owner) noexcept {
  // relaxed: a hoarded slot keeps its run; if it was evicted meanwhile the class is a hint that revalidation corrects.
  const ObjectId class_id = entry.slot.run().length_class.load(std::memory_order_relaxed);
  LengthClass* const c = class_id == 0 ? nullptr : class_at(class_id);
  Magazine* magazine = c == nullptr ? nullptr : magazine_for(me, c->key, class_id);
  if (magazine == nullptr || magazine->incarnation != owner) {
    put_back(me, {&entry, 1}, owner);
    bump(me.other_intervals, std::int64_t{-1});
    bump(me.other_units, -static_cast<std::int64_t>(c == nullptr ? 0 : c->key.length()));
    return;
  }
  magazine->entries[magazine->count++] = entry;
  bump(magazine->net_live, std::int64_t{-1});
  if (magazine->count > magazine->capacity) {
    magazine->capacity = capacity_for(*magazine->length_class);
    if (magazine->count > magazine->capacity) flush(me, *magazine, std::max(1U, magazine->count / 2));
  }
}

// A claimed run without live slots waits here for the next claim of the same range; the oldest one that waits leaves.
void AllocatorCore::park(ThreadCache& me, Run& run) noexcept {
  const auto all_free = [](Run& r, std::uint32_t slots) {
    for (unsigned i = 0; i < slots && i < Run::slots_max; ++i)
      // R.slot - acquire.
      if (SlotWord{r.slot(i).load(std::memory_order_acquire)}.state() == SlotState::live) return false;
    return true;
  };
  std::uint64_t oldest = 0;
  {
    MapSection section{map_, me};
    const RunShape shape = RunShape::load(run);
    // R.bits - seq_cst, R.shape - acquire: alive and known to the section, as in take_from_shelf().
    const std::uint64_t bits = run.bits.load(std::memory_order_seq_cst);
    if ((bits & (Run::parked | Run::doomed)) != 0 || run.born.load(std::memory_order_acquire) > section.version() ||
        !shape.valid() || !shape.unchanged(run) || !all_free(run, shape.slots))
      return;
    base::yield_point("park.mark");
    // seq_cst: one thread parks it.
    if ((run.bits.fetch_or(Run::parked, std::memory_order_seq_cst) & Run::parked) != 0) return;
    // relaxed: only picks a place.
    const std::uint64_t turn = parked_next_.fetch_add(1, std::memory_order_relaxed);
    const std::uint64_t tagged = (std::uint64_t{shape.generation} << 32) | arena_.id_of(&run);
    // acq_rel: hands a place from one thread to the next.
    oldest = parked_[turn % parked_entries].exchange(tagged, std::memory_order_acq_rel);
  }
  if (oldest == 0) return;
  Run& leaving = *arena_.at<Run>(static_cast<ObjectId>(oldest));
  {
    MapSection section{map_, me};
    const RunShape shape = RunShape::load(leaving);
    if (shape.generation != oldest >> 32 || !shape.unchanged(leaving)) return;
    base::yield_point("park.leave");
    // seq_cst: from here on its next free parks it again.
    leaving.bits.fetch_and(~Run::parked, std::memory_order_seq_cst);
    if (!all_free(leaving, shape.slots)) return;
    for (unsigned i = 0; i < shape.slots; ++i) {
      std::uint64_t expected = SlotWord::of(SlotState::free).raw;
      // A.slot - acq_rel: free -> settled.
      leaving.slot(i).compare_exchange_strong(expected, SlotWord::of(SlotState::settled).raw, std::memory_order_acq_rel,
                                              std::memory_order_relaxed);
    }
  }
  settle(me, leaving);
}

}  // namespace iovane::iova
