// Checks of requests before anything is done, and the sentences that refuse them.
#pragma once

#include <cstdint>
#include <span>

#include "engine/operation.hpp"
#include "engine/space_state.hpp"
#include "iovane/result.hpp"

namespace iovane::engine {

/// Where a piece's bytes come from, resolved for the backend.
struct ResolvedPiece {
  backends::RegionId region{};
  std::uint64_t memory = 0;        ///< process address, or offset into the region
  std::uint32_t memory_index = 0;  ///< MemoryTable index + 1; 0 for a process address
};

/// The sentences for what the checks below refuse. Out of line: the checks are short without them.
Error unknown_access() noexcept;
Error bad_piece(const SpaceState& space, const MemoryPiece& piece) noexcept;
Error bad_range(const SpaceState& space, IovaRange range) noexcept;
Error not_usable(const SpaceState& space, IovaRange range) noexcept;
/// For a map of `length` bytes at `start` that is_placeable() refuses.
Error bad_place(const SpaceState& space, Iova start, Bytes length) noexcept;

constexpr bool is_access(Access access) noexcept {
  return access != Access::none && includes(Access::read_write, access);
}

/// Fills `out` from a piece; false when its length, alignment, memory or bounds are wrong.
inline bool resolve_piece(const SpaceState& space, const MemoryPiece& piece, ResolvedPiece& out) noexcept {
  const std::uint64_t span = piece.length.value - 1;  // wraps when the length is zero
  const bool sound = piece.length.value != 0 &&
                     ((piece.length.value | piece.offset) & (space.granule.value - 1)) == 0 &&
                     piece.offset <= ~std::uint64_t{0} - span;
  if (!sound) [[unlikely]]
    return false;
  out.memory = piece.offset;
  if (!piece.memory) return piece.offset != 0;
  const std::uint32_t index = space.memories.index_of(piece.memory);
  if (index == MemoryTable::none || piece.offset + span >= space.memories.at(index).length.value) [[unlikely]]
    return false;
  out.region = space.memories.at(index).region;
  out.memory_index = index + 1;
  return true;
}

/// The length of all pieces, each checked for zero and alignment.
Result<Bytes> total_length(const SpaceState& space, std::span<const MemoryPiece> pieces) noexcept;

/// A range as unmap and replace take it: well formed and granule-aligned (everything() is).
inline bool is_granular(const SpaceState& space, IovaRange range) noexcept {
  return range.start <= range.last && ((range.start.value | (range.last.value + 1)) & (space.granule.value - 1)) == 0;
}

/// Looks for the usable window that holds the range, and makes it SpaceState::window.
bool find_window(SpaceState& space, IovaRange range) noexcept;

/// Whether whole granules may be mapped at this range of whole granules' length: it does not wrap, and is wholly
/// usable.
inline bool is_placeable(SpaceState& space, IovaRange range) noexcept {
  if (range.last < range.start || (range.start.value & (space.granule.value - 1)) != 0) [[unlikely]]
    return false;
  return space.window.contains(range) || find_window(space, range);
}

}  // namespace iovane::engine
