#include "replay/call_bound.hpp"

#include <algorithm>
#include <vector>

namespace iovane::replay {

std::uint64_t least_calls(std::span<const Operation> batch, const trace::Reference& before, bool spans) {
  std::uint64_t calls = 0;
  std::vector<IovaRange> unmaps;
  for (const Operation& op : batch) {
    if (op.kind == trace::EventKind::map)
      ++calls;
    else
      unmaps.push_back(op.range);
  }
  std::sort(unmaps.begin(), unmaps.end());
  for (std::size_t i = 0; i < unmaps.size(); ++i) {
    if (!spans) {
      for (auto at = before.live().lower_bound(unmaps[i].start);
           at != before.live().end() && at->first <= unmaps[i].last; ++at)
        ++calls;
      continue;
    }
    // Between two neighbours of the sorted unmaps nothing is unmapped, so whatever lives there survives the batch.
    const bool joins =
        i > 0 && (unmaps[i - 1].precedes_directly(unmaps[i]) ||
                  !before.overlaps({Iova{unmaps[i - 1].last.value + 1}, Iova{unmaps[i].start.value - 1}}));
    if (!joins) ++calls;
  }
  return calls;
}

std::uint64_t least_calls_in_all(std::span<const Operation> operations, std::span<const std::size_t> begins,
                                 bool spans) {
  trace::Reference reference;
  std::uint64_t calls = 0;
  for (std::size_t b = 0; b < begins.size(); ++b) {
    const std::size_t stop = b + 1 < begins.size() ? begins[b + 1] : operations.size();
    const auto batch = operations.subspan(begins[b], stop - begins[b]);
    calls += least_calls(batch, reference, spans);
    for (const Operation& op : batch)
      static_cast<void>(reference.apply({.kind = op.kind, .range = op.range, .physical = op.memory}).has_value());
  }
  return calls;
}

}  // namespace iovane::replay
