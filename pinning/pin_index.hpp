// Which registered regions cover an address range, and leases on them.
//
// Purpose: the index of pinned memory. Lookups and leases by any thread without locks; changes under one lock.
// Roles: readers (translate, pieces, acquire), writers (everything else; the index locks itself).
// Progress: readers wait-free (a thread's very first call registers it and locks once); writers block each other.
// Linearization: see RadixTable; a lease exists from the moment its guard word says "walking" over a live region.
// Reclamation: see LeaseGuards. A region goes insert -> erase -> (in_use() says no) -> forget, and its id is reused
//   only then.
// Fork: in a child the index is empty and takes no region: the top table is wiped there by the kernel, for every kind
//   of fork. The child's destructor leaves the parent's pins alone.
// Proven by: tests/model/pin_index_model_test.cpp, tests/exhaustive/pin_index_exhaustive_test.cpp,
//   tests/stress/pin_lease_stress_test.cpp, tests/unit/pin_index_test.cpp.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>

#include "base/asymmetric_barrier.hpp"
#include "base/yield_point.hpp"
#include "iovane/result.hpp"
#include "iovane/types.hpp"
#include "pinning/lease.hpp"
#include "pinning/memory_range.hpp"
#include "pinning/radix_table.hpp"
#include "pinning/region.hpp"
#include "pinning/region_table.hpp"

namespace iovane::pinning {

/// Where a byte is for the device, and how many bytes from there on the same table slot answers for (a lower bound of
/// how far the region reaches).
struct Translation {
  std::uint64_t address = 0;
  std::uint64_t length_min = 0;
  RegionId id = no_region;
  Access access = Access::none;
};

class PinIndex {
 public:
  /// How many indices may live in a process at once: their numbers appear in guard words.
  static constexpr std::uint32_t indices_max = 4095;

  PinIndex() noexcept = default;
  PinIndex(const PinIndex&) = delete;
  PinIndex& operator=(const PinIndex&) = delete;
  /// Precondition: no lease and no hold is left.
  ~PinIndex();

  /// Reserves address space and a number. Once, before anything else. Errors: out_of_memory, limit_reached,
  /// unsupported (a kernel before 4.14).
  Result<void> open() noexcept;

  // Readers.

  /// Where `key` is, without a lease: the answer may be out of date when it is read. Any thread; not from a signal
  /// handler.
  std::optional<Translation> translate(std::uint64_t key) noexcept {
    if (key > key_last) return std::nullopt;
    ThreadGuards* guards = LeaseGuards::current();
    if (guards == nullptr) [[unlikely]]
      return translate_first(key);
    auto& word = guards->words[ThreadGuards::walk_word];
    // relaxed: ordered before the walk by light_barrier().
    word.store(walking_guard({key, key}), std::memory_order_relaxed);
    base::light_barrier();
    base::yield_point("pin.announced");
    const RadixTable::Found found = table_.find(key);
    // R.guard - release, pairs with A.guard: our reads come before the reuse of what we read.
    word.store(idle_guard, std::memory_order_release);
    if (found.word == 0) return std::nullopt;
    return Translation{found.address, found.slot_last - key + 1, found.id(), found.access()};
  }

  /// A lease on the region that covers `range.start` with at least the rights `need`; its length() says how much of
  /// the range that region covers. Empty when there is none. Any thread.
  /// `note_use` false leaves no trace for the eviction policy: the first use after a miss is not a re-use.
  template <bool note_use = true>
  [[gnu::always_inline]] Lease acquire(MemoryRange range, Access need) noexcept {
    std::atomic<GuardWord>* const word = LeaseGuards::free_word();
    if (word == nullptr || !range.well_formed()) [[unlikely]] {
      const SlowLease slow = acquire_without_guard(range, need, note_use);
      if (!slow.found) return {};
      return Lease{this, slow.word, slow.id, slow.address, slow.length};
    }
    return acquire_by<note_use>(*word, range, need);
  }
  /// The same, but empty also when this thread has no guard word left: then acquire() takes a lock and counts.
  [[gnu::always_inline]] Lease acquire_by_guard(MemoryRange range, Access need) noexcept {
    std::atomic<GuardWord>* const word = LeaseGuards::free_word();
    if (word == nullptr || !range.well_formed()) [[unlikely]]
      return {};
    return acquire_by<true>(*word, range, need);
  }

  /// The regions that cover parts of `range`, in order, clipped to it; gaps are what lies between them. Returns how
  /// many were written; when that is out.size(), ask again from behind the last one. Lock-free; a snapshot per piece.
  struct Piece {
    MemoryRange range;
    std::uint64_t address = 0;
    RegionId id = no_region;
    Access access = Access::none;
  };
  std::size_t pieces(const MemoryRange& range, std::span<Piece> out) noexcept;

