// What a trace is made of: one map or unmap that a real IOMMU driver made.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "iovane/types.hpp"

namespace iovane::trace {

enum class EventKind : std::uint8_t { map = 0, unmap = 1 };

/// One recorded event. Addresses and lengths are multiples of `granule`.
struct Event {
  EventKind kind = EventKind::map;
  std::uint8_t cpu = 0;
  std::uint64_t time_ns = 0;  ///< the recording's clock; repaired traces may step back by a few microseconds
  IovaRange range{};
  std::uint64_t physical = 0;  ///< map: the guest physical address; unmap: 0

  bool operator==(const Event&) const = default;
};

inline constexpr std::uint64_t granule = 4096;

/// Where a trace came from and what import did to it. All counts are of events unless their name says otherwise.
struct SourceFacts {
  std::string source;       ///< the imported file's name, without its folder
  std::uint64_t lines = 0;  ///< lines read
  std::uint64_t maps_read = 0;
  std::uint64_t unmaps_read = 0;
  std::uint64_t foreign_lines = 0;         ///< events of other kinds, left out
  std::uint64_t malformed_lines = 0;       ///< left out on request
  std::uint64_t lost_events = 0;           ///< that the recorder itself says it lost
  std::uint64_t unmaps_moved_later = 0;    ///< recorded before their own map by another CPU's clock
  std::uint64_t unmaps_moved_earlier = 0;  ///< recorded after the next map of their IOVA by another CPU's clock
  std::uint64_t unmaps_trimmed = 0;        ///< began before the recording: shortened to what was recorded
  std::uint64_t unmaps_dropped = 0;        ///< of ranges that were mapped before the recording began
  std::uint64_t maps_dropped = 0;          ///< too many live mappings of one IOVA
  std::uint64_t spaces = 1;                ///< address spaces needed so that nothing overlaps
  std::uint64_t space_stride = 0;          ///< distance in bytes between them; 0 with one space
  std::uint64_t moved_to_space = 0;        ///< events that went into a space other than the first

  bool operator==(const SourceFacts&) const = default;
};

/// A whole trace. Invariant of every trace that import() or read_file() returns: applied in order to an empty
/// address space, no map overlaps a live one, every unmap removes at least one mapping and cuts none.
struct Trace {
  SourceFacts facts;
  std::vector<Event> events;
};

/// Bounds on what is accepted from outside.
inline constexpr std::uint64_t events_max = 1U << 24;
inline constexpr std::uint64_t line_bytes_max = 4096;

}  // namespace iovane::trace
