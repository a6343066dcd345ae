// How a large range is cut for parallel population. Pure.
#pragma once

#include <cstdint>
#include <vector>

#include "iovane/types.hpp"
#include "pinning/memory_range.hpp"

namespace iovane::pinning {

/// Cuts [range] at multiples of a unit, so that no cut lies inside an OS page of `os_page` bytes, nor inside a 2 MiB
/// block of it where the memory could have been huge: such a cut would make the IOMMU use smaller entries on both
/// sides. The unit is the largest power of two from that minimum up to `border` that still leaves about four pieces
/// for each worker. Pieces are in order and cover the range; all but the first and the last are whole units.
std::vector<MemoryRange> cut_for_population(const MemoryRange& range, Bytes os_page, Bytes border, unsigned workers);

/// The unit that cut_for_population() cuts at.
std::uint64_t population_unit(Bytes length, Bytes os_page, Bytes border, unsigned workers) noexcept;

}  // namespace iovane::pinning
