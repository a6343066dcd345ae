#include "engine/request_check.hpp"

#include <algorithm>

#include "base/checked_math.hpp"
#include "base/error_text.hpp"

namespace iovane::engine {

using base::fail;

Error unknown_access() noexcept {
  return make_error(Errc::invalid_argument, Stage::validate,
                    "the access right is none or unknown; ask for read, write or both");
}

Error bad_piece(const SpaceState& space, const MemoryPiece& piece) noexcept {
  const std::uint64_t granule = space.granule.value;
  if (const auto length = total_length(space, {&piece, 1}); !length) return length.error();
  if (!base::is_aligned(piece.offset, granule))
    return fail(Errc::invalid_argument, Stage::validate, 0, "memory at {:#x} is not aligned to the granule of {} bytes",
                piece.offset, granule);
  if (!base::checked_add(piece.offset, piece.length.value - 1))
    return fail(Errc::overflow, Stage::validate, 0, "memory at {:#x} with {} bytes passes 2^64-1", piece.offset,
                piece.length.value);
  if (!piece.memory) return make_error(Errc::bad_memory, Stage::validate, "the memory's address is null");
  const auto index = space.memories.find(piece.memory);
  if (!index) return index.error();
  return fail(Errc::invalid_argument, Stage::validate, 0,
              "offset {:#x} with {} bytes lies beyond the registered memory, which has {} bytes", piece.offset,
              piece.length.value, space.memories.at(*index).length.value);
}

Result<Bytes> total_length(const SpaceState& space, std::span<const MemoryPiece> pieces) noexcept {
  const std::uint64_t granule = space.granule.value;
  std::uint64_t total = 0;
  for (const MemoryPiece& piece : pieces) {
    if (piece.length.value == 0)
      return make_error(Errc::invalid_argument, Stage::validate, "the length is zero; map at least one granule");
    if (!base::is_aligned(piece.length.value, granule))
      return fail(Errc::invalid_argument, Stage::validate, 0, "length {} is not a multiple of the granule of {} bytes",
                  piece.length.value, granule);
    const auto sum = base::checked_add(total, piece.length.value);
    if (!sum)
      return make_error(Errc::overflow, Stage::validate, "the lengths of the pieces add up to more than 2^64-1");
    total = *sum;
  }
  return Bytes{total};
}

Error bad_range(const SpaceState& space, IovaRange range) noexcept {
  const std::uint64_t granule = space.granule.value;
  if (!range.well_formed())
    return fail(Errc::invalid_argument, Stage::validate, 0,
                "the range [{:#x}, {:#x}] ends before it starts; `last` is its last address, not the next one",
                range.start.value, range.last.value);
  return fail(Errc::invalid_argument, Stage::validate, 0,
              "the range [{:#x}, {:#x}] is not made of whole granules of {} bytes; `last` is its last address, as in "
              "{:#x}",
              range.start.value, range.last.value, granule, range.last.value | (granule - 1));
}

Error bad_place(const SpaceState& space, Iova start, Bytes length) noexcept {
  const IovaRange range{start, Iova{start.value + (length.value - 1)}};
  if (!range.well_formed())
    return fail(Errc::overflow, Stage::validate, 0, "{} bytes at IOVA {:#x} pass 2^64-1", length.value, start.value);
  if (!is_granular(space, range)) return bad_range(space, range);
  return not_usable(space, range);
}

bool find_window(SpaceState& space, IovaRange range) noexcept {
  for (const IovaRange& window : space.usable) {  // a handful, as many as the host has reserved regions and one more
    if (!window.contains(range)) continue;
    space.window = window;
    return true;
  }
  return false;
}

Error not_usable(const SpaceState& space, IovaRange range) noexcept {
  const auto& usable = space.usable;
  // The first window that does not stop before the range.
  auto window = std::lower_bound(usable.begin(), usable.end(), range.start,
                                 [](const IovaRange& w, Iova start) { return w.last < start; });
  if (usable.empty())
    return make_error(Errc::iova_reserved, Stage::reserve,
                      "no IOVA is usable yet: attach a device to this address space first");
  // The hole that is in the way: what the windows leave around the first uncovered address.
  Iova bad = range.start;
  if (window != usable.end() && window->contains(range.start)) {
    bad = Iova{window->last.value + 1};
    ++window;
  }
  const Iova hole_start = window == usable.begin() ? Iova{0} : Iova{std::prev(window)->last.value + 1};
  const Iova hole_last = window == usable.end() ? iova_max : Iova{window->start.value - 1};
  return fail(
      Errc::iova_reserved, Stage::reserve, 0,
      "[{:#x}, {:#x}] is not usable at {:#x}: the host keeps [{:#x}, {:#x}] (reserved, or beyond what the IOMMU "
      "translates)",
      range.start.value, range.last.value, bad.value, hole_start.value, hole_last.value);
}

}  // namespace iovane::engine
