// The two paths that nearly every call takes, inline: pop a magazine's entry, push a freed interval.
//
// Both are the owner's half of the protocol in thread_cache.hpp: announce the slot, look whether the incarnation is
// still open, change the slot's word by a plain store, withdraw the announcement. No read-modify-write, no fence.
// The caller comes here through ThreadSlots, so announce_fast() is allowed.
// Proven by: tests/litmus/interval_allocator_test.cpp.
#pragma once

#include <cstdint>
#include <optional>

#include "base/asymmetric_barrier.hpp"
#include "base/yield_point.hpp"
#include "iova/thread_cache.hpp"

namespace iovane::iova {

/// The start of an interval of `length` bytes, or nothing when the magazine of that length is empty or absent, or the
/// incarnation was closed.
inline std::optional<std::uint64_t> pop_fast(ThreadCache& me, std::uint64_t length) noexcept {
  // relaxed: only the owner writes the place.
  Magazine& magazine = *me.magazines[place_of_length(length >> me.granule_log2)].load(std::memory_order_relaxed);
  const std::uint32_t n = magazine.size();
  // relaxed: only the owner writes it.
  if (magazine.length.load(std::memory_order_relaxed) != length || n == 0) [[unlikely]]
    return std::nullopt;
  const MagazineEntry entry = magazine.entries[n - 1];
  base::yield_point("pop.announce");
  base::announce_fast(me.busy, entry.word);
  base::yield_point("pop.check");
  // R.state - seq_cst: the owner's load of the handshake (thread_cache.hpp, I1).
  if (me.state.load(std::memory_order_seq_cst) != magazine.incarnation.raw) [[unlikely]] {
    // W.idle - release, pairs with R.busy.
    me.busy.store(nullptr, std::memory_order_release);
    return std::nullopt;
  }
  base::yield_point("pop.live");
  // W.slot - release: linearization of an allocation by magazine.
  entry.word->store(me.live_word.raw, std::memory_order_release);
  magazine.resize(n - 1);
  base::yield_point("pop.idle");
  // W.idle - release, pairs with R.busy: who finds the announcement gone finds the slot live.
  me.busy.store(nullptr, std::memory_order_release);
  return entry.start();
}

/// Takes back [start, last] if it is live, biased to this thread's open incarnation, found by the hint of `shift`, and
/// the magazine of its length has room. False: nothing happened. Any two addresses may be given.
inline bool push_fast(ThreadCache& me, Magazine& magazine, std::uint64_t start, std::uint64_t length,
                      unsigned shift) noexcept {
  // The slot's word by the hint alone, so that its cache miss and the run's overlap.
  const HintEntry& hint = me.hints[HintTable::index(start, shift)];
  // relaxed: hints.
  const std::uint64_t offset = start - hint.first.load(std::memory_order_relaxed);
  Run* const run = hint.run.load(std::memory_order_relaxed);
  const auto index = static_cast<std::uint64_t>((static_cast<Wide>(offset) * magazine.reciprocal) >> 64);
  if (run == nullptr) return false;
  // R.shape - acquire. An object that was a run holds runs of its size for ever, so a slot below this number has a
  // word.
  const RunTag tag{run->tag.load(std::memory_order_acquire)};
  if (index >= tag.slots()) return false;
  const SlotWordPtr word = &run->slot(static_cast<unsigned>(index));

  base::yield_point("push.announce");
  base::announce_fast(me.busy, word);
  base::yield_point("push.check");
  // R.state - seq_cst: the owner's load of the handshake (thread_cache.hpp, I1).
  const std::uint64_t state = me.state.load(std::memory_order_seq_cst);
  // R.slot - acquire: a slot that is live and biased to us stays so until we change it, and its run with it. An
  // unchanged tag proves that word and fields belong to one run.
  const std::uint64_t seen = word->load(std::memory_order_acquire);
  const bool ours = state == magazine.incarnation.raw && seen == magazine.live_raw &&
                    (run->first.load(std::memory_order_acquire) << me.granule_log2) + index * length == start &&
                    run->length_class.load(std::memory_order_acquire) == magazine.class_id &&
                    // relaxed: the acquire loads before it keep it last.
                    run->tag.load(std::memory_order_relaxed) == tag.raw;
  if (ours) [[likely]] {
    base::yield_point("push.hoard");
    // W.slot - release: linearization of a free into a magazine.
    word->store(magazine.live_raw ^ live_to_hoarded, std::memory_order_release);
    const std::uint32_t n = magazine.size();
    magazine.entries[n] = {start | index, word};
    magazine.resize(n + 1);
  }
  base::yield_point("push.idle");
  // W.idle - release, pairs with R.busy: who finds the announcement gone finds the slot hoarded.
  me.busy.store(nullptr, std::memory_order_release);
  return ours;
}

inline bool push_fast(ThreadCache& me, std::uint64_t start, std::uint64_t last) noexcept {
  const std::uint64_t length = last - start + 1;
  // relaxed: only the owner writes the place.
  Magazine& magazine = *me.magazines[place_of_length(length >> me.granule_log2)].load(std::memory_order_relaxed);
  // relaxed: only the owner writes it.
  if (magazine.length.load(std::memory_order_relaxed) != length || magazine.size() >= magazine.capacity) [[unlikely]]
    return false;
  return push_fast(me, magazine, start, length, magazine.coarse_shift) ||
         push_fast(me, magazine, start, length, magazine.fine_shift);
}

}  // namespace iovane::iova
