// The words every part of iovane shares: I/O virtual addresses, byte counts and closed address ranges.
//
// Addresses are closed ranges [start, last], as in the kernel's own iommufd (drivers/iommu/iommufd/pages.c): an
// IOVA may be 2^64-1, so "one past the end" is not representable and nothing here computes it unchecked.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>

namespace iovane {

/// A number of bytes. Zero is a valid count and never a valid length of a range.
struct Bytes {
  std::uint64_t value = 0;
  constexpr auto operator<=>(const Bytes&) const noexcept = default;
};

/// An I/O virtual address: what a device puts on the bus.
struct Iova {
  std::uint64_t value = 0;
  constexpr auto operator<=>(const Iova&) const noexcept = default;
};

inline constexpr Iova iova_max{std::numeric_limits<std::uint64_t>::max()};

inline namespace literals {
constexpr Bytes operator""_KiB(unsigned long long n) noexcept { return {n << 10}; }
constexpr Bytes operator""_MiB(unsigned long long n) noexcept { return {n << 20}; }
constexpr Bytes operator""_GiB(unsigned long long n) noexcept { return {n << 30}; }
constexpr Bytes operator""_TiB(unsigned long long n) noexcept { return {n << 40}; }
}  // namespace literals

/// What a device may do with mapped memory. `none` is never a valid request.
enum class Access : std::uint8_t { none = 0, read = 1, write = 2, read_write = 3 };

constexpr bool may_read(Access a) noexcept { return (static_cast<unsigned>(a) & 1U) != 0; }
constexpr bool may_write(Access a) noexcept { return (static_cast<unsigned>(a) & 2U) != 0; }
/// True when everything that `inner` allows, `outer` allows too.
constexpr bool includes(Access outer, Access inner) noexcept {
  return (static_cast<unsigned>(inner) & ~static_cast<unsigned>(outer)) == 0;
}

/// A closed range of I/O virtual addresses; `last` is included. Well formed when start <= last.
struct IovaRange {
  Iova start;
  Iova last;

  constexpr auto operator<=>(const IovaRange&) const noexcept = default;

  /// The range of `length` bytes at `start`; nothing when length is zero or the range would pass 2^64-1.
  static constexpr std::optional<IovaRange> from_length(Iova start, Bytes length) noexcept {
    if (length.value == 0 || length.value - 1 > iova_max.value - start.value) return std::nullopt;
    return IovaRange{start, Iova{start.value + (length.value - 1)}};
  }
  /// All 2^64 addresses.
  static constexpr IovaRange everything() noexcept { return {Iova{0}, iova_max}; }

  constexpr bool well_formed() const noexcept { return start <= last; }
  /// last - start: the length less one, which always fits (the length of everything() does not).
  constexpr std::uint64_t span() const noexcept { return last.value - start.value; }
  /// Length in bytes. Precondition: the range is not everything().
  constexpr Bytes length() const noexcept { return {span() + 1}; }

  constexpr bool contains(Iova a) const noexcept { return start <= a && a <= last; }
  constexpr bool contains(const IovaRange& r) const noexcept { return start <= r.start && r.last <= last; }
  constexpr bool overlaps(const IovaRange& r) const noexcept { return start <= r.last && r.start <= last; }
  /// True when `next` begins exactly where this range stops.
  constexpr bool precedes_directly(const IovaRange& next) const noexcept {
    return last != iova_max && last.value + 1 == next.start.value;
  }
  /// The common part, if there is one.
  constexpr std::optional<IovaRange> intersection(const IovaRange& r) const noexcept {
    if (!overlaps(r)) return std::nullopt;
    return IovaRange{start < r.start ? r.start : start, last < r.last ? last : r.last};
  }
};

}  // namespace iovane
