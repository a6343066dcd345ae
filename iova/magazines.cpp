// Between a thread's magazines and the runs that all threads share.
#include <algorithm>
#include <bit>

#include "base/asymmetric_barrier.hpp"
#include "base/checked_math.hpp"
#include "base/yield_point.hpp"
#include "iova/allocator_core.hpp"

namespace iovane::iova {
namespace {

// What all classes together may keep free whatever is live: the 1,024th part of the space, at most 1 GiB of 4 KiB
// granules; less the more classes there are. A class keeps four slots and not more than 1,024. Beyond, an eighth of
// what is in use.
constexpr std::uint64_t hoard_space_divisor = 1024;
constexpr std::uint64_t hoard_units_always = std::uint64_t{1} << 18;
constexpr std::uint64_t hoard_slots_least = 4;
constexpr std::uint64_t hoard_slots_most = 1024;
constexpr std::uint64_t hoard_divisor = 8;
constexpr unsigned shelf_tries_max = 8;
// Runs that are looked at for each one that gives back: fewer than are kept, and all of them while half are freed.
constexpr unsigned sweep_runs = 2;

// Whether a run is worth giving back. Each interval that is left in it costs a change of the map when it is freed: one
// for at least three slots that are given back together.
constexpr bool sparse(unsigned unused, unsigned slots) noexcept { return 4 * unused >= 3 * slots; }

}  // namespace

// Slots that a class may keep in any case. Classes are never fewer than one when this is asked.
std::uint64_t AllocatorCore::always_kept_slots(const LengthClass& c) const noexcept {
  // relaxed: a bound that need not be exact.
  const std::uint64_t all =
      std::min(usable_units_.load(std::memory_order_relaxed) / hoard_space_divisor, hoard_units_always);
  const std::uint64_t classes = class_count_.load(std::memory_order_relaxed);
  const std::uint64_t mine = all / (c.key.length() * classes * static_cast<unsigned>(std::bit_width(classes)));
  return std::clamp<std::uint64_t>(mine, hoard_slots_least, hoard_slots_most);
}

// Free slots that a class may keep, and as many again in each magazine.
std::uint64_t AllocatorCore::kept_slots(const LengthClass& c) const noexcept {
  return std::max(always_kept_slots(c), c.slots_in_use() / hoard_divisor);
}

unsigned AllocatorCore::capacity_for(const LengthClass& c) const noexcept {
  if (!magazines_) return 1;
  return static_cast<unsigned>(std::min<std::uint64_t>(kept_slots(c), Magazine::entries_max - 1));
}

// How many slots a new run has.
unsigned AllocatorCore::run_slots_for(const LengthClass& c) const noexcept {
  if (c.key.over_aligned() || c.key.length() >= multi_slot_length_max) return 1;
  const std::uint64_t allowed = std::max(always_kept_slots(c) / 4, c.slots_in_use() / hoard_divisor);
  if (allowed >= run_many_slots) return run_many_slots;
  if (allowed >= run_few_slots) return run_few_slots;
  return allowed >= run_single_slots ? run_single_slots : 1;
}

// The magazine for a class, empty or with valid entries. Null without memory. Not inside a section.
Magazine* AllocatorCore::magazine_for(ThreadCache& me, LengthKey key, ObjectId class_id) noexcept {
  auto& place = me.magazines[magazine_place(key, granule_log2_)];
  // relaxed: only the owner writes the place and its magazine.
  Magazine* magazine = place.load(std::memory_order_relaxed);
  if (magazine == &no_magazine) {
    const ObjectId id = arena_.allocate(ObjectKind::magazine, sizeof(Magazine));
    if (id == 0) return nullptr;
    magazine = new (arena_.at<void>(id)) Magazine{};
    magazine->adopt(me.incarnation());
    magazine->forget_handed_out();
  }
  if (magazine->class_id != class_id) {
    // Another class used the place: its entries go back to their runs.
    if (magazine->class_id != 0) {
      revalidate(me, *magazine);
      flush(me, *magazine, magazine->size());
      // relaxed: statistics.
      const std::int64_t net = magazine->intake.load(std::memory_order_relaxed);
      const std::uint64_t length = magazine->length.load(std::memory_order_relaxed) >> granule_log2_;
      magazine->intake.store(0, std::memory_order_relaxed);
      bump(me.other_intervals, net);
      bump(me.other_units, net * static_cast<std::int64_t>(length));
    }
    magazine->class_id = class_id;
    magazine->length_class = class_at(class_id);
    magazine->class_code = magazine->length_class->code;
    const std::uint64_t length = key.length();
    // Of the length in bytes, which is at least 2^12. Not exact for very long ones: push_fast() checks what it finds.
    magazine->reciprocal = ~std::uint64_t{0} / bytes_of(length) + 1;
    const unsigned fine_shift = floor_log2(length) + granule_log2_;
    const unsigned coarse_shift = std::min(fine_shift + HintTable::coarse_log2, 63U);
    magazine->granule_turn = static_cast<std::uint8_t>(granule_log2_ - 12);
    magazine->fine_shift = static_cast<std::uint8_t>(fine_shift);
    magazine->coarse_shift = static_cast<std::uint8_t>(coarse_shift);
    magazine->coarse_salt = static_cast<std::uint32_t>(HintTable::salt(coarse_shift));
    magazine->capacity = capacity_for(*magazine->length_class);
    // relaxed: a statistic for others. Where every address is one interval its length does not fit and the fast paths,
    // which compare with this, never see it.
    magazine->length.store(bytes_of(length), std::memory_order_relaxed);
    // W.magazine - release: statistics readers see an initialised magazine.
    place.store(magazine, std::memory_order_release);
  }
  revalidate(me, *magazine);
  return magazine;
}

// After this thread's incarnation was closed: carries the entries over that nobody took.
void AllocatorCore::revalidate(ThreadCache& me, Magazine& magazine) noexcept {
  // R.state - seq_cst: as in the handshake; only the owner opens.
  if ((me.state.load(std::memory_order_seq_cst) & 7) != ThreadCache::open) reopen(me);
  if (magazine.incarnation == me.incarnation()) return;
  const SlotWord old = SlotWord::of(SlotState::hoarded, magazine.incarnation);
  const SlotWord now = SlotWord::of(SlotState::hoarded, me.incarnation());
  const std::uint32_t had = magazine.size();
  unsigned kept = 0;
  for (unsigned i = 0; i < had; ++i) {
    const MagazineEntry entry = magazine.entry(i);
    const Run& run = entry.run();
    // Only this thread writes words that carry its incarnations, so if the CAS below succeeds the word has not changed
    // since this thread wrote it, and the run has been the same since. But it may be a later run in the same object:
    // the slot was evicted, the run buried, and this thread made another of it, still under the old incarnation.
    // R.shape - acquire.
    const Unit first = (entry.start - entry.index * magazine.length.load(std::memory_order_relaxed)) >> granule_log2_;
    const bool same = run.identity.load(std::memory_order_acquire) == RunIdentity::of(first, magazine.class_code).raw;
    std::uint64_t expected = old.raw;
    base::yield_point("magazine.carry");
    // A.slot - acq_rel: whoever evicted the slot meanwhile has it.
    if (same &&
        entry.word->compare_exchange_strong(expected, now.raw, std::memory_order_acq_rel, std::memory_order_relaxed))
      magazine.put(kept++, entry);
  }
  magazine.adopt(me.incarnation());
  magazine.forget_handed_out();
  bump(magazine.intake, static_cast<std::int64_t>(kept) - static_cast<std::int64_t>(had));
  magazine.resize(kept);
  // A doomed run's slots are not handed out again. They are rare: sort them out one by one.
  for (unsigned i = 0; i < magazine.size();) {
    const MagazineEntry entry = magazine.entry(i);
    // R.doomed - seq_cst: set_usable() dooms runs before it closes incarnations.
    if ((entry.run().flags.load(std::memory_order_seq_cst) & Run::doomed) == 0) {
      ++i;
      continue;
    }
    magazine.resize(magazine.size() - 1);
    magazine.put(i, magazine.entry(magazine.size()));
    bump(magazine.intake, std::int64_t{-1});
    put_back(me, {&entry, 1}, magazine.incarnation);
  }
  magazine.forget_handed_out();
}

// After a slot of the class left this thread in another way than out of its magazine: I4 of thread_cache.hpp.
void AllocatorCore::forget_handed_out(ThreadCache& me, ObjectId class_id) noexcept {
  if (class_id == 0) return;
  // relaxed: only the owner writes the place.
  Magazine* const magazine =
      me.magazines[magazine_place(class_at(class_id)->key, granule_log2_)].load(std::memory_order_relaxed);
  if (magazine->class_id == class_id) magazine->forget_handed_out();
}

// Marks slots that have just become free in their run's word and on the shelf. Inside a section. Answers with the word.
std::uint64_t AllocatorCore::note_free_slots(Run& run, std::uint64_t mask) noexcept {
  base::yield_point("run.free_bits");
  // W.bits - seq_cst: the shelf's handshake; release: the slots' words come first.
  const std::uint64_t before = run.bits.fetch_or(mask, std::memory_order_seq_cst);
  // relaxed: they do not change while the section protects the run.
  const std::uint32_t position = run.position.load(std::memory_order_relaxed);
  const ObjectId c = run.length_class.load(std::memory_order_relaxed);
  if (c == 0) return before | mask;
  LengthClass& length_class = *class_at(c);
  // relaxed: a statistic.
  length_class.slots_free.fetch_add(std::popcount(mask & ~before), std::memory_order_relaxed);
  if (before == 0 && position != Run::no_position) length_class.shelf.set_ready(arena_, position);
  return before | mask;
}

// Takes bits out of a run's word, whether or not the slots are free.
void AllocatorCore::note_taken_slots(Run& run, std::uint64_t mask) noexcept {
  // A.bits - seq_cst: nobody finds these slots by the word any more; who has taken some already keeps them.
  const std::uint64_t before = run.bits.fetch_and(~mask, std::memory_order_seq_cst);
  // relaxed: does not change while the caller keeps the run; a statistic.
  if (const ObjectId c = run.length_class.load(std::memory_order_relaxed); c != 0)
    class_at(c)->slots_free.fetch_sub(std::popcount(before & mask), std::memory_order_relaxed);
}

// hoarded by `owner`, an incarnation of ours -> free. False if somebody took the slot meanwhile.
bool AllocatorCore::put_back_slot(ThreadCache& me, SlotWordPtr word, Incarnation owner) noexcept {
  base::yield_point("put_back.announce");
  base::announce(me.busy, word);
  base::yield_point("put_back.check");
  // R.state - seq_cst: the owner's load of the handshake (thread_cache.hpp, I1).
  const bool ours = me.state.load(std::memory_order_seq_cst) == owner.raw;
  base::yield_point("put_back.free");
  // W.slot - release: nobody but us changes the slot.
  if (ours) word->store(SlotWord::of(SlotState::free).raw, std::memory_order_release);
  // W.idle - release, pairs with R.busy.
  me.busy.store(nullptr, std::memory_order_release);
  if (ours) return true;
  std::uint64_t expected = SlotWord::of(SlotState::hoarded, owner).raw;
  base::yield_point("slot.put_back");
  // A.slot - acq_rel: hoarded -> free. It fails if a claim took the slot.
  return word->compare_exchange_strong(expected, SlotWord::of(SlotState::free).raw, std::memory_order_acq_rel,
                                       std::memory_order_relaxed);
}

// Hoarded slots go back to their runs. Not inside a section.
void AllocatorCore::put_back(ThreadCache& me, std::span<const MagazineEntry> entries, Incarnation owner) noexcept {
  constexpr unsigned sparse_max = Magazine::entries_max;
  std::array<Run*, sparse_max> seen;  // runs to look at again when the section is over
  unsigned sparse_count = 0;
  {
    MapSection section{map_, me};  // keeps each run from being reused between its slot's word and its bits
    for (std::size_t i = 0; i < entries.size();) {
      Run& run = entries[i].run();
      std::uint64_t mask = 0;
      for (; i < entries.size() && &entries[i].run() == &run; ++i) {
        if (put_back_slot(me, entries[i].word, owner)) mask |= std::uint64_t{1} << entries[i].index;
      }
      if (mask == 0) continue;
      const auto unused = static_cast<unsigned>(std::popcount(note_free_slots(run, mask)));
      // R.doomed - seq_cst: see free().
      const bool doomed = (run.flags.load(std::memory_order_seq_cst) & Run::doomed) != 0;
      // relaxed: does not change while the section protects the run.
      const bool is_sparse = sparse(unused, run.slots.load(std::memory_order_relaxed));
      if ((doomed || is_sparse) && sparse_count < sparse_max) seen[sparse_count++] = &run;
    }
  }
  for (unsigned i = 0; i < sparse_count; ++i) {
    if (LengthClass* const c = give_back(me, *seen[i])) give_back_more(me, *c);
  }
}

void AllocatorCore::flush(ThreadCache& me, Magazine& magazine, unsigned count) noexcept {
  std::array<MagazineEntry, Magazine::entries_max> leaving;
  for (unsigned i = 0; i < count; ++i) leaving[i] = magazine.entry(i);
  put_back(me, {leaving.data(), count}, magazine.incarnation);
  for (unsigned i = count; i < magazine.size(); ++i) magazine.put(i - count, magazine.entry(i));
  bump(magazine.intake, -static_cast<std::int64_t>(count));
  magazine.resize(magazine.size() - count);
  magazine.forget_handed_out();
}

// A run gives its free slots back to the map: a doomed one always; another if at least three quarters of it are free
// and its class keeps more than it may. Then it is doomed too, so that it drains: it would stay for as long as the last
// interval in it. The answer is the class that kept too much. The object may have become another run by now, which
// then is treated the same. Not inside a section.
LengthClass* AllocatorCore::give_back(ThreadCache& me, Run& run) noexcept {
  LengthClass* surplus = nullptr;
  {
    MapSection section{map_, me};
    // R.shape - acquire: the run is in this section's version or later, so the section protects what follows.
    const RunShape shape = RunShape::load(run);
    if (!shape.valid() || run.born.load(std::memory_order_acquire) > section.version() || !shape.unchanged(run))
      return nullptr;
    // R.doomed - seq_cst: see free().
    if ((run.flags.load(std::memory_order_seq_cst) & Run::doomed) == 0) {
      // relaxed: does not change while the section protects the run.
      const ObjectId c = run.length_class.load(std::memory_order_relaxed);
      if (c == 0) return nullptr;
      // R.bits - seq_cst: as in note_free_slots().
      const auto unused = static_cast<unsigned>(std::popcount(run.bits.load(std::memory_order_seq_cst)));
      LengthClass& length_class = *class_at(c);
      // relaxed: a statistic.
      const std::int64_t kept = length_class.slots_free.load(std::memory_order_relaxed);
      if (!sparse(unused, shape.slots) || kept <= static_cast<std::int64_t>(kept_slots(length_class))) return nullptr;
      surplus = &length_class;
      if (unused < shape.slots) {
        base::yield_point("run.drain");
        // seq_cst: as in set_usable(), but here nothing depends on who sees it: a slot that its owner's magazine hoards
        // meanwhile is handed out once more.
        run.flags.fetch_or(Run::doomed, std::memory_order_seq_cst);
        forget_starts(run, shape);
      }
    }
    base::yield_point("run.retire");
    note_taken_slots(run, ~std::uint64_t{0});
    for (unsigned i = 0; i < shape.slots && i < Run::slots_max; ++i) {
      // relaxed: the CAS decides.
      std::uint64_t expected = run.slot(i).load(std::memory_order_relaxed);
      if (SlotWord{expected}.state() != SlotState::free) continue;
      base::yield_point("slot.settle");
      // A.slot - acq_rel: free -> settled; settle() follows.
      run.slot(i).compare_exchange_strong(expected, SlotWord::of(SlotState::settled).raw, std::memory_order_acq_rel,
                                          std::memory_order_relaxed);
    }
  }
  settle(me, run);
  return surplus;
}

// As a class declines, the runs that it kept when it was larger are looked at too: a few for each one that gave back.
void AllocatorCore::give_back_more(ThreadCache& me, LengthClass& c) noexcept {
  for (unsigned turn = 0; turn < sweep_runs; ++turn) {
    // relaxed: threads that sweep at once may look at the same runs.
    const auto found = c.shelf.next_ready(arena_, c.sweep.load(std::memory_order_relaxed));
    c.sweep.store(found ? found->position + 1 : 0, std::memory_order_relaxed);
    if (found) give_back(me, *arena_.at<Run>(found->run));
  }
}

// Up to `want` slots from a run of the class. False when none was found at once.
bool AllocatorCore::take_from_shelf(ThreadCache& me, Magazine& magazine, unsigned want) noexcept {
  LengthClass& c = *magazine.length_class;
  const SlotWord mine = SlotWord::of(SlotState::hoarded, magazine.incarnation);
  MapSection section{map_, me};
  for (unsigned tries = 0; tries < shelf_tries_max; ++tries) {
    const auto found = c.shelf.find_ready(arena_, me.index * 7);
    if (!found) return false;
    Run& run = *arena_.at<Run>(found->run);
    const RunShape shape = RunShape::load(run);
    // R.shape - acquire.
    if (run.born.load(std::memory_order_acquire) > section.version()) section.renew();
    const bool ours = run.length_class.load(std::memory_order_acquire) == magazine.class_id;
    std::uint64_t bits = run.bits.load(std::memory_order_seq_cst);
    // R.doomed - seq_cst: not doomed now, so the section's version is below what bury() stamps; see era.hpp.
    const bool doomed = (run.flags.load(std::memory_order_seq_cst) & Run::doomed) != 0;
    if (!ours || !shape.valid() || !shape.unchanged(run)) continue;
    if (doomed) {
      c.shelf.clear_ready(arena_, found->position);
      continue;
    }
    std::uint64_t taken = 0;
    while (bits != 0) {
      taken = 0;
      std::uint64_t left = bits;
      for (unsigned n = 0; n < want && left != 0; ++n) {
        const std::uint64_t one = direction_ == Direction::bottom_up ? left & -left : std::bit_floor(left);
        taken |= one;
        left &= ~one;
      }
      base::yield_point("run.take_bits");
      // A.bits - seq_cst: the shelf's handshake.
      if (run.bits.compare_exchange_weak(bits, bits & ~taken, std::memory_order_seq_cst)) {
        bits &= ~taken;
        break;
      }
      taken = 0;  // lock-free: another thread changed the word
    }
    if (bits == 0) {
      c.shelf.clear_ready(arena_, found->position);
      base::yield_point("run.recheck");
      // R.bits - seq_cst: slots freed since then set the shelf's bit themselves, or we do.
      if (run.bits.load(std::memory_order_seq_cst) != 0 && shape.unchanged(run))
        c.shelf.set_ready(arena_, found->position);
    }
    if (taken == 0) continue;
    // relaxed: a statistic.
    c.slots_free.fetch_sub(std::popcount(taken), std::memory_order_relaxed);
    unsigned got = 0;
    unsigned index_of_last = 0;
    while (taken != 0) {
      // The slot to be handed out first is pushed last.
      const auto index = direction_ == Direction::bottom_up ? static_cast<unsigned>(std::bit_width(taken)) - 1
                                                            : static_cast<unsigned>(std::countr_zero(taken));
      taken &= ~(std::uint64_t{1} << index);
      std::uint64_t expected = SlotWord::of(SlotState::free).raw;
      base::yield_point("slot.take");
      // A.slot - acq_rel: free -> hoarded. It fails if a claim or an eviction took the slot; its bit was only a hint.
      if (!run.slot(index).compare_exchange_strong(expected, mine.raw, std::memory_order_acq_rel,
                                                   std::memory_order_relaxed))
        continue;
      index_of_last = index;
      push(magazine, MagazineEntry::of(bytes_of(shape.slot_range(index).first), run, index));
      ++got;
    }
    bump(magazine.intake, std::int64_t{got});
    if (got == 0) continue;
    note_start(run, shape.first, shape.length, shape.slots, shape.slot_range(index_of_last).first);
    return true;
  }
  return false;
}

// Gets at least one entry into an empty magazine. Not inside a section.
bool AllocatorCore::refill(ThreadCache& me, Magazine& magazine, Unit last_max) noexcept {
  LengthClass& c = *magazine.length_class;
  magazine.capacity = capacity_for(c);
  const unsigned want = std::max(1U, (magazine.capacity + 1) / 2);
  if (take_from_shelf(me, magazine, want)) return true;
  unsigned slots = run_slots_for(c);
  bool unaligned = false;
  for (;;) {
    const unsigned first_count = std::min(slots, want);
    // Large runs of a power of two begin where their hints' blocks do, so that each has one hint; if there is no such
    // place, anywhere that suits the slots.
    const bool hint_aligned = slots == run_many_slots && !unaligned && base::is_power_of_two(c.key.length());
    const unsigned align_log2 = c.key.align_log2() + (hint_aligned ? floor_log2(slots) : 0);
    const MadeRun made = make_run(me, {.length = c.key.length(),
                                       .slots = slots,
                                       .align_log2 = align_log2,
                                       .last_max = last_max,
                                       .kind = RunKind::shelved,
                                       .length_class = magazine.class_id,
                                       .first_word = SlotWord::of(SlotState::hoarded, magazine.incarnation),
                                       .first_count = first_count,
                                       .at = std::nullopt,
                                       .at_slot = 0});
    if (made.outcome == Outcome::done) {
      for (unsigned n = first_count; n-- > 0;) {
        const unsigned index = direction_ == Direction::bottom_up ? n : slots - 1 - n;
        const Unit start = made.first + index * c.key.length();
        push(magazine, MagazineEntry::of(bytes_of(start), *made.run, index));
        note_start(*made.run, made.first, c.key.length(), slots, start);
      }
      bump(magazine.intake, std::int64_t{first_count});
      return true;
    }
    if (hint_aligned) {
      unaligned = true;
      continue;
    }
    if (slots == 1) return false;
    slots = slots > run_few_slots ? run_few_slots : slots > run_single_slots ? run_single_slots : 1;
  }
}

}  // namespace iovane::iova
