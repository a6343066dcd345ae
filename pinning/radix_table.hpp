// From a key to the region that covers it, at 4 KiB resolution.
//
// Purpose: the translation table of the index; a lookup is two to four loads.
// Shape: a top array of 2^19 pointers (one per 512 GiB), then slots of 16 bytes on up to three levels:
//     level 0: 2^18 slots of 2 MiB    level 1: 32 slots of 64 KiB    level 2: 16 slots of 4 KiB
//   A region is written into the highest slots that it fills whole, so guest memory costs 16 bytes per 2 MiB and a
//   chunk of 64 KiB one slot; only ragged edges go down to level 2.
// Roles: any thread may find(), under a walking guard; one writer at a time (the index's lock).
// Progress: find() wait-free, at most four dependent loads and one re-read.
// State word of a slot:  0                                                   nothing here
//                        pointer, bit 0 clear                                a table one level below
//                        [region id : 32][..][access : 2 at 2][accessed : 1 at 1][1]   a region
//   The slot's second word is the region's device address at the slot's first byte.
// Invariants: I1 a slot's address is written before its region word (R.slot), and while its word is 0 or a pointer.
//   I2 a region id is not given to another region while a walk that could have seen it lasts, so an unchanged word
//   around the read of the address means that both belong together. I3 an empty table is unlinked from its parent and
//   reused only after no walking guard touches the keys it stood for (the caller runs reclaim() after the barrier).
// Linearization: insert - the slot's R.slot store (per slot: a region becomes visible slot by slot, which is why a
//   lookup of a longer range looks at both ends); erase - the store of 0; find - A.slot.
// ABA: excluded by I2.
// Proven by: tests/model/pin_index_model_test.cpp, tests/exhaustive/pin_index_exhaustive_test.cpp,
//   tests/stress/pin_lease_stress_test.cpp.
#pragma once

#include <atomic>
#include <cstdint>

#include "base/yield_point.hpp"
#include "iovane/result.hpp"
#include "iovane/types.hpp"
#include "pinning/lease_guards.hpp"
#include "pinning/memory_range.hpp"
#include "pinning/region.hpp"
#include "pinning/slab_arena.hpp"

namespace iovane::pinning {

class RadixTable {
 public:
  struct Slot {
    std::atomic<std::uint64_t> word{0};
    std::atomic<std::uint64_t> address{0};
  };
  static_assert(sizeof(Slot) == 16);

  static constexpr std::uint64_t region_tag = 1;
  static constexpr std::uint64_t accessed_bit = 2;
  static constexpr unsigned access_shift = 2;

  static constexpr unsigned top_shift = 39;
  static constexpr unsigned level_shifts[3] = {21, 16, 12};
  static constexpr std::uint64_t top_entries = (key_last + 1) >> top_shift;
  static constexpr std::uint64_t level_slots[3] = {1U << 18, 32, 16};

  /// What a lookup saw. `word` is 0 when nothing covers the key.
  struct Found {
    std::uint64_t word = 0;
    std::uint64_t address = 0;  ///< device address of the key itself
    Slot* slot = nullptr;
    std::uint64_t slot_last = 0;  ///< the last key that this slot answers for

    RegionId id() const noexcept { return static_cast<RegionId>(word >> 32); }
    Access access() const noexcept { return static_cast<Access>((word >> access_shift) & 3U); }
  };

  RadixTable() noexcept : middle_tables_{64}, fine_tables_{256}, coarse_tables_{512} {}
  RadixTable(const RadixTable&) = delete;
  RadixTable& operator=(const RadixTable&) = delete;
  ~RadixTable();

  /// Maps the top array. out_of_memory when the kernel refuses.
  Result<void> open() noexcept;

