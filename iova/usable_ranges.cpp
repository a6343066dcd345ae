#include "iova/usable_ranges.hpp"

#include <algorithm>

namespace iovane::iova {

UsableRanges::UsableRanges(std::span<const IovaRange> ranges) {
  std::vector<IovaRange> sorted;
  std::copy_if(ranges.begin(), ranges.end(), std::back_inserter(sorted),
               [](const IovaRange& r) { return r.well_formed(); });
  std::sort(sorted.begin(), sorted.end());
  for (const IovaRange& r : sorted) {
    if (!ranges_.empty() && (ranges_.back().overlaps(r) || ranges_.back().precedes_directly(r))) {
      ranges_.back().last = std::max(ranges_.back().last, r.last);
    } else {
      ranges_.push_back(r);
    }
  }
}

bool UsableRanges::contains(const IovaRange& range) const { return !first_missing(range); }

std::optional<IovaRange> UsableRanges::first_overlap(const IovaRange& range) const noexcept {
  for (const IovaRange& r : ranges_)
    if (const auto common = r.intersection(range)) return common;
  return std::nullopt;
}

std::optional<IovaRange> UsableRanges::first_missing(const IovaRange& range) const {
  return complement().first_overlap(range);
}

UsableRanges UsableRanges::complement() const {
  UsableRanges out;
  Iova next{0};
  for (const IovaRange& r : ranges_) {
    if (r.start > next) out.ranges_.push_back({next, Iova{r.start.value - 1}});
    if (r.last == iova_max) return out;
    next = Iova{r.last.value + 1};
  }
  out.ranges_.push_back({next, iova_max});
  return out;
}

UsableRanges UsableRanges::common_with(const UsableRanges& other) const {
  UsableRanges out;
  auto a = ranges_.begin();
  auto b = other.ranges_.begin();
  while (a != ranges_.end() && b != other.ranges_.end()) {
    if (const auto common = a->intersection(*b)) out.ranges_.push_back(*common);
    if (a->last < b->last) {
      ++a;
    } else {
      ++b;
    }
  }
  return out;
}

UsableRanges UsableRanges::without(std::span<const IovaRange> taken) const {
  return common_with(UsableRanges{taken}.complement());
}

}  // namespace iovane::iova
