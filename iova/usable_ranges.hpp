// Sets of addresses as ascending, disjoint, non-adjacent closed ranges. Control plane: allocates.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "iovane/types.hpp"

namespace iovane::iova {

/// An address set; value type. Any 64-bit address may be in it, 2^64-1 included.
class UsableRanges {
 public:
  UsableRanges() = default;
  /// Ranges in any order, overlapping or adjacent as they like; malformed ones are ignored.
  explicit UsableRanges(std::span<const IovaRange> ranges);

  std::span<const IovaRange> ranges() const noexcept { return ranges_; }
  bool empty() const noexcept { return ranges_.empty(); }
  bool contains(const IovaRange& range) const;
  /// The lowest part of `range` that is in the set.
  std::optional<IovaRange> first_overlap(const IovaRange& range) const noexcept;
  /// The lowest part of `range` that is not.
  std::optional<IovaRange> first_missing(const IovaRange& range) const;

  UsableRanges without(std::span<const IovaRange> taken) const;
  UsableRanges common_with(const UsableRanges& other) const;
  /// Every address that is not in the set.
  UsableRanges complement() const;
  bool operator==(const UsableRanges&) const = default;

 private:
  std::vector<IovaRange> ranges_;
};

}  // namespace iovane::iova
