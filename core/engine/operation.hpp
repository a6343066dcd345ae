// Operation: a request as it lies in a submission ring, one cache line.
#pragma once

#include <cstdint>
#include <span>

#include "iovane/request.hpp"

namespace iovane::engine {

enum class OperationKind : std::uint8_t { map, unmap, replace, fence, flush };
inline constexpr std::size_t operation_kinds = 5;

/// The flat form of a MapRequest, UnmapRequest, ReplaceRequest or fence. Which member means what depends on the kind.
struct alignas(64) Operation {
  OperationKind kind = OperationKind::fence;
  Order order = Order::free;
  Access access = Access::none;
  Placement::Kind placement = Placement::Kind::anywhere;
  std::uint32_t piece_count = 0;  ///< map: 0 = the piece is in memory/offset/length; else `pieces` are
  std::uint64_t user_data = 0;
  Iova start{};              ///< fixed placement, unmap and replace: first address
  Iova last{};               ///< unmap and replace: last address; map anywhere: ceiling
  std::uint64_t memory = 0;  ///< MemoryId; unmap: MappingId, 0 for a range
  union {
    std::uint64_t offset = 0;   ///< address or offset of the one piece
    const MemoryPiece* pieces;  ///< the caller's, until the completion
  };
  Bytes length{};  ///< of the one piece
  Bytes align{};

  Operation() noexcept = default;
  explicit Operation(const MapRequest& r) noexcept
      : kind{OperationKind::map},
        order{r.order},
        access{r.access},
        placement{r.placement.kind},
        user_data{r.user_data},
        start{r.placement.at},
        last{r.placement.ceiling},
        memory{r.memory.memory.value},
        offset{r.memory.offset},
        length{r.memory.length},
        align{r.placement.align} {
    if (r.pieces.empty()) return;
    // More pieces than 2^32-1 cannot be named; validation refuses the request by its (cut) count's sum of lengths.
    piece_count = static_cast<std::uint32_t>(r.pieces.size() < UINT32_MAX ? r.pieces.size() : UINT32_MAX);
    pieces = r.pieces.data();
  }
  explicit Operation(const UnmapRequest& r) noexcept
      : kind{OperationKind::unmap},
        order{r.order},
        user_data{r.user_data},
        start{r.range.start},
        last{r.range.last},
        memory{r.mapping.value} {}
  explicit Operation(const ReplaceRequest& r) noexcept
      : kind{OperationKind::replace},
        order{r.order},
        access{r.access},
        user_data{r.user_data},
        start{r.range.start},
        last{r.range.last},
        memory{r.memory.memory.value},
        offset{r.memory.offset},
        length{r.memory.length} {}

  IovaRange range() const noexcept { return {start, last}; }
  /// The memory, when it is one piece.
  MemoryPiece one_piece() const noexcept { return {MemoryId{memory}, offset, length}; }
};
static_assert(sizeof(Operation) == 64);

/// Where a slice's operations lie and where their completions go: the rings of a queue, or one of each (mask 0).
struct Slice {
  const Operation* operations;
  Completion* completions;
  std::uint64_t first;
  std::uint64_t mask;

  const Operation& operation(std::uint32_t i) const noexcept { return operations[(first + i) & mask]; }
  Completion& completion(std::uint32_t i) const noexcept { return completions[(first + i) & mask]; }
};

}  // namespace iovane::engine
