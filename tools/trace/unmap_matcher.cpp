#include "trace/unmap_matcher.hpp"

#include <algorithm>
#include <tuple>

namespace iovane::trace {

bool UnmapMatcher::too_young(const Open& map, const Event& unmap) const noexcept {
  return map.cpu != unmap.cpu && map.time_ns + skew_ns_max_ > unmap.time_ns;
}

bool UnmapMatcher::add(std::uint32_t position, const Event& map) {
  const std::uint32_t sequence = maps_by_cpu_[map.cpu]++;
  if (open_.count(map.range.start.value) >= open_per_start_max_) return false;
  open_.emplace(map.range.start.value, Open{map.range.last.value, position, sequence, map.time_ns, map.cpu});
  return true;
}

void UnmapMatcher::remove(std::uint32_t position, const Event& map) {
  auto [at, stop] = open_.equal_range(map.range.start.value);
  at = std::find_if(at, stop, [&](const auto& entry) { return entry.second.position == position; });
  if (at != stop) open_.erase(at);
}

/// Shortest path through the pieces, from the range's last address down to its first: cost[i] is the best way to tile
/// from piece i's start to the range's last address. Linear in the pieces inside the range.
std::optional<UnmapMatcher::Match> UnmapMatcher::search(const Event& unmap, bool tail_only) const {
  struct Step {
    const Open* piece = nullptr;
    std::uint64_t start = 0;
    std::uint32_t young = 0;
    std::uint32_t breaks = 0;
    std::int64_t next = -1;  // index of the following piece, -1 at the range's last address
    auto cost() const noexcept { return std::tuple{young, breaks, -std::int64_t{piece->position}}; }
  };
  std::vector<Step> steps;                                                          // by descending start
  std::unordered_map<std::uint64_t, std::pair<std::size_t, std::size_t>> by_start;  // start -> [first, count]

  const auto first = open_.lower_bound(unmap.range.start.value);
  for (auto at = open_.upper_bound(unmap.range.last.value); at != first;) {
    --at;
    const auto& [start, piece] = *at;
    Step step{&piece, start, too_young(piece, unmap) ? 1U : 0U, 0, -1};
    if (piece.last > unmap.range.last.value) continue;
    if (piece.last != unmap.range.last.value) {
      const auto followers = by_start.find(piece.last + 1);
      if (followers == by_start.end()) continue;
      bool found = false;
      Step best;
      for (std::size_t i = 0; i < followers->second.second; ++i) {
        const std::size_t index = followers->second.first + i;
        const Step& follower = steps[index];
        const bool in_a_row =
            follower.piece->cpu == piece.cpu && follower.piece->cpu_sequence == piece.cpu_sequence + 1;
        Step candidate{&piece, start, step.young + follower.young, follower.breaks + (in_a_row ? 0U : 1U),
                       static_cast<std::int64_t>(index)};
        // Equal cost: followers come newest first, and the first one stays.
        if (!found || candidate.cost() < best.cost()) best = candidate;
        found = true;
      }
      step = best;
    }
    auto& slot = by_start.try_emplace(start, steps.size(), 0).first->second;
    ++slot.second;
    steps.push_back(step);
  }

  std::int64_t chosen = -1;
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    if (tail_only ? (step.breaks != 0 || step.young != 0) : step.start != unmap.range.start.value) continue;
    const auto better = [&](const Step& other) {
      return tail_only ? step.start < other.start : step.cost() < other.cost();
    };
    if (chosen < 0 || better(steps[static_cast<std::size_t>(chosen)])) chosen = static_cast<std::int64_t>(i);
  }
  if (chosen < 0) return std::nullopt;
  Match match;
  for (std::int64_t at = chosen; at >= 0; at = steps[static_cast<std::size_t>(at)].next)
    match.maps.push_back(steps[static_cast<std::size_t>(at)].piece->position);
  return match;
}

std::optional<std::uint32_t> UnmapMatcher::earliest_young(const Event& unmap) const {
  std::optional<std::uint32_t> earliest;
  const auto stop = open_.upper_bound(unmap.range.last.value);
  for (auto at = open_.lower_bound(unmap.range.start.value); at != stop; ++at)
    if (too_young(at->second, unmap) && (!earliest || at->second.position < *earliest)) earliest = at->second.position;
  return earliest;
}

}  // namespace iovane::trace
