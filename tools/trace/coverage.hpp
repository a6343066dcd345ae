// Which granules of memory a trace ever maps.
#pragma once

#include <cstdint>
#include <iterator>
#include <map>

namespace iovane::trace {

/// A set of numbers as disjoint closed ranges that do not touch: one entry per contiguous piece, so that a trace which
/// claims terabytes in one piece costs no more than one that maps a page.
class Coverage {
 public:
  /// first <= last.
  void add(std::uint64_t first, std::uint64_t last) {
    auto at = ranges_.upper_bound(first);
    if (at != ranges_.begin() && touches(std::prev(at)->second, first)) --at;
    while (at != ranges_.end() && (at->first <= last || touches(last, at->first))) {
      first = first < at->first ? first : at->first;
      last = last > at->second ? last : at->second;
      at = ranges_.erase(at);
    }
    ranges_.emplace(first, last);
  }
  std::uint64_t count() const {
    std::uint64_t sum = 0;
    for (const auto& [first, last] : ranges_) sum += last - first + 1;
    return sum;
  }
  /// first -> last, ascending.
  const std::map<std::uint64_t, std::uint64_t>& ranges() const noexcept { return ranges_; }

 private:
  static bool touches(std::uint64_t last, std::uint64_t next) noexcept { return last >= next || last + 1 == next; }
  std::map<std::uint64_t, std::uint64_t> ranges_;
};

}  // namespace iovane::trace
