// Turns recorded events into a sequence that an address space can follow.
//
// A recording is not such a sequence, for four reasons, and none of them is the recorded driver's fault:
//   1. The events do not name their domain. Two devices in two domains use the same IOVAs at the same time, and in the
//      recording the second device's map seems to fall on a live mapping.
//   2. One unmap removes what a scatter list mapped in many pieces, each with an event of its own.
//   3. The clocks of two CPUs differ by a few microseconds, so that events of different CPUs can change places.
//   4. The recording starts and stops in mid-life, and may lose events.
//
// So every unmap is first *matched*: with recorded maps that tile its range exactly, preferring pieces that one CPU
// mapped one after the other, then the newest. A match is a range and a time of life. Lives are then *placed*: in the
// order of their birth, each into the first address space where it overlaps no other. One space is enough for one
// domain; what does not fit into `spaces_max` is dropped. Spaces become distinct IOVA windows of one address space.
#pragma once

#include <cstdint>
#include <vector>

#include "iovane/result.hpp"
#include "trace/event.hpp"

namespace iovane::trace {

struct RepairOptions {
  /// How far the clocks of two CPUs may be apart: events of different CPUs may change places within this time.
  /// Longer than any skew seen, and shorter than any I/O: a map is not unmapped within it by another CPU.
  std::uint64_t skew_ns_max = 20'000;
  std::uint32_t spaces_max = 16;
};

/// Repairs `recorded` (in recorded order) and counts what it did in `facts`. Errors: limit_reached when the windows
/// of several spaces would pass 2^63.
Result<std::vector<Event>> repair(const std::vector<Event>& recorded, const RepairOptions& options, SourceFacts& facts);

}  // namespace iovane::trace
