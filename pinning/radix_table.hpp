// From a key to the region that covers it, at 4 KiB resolution.
//
// Purpose: the translation table of the index; a lookup is two to four loads, and at most one of them misses the cache.
// Shape: a top array of 2^19 pointers (one per 512 GiB), then slots of one word on up to three levels:
//     level 0: 2^18 slots of 2 MiB    level 1: 32 slots of 64 KiB    level 2: 16 slots of 4 KiB
//   A region is written into the highest slots that it fills whole, so guest memory costs 8 bytes per 2 MiB and a
//   chunk of 64 KiB one slot. Where it is alone in a block that it does not fill, the block's slot names it too, and
//   its record says how far it reaches: a region of 4 KiB alone in its 2 MiB needs no table. The second region of
//   such a block splits the slot.
// Roles: any thread may find(), under a walking guard; one writer at a time (the index's lock).
// Progress: find() wait-free, at most four dependent loads, and a region's record after them where a slot sends there.
// State word of a slot, by its low bits:
//   00  nothing (a table that waits for reclaim() keeps its links in such words)
//   10  [table one level below, aligned to 64 bytes or more]
//    1  [frame : 36 at 28][region id : 24 at 4][access : 2 at 2][accessed : 1 at 1][1]
//       frame: the device address of the slot's first byte, in units of 4 KiB; frame_in_record: look into the record,
//       for the range, because the region may not fill the slot, and for the address, because it may not fit.
// Invariants: I1 one word says all that a lookup needs, so it is right or absent, never mixed. I2 a record that a walk
//   was sent to is not changed while that walk lasts: the region's walked_range() has the whole block of every slot
//   that sends walks there, since walks for other keys of the block come too. I3 an empty table is unlinked from its
//   parent and reused only after no walking guard touches the keys it stood for (reclaim() after the barrier).
//   I4 a slot that is split names its region before and after: the table below is complete when it is linked.
// Linearization: insert - the slot's R.slot store (per slot: a region becomes visible slot by slot, which is why a
//   lookup of a longer range looks at both ends); erase - the store of 0; find - A.slot.
// ABA: a walk reads each word once; I2 for the record.
// Proven by: tests/model/pin_index_model_test.cpp, tests/exhaustive/pin_index_exhaustive_test.cpp,
//   tests/stress/pin_lease_stress_test.cpp, tests/litmus/pin_lease_test.cpp.
#pragma once

#include <atomic>
#include <cstdint>

#include "base/yield_point.hpp"
#include "iovane/result.hpp"
#include "iovane/types.hpp"
#include "pinning/lease_guards.hpp"
#include "pinning/memory_range.hpp"
#include "pinning/region.hpp"
#include "pinning/region_table.hpp"
#include "pinning/slab_arena.hpp"

namespace iovane::pinning {

class RadixTable {
 public:
  using Slot = std::atomic<std::uint64_t>;
  static_assert(sizeof(Slot) == 8);

  static constexpr std::uint64_t region_tag = 1;
  static constexpr std::uint64_t table_tag = 2;
  static constexpr std::uint64_t accessed_bit = 2;
  static constexpr unsigned access_shift = 2;
  static constexpr unsigned id_shift = region_id_shift;
  static constexpr unsigned frame_shift = id_shift + region_id_bits;
  static constexpr std::uint64_t frame_in_record = (std::uint64_t{1} << 36) - 1;

  static constexpr unsigned top_shift = 39;
  static constexpr unsigned level_shifts[3] = {21, 16, 12};
  static constexpr std::uint64_t top_entries = (key_last + 1) >> top_shift;
  static constexpr std::uint64_t level_slots[3] = {1U << 18, 32, 16};

  /// What a lookup saw. `word` is 0 when nothing covers the key.
  struct Found {
    std::uint64_t word = 0;
    std::uint64_t address = 0;    ///< device address of the key itself
    std::uint64_t slot_last = 0;  ///< the last key that this slot answers for

    RegionId id() const noexcept { return id_of(word); }
    Access access() const noexcept { return static_cast<Access>((word >> access_shift) & 3U); }
    /// Whether something was found that allows at least this.
    bool allows(Access need) const noexcept {
      const std::uint64_t mask = region_tag | (static_cast<std::uint64_t>(need) << access_shift);
      return (word & mask) == mask;
    }
    /// Whether the use has been noted for the eviction policy.
    bool is_marked() const noexcept { return (word & accessed_bit) != 0; }
  };

  explicit RadixTable(const RegionTable& records) noexcept
      : records_{records}, middle_tables_{64}, fine_tables_{128}, coarse_tables_{256} {}
  RadixTable(const RadixTable&) = delete;
  RadixTable& operator=(const RadixTable&) = delete;
  ~RadixTable();

  /// Maps the top array. out_of_memory when the kernel refuses.
  Result<void> open() noexcept;

