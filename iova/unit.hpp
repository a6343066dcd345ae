// The allocator's own coordinate: the number of a granule.
//
// Inside iova/ an address is its granule's number, so a 64-bit space of 4 KiB granules has units 0 to 2^52-1 and
// "one past the last" always fits in 64 bits. Only the facade converts.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace iovane::iova {

using Unit = std::uint64_t;

/// Closed, as IovaRange is.
struct UnitRange {
  Unit first = 0;
  Unit last = 0;

  constexpr bool operator==(const UnitRange&) const noexcept = default;
  constexpr std::uint64_t count() const noexcept { return last - first + 1; }
  constexpr bool contains(Unit u) const noexcept { return first <= u && u <= last; }
  constexpr bool contains(const UnitRange& r) const noexcept { return first <= r.first && r.last <= last; }
  constexpr bool overlaps(const UnitRange& r) const noexcept { return first <= r.last && r.first <= last; }
  /// Precondition: they overlap.
  constexpr UnitRange intersection(const UnitRange& r) const noexcept {
    return {std::max(first, r.first), std::min(last, r.last)};
  }
};

/// Granules are at least 4 KiB, so units have at most 52 bits and 12 bits of a word stay free for tags.
inline constexpr unsigned unit_bits_max = 52;

/// The exponent of the largest power of two that divides `n`; n is not 0.
constexpr unsigned natural_alignment(std::uint64_t n) noexcept { return static_cast<unsigned>(std::countr_zero(n)); }
constexpr unsigned floor_log2(std::uint64_t n) noexcept { return static_cast<unsigned>(std::bit_width(n)) - 1; }

}  // namespace iovane::iova
