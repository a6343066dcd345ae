#include "trace/summary.hpp"

#include <algorithm>
#include <bitset>

#include "trace/coverage.hpp"
#include "trace/reference.hpp"

namespace iovane::trace {
Summary summarize(const Trace& trace) {
  Summary s;
  if (trace.events.empty()) return s;
  Reference reference;
  Coverage memory;
  std::bitset<256> cpus;
  std::uint64_t first_ns = trace.events.front().time_ns;
  std::uint64_t last_ns = first_ns;
  s.iova_first = ~std::uint64_t{0};
  for (const Event& e : trace.events) {
    cpus.set(e.cpu);
    first_ns = std::min(first_ns, e.time_ns);
    last_ns = std::max(last_ns, e.time_ns);
    if (!reference.apply(e)) break;
    if (e.kind == EventKind::unmap) {
      ++s.unmaps;
      continue;
    }
    ++s.maps;
    s.mapped.value += e.range.length().value;
    s.leaf_entries += e.range.span() / granule + 1;
    memory.add(e.physical / granule, (e.physical + e.range.span()) / granule);
    s.iova_first = std::min(s.iova_first, e.range.start.value);
    s.iova_last = std::max(s.iova_last, e.range.last.value);
    s.physical_last = std::max(s.physical_last, e.physical + e.range.span());
    s.live_max = std::max<std::uint64_t>(s.live_max, reference.live().size());
    s.live_max_bytes = std::max(s.live_max_bytes, reference.live_bytes());
  }
  if (s.maps == 0) s.iova_first = 0;
  s.duration_ns = last_ns - first_ns;
  s.cpus = static_cast<std::uint32_t>(cpus.count());
  s.distinct_granules = memory.count();
  s.live_at_end = reference.live().size();
  return s;
}

}  // namespace iovane::trace