  /// Precondition: key <= key_last and the calling thread's walking guard covers it (or it is the writer).
  [[gnu::always_inline]] Found find(std::uint64_t key) const noexcept {
    // A.top - acquire, pairs with R.top in prepare().
    Slot* slot = top_[key >> top_shift].load(std::memory_order_acquire);
    if (slot == nullptr) return {};
    slot += (key >> level_shifts[0]) & (level_slots[0] - 1);
    // A.slot - acquire, pairs with R.slot (a region: its record is visible) and R.table (a complete table).
    std::uint64_t word = slot->load(std::memory_order_acquire);
    std::uint64_t offset_mask = (std::uint64_t{1} << level_shifts[0]) - 1;
    if ((word & region_tag) == 0) {
      if ((word & table_tag) == 0) return {};
      base::yield_point("pin.coarse");
      slot = table_of(word) + ((key >> level_shifts[1]) & (level_slots[1] - 1));
      word = slot->load(std::memory_order_acquire);  // A.slot
      offset_mask = (std::uint64_t{1} << level_shifts[1]) - 1;
      if ((word & region_tag) == 0) {
        if ((word & table_tag) == 0) return {};
        base::yield_point("pin.fine");
        slot = table_of(word) + ((key >> level_shifts[2]) & (level_slots[2] - 1));
        word = slot->load(std::memory_order_acquire);  // A.slot
        offset_mask = (std::uint64_t{1} << level_shifts[2]) - 1;
        if ((word & region_tag) == 0) return {};
      }
    }
    if (word >= frame_in_record << frame_shift) {
      base::yield_point("pin.record");
      const RegionRecord& record = records_.at(id_of(word));
      const MemoryRange range = record.range();
      if (!range.contains(key)) return {};
      const std::uint64_t slot_last = key | offset_mask;
      return {word, record.handle.address + (key - range.start), slot_last < range.last ? slot_last : range.last};
    }
    return {word, (word >> frame_shift) * granule_bytes + (key & offset_mask), key | offset_mask};
  }

  /// Notes a use for the eviction policy, where find() of the same walk saw `word`. Once per region and round of the
  /// policy, so the line stays shared.
  void mark_accessed(std::uint64_t key, std::uint64_t word) const noexcept;

  // The writer's side. A region's range, rights and address are those of its record.

  /// The first covered key at or after `range.start`, within the range: which region, or no_region.
  RegionId first_in(const MemoryRange& range) const noexcept;
  /// Makes the tables that write() needs. Preconditions: granular range; nothing in it is covered.
  /// out_of_memory leaves every answer as it was.
  Result<void> prepare(const MemoryRange& range) noexcept;
  /// Publishes a region. Precondition: prepare() succeeded for its range, last of all. Cannot fail.
  void write(RegionId id) noexcept;
  /// Takes a published region out. Tables that become empty wait for reclaim().
  void erase(RegionId id) noexcept;
  /// Whether any slot of a published region was used since the last call; clears the marks.
  bool take_accessed(RegionId id) noexcept;
  /// Frees unlinked tables that nobody walks. Call after base::heavy_barrier().
  void reclaim() noexcept;
  bool has_limbo() const noexcept { return limbo_ != nullptr; }

  /// Bytes of memory behind the tables (the top and level-0 arrays only as far as written, in units of OS pages).
  std::size_t table_bytes() const noexcept;

 private:
  static Slot* table_of(std::uint64_t word) noexcept { return reinterpret_cast<Slot*>(word & ~table_tag); }
  static constexpr bool is_table(std::uint64_t word) noexcept { return (word & (table_tag | region_tag)) == table_tag; }
  static constexpr RegionId id_of(std::uint64_t word) noexcept {
    return static_cast<RegionId>(word >> id_shift) & ((RegionId{1} << region_id_bits) - 1);
  }
  /// The lowest slot around `key`: one without a table below it.
  struct Place {
    Slot* slot;
    unsigned level;
    std::uint64_t word;
  };
  Place lowest(std::uint64_t key) const noexcept;
  Slot* level0_slot(std::uint64_t key) const noexcept;
  /// The word that names a region in the slot of `level` around `key`.
  std::uint64_t word_for(RegionId id, unsigned level, std::uint64_t key) const noexcept;
  bool prepare_edge(std::uint64_t key) noexcept;
  bool split(Slot& slot, unsigned level, std::uint64_t key) noexcept;
  void prune(std::uint64_t key) noexcept;
  void unlink(Slot& parent, std::uint64_t first_key, unsigned child_level) noexcept;
  /// Calls f(slot, level, a key of the slot) for the slots that stand for the range: below no table.
  template <typename F>
  void for_each_slot(const MemoryRange& range, F&& f) const noexcept;

  const RegionTable& records_;
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
  /// Unlinked tables: linked through slot 0; slot 1 holds first key | level << 2.
  Slot* limbo_ = nullptr;
};

}  // namespace iovane::pinning
