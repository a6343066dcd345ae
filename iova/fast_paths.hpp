// The two paths that nearly every call takes, inline: pop a magazine's entry, push a freed interval.
//
// A free looks first at the entry that was handed out last: what is freed in the reverse order needs no hint.
// Both are the owner's half of the protocol in thread_cache.hpp: announce the slot, look whether the incarnation is
// still open, change the slot's word by a plain store, withdraw the announcement. No read-modify-write, no fence.
// The caller comes here through ThreadSlots, so announce_fast() is allowed.
// Proven by: tests/litmus/interval_allocator_test.cpp.
#pragma once

#include <bit>
#include <cstdint>

#include "base/asymmetric_barrier.hpp"
#include "base/yield_point.hpp"
#include "iova/thread_cache.hpp"

namespace iovane::iova {

/// What pop_fast() answers when it has nothing: no start, since those are multiples of a granule.
inline constexpr std::uint64_t nothing_popped = 1;

/// The start of an interval of `length` bytes, or nothing_popped when the magazine of that length is empty or absent,
/// or the incarnation was closed.
inline std::uint64_t pop_fast(ThreadCache& me, std::uint64_t length) noexcept {
  // relaxed: only the owner writes the place.
  Magazine& magazine = *me.magazines[place_of_length(length, me.place_multiplier)].load(std::memory_order_relaxed);
  const std::uint32_t n = magazine.size();
  // relaxed: only the owner writes it.
  if (magazine.length.load(std::memory_order_relaxed) != length || n == 0) [[unlikely]]
    return nothing_popped;
  const Magazine::Interval top = magazine.intervals[n - 1];
  base::yield_point("pop.announce");
  base::announce_fast(me.busy, top.word);
  base::yield_point("pop.check");
  // R.state - seq_cst: the owner's load of the handshake (thread_cache.hpp, I1).
  if (me.state.load(std::memory_order_seq_cst) != magazine.incarnation.raw) [[unlikely]] {
    // W.idle - release, pairs with R.busy.
    me.busy.store(nullptr, std::memory_order_release);
    return nothing_popped;
  }
  base::yield_point("pop.live");
  // W.slot - release: linearization of an allocation by magazine.
  top.word->store(me.live_word.raw, std::memory_order_release);
  magazine.resize(n - 1);
  base::yield_point("pop.idle");
  // W.idle - release, pairs with R.busy: who finds the announcement gone finds the slot live.
  me.busy.store(nullptr, std::memory_order_release);
  return top.start;
}

/// Takes back the interval if it is live, biased to this thread's open incarnation, found by that hint, and
/// of the magazine's length, which has room. False: nothing happened. Any start may be given.
[[gnu::always_inline]] inline bool push_by_hint(ThreadCache& me, Magazine& magazine, std::uint64_t start,
                                                std::uint64_t length, std::size_t hint_index) noexcept {
  // The slot's word by the hint alone, so that its cache miss and the run's overlap.
  const HintEntry& hint = me.hints[hint_index];
  // relaxed: hints.
  const std::uint64_t offset = start - hint.first.load(std::memory_order_relaxed);
  Run* const run = hint.run.load(std::memory_order_relaxed);
  const auto index = static_cast<std::uint64_t>((static_cast<Wide>(offset) * magazine.reciprocal) >> 64);
  if (run == nullptr) return false;
  // R.shape - acquire. An object that was a run holds runs of its size for ever, so a slot below this number has a
  // word, and in a run of fewer slots that word is left as settled.
  if (index >= run->slots.load(std::memory_order_acquire)) return false;
  const SlotWordPtr word = &run->slot(static_cast<unsigned>(index));

  base::yield_point("push.announce");
  base::announce_fast(me.busy, word);
  base::yield_point("push.check");
  // R.state - seq_cst: the owner's load of the handshake (thread_cache.hpp, I1).
  const std::uint64_t state = me.state.load(std::memory_order_seq_cst);
  // R.slot - acquire: a slot that is live and biased to us stays so until we change it, and its run with it.
  const std::uint64_t seen = word->load(std::memory_order_acquire);
  // Rotated, so that a start inside a granule keeps its low bits and equals no identity.
  const std::uint64_t first = std::rotr(start - index * length, magazine.granule_turn);
  const bool ours = state == magazine.incarnation.raw && seen == magazine.live_raw &&
                    // relaxed: the acquire load before it keeps it behind; the run has been ours since.
                    run->identity.load(std::memory_order_relaxed) - magazine.class_code == first;
  if (ours) [[likely]] {
    base::yield_point("push.hoard");
    // W.slot - release: linearization of a free into a magazine.
    word->store(magazine.live_raw ^ live_to_hoarded, std::memory_order_release);
    const std::uint32_t n = magazine.size();
    magazine.intervals[n] = {start, word};
    magazine.indices[n] = static_cast<std::uint8_t>(index);
    magazine.resize(n + 1);
  }
  base::yield_point("push.idle");
  // W.idle - release, pairs with R.busy: who finds the announcement gone finds the slot hoarded.
  me.busy.store(nullptr, std::memory_order_release);
  return ours;
}

/// The interval that stands just above the top of the magazine, because it was handed out from there, comes back:
/// without a search, since I4 of thread_cache.hpp says that the entry is still true if its slot is live and ours.
/// False: nothing happened.
[[gnu::always_inline]] inline bool push_again(ThreadCache& me, Magazine& magazine, std::uint32_t n) noexcept {
  const SlotWordPtr word = magazine.intervals[n].word;
  base::yield_point("push_again.announce");
  base::announce_fast(me.busy, word);
  base::yield_point("push_again.check");
  // R.state - seq_cst: the owner's load of the handshake (thread_cache.hpp, I1).
  const std::uint64_t state = me.state.load(std::memory_order_seq_cst);
  // relaxed: only the owner writes words that carry its open incarnation.
  const bool ours = state == magazine.incarnation.raw && word->load(std::memory_order_relaxed) == magazine.live_raw;
  if (ours) [[likely]] {
    base::yield_point("push_again.hoard");
    // W.slot - release: linearization of a free into a magazine.
    word->store(magazine.live_raw ^ live_to_hoarded, std::memory_order_release);
    magazine.resize(n + 1);
  }
  base::yield_point("push_again.idle");
  // W.idle - release, pairs with R.busy: who finds the announcement gone finds the slot hoarded.
  me.busy.store(nullptr, std::memory_order_release);
  return ours;
}

/// push_by_hint() by the other hint. Out of line: few frees need it.
bool push_by_fine_hint(ThreadCache& me, Magazine& magazine, std::uint64_t start, std::uint64_t length) noexcept;

/// Takes back [start, last], whole granules or not, if that is possible without any other thread.
[[gnu::always_inline]] inline bool push_fast(ThreadCache& me, std::uint64_t start, std::uint64_t last) noexcept {
  const std::uint64_t length = last - start + 1;
  // relaxed: only the owner writes the place.
  Magazine& magazine = *me.magazines[place_of_length(length, me.place_multiplier)].load(std::memory_order_relaxed);
  const std::uint32_t n = magazine.size();
  // relaxed: only the owner writes it.
  if (magazine.length.load(std::memory_order_relaxed) != length || n >= magazine.capacity) [[unlikely]]
    return false;
  if (magazine.intervals[n].start == start && push_again(me, magazine, n)) return true;
  if (push_by_hint(me, magazine, start, length, HintTable::index(start, magazine.coarse_shift, magazine.coarse_salt)))
      [[likely]]
    return true;
  return push_by_fine_hint(me, magazine, start, length);
}

}  // namespace iovane::iova
