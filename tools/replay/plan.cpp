#include "replay/plan.hpp"

#include <algorithm>
#include <iterator>
#include <map>

#include "base/checked_math.hpp"
#include "base/error_text.hpp"
#include "trace/coverage.hpp"

namespace iovane::replay {
namespace {

using trace::granule;

constexpr std::uint64_t superpage_granules = (2U << 20) / granule;

/// From granules of guest physical memory to granules of the memory that stands for it.
class Layout {
 public:
  explicit Layout(const trace::Coverage& coverage) {
    for (const auto& [first, last] : coverage.ranges()) {
      const std::uint64_t count = last - first + 1;
      if (count >= superpage_granules) {
        const std::uint64_t wanted = first % superpage_granules;
        size_ += (wanted + superpage_granules - size_ % superpage_granules) % superpage_granules;
      }
      moved_.emplace(first, size_);
      size_ += count;
    }
  }
  std::uint64_t size() const noexcept { return size_; }
  std::uint64_t offset_of(std::uint64_t first) const {
    const auto piece = std::prev(moved_.upper_bound(first));
    return piece->second + (first - piece->first);
  }

 private:
  std::map<std::uint64_t, std::uint64_t> moved_;  // first granule of a piece -> where it went
  std::uint64_t size_ = 0;
};

}  // namespace

Result<Plan> make_plan(const trace::Trace& trace, std::uint64_t events_max, Bytes memory_max) {
  const std::size_t count = events_max == 0
                                ? trace.events.size()
                                : static_cast<std::size_t>(std::min<std::uint64_t>(events_max, trace.events.size()));
  const std::span events{trace.events.data(), count};
  trace::Coverage coverage;
  for (const trace::Event& e : events)
    if (e.kind == trace::EventKind::map) coverage.add(e.physical / granule, (e.physical + e.range.span()) / granule);
  // Before the layout: counts of granules cannot overflow, the padding between pieces is bounded by their sum.
  if (coverage.count() > memory_max.value / granule) {
    constexpr std::uint64_t granules_per_mib = (1U << 20) / granule;
    const std::uint64_t need_mib = coverage.count() / granules_per_mib + (coverage.count() % granules_per_mib != 0);
    return base::fail(Errc::limit_reached, Stage::validate, 0,
                      "the trace maps {} MiB of memory, replay was allowed {} MiB; allow as much (--memory {}) or "
                      "replay fewer events (--events)",
                      need_mib, memory_max.value >> 20, need_mib);
  }
  const Layout layout{coverage};
  Plan plan;
  plan.memory = Bytes{layout.size() * granule};
  plan.operations.reserve(count);
  for (const trace::Event& e : events) {
    const bool map = e.kind == trace::EventKind::map;
    plan.operations.push_back({e.kind, e.range, map ? layout.offset_of(e.physical / granule) * granule : 0});
    plan.leaf_entries += e.range.span() / granule + 1;
  }
  return plan;
}

std::vector<std::size_t> cut_batches(std::span<const Operation> operations, std::size_t batch_max) {
  std::vector<std::size_t> begins;
  std::map<std::uint64_t, std::uint64_t> touched;  // start -> last, disjoint
  std::size_t in_batch = 0;
  for (std::size_t i = 0; i < operations.size(); ++i) {
    const IovaRange range = operations[i].range;
    const auto after = touched.upper_bound(range.last.value);
    const bool depends = after != touched.begin() && std::prev(after)->second >= range.start.value;
    if (in_batch == 0 || in_batch == batch_max || depends) {
      begins.push_back(i);
      touched.clear();
      in_batch = 0;
    }
    touched.emplace(range.start.value, range.last.value);
    ++in_batch;
  }
  return begins;
}

}  // namespace iovane::replay
