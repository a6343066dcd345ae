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

/// A piece's memory, bounds and alignment.
Result<ResolvedPiece> resolve_piece(const SpaceState& space, const MemoryPiece& piece) noexcept;
/// The length of all pieces, each checked for zero and alignment.
Result<Bytes> total_length(const SpaceState& space, std::span<const MemoryPiece> pieces) noexcept;
/// A range as unmap and replace take it: well formed and granule-aligned (everything() is).
Error check_range(const SpaceState& space, IovaRange range) noexcept;
/// Refuses a range that is not wholly usable, naming the part that is not.
Error check_usable(const SpaceState& space, IovaRange range) noexcept;

}  // namespace iovane::engine
