// Length classes: intervals of one exact length (and, if asked for, one alignment and ceiling) share runs.
//
// A class has no rounding: its slots are as long as the requests, so nothing is wasted inside an interval and no unit
// that is not live belongs to a live interval. Classes are made on first use and live as long as the allocator; there
// may be as many as the table holds, further lengths are served one by one.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "iova/metadata_arena.hpp"
#include "iova/run.hpp"
#include "iova/run_shelf.hpp"
#include "iova/unit.hpp"

namespace iovane::iova {

/// What intervals of one class have in common, in one word.
struct LengthKey {
  std::uint64_t raw = 0;
  /// `align_log2` in units, 0 when the length's natural alignment suffices; `ceiling_log2`: all units below
  /// 2^ceiling_log2, 0 for no ceiling.
  static constexpr LengthKey of(std::uint64_t length, unsigned align_log2, unsigned ceiling_log2) noexcept {
    const unsigned align = align_log2 <= natural_alignment(length) ? 0 : align_log2;
    return {(length << 12) | (std::uint64_t{align} << 6) | ceiling_log2};
  }
  constexpr std::uint64_t length() const noexcept { return raw >> 12; }
  constexpr unsigned align_log2() const noexcept {
    const unsigned asked = static_cast<unsigned>(raw >> 6) & 63;
    return asked != 0 ? asked : natural_alignment(length());
  }
  constexpr bool over_aligned() const noexcept { return ((raw >> 6) & 63) != 0; }
  constexpr unsigned ceiling_log2() const noexcept { return static_cast<unsigned>(raw) & 63; }
  constexpr bool operator==(const LengthKey&) const noexcept = default;
};

/// Places for magazines in a thread cache. By Fibonacci hashing (Knuth, TAOCP 6.4) the lengths 1 to 262 have places
/// of their own: multiples of the golden ratio keep away from each other.
inline constexpr unsigned magazine_place_bits = 9;
inline constexpr unsigned magazine_places = 1U << magazine_place_bits;

/// The multiplier for lengths in bytes.
constexpr std::uint64_t place_multiplier(unsigned granule_log2) noexcept {
  return 0x9e3779b97f4a7c15ULL >> granule_log2;
}
constexpr unsigned place_of_length(std::uint64_t bytes, std::uint64_t multiplier) noexcept {
  return static_cast<unsigned>((bytes * multiplier) >> (64 - magazine_place_bits));
}
/// Classes with further wishes have other places than the plain class of their length.
constexpr unsigned magazine_place(LengthKey key, unsigned granule_log2) noexcept {
  return place_of_length((key.length() + ((key.raw & 0xfff) << 16)) << granule_log2, place_multiplier(granule_log2));
}

struct LengthClass : ArenaObject {
  LengthKey key;
  std::uint32_t code;                     ///< its place in the table of classes: 12 bits, not 0, of no other class
  std::atomic<std::uint64_t> slots;       ///< in runs of this class
  std::atomic<std::int64_t> slots_free;   ///< bits that are set in them; for a moment less than nothing
  std::atomic<RunShelf::Position> sweep;  ///< where AllocatorCore::give_back_more() goes on
  RunShelf shelf;

  /// Slots that are live or in magazines. Approximate.
  std::uint64_t slots_in_use() const noexcept {
    // relaxed: statistics.
    const std::uint64_t all = slots.load(std::memory_order_relaxed);
    const std::int64_t unused = slots_free.load(std::memory_order_relaxed);
    return unused <= 0 ? all : all - std::min(all, static_cast<std::uint64_t>(unused));
  }
};

}  // namespace iovane::iova
