// Finds the recorded maps that an unmap ends.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <unordered_map>
#include <vector>

#include "trace/event.hpp"

namespace iovane::trace {

/// Maps whose unmap was not seen yet, and the search for those that tile an unmap's range. Names events by their
/// position in the recording. One thread.
class UnmapMatcher {
 public:
  /// `open_per_start_max`: maps of one start address that may wait for their unmap.
  UnmapMatcher(std::uint64_t skew_ns_max, std::uint32_t open_per_start_max) noexcept
      : skew_ns_max_{skew_ns_max}, open_per_start_max_{open_per_start_max} {}

  /// False: too many maps of that start address wait already.
  bool add(std::uint32_t position, const Event& map);
  void remove(std::uint32_t position, const Event& map);

  struct Match {
    std::vector<std::uint32_t> maps;  ///< positions, by address, without a hole between them
  };

  /// Maps that tile `unmap` exactly. Among several: the fewest that are too young for this unmap (mapped by another
  /// CPU within the skew), then the fewest breaks in what one CPU mapped in a row, then the newest.
  std::optional<Match> exact(const Event& unmap) const { return search(unmap, false); }
  /// Maps that one CPU mapped in a row and that tile the range's tail: what is left of a scatter list whose first
  /// pieces were mapped before the recording began.
  std::optional<Match> tail(const Event& unmap) const { return search(unmap, true); }
  /// The earliest map that another CPU made over part of the range within the skew before `unmap`.
  std::optional<std::uint32_t> earliest_young(const Event& unmap) const;

 private:
  struct Open {
    std::uint64_t last = 0;
    std::uint32_t position = 0;
    std::uint32_t cpu_sequence = 0;  ///< how many maps this CPU made before
    std::uint64_t time_ns = 0;
    std::uint8_t cpu = 0;
  };
  std::optional<Match> search(const Event& unmap, bool tail_only) const;
  bool too_young(const Open& map, const Event& unmap) const noexcept;

  std::uint64_t skew_ns_max_;
  std::uint32_t open_per_start_max_;
  std::multimap<std::uint64_t, Open> open_;  ///< by start address; equal starts in recorded order
  std::uint32_t maps_by_cpu_[256] = {};
};

}  // namespace iovane::trace
