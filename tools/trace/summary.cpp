#include "trace/summary.hpp"

#include <algorithm>
#include <bitset>
#include <map>

#include "trace/reference.hpp"

namespace iovane::trace {
namespace {

/// Memory ranges that were mapped at least once, as disjoint ranges of granule numbers: one entry per contiguous
/// piece, so that a trace which claims terabytes costs no more than one that maps pages.
class Coverage {
 public:
  void add(std::uint64_t first, std::uint64_t last) {
    auto at = ranges_.upper_bound(first);
    if (at != ranges_.begin() && std::prev(at)->second >= first) --at;
    while (at != ranges_.end() && at->first <= last) {
      first = std::min(first, at->first);
      last = std::max(last, at->second);
      at = ranges_.erase(at);
    }
    ranges_.emplace(first, last);
  }
  std::uint64_t count() const {
    std::uint64_t sum = 0;
    for (const auto& [first, last] : ranges_) sum += last - first + 1;
    return sum;
  }

 private:
  std::map<std::uint64_t, std::uint64_t> ranges_;
};

}  // namespace

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
