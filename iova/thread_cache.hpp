// A thread's own store of free intervals, and the licence to use it without atomic read-modify-writes.
//
// Purpose: allocate() and free() of a length that the thread used before are a pop and a push.
// Roles: the owner (one thread at a time) does everything here; any other thread may only *close* the current
//   incarnation, when it needs a slot that belongs to it: a biased live interval that it frees, or a hoarded one inside
//   a range that it claims.
// Progress: the owner never waits: closed, it goes on with the next incarnation. The closer executes one heavy barrier.
// State word (ThreadCache::state): an Incarnation; low bits 0 open, 1 closing, 2 closed.
// Transitions: open -> closing (anyone, CAS) -> closed (anyone, CAS, after a heavy barrier) -> next generation's open
//   (owner, store; from closing too).
// Invariants: I1 the owner changes a slot by a plain store only between announcing it in `busy` and clearing `busy`,
//   and only after finding, in between, the state open. I2 a thread other than the owner changes a slot that carries
//   incarnation i only after i was closed or passed and, if it is still the current one, `busy` does not name the slot.
//   I3 every entry of a magazine whose `incarnation` is the open one names a slot that is hoarded by it, once.
//   I4 an entry above a magazine's top names no_slot, or a slot that was handed out from there under the same
//   incarnation and whose run has not ended since: whatever else takes a slot of the magazine's class from this thread
//   forgets those entries.
// Why that is exclusive: announce / load state  against  CAS state / heavy barrier / load busy is Dekker's handshake
//   (base/asymmetric_barrier.hpp). Either the owner sees the closing and leaves the slot alone, or the closer sees the
//   announcement and leaves it alone. A `busy` that was cleared was cleared with release, so the closer sees the
//   owner's store.
// When the closer finds the slot announced: the owner is in the middle of handing out or taking back exactly this
//   interval, perhaps stopped there. The slot then counts as live and the other call fails, naming it: its order is
//   before the owner's free or after the owner's allocation. Nobody waits.
// Linearization: the owner's store to the slot's word; the other thread's CAS on it.
// ABA: generations have 48 bits and never repeat.
// Source: biased locking with revocation, as in Kawachiya, Koseki, Onodera, OOPSLA 2002, per interval and without a
// lock. Proven by: tests/litmus/interval_allocator_test.cpp (every step frozen),
// tests/stress/interval_allocator_test.cpp.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "iova/era.hpp"
#include "iova/length_class.hpp"
#include "iova/run.hpp"

namespace iovane::iova {

/// Where free() looks first: from an interval's start and length to its run.
///
/// Two entries per interval: a coarse one shared by 64 neighbours of its length, for runs of many slots, and a fine one
/// of its own. An entry's two words may belong to different runs; the run itself is checked.
struct HintEntry {
  std::atomic<std::uint64_t> first;  ///< of the run, in bytes
  std::atomic<Run*> run;
};

struct HintTable {
  static constexpr unsigned bits = 17;
  static constexpr unsigned coarse_log2 = 6;
  static constexpr std::uint64_t salt(unsigned shift) noexcept { return std::uint64_t{shift} << 10; }
  static constexpr std::size_t index(std::uint64_t start, unsigned shift, std::uint64_t salt_of_shift) noexcept {
    const std::uint64_t block = shift < 64 ? start >> shift : 0;  // an interval may be the whole space
    return static_cast<std::size_t>((block ^ (block >> 16) ^ salt_of_shift) & ((std::uint64_t{1} << bits) - 1));
  }
  static constexpr std::size_t index(std::uint64_t start, unsigned shift) noexcept {
    return index(start, shift, salt(shift));
  }
};

/// A hoarded slot. Addresses are in bytes here, so that the fast paths need not convert.
struct MagazineEntry {
  std::uint64_t start = 0;
  SlotWordPtr word = nullptr;
  std::uint8_t index = 0;  ///< of the slot in its run

