// Per-thread guard words: how a lease is announced without writing a shared line.
//
// Purpose: let a thread use a region, and a table of the index, with plain stores to its own cache lines; let the
//   reclaimer find out who uses what.
// Roles: the owner thread writes its words; the reclaimer (one at a time per index) reads all words.
// Progress: owner wait-free; scan bounded by threads_max * words_per_thread.
// State word (64 bits):
//   0                                             idle
//   [key >> 12 : 46 bits at 12][width : 6 bits at 1][1]   walking: reading tables for keys in the aligned block of
//                                                 2^width bytes around key; nothing is known yet
//   [index number : 12 at 32][region id : 24 at 4][2 at 0] leased: using that region
// Invariants: I1 a thread walks or leases only what its word announced before light_barrier(). I2 walking turns into
// leased by
//   one store, so that no instant shows neither. I3 a word returns to 0 with release after the last use.
// Reclamation argument: the reclaimer takes a region or a table out of the tables, passes heavy_barrier(), then reads
// all
//   words. A reader whose walk began early enough to find the region stored "walking" before light_barrier() and its
//   walk's loads; as it found what the reclaimer's store removes, the barrier's guarantee says that the reclaimer sees
//   that store or a later one of the same word (I2). So a region for which no word says leased and no walking word's
//   block touches its range is out of use, and stays so, for no later walk can find it. The same holds for tables. The
//   idea is that of hazard pointers (M. Michael, "Hazard Pointers: Safe Memory Reclamation for Lock-Free Objects", IEEE
//   TPDS 15(6), 2004) with an asymmetric barrier; unlike there, the walk is announced by what is searched, so a reader
//   never has to look twice.
// Fork: the child inherits words of threads that it does not have; indices are closed in a child (see PinIndex).
// Proven by: tests/stress/pin_lease_stress_test.cpp, tests/unit/pin_index_test.cpp.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>

#include "base/cacheline.hpp"
#include "pinning/memory_range.hpp"
#include "pinning/region.hpp"

namespace iovane::pinning {

using GuardWord = std::uint64_t;

constexpr GuardWord idle_guard = 0;
/// `width`: how many low bits the searched keys may differ in.
constexpr GuardWord walking_guard(const MemoryRange& searched) noexcept {
  // A granule at least: lower bits are not kept, and a width that is never 0 needs no branch.
  const auto width = static_cast<std::uint64_t>(std::bit_width((searched.start ^ searched.last) | (granule_bytes - 1)));
  return (searched.start & ~(granule_bytes - 1)) | (width << 1) | 1U;
}
constexpr GuardWord leased_guard(std::uint32_t index_number, RegionId id) noexcept {
  return (std::uint64_t{index_number} << 32) | (std::uint64_t{id} << region_id_shift) | 2U;
}
constexpr bool is_walking(GuardWord w) noexcept { return (w & 1U) != 0; }
/// The keys that a walking word may be about.
constexpr MemoryRange walked_keys(GuardWord w) noexcept {
  const std::uint64_t key = w & RegionRecord::start_mask;
  const std::uint64_t block = std::uint64_t{1} << ((w >> 1) & 63U);
  return {key & ~(block - 1), key | (block - 1)};
}

/// One thread's words. Two cache lines, written by their owner only.
///
/// A free word is found by looking, not in a mask: a mask would chain every lease to the drop before it through two
/// store-to-load forwardings, which is a third of a hit's time.
struct alignas(base::cacheline_bytes) ThreadGuards {
  /// Leases that a thread may hold at once without a counted hold.
  static constexpr unsigned lease_words = 13;
  /// The word for walks that take no lease.
  static constexpr unsigned walk_word = lease_words;

  std::array<std::atomic<GuardWord>, lease_words + 1> words{};
  std::atomic<std::uint32_t> owned{0};

  /// A word without a lease, or null. Owner only.
  std::atomic<GuardWord>* free_word() noexcept {
    for (unsigned i = 0; i < lease_words; ++i)
      // relaxed: only this thread writes it.
      if (words[i].load(std::memory_order_relaxed) == idle_guard) return &words[i];
    return nullptr;
  }
  bool all_free() const noexcept {
    for (unsigned i = 0; i < lease_words; ++i)
      if (words[i].load(std::memory_order_relaxed) != idle_guard) return false;  // relaxed: as above
    return true;
  }
};
static_assert(sizeof(ThreadGuards) == base::cacheline_bytes);

/// The process's guard blocks. Blocks are never freed, only handed to the next thread.
class LeaseGuards {
 public:
  static constexpr std::size_t threads_max = 4096;

  /// This thread's block, or null before attach(). Initial-exec: one load, also from a shared library.
  static ThreadGuards* current() noexcept { return current_; }
  /// A word of this thread that no lease has, or null: none is left, or there is no block yet.
  static std::atomic<GuardWord>* free_word() noexcept {
    ThreadGuards* const guards = current();
    return guards != nullptr ? guards->free_word() : nullptr;
  }
  /// Gives this thread a block; it goes back when the thread ends. Null when threads_max threads have one: then
  /// leases are counted under the index's lock. May allocate (mmap), takes a lock.
  static ThreadGuards* attach() noexcept;

  /// Calls f(word) for every word that is not idle. A.guard - acquire, pairs with R.guard in Lease::drop().
  template <typename F>
  static void for_each_busy(F&& f) noexcept {
    // A.blocks - acquire, pairs with the release in attach(): the block's memory is there.
    const std::size_t used = blocks_used_.load(std::memory_order_acquire);
    for (std::size_t i = 0; i < used; ++i)
      for (const auto& word : blocks_[i].words) {
        const GuardWord w = word.load(std::memory_order_acquire);
        if (w != idle_guard) f(w);
      }
  }

 private:
  static constinit thread_local ThreadGuards* current_ __attribute__((tls_model("initial-exec")));
  static std::atomic<std::size_t> blocks_used_;
  static ThreadGuards* blocks_;
};

}  // namespace iovane::pinning
