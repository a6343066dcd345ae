// Names for live mappings and registered memory that survive their objects safely.
#pragma once

#include <compare>
#include <cstdint>

namespace iovane {

/// Names one mapping of one address space: generation << 32 | slot + 1. Zero is "none". A name whose mapping is gone
/// is refused with Errc::stale_handle, never mistaken for the slot's next tenant.
struct MappingId {
  std::uint64_t value = 0;
  constexpr auto operator<=>(const MappingId&) const noexcept = default;
  constexpr explicit operator bool() const noexcept { return value != 0; }
};

/// Names memory registered with one address space, built like MappingId.
struct MemoryId {
  std::uint64_t value = 0;
  constexpr auto operator<=>(const MemoryId&) const noexcept = default;
  constexpr explicit operator bool() const noexcept { return value != 0; }
};

}  // namespace iovane
