// The plainest possible interval allocator: what the real one is compared with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <optional>
#include <vector>

#include "iovane/types.hpp"

namespace iovane::test {

/// Live intervals in an ordered map; windows in a vector. Nothing is fast and everything is obvious.
class ReferenceIntervals {
 public:
  explicit ReferenceIntervals(std::uint64_t granule) : granule_{granule} {}

  void set_windows(std::vector<IovaRange> windows) { windows_ = std::move(windows); }
  const std::vector<IovaRange>& windows() const { return windows_; }

  bool usable(const IovaRange& r) const {
    return std::any_of(windows_.begin(), windows_.end(), [&](const IovaRange& w) { return w.contains(r); });
  }
  /// The first live interval that overlaps `r`.
  std::optional<IovaRange> overlap(const IovaRange& r) const {
    auto it = live_.upper_bound(r.last.value);
    std::optional<IovaRange> found;
    while (it != live_.begin()) {
      --it;
      if (it->second < r.start.value) break;
      found = IovaRange{Iova{it->first}, Iova{it->second}};
    }
    return found;
  }
  /// True when some start would do.
  bool fits(std::uint64_t length, std::uint64_t align, Iova ceiling) const {
    align = std::max(align, granule_);
    for (const IovaRange& window : windows_) {
      Iova from = window.start;
      for (;;) {
        const IovaRange rest{from, window.last};
        const auto next = overlap(rest);
        Iova last = next ? Iova{next->start.value - 1} : window.last;  // only used when there is room before it
        if (!next || next->start > from) {
          if (last > ceiling) last = ceiling;
          const std::uint64_t mask = align - 1;
          if (from.value <= ~std::uint64_t{0} - mask) {
            const Iova start{(from.value + mask) & ~mask};
            if (start <= last && last.value - start.value >= length - 1) return true;
          }
        }
        if (!next || next->last >= window.last) break;
        from = Iova{next->last.value + 1};
      }
    }
    return false;
  }
  void add(const IovaRange& r) { live_.emplace(r.start.value, r.last.value); }
  bool has(const IovaRange& r) const {
    const auto it = live_.find(r.start.value);
    return it != live_.end() && it->second == r.last.value;
  }
  void remove(const IovaRange& r) { live_.erase(r.start.value); }
  std::optional<IovaRange> find(Iova a) const { return overlap({a, a}); }
  std::size_t count() const { return live_.size(); }
  std::uint64_t bytes() const {
    std::uint64_t sum = 0;
    for (const auto& [start, last] : live_) sum += last - start + 1;
    return sum;
  }
  std::vector<IovaRange> all() const {
    std::vector<IovaRange> out;
    for (const auto& [start, last] : live_) out.push_back({Iova{start}, Iova{last}});
    return out;
  }
  IovaRange at(std::size_t index) const {
    const auto it = std::next(live_.begin(), static_cast<std::ptrdiff_t>(index));
    return {Iova{it->first}, Iova{it->second}};
  }

 private:
  std::uint64_t granule_;
  std::vector<IovaRange> windows_;
  std::map<std::uint64_t, std::uint64_t> live_;
};

}  // namespace iovane::test