  /// Precondition: key <= key_last and the calling thread's walking guard covers it (or it is the writer).
  Found find(std::uint64_t key) const noexcept {
    // A.top - acquire, pairs with R.top in prepare().
    Slot* slot = top_[key >> top_shift].load(std::memory_order_acquire);
    if (slot == nullptr) return {};
    slot += (key >> level_shifts[0]) & (level_slots[0] - 1);
    // A.slot - acquire, pairs with R.slot (a region: its address and record are visible) and R.table (a zeroed table).
    std::uint64_t word = slot->word.load(std::memory_order_acquire);
    std::uint64_t offset_mask = (std::uint64_t{1} << level_shifts[0]) - 1;
    if ((word & region_tag) == 0) {
      if (word == 0) return {};
      base::yield_point("pin.coarse");
      slot = table_of(word) + ((key >> level_shifts[1]) & (level_slots[1] - 1));
      word = slot->word.load(std::memory_order_acquire);  // A.slot
      offset_mask = (std::uint64_t{1} << level_shifts[1]) - 1;
      if ((word & region_tag) == 0) {
        if (word == 0) return {};
        base::yield_point("pin.fine");
        slot = table_of(word) + ((key >> level_shifts[2]) & (level_slots[2] - 1));
        word = slot->word.load(std::memory_order_acquire);  // A.slot
        offset_mask = (std::uint64_t{1} << level_shifts[2]) - 1;
        if (word == 0) return {};
      }
    }
    // A.address - acquire, pairs with R.address: an address of a later region brings the 0 that preceded it, so that
    // the re-read below cannot still show the earlier region (I2).
    base::yield_point("pin.address");
    const std::uint64_t address = slot->address.load(std::memory_order_acquire);
    base::yield_point("pin.again");
    // relaxed: ordered by A.address; compared only.
    const std::uint64_t again = slot->word.load(std::memory_order_relaxed);
    if (((word ^ again) & ~accessed_bit) != 0) return {};  // it changed under us: the slow path sees what it is now
    return {word, address + (key & offset_mask), slot, key | offset_mask};
  }

  /// Notes a use for the eviction policy. Writes only when the mark is not there yet, so the line stays shared.
  static void mark_accessed(const Found& found) noexcept {
    if ((found.word & accessed_bit) != 0) return;
    std::uint64_t expected = found.word;
    // relaxed both: a hint. The exchange (rather than a store) keeps an erased slot erased.
    found.slot->word.compare_exchange_strong(expected, expected | accessed_bit, std::memory_order_relaxed,
                                             std::memory_order_relaxed);
  }

  // The writer's side.

  /// The first covered key at or after `range.start`, within the range: which region, or no_region.
  RegionId first_in(const MemoryRange& range) const noexcept;
  /// Makes the tables that write() needs. Preconditions: granular range; nothing in it is covered.
  /// out_of_memory leaves the table as it was.
  Result<void> prepare(const MemoryRange& range) noexcept;
  /// Publishes. Precondition: prepare() succeeded for the same range. Cannot fail.
  void write(const MemoryRange& range, RegionId id, Access access, std::uint64_t address) noexcept;
  /// Takes out exactly what write() of the same range put in. Tables that become empty wait for reclaim().
  void erase(const MemoryRange& range) noexcept;
  /// Whether any slot of the range was used since the last call; clears the marks.
  bool take_accessed(const MemoryRange& range) noexcept;
  /// Frees unlinked tables that nobody walks. Call after base::heavy_barrier().
  void reclaim() noexcept;
  bool has_limbo() const noexcept { return limbo_ != nullptr; }

  /// Bytes of memory behind the tables (the top and level-0 arrays only as far as written, in units of OS pages).
  std::size_t table_bytes() const noexcept;

 private:
  static Slot* table_of(std::uint64_t word) noexcept { return reinterpret_cast<Slot*>(word); }
  Slot* level0_slot(std::uint64_t key) const noexcept;
  /// Makes the child table of `slot` at `level` if there is none.
  bool ensure_child(Slot& slot, unsigned child_level) noexcept;
  bool prepare_edge(const MemoryRange& range, std::uint64_t key) noexcept;
  void prune(std::uint64_t key) noexcept;
  void unlink(Slot& parent, std::uint64_t first_key, unsigned child_level) noexcept;
  /// Calls f(slot, level, first key of the slot) for the highest slots that the range fills.
  template <typename F>
  void for_each_slot(const MemoryRange& range, F&& f) const noexcept;

  std::atomic<Slot*>* top_ = nullptr;
  SlabArena middle_tables_;  // records of level-0 arrays, for the destructor
  SlabArena fine_tables_;
  SlabArena coarse_tables_;
  struct MiddleRecord {
    MiddleRecord* next;
    Slot* slots;
  };
  MiddleRecord* middles_ = nullptr;
  std::uint64_t top_first_ = top_entries;  // the used part of the top array
  std::uint64_t top_last_ = 0;
  /// Unlinked tables: linked through slot 0's address; slot 1's address holds first key | level.
  Slot* limbo_ = nullptr;
};

}  // namespace iovane::pinning