  // Writers. Any thread; each takes the index's lock for itself. A cache that keeps its regions on lists calls them
  // with its own lock held as well, for state and list share a word of the record.

  /// Adds a region. The range must be granular and not overlap a live one (iova_busy names it). Takes no system call
  /// except for memory. Errors: invalid_argument, iova_busy, out_of_memory, limit_reached, closed (a forked child).
  Result<RegionId> insert(const MemoryRange& range, Access access, PinHandle handle, std::uint8_t node = 0) noexcept;
  /// Takes a live region out: no lookup that begins afterwards finds it. Its record stays until forget().
  void erase(RegionId id) noexcept;
  /// Undoes erase(). False when something else has been inserted there meanwhile or memory is short.
  bool restore(RegionId id) noexcept;
  /// Which of these erased regions may still be in use: sets in_use[i]. Passes the asymmetric barrier once and also
  /// frees tables that nobody walks. At most batch_max regions. Returns a set, bit i for erased[i]: those that only a
  /// lookup under way holds back, which is over as soon as its thread runs.
  static constexpr std::size_t batch_max = 64;
  std::uint64_t find_users(std::span<const RegionId> erased, std::span<bool> in_use) noexcept;
  /// Ends an erased region that find_users() found unused.
  void forget(RegionId id) noexcept;

  /// Whether a region is plainly in use now: by a counted hold. (A guard may say so too; see find_users().)
  bool is_held(RegionId id) const noexcept {
    // relaxed: a hint that saves work.
    return records_.at(id).holds.load(std::memory_order_relaxed) != 0;
  }
  /// Whether it was leased since the last call.
  bool take_accessed(RegionId id) noexcept;
  /// The first live region with a key in `range`.
  std::optional<Region> first_in(const MemoryRange& range) noexcept;
  /// A copy of a region's facts. The caller has a lease, a hold or is the only writer.
  Region region(RegionId id) const noexcept;
  RegionRecord& record(RegionId id) const noexcept { return records_.at(id); }

  /// True in a process forked from the one that opened the index.
  bool is_forked_copy() const noexcept;
  /// open() went through.
  bool is_open() const noexcept { return number_ != 0; }
  std::uint32_t region_count() const noexcept;
  /// Bytes of memory behind the index.
  std::size_t memory_bytes() const noexcept;

 private:
  friend class Lease;
  friend class Hold;
  template <bool note_use>
  [[gnu::always_inline]] Lease acquire_by(std::atomic<GuardWord>& word, MemoryRange range, Access need) noexcept {
    // relaxed: ordered before the walk by light_barrier().
    word.store(walking_guard(range), std::memory_order_relaxed);
    base::light_barrier();
    base::yield_point("pin.announced");
    const RadixTable::Found found = table_.find(range.start);
    if (!found.allows(need)) [[unlikely]] {
      word.store(idle_guard, std::memory_order_release);  // R.guard
      return {};
    }
    const RegionId id = found.id();
    std::uint64_t last = range.last;
    if (last > found.slot_last) [[unlikely]]
      last = last_within(id, last);
    base::yield_point("pin.found");
    if constexpr (note_use)
      if (!found.is_marked()) [[unlikely]]
        table_.mark_accessed(range.start, found.word);
    base::yield_point("pin.marked");
    // R.walk - release, pairs with A.guard: our reads of the tables come before their reuse, which "leased" allows.
    word.store(leased_guard(number_, id), std::memory_order_release);
    return Lease{this, &word, id, found.address, last - range.start + 1};
  }
  /// `last`, or where the region ends before it. The caller's walking guard covers both.
  std::uint64_t last_within(RegionId id, std::uint64_t last) const noexcept;
  std::optional<Translation> translate_first(std::uint64_t key) noexcept;
  /// What a lease is made of. Not a Lease: one that a function returns is built in memory, on the fast path too.
  struct SlowLease {
    bool found = false;
    std::atomic<GuardWord>* word = nullptr;
    RegionId id = no_region;
    std::uint64_t address = 0;
    std::uint64_t length = 0;
  };
  SlowLease acquire_without_guard(MemoryRange range, Access need, bool note_use) noexcept;
  SlowLease acquire_counted(const MemoryRange& range, Access need, bool note_use) noexcept;
  void add_hold(RegionId id) noexcept;
  void drop_hold(RegionId id) noexcept;

  RegionTable records_;
  RadixTable table_{records_};
  std::uint32_t number_ = 0;
  /// One word that the kernel zeroes in a forked child.
  std::atomic<std::uint64_t>* alive_ = nullptr;
  mutable std::mutex lock_;  // writers: a change costs a kernel call anyway, so a mutex is enough
};

}  // namespace iovane::pinning
