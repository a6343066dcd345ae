#include "backends/range_list.hpp"

#include <algorithm>

#include "base/checked_math.hpp"

namespace iovane::backends {

std::vector<IovaRange> normalized(std::vector<IovaRange> ranges) {
  std::sort(ranges.begin(), ranges.end());
  std::vector<IovaRange> joined;
  for (const IovaRange& range : ranges) {
    if (!joined.empty() && (joined.back().overlaps(range) || joined.back().precedes_directly(range))) {
      joined.back().last = std::max(joined.back().last, range.last);
    } else {
      joined.push_back(range);
    }
  }
  return joined;
}

std::vector<IovaRange> without(std::vector<IovaRange> ranges, std::span<const IovaRange> holes) {
  std::vector<IovaRange> left = normalized(std::move(ranges));
  for (const IovaRange& hole : holes) {
    std::vector<IovaRange> next;
    for (const IovaRange& range : left) {
      if (!range.overlaps(hole)) {
        next.push_back(range);
        continue;
      }
      if (range.start < hole.start) next.push_back({range.start, Iova{hole.start.value - 1}});
      if (hole.last < range.last) next.push_back({Iova{hole.last.value + 1}, range.last});
    }
    left = std::move(next);
  }
  return left;
}

std::optional<IovaRange> first_missing(std::span<const IovaRange> usable, IovaRange wanted) noexcept {
  for (const IovaRange& range : usable) {
    if (range.last < wanted.start) continue;
    if (wanted.start < range.start) return IovaRange{wanted.start, std::min(wanted.last, Iova{range.start.value - 1})};
    if (wanted.last <= range.last) return std::nullopt;
    wanted.start = Iova{range.last.value + 1};
  }
  return wanted;
}

std::vector<IovaRange> whole_granules(std::span<const IovaRange> ranges, Bytes granule) {
  std::vector<IovaRange> whole;
  for (const IovaRange& range : ranges) {
    const auto start = base::align_up(range.start.value, granule.value);
    // The address after `last`, rounded down; 0 stands for 2^64, which is a multiple of every granule.
    const std::uint64_t after = range.last == iova_max ? 0 : base::align_down(range.last.value + 1, granule.value);
    if (!start || (after != 0 && after <= *start)) continue;
    whole.push_back({Iova{*start}, Iova{after - 1}});
  }
  return whole;
}

}  // namespace iovane::backends
