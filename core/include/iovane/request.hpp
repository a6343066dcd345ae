// What a caller asks for, and what comes back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "iovane/mapping_id.hpp"
#include "iovane/result.hpp"
#include "iovane/types.hpp"

namespace iovane {

/// Memory of this process, or a piece of registered memory. Names memory, owns nothing: the memory must stay valid
/// until the *unmap* of every mapping of it has completed.
struct MemoryPiece {
  MemoryId memory{};         ///< none: `offset` is an address of this process; else an offset into that memory
  std::uint64_t offset = 0;  ///< bytes; multiple of the granule
  Bytes length{};            ///< multiple of the granule

  static MemoryPiece at(void* address, Bytes length) noexcept {
    return {{}, reinterpret_cast<std::uintptr_t>(address), length};
  }
  static MemoryPiece of(std::span<std::byte> memory) noexcept { return at(memory.data(), Bytes{memory.size()}); }
  static constexpr MemoryPiece within(MemoryId memory, Bytes offset, Bytes length) noexcept {
    return {memory, offset.value, length};
  }
};

/// Where a mapping goes.
struct Placement {
  enum class Kind : std::uint8_t { anywhere, fixed };
  Kind kind = Kind::anywhere;
  Iova at{};                ///< fixed: the first address
  Bytes align{};            ///< anywhere: power of two, 0 = the largest that helps, at least the granule
  Iova ceiling = iova_max;  ///< anywhere: the last address that may be used (32-bit DMA: 0xffffffff)

  static constexpr Placement anywhere(Bytes align = {}, Iova ceiling = iova_max) noexcept {
    return {Kind::anywhere, {}, align, ceiling};
  }
  static constexpr Placement fixed(Iova at) noexcept { return {Kind::fixed, at, {}, iova_max}; }
};

/// How an operation stands to its neighbours in the queue.
enum class Order : std::uint8_t {
  free = 0,  ///< only overlapping IOVAs keep their order
  link = 1,  ///< the next operation runs only if this one succeeds; otherwise it completes with Errc::cancelled
};

/// Makes memory reachable for the address space's devices. All or nothing.
struct MapRequest {
  MemoryPiece memory{};
  Access access = Access::read_write;
  Placement placement{};
  std::uint64_t user_data = 0;  ///< returned verbatim
  Order order = Order::free;
  /// A scatter list instead of `memory`: the pieces follow each other in one IOVA range and are unmapped as one unit.
  /// Borrowed until the completion. Empty: `memory` is the one piece.
  std::span<const MemoryPiece> pieces{};
};

/// Removes mappings: one by its id, or every one inside a range (holes are fine, cutting one is not: would_bisect).
/// A range without any mapping is not_found, except everything(), which may be empty.
struct UnmapRequest {
  MappingId mapping{};  ///< wins over `range` when set
  IovaRange range{};
  std::uint64_t user_data = 0;
  Order order = Order::free;

  static constexpr UnmapRequest of(MappingId mapping, std::uint64_t user_data = 0) noexcept {
    return {mapping, {}, user_data, Order::free};
  }
  static constexpr UnmapRequest of(IovaRange range, std::uint64_t user_data = 0) noexcept {
    return {{}, range, user_data, Order::free};
  }
};

/// Points an existing mapping of exactly this range at other memory. Atomic for the device where the backend can
/// (AddressSpace::facts().replace_is_atomic), otherwise with a gap in which the device faults. On failure the old
/// mapping stands again, or, if that failed too, the range is unmapped and the detail says so.
struct ReplaceRequest {
  IovaRange range{};
  MemoryPiece memory{};  ///< of the range's length
  Access access = Access::read_write;
  std::uint64_t user_data = 0;
  Order order = Order::free;
};

/// The end of one operation. A map's completion means that devices may use it; a strict unmap's that no device can
/// reach the memory any more.
struct Completion {
  std::uint64_t user_data = 0;
  Error error{};        ///< Errc::ok, or what failed and where
  Iova iova{};          ///< map, replace: first address; unmap: start of the range asked for
  Bytes bytes{};        ///< map, replace: the length; unmap: bytes removed
  MappingId mapping{};  ///< map, replace: the mapping's name

  constexpr bool ok() const noexcept { return error.ok(); }
};
static_assert(sizeof(Completion) == 40);

}  // namespace iovane
