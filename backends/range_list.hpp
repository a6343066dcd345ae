// Small algebra on sorted lists of closed ranges: what is usable, what is missing, what is left.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "iovane/types.hpp"

namespace iovane::backends {

/// Sorted, disjoint, with touching ranges joined.
std::vector<IovaRange> normalized(std::vector<IovaRange> ranges);

/// The parts of `ranges` that no hole covers. Both need not be sorted.
std::vector<IovaRange> without(std::vector<IovaRange> ranges, std::span<const IovaRange> holes);

/// The first part of `wanted` that lies outside `usable` (normalized); nothing when all of it is usable.
std::optional<IovaRange> first_missing(std::span<const IovaRange> usable, IovaRange wanted) noexcept;

/// Each range cut down to whole granules (a power of two); ranges without a whole granule go.
std::vector<IovaRange> whole_granules(std::span<const IovaRange> ranges, Bytes granule);

}  // namespace iovane::backends
