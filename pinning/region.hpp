// One pinned range and what the provider said about it.
#pragma once

#include <atomic>
#include <cstdint>

#include "iovane/types.hpp"
#include "pinning/memory_range.hpp"

namespace iovane::pinning {

/// Names a region inside one PinIndex. Reused only after every lease on its former bearer is gone.
using RegionId = std::uint32_t;
inline constexpr RegionId no_region = 0;
/// Where table slots and guard words have a region's id, so that one is made from the other by masking.
inline constexpr unsigned region_id_shift = 4;
inline constexpr unsigned region_id_bits = 24;

/// What a provider returns for pinned memory. `address` belongs to the first byte and grows with it: an IOVA, or the
/// process address for io_uring. `token` is the provider's own: a buffer index, an IOAS id.
struct PinHandle {
  std::uint64_t address = 0;
  std::uint64_t token = 0;
  constexpr bool operator==(const PinHandle&) const noexcept = default;
};

/// A region as callers see it: a copy, never a reference into the index.
struct Region {
  RegionId id = no_region;
  MemoryRange range;
  Access access = Access::none;
  std::uint8_t node = 0;
  PinHandle handle;
};

/// Where a region stands. Only the owner of the index's writer lock changes it.
enum class RegionState : std::uint8_t {
  free,         ///< the record is unused
  live,         ///< in the index: lookups find it
  retired,      ///< out of the index; waits until its last lease is gone, then its pin is dropped
  quarantined,  ///< its unpin failed: never used again, stays charged, counted
};

/// Which list of its cache a region is on. `reported`: on the retired list, and its stale use has been reported.
enum class RegionList : std::uint8_t { none, small, main, retired, reported };

/// A record of 40 bytes: with a slot of 8 bytes and its share of the tables, a million regions stay below 64 MB.
///
/// Written by            read by
/// `packed`  writer lock  anyone holding a guard (start only: it does not change while the region is in the index)
/// `granules` before publication; anyone holding a guard
/// `holds`   anyone holding a guard or another hold; the writer reads it after the barrier
/// the rest  writer lock
struct RegionRecord {
  std::atomic<std::uint64_t> packed{
      0};  // start (bits 12..57), node (58..63), access (0..1), state (2..4), list (5..7), reach (8..9)
  std::atomic<std::uint32_t> granules{0};
  std::atomic<std::uint32_t> holds{0};
  PinHandle handle;
  RegionId prev = no_region;
  RegionId next = no_region;

  static constexpr std::uint64_t start_mask = key_last & ~(granule_bytes - 1);

  // relaxed throughout: the slot's release store (R.slot) published start and granules; the rest is under a lock.
  std::uint64_t start() const noexcept { return packed.load(std::memory_order_relaxed) & start_mask; }
  std::uint64_t last() const noexcept {
    return start() + std::uint64_t{granules.load(std::memory_order_relaxed)} * granule_bytes - 1;
  }
  MemoryRange range() const noexcept { return {start(), last()}; }
  std::uint8_t node() const noexcept { return static_cast<std::uint8_t>(packed.load(std::memory_order_relaxed) >> 58); }
  Access access() const noexcept { return static_cast<Access>(packed.load(std::memory_order_relaxed) & 3U); }
  RegionState state() const noexcept {
    return static_cast<RegionState>((packed.load(std::memory_order_relaxed) >> 2) & 7U);
  }
  RegionList list() const noexcept {
    return static_cast<RegionList>((packed.load(std::memory_order_relaxed) >> 5) & 7U);
  }
  /// The keys whose lookups may read this record: its own, and those of the blocks that it does not fill but has to
  /// itself (see RadixTable). Grows only, until the id is given up.
  MemoryRange walked_range() const noexcept {
    return range().grown_to(std::uint64_t{1} << reach_shifts[(packed.load(std::memory_order_relaxed) >> 8) & 3U]);
  }
  void widen_reach(unsigned block_shift) noexcept {
    const std::uint64_t now = (packed.load(std::memory_order_relaxed) >> 8) & 3U;
    const std::uint64_t wanted = block_shift <= reach_shifts[1] ? 1 : 2;
    if (wanted > now) set_field(8, wanted, 3);
  }
  void set_state(RegionState s) noexcept { set_field(2, static_cast<std::uint64_t>(s), 7); }
  void set_list(RegionList l) noexcept { set_field(5, static_cast<std::uint64_t>(l), 7); }

 private:
  static constexpr unsigned reach_shifts[] = {12, 16, 21, 21};  // by the reach field: nothing beside it, 64 KiB, 2 MiB
  void set_field(unsigned shift, std::uint64_t value, std::uint64_t mask) noexcept {
    const std::uint64_t word = packed.load(std::memory_order_relaxed);
    // relaxed: readers under a guard use only the start bits, which this store repeats.
    packed.store((word & ~(mask << shift)) | (value << shift), std::memory_order_relaxed);
  }
};
static_assert(sizeof(RegionRecord) == 40);

inline constexpr std::uint64_t region_bytes_max = (std::uint64_t{0xffff'ffff}) * granule_bytes;
inline constexpr unsigned nodes_max = 64;

}  // namespace iovane::pinning
