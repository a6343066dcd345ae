// Dirty pages behind the seam: what devices wrote, one bit per granule, and what becomes of it when an unmap takes the
// mapping away.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "iovane/types.hpp"

namespace iovane::backends {

/// Who keeps the marks of mappings that an unmap removes. The engine implements it, because it has the index: kernels
/// read dirty pages of runs of mappings without holes (iommufd) or of whole mappings (type1), and only the index knows
/// where those begin. Called by execute() and unmap_all() of a space that tracks, on their thread; must not call back.
class DirtyHarvest {
 public:
  virtual ~DirtyHarvest() = default;
  DirtyHarvest() = default;
  DirtyHarvest(const DirtyHarvest&) = delete;
  DirtyHarvest& operator=(const DirtyHarvest&) = delete;

  /// The first run of whole mappings, without a hole between them, that begins inside `range`, cut short between two
  /// mappings where it would pass a bound of the engine's. Nothing when no mapping begins there.
  virtual std::optional<IovaRange> mapped_run(const IovaRange& range) noexcept = 0;
  /// Bit n of `bitmap`: granule n of `range` was written, and its mapping goes now.
  virtual void take(const IovaRange& range, std::span<const std::uint64_t> bitmap) noexcept = 0;
  /// Nobody could say what was written: all of `range` counts.
  virtual void take_all(const IovaRange& range) noexcept = 0;
};

/// Words of a bitmap with one bit for each of `granule` bytes of `range`.
constexpr std::uint64_t bitmap_words(const IovaRange& range, Bytes granule) noexcept {
  return range.span() / granule.value / 64 + 1;
}

}  // namespace iovane::backends
