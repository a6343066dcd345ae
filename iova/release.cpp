// free(): retire the interval's word, then keep or give back its slot.
#include <algorithm>

#include "base/asymmetric_barrier.hpp"
#include "base/yield_point.hpp"
#include "iova/allocator_core.hpp"
#include "iova/fast_paths.hpp"

namespace iovane::iova {

bool push_by_fine_hint(ThreadCache& me, Magazine& magazine, std::uint64_t start, std::uint64_t length) noexcept {
  return push_by_hint(me, magazine, start, length, HintTable::index(start, magazine.fine_shift));
}

// A run that may hold the interval, by the hints.
Run* AllocatorCore::hinted_run(std::uint64_t start, std::uint64_t length) const noexcept {
  const unsigned fine = floor_log2(length);
  for (const unsigned shift : {std::min(fine + HintTable::coarse_log2, 63U), fine}) {
    const HintEntry& entry = hints_[HintTable::index(start, shift)];
    // relaxed: hints.
    const std::uint64_t offset = start - entry.first.load(std::memory_order_relaxed);
    Run* const run = entry.run.load(std::memory_order_relaxed);
    if (run != nullptr && offset / length < Run::slots_max) return run;
  }
  return nullptr;
}

Answer AllocatorCore::free(UnitRange range) noexcept {
  ThreadCache* const me = my_cache();
  if (me == nullptr) [[unlikely]]
    return {Outcome::too_many_threads};
  enum class After { stow, put_back, park, settle, nothing } after;
  MagazineEntry entry{};
  Incarnation owner;
  ObjectId class_id = 0;
  Run* run;
  {
    MapSection section{map_, *me};
    // By hint if the hinted run is a true answer, else by the map.
    RunShape shape{};
    run = hinted_run(bytes_of(range.first), bytes_of(range.count()));
    bool found = false;
    if (run != nullptr) {
      shape = RunShape::load(*run);
      // R.shape - acquire: a run of the section's version or an older one is kept from reuse if it is still in use now,
      // which a live slot proves below.
      found = shape.valid() && shape.range().contains(range.first) &&
              run->born.load(std::memory_order_acquire) <= section.version();
      if (found) {
        // R.slot - acquire, pairs with W.slot.
        const SlotWord now{run->slot(shape.slot_of(range.first)).load(std::memory_order_acquire)};
        found = now.state() == SlotState::live && shape.unchanged(*run);
      }
    }
    if (!found) {
      run = locate(section, range.first);
      if (run == nullptr) return {Outcome::not_live};
      shape = RunShape::load(*run);
      // seq_cst: as below, but only a preference.
      if ((run->flags.load(std::memory_order_seq_cst) & Run::doomed) == 0)
        note_start(*run, shape.first, shape.length, shape.slots, range.first);
    }
    const unsigned index = shape.slot_of(range.first);
    const UnitRange interval = shape.slot_range(index);
    const SlotWordPtr word = &run->slot(index);
    // R.slot - acquire, pairs with W.slot.
    std::uint64_t seen = word->load(std::memory_order_acquire);
    for (;;) {  // lock-free: repeats after another thread changed the word
      const SlotWord now{seen};
      if (now.state() != SlotState::live) return {Outcome::not_live};
      if (interval != range) return {Outcome::partial, interval};
      if (!close_unless_mine(*me, now.owner(), word)) return {Outcome::contended, interval};
      // seq_cst: in one order with the store of `doomed` and the slot words, see the edges of run.hpp.
      const bool doomed = (run->flags.load(std::memory_order_seq_cst) & Run::doomed) != 0;
      // relaxed: neither changes while the section protects the run.
      const RunKind kind = run->run_kind.load(std::memory_order_relaxed);
      class_id = run->length_class.load(std::memory_order_relaxed);
      SlotWord next;
      if (doomed || kind == RunKind::irregular) {
        after = After::settle;
        next = SlotWord::of(SlotState::settled);
      } else if (kind == RunKind::claimed) {
        after = After::park;
        next = SlotWord::of(SlotState::free);
      } else {
        after = magazines_ ? After::stow : After::put_back;
        owner = me->incarnation();
        next = SlotWord::of(SlotState::hoarded, owner);
      }
      base::yield_point("free.retire");
      // A.slot - linearization of a free that is not into a magazine at once.
      // seq_cst: with the look at the flags behind it, the handshake with set_usable(), which sets the flag and then
      // looks at the word: it finds the slot hoarded and takes it, or we find the run doomed.
      if (word->compare_exchange_weak(seen, next.raw, std::memory_order_seq_cst, std::memory_order_acquire)) break;
    }
    // R.doomed - seq_cst: as above.
    const std::uint32_t flags = run->flags.load(std::memory_order_seq_cst);
    if (after == After::stow && (flags & Run::doomed) != 0) after = After::put_back;
    // Parked already: whoever lets it leave clears the flag first and then looks at the slots.
    if (after == After::park && (flags & Run::parked) != 0) after = After::nothing;
    entry = MagazineEntry::of(bytes_of(range.first), *run, index);
    if (me->unbiased_frees_left > 0 && --me->unbiased_frees_left == 0)
      me->live_word = SlotWord::of(SlotState::live, me->incarnation());
  }
  // Behind this point the run may be reused at any time unless the slot is hoarded by us.
  if (after != After::stow) forget_handed_out(*me, class_id);
  switch (after) {
    case After::stow: stow(*me, class_id, entry, owner); return {Outcome::done, range};
    case After::put_back: put_back(*me, {&entry, 1}, owner); break;
    case After::park: park(*me, *run); break;
    case After::settle: settle(*me, *run); break;
    case After::nothing: break;
  }
  bump(me->other_intervals, std::int64_t{-1});
  bump(me->other_units, -static_cast<std::int64_t>(range.count()));
  return {Outcome::done, range};
}

bool AllocatorCore::close_unless_mine(ThreadCache& me, Incarnation owner, SlotWordPtr word) noexcept {
  // Ours, open or closed: we are not in the middle of anything, and others leave open ones to us; if it is closed the
  // CAS decides.
  return owner == me.incarnation() || close_incarnation(me, owner, word, true);
}

// Into the magazine of the slot's class, making room if needed. The slot is hoarded by `owner`, an incarnation of ours.
void AllocatorCore::stow(ThreadCache& me, ObjectId class_id, const MagazineEntry& entry, Incarnation owner) noexcept {
  const LengthKey key = class_at(class_id)->key;
  Magazine* const magazine = magazine_for(me, key, class_id);
  if (magazine == nullptr || magazine->incarnation != owner) {
    forget_handed_out(me, class_id);
    put_back(me, {&entry, 1}, owner);
    bump(me.other_intervals, std::int64_t{-1});
    bump(me.other_units, -static_cast<std::int64_t>(key.length()));
    return;
  }
  push(*magazine, entry);
  const std::uint32_t n = magazine->size();
  if (n <= magazine->capacity) return;
  magazine->capacity = capacity_for(*magazine->length_class);
  if (n > magazine->capacity) flush(me, *magazine, std::max(1U, n / 2));
}

// A claimed run without live slots waits here for the next claim of the same range; the oldest one that waits leaves.
void AllocatorCore::park(ThreadCache& me, Run& run) noexcept {
  const auto all_free = [](Run& r, unsigned slots) {
    for (unsigned i = 0; i < slots && i < Run::slots_max; ++i)
      // R.slot - acquire.
      if (SlotWord{r.slot(i).load(std::memory_order_acquire)}.state() == SlotState::live) return false;
    return true;
  };
  std::uint64_t oldest = 0;
  {
    MapSection section{map_, me};
    const RunShape shape = RunShape::load(run);
    // R.doomed - seq_cst, R.shape - acquire: alive and known to the section, as in take_from_shelf().
    const std::uint32_t flags = run.flags.load(std::memory_order_seq_cst);
    if ((flags & (Run::parked | Run::doomed)) != 0 || run.born.load(std::memory_order_acquire) > section.version() ||
        !shape.valid() || !shape.unchanged(run) || !all_free(run, shape.slots))
      return;
    base::yield_point("park.mark");
    // seq_cst: one thread parks it.
    if ((run.flags.fetch_or(Run::parked, std::memory_order_seq_cst) & Run::parked) != 0) return;
    // relaxed: only picks a place.
    const std::uint64_t turn = parked_next_.fetch_add(1, std::memory_order_relaxed);
    const std::uint64_t tagged = (shape.tag.generation() << 32) | arena_.id_of(&run);
    // acq_rel: hands a place from one thread to the next.
    oldest = parked_[turn % parked_entries].exchange(tagged, std::memory_order_acq_rel);
  }
  if (oldest == 0) return;
  Run& leaving = *arena_.at<Run>(static_cast<ObjectId>(oldest));
  {
    MapSection section{map_, me};
    const RunShape shape = RunShape::load(leaving);
    if ((shape.tag.generation() << 32) >> 32 != oldest >> 32 || !shape.valid() || !shape.unchanged(leaving)) return;
    base::yield_point("park.leave");
    // seq_cst: from here on its next free parks it again.
    leaving.flags.fetch_and(~Run::parked, std::memory_order_seq_cst);
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
