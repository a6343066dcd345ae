// What memory a pin is about: a closed range of keys.
//
// A key names one byte of memory that can be pinned. Below `file_key_first` it is an address of this process; from
// there on it is an offset into a registered file, moved into a window of its own (see FileWindows), so that one index
// answers for anonymous memory and for `fd + offset` alike.
#pragma once

#include <compare>
#include <cstdint>
#include <optional>

#include "iovane/types.hpp"

namespace iovane::pinning {

/// The resolution of the index. Larger OS pages are multiples of it.
inline constexpr std::uint64_t granule_bytes = 4096;
/// User addresses need at most 57 bits (x86-64 with five levels); the other half of the key space holds files.
inline constexpr std::uint64_t file_key_first = std::uint64_t{1} << 57;
inline constexpr std::uint64_t key_last = (std::uint64_t{1} << 58) - 1;

/// Keys [start, last]; `last` is included. Well formed when start <= last <= key_last.
struct MemoryRange {
  std::uint64_t start = 1;
  std::uint64_t last = 0;

  constexpr auto operator<=>(const MemoryRange&) const noexcept = default;

  /// Nothing when length is zero or the range would leave the key space.
  static constexpr std::optional<MemoryRange> from_length(std::uint64_t start, Bytes length) noexcept {
    if (length.value == 0 || start > key_last || length.value - 1 > key_last - start) return std::nullopt;
    return MemoryRange{start, start + (length.value - 1)};
  }
  /// The range of an object in this process. Same conditions.
  static std::optional<MemoryRange> of(const void* address, Bytes length) noexcept {
    return from_length(reinterpret_cast<std::uintptr_t>(address), length);
  }

  constexpr bool well_formed() const noexcept { return start <= last && last <= key_last; }
  constexpr Bytes length() const noexcept { return {last - start + 1}; }
  constexpr bool is_file() const noexcept { return start >= file_key_first; }
  constexpr bool contains(std::uint64_t key) const noexcept { return start <= key && key <= last; }
  constexpr bool contains(const MemoryRange& r) const noexcept { return start <= r.start && r.last <= last; }
  constexpr bool overlaps(const MemoryRange& r) const noexcept { return start <= r.last && r.start <= last; }
  /// The common part. Precondition: overlaps(r).
  constexpr MemoryRange common(const MemoryRange& r) const noexcept {
    return {start < r.start ? r.start : start, last < r.last ? last : r.last};
  }
  /// Grown at both ends to multiples of `alignment`, a power of two not above 2^57; stays inside the key space.
  constexpr MemoryRange grown_to(std::uint64_t alignment) const noexcept {
    return {start & ~(alignment - 1), last | (alignment - 1)};
  }
  constexpr bool is_granular() const noexcept {
    return (start & (granule_bytes - 1)) == 0 && ((last + 1) & (granule_bytes - 1)) == 0;
  }
};

}  // namespace iovane::pinning