  static MagazineEntry of(std::uint64_t start, Run& run, unsigned index) noexcept {
    return {start, &run.slot(index), static_cast<std::uint8_t>(index)};
  }
  Run& run() const noexcept { return *(reinterpret_cast<Run*>(word - index) - 1); }
};

/// A word that is never live.
extern constinit std::atomic<std::uint64_t> no_slot;

inline constexpr std::uint64_t live_to_hoarded =
    static_cast<std::uint64_t>(SlotState::live) ^ static_cast<std::uint64_t>(SlotState::hoarded);

struct alignas(64) Magazine : ArenaObject {
  static constexpr unsigned entries_max = 64;
  std::atomic<std::uint32_t> count;   ///< written by the owner, read for statistics
  std::atomic<std::uint64_t> length;  ///< bytes, 0: in nobody's use
  Incarnation incarnation;            ///< whose the entries are
  std::uint64_t live_raw;             ///< a slot's word that is live and biased to `incarnation`
  std::uint64_t reciprocal;           ///< 2^64 / length rounded up
  std::uint32_t capacity;             ///< below entries_max, so that one more always has room
  std::uint32_t class_code;           ///< LengthClass::code
  std::uint8_t granule_turn;          ///< granule_log2 - 12
  std::uint8_t coarse_shift;          ///< see HintTable
  std::uint8_t fine_shift;
  std::uint32_t coarse_salt;
  // Behind the first cache line: the entries, and what only the shared level uses. An entry's parts lie apart: what the
  // next allocation answers with is exactly what a free stored, so one's latency does not wait for the other's search.
  struct Interval {
    std::uint64_t start;
    SlotWordPtr word;
  } intervals[entries_max];
  std::uint8_t indices[entries_max];
  ObjectId class_id;
  std::atomic<std::int64_t> intake;  ///< entries from runs less entries to runs: intake - count are live, net
  LengthClass* length_class;

  MagazineEntry entry(std::uint32_t i) const noexcept { return {intervals[i].start, intervals[i].word, indices[i]}; }
  void put(std::uint32_t i, const MagazineEntry& e) noexcept {
    intervals[i] = {e.start, e.word};
    indices[i] = e.index;
  }
  void adopt(Incarnation i) noexcept {
    incarnation = i;
    live_raw = SlotWord::of(SlotState::live, i).raw;
  }
  void forget_handed_out() noexcept {
    for (std::uint32_t i = size(); i < entries_max; ++i) intervals[i].word = &no_slot;
  }
  std::uint32_t size() const noexcept {
    // relaxed: only the owner writes it.
    return count.load(std::memory_order_relaxed);
  }
  void resize(std::uint32_t n) noexcept {
    // relaxed: statistics readers want a number of some moment.
    count.store(n, std::memory_order_relaxed);
  }
};

/// Stands in every place without a magazine: no request has its length. Never written.
extern constinit Magazine no_magazine;

struct alignas(64) ThreadCache : ArenaObject, Participant {
  static constexpr std::uint64_t open = 0;
  static constexpr std::uint64_t closing = 1;
  static constexpr std::uint64_t closed = 2;

  std::atomic<std::uint64_t> state;
  std::atomic<SlotWordPtr> busy;  ///< the slot being changed, null for none
  SlotWord live_word;             ///< what a slot that this thread hands out says
  std::uint64_t place_multiplier;
  const HintEntry* hints;
  std::uint32_t index;
  std::atomic<std::uint32_t> owned;            ///< 1 while a thread has it
  std::atomic<std::uint32_t> freed_by_others;  ///< this incarnation was closed to free a biased interval
  std::uint64_t generation;
  std::uint64_t unbiased_frees_left;          ///< own frees until intervals are biased again
  std::uint64_t unbiased_frees_next;          ///< how long the next such period lasts
  std::atomic<std::int64_t> other_intervals;  ///< live intervals that went through no magazine, net
  std::atomic<std::int64_t> other_units;
  std::array<std::atomic<Magazine*>, magazine_places> magazines;

  Incarnation incarnation() const noexcept { return Incarnation::of(index, generation); }
};

/// Adds to a counter that only its owner writes.
template <typename T>
inline void bump(std::atomic<T>& counter, T by) noexcept {
  // relaxed: one writer; readers want a number of some moment.
  counter.store(counter.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
}

}  // namespace iovane::iova
