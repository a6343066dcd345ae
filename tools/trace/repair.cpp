#include "trace/repair.hpp"

#include <algorithm>
#include <bit>
#include <deque>
#include <iterator>
#include <limits>
#include <map>
#include <optional>

#include "base/error_text.hpp"
#include "trace/unmap_matcher.hpp"

namespace iovane::trace {
namespace {

constexpr std::uint32_t never = std::numeric_limits<std::uint32_t>::max();

/// What one unmap ends: pieces that live and die together, or one map that nothing ended.
struct Life {
  IovaRange range{};
  std::vector<std::uint32_t> maps;  ///< positions
  std::uint32_t unmap = never;      ///< position
  std::uint64_t birth = 0;          ///< order of its first map
  std::uint64_t death = 0;          ///< order of its unmap
};

/// Recorded event i has order 2i + 1 unless it was moved: before event j is 2j, after it 2j + 2.
constexpr std::uint64_t order_of(std::uint32_t position) noexcept { return 2 * std::uint64_t{position} + 1; }

/// Pairs unmaps with maps.
class Matching {
 public:
  Matching(const std::vector<Event>& recorded, const RepairOptions& options, SourceFacts& facts)
      : recorded_{recorded}, options_{options}, facts_{facts}, matcher_{options.skew_ns_max, options.spaces_max} {}

  std::vector<Life> run() {
    waiting_for_unmap_.assign(recorded_.size(), false);
    for (std::uint32_t i = 0; i < recorded_.size(); ++i) {
      give_up_on_early_unmaps(recorded_[i].time_ns);
      if (recorded_[i].kind == EventKind::map)
        on_map(i);
      else
        on_unmap(i);
    }
    give_up_on_early_unmaps(std::numeric_limits<std::uint64_t>::max());
    for (std::uint32_t i = 0; i < recorded_.size(); ++i) {
      if (!waiting_for_unmap_[i]) continue;
      lives_.push_back({recorded_[i].range, {i}, never, order_of(i), std::numeric_limits<std::uint64_t>::max()});
    }
    return std::move(lives_);
  }

 private:
  void on_map(std::uint32_t position) {
    const Event& map = recorded_[position];
    if (!matcher_.add(position, map)) {
      ++facts_.maps_dropped;
      return;
    }
    waiting_for_unmap_[position] = true;
    // An unmap that another CPU's clock put before its last map finds it now.
    for (auto early = early_unmaps_.begin(); early != early_unmaps_.end(); ++early) {
      const Event& unmap = recorded_[*early];
      if (unmap.cpu == map.cpu || !unmap.range.contains(map.range)) continue;
      const auto match = matcher_.exact(unmap);
      if (!match) continue;
      ++facts_.unmaps_moved_later;
      end_life(*match, *early, order_of(position) + 1);
      early_unmaps_.erase(early);
      return;
    }
  }

  void on_unmap(std::uint32_t position) {
    const Event& unmap = recorded_[position];
    const auto match = matcher_.exact(unmap);
    if (!match) {
      early_unmaps_.push_back(position);
      return;
    }
    std::uint64_t order = order_of(position);
    // Another CPU mapped the range anew "before" this unmap freed it: put the unmap back in front of that map.
    if (const auto young = matcher_.earliest_young(unmap); young) {
      const auto newest = *std::max_element(match->maps.begin(), match->maps.end());
      if (newest < *young) {
        order = order_of(*young) - 1;
        ++facts_.unmaps_moved_earlier;
      }
    }
    end_life(*match, position, order);
  }

  void give_up_on_early_unmaps(std::uint64_t now_ns) {
    while (!early_unmaps_.empty()) {
      const std::uint32_t position = early_unmaps_.front();
      const std::uint64_t waits_until = recorded_[position].time_ns + options_.skew_ns_max;
      if (now_ns != std::numeric_limits<std::uint64_t>::max() && now_ns <= waits_until) return;
      early_unmaps_.pop_front();
      if (auto match = matcher_.tail(recorded_[position]); match && is_before(*match, position)) {
        ++facts_.unmaps_trimmed;
        end_life(*match, position, order_of(position));
      } else {
        ++facts_.unmaps_dropped;
      }
    }
  }

  static bool is_before(const UnmapMatcher::Match& match, std::uint32_t position) {
    return std::all_of(match.maps.begin(), match.maps.end(), [&](std::uint32_t map) { return map < position; });
  }

  void end_life(const UnmapMatcher::Match& match, std::uint32_t unmap, std::uint64_t order) {
    Life life{{recorded_[match.maps.front()].range.start, recorded_[match.maps.back()].range.last},
              match.maps,
              unmap,
              order_of(*std::min_element(match.maps.begin(), match.maps.end())),
              order};
    for (const std::uint32_t map : match.maps) {
      matcher_.remove(map, recorded_[map]);
      waiting_for_unmap_[map] = false;
    }
    lives_.push_back(std::move(life));
  }

  const std::vector<Event>& recorded_;
  const RepairOptions& options_;
  SourceFacts& facts_;
  UnmapMatcher matcher_;
  std::vector<bool> waiting_for_unmap_;
  std::deque<std::uint32_t> early_unmaps_;  ///< unmaps without a match yet, in recorded order
  std::vector<Life> lives_;
};

/// One address space: which ranges are taken, and until when.
class Space {
 public:
  bool place(const Life& life) {
    auto at = taken_.upper_bound(life.range.last.value);
    while (at != taken_.begin()) {
      const auto before = std::prev(at);
      if (before->second.last < life.range.start.value) break;
      if (before->second.death > life.birth) return false;
      at = taken_.erase(before);
    }
    taken_[life.range.start.value] = {life.range.last.value, life.death};
    return true;
  }

 private:
  struct Taken {
    std::uint64_t last = 0;
    std::uint64_t death = 0;
  };
  std::map<std::uint64_t, Taken> taken_;  ///< by start; disjoint
};

struct Placed {
  std::uint64_t order = 0;
  std::uint32_t position = 0;
  std::uint32_t space = 0;
  const Life* life = nullptr;
};

}  // namespace

Result<std::vector<Event>> repair(const std::vector<Event>& recorded, const RepairOptions& options,
                                  SourceFacts& facts) {
  std::vector<Life> lives = Matching{recorded, options, facts}.run();
  std::sort(lives.begin(), lives.end(), [](const Life& a, const Life& b) { return a.birth < b.birth; });

  std::vector<Space> spaces(options.spaces_max);
  std::vector<Placed> placed;
  placed.reserve(recorded.size());
  std::uint32_t spaces_used = 1;
  std::uint64_t highest = 0;
  for (const Life& life : lives) {
    std::uint32_t space = 0;
    while (space < options.spaces_max && !spaces[space].place(life)) ++space;
    if (space == options.spaces_max) {
      facts.maps_dropped += life.maps.size();
      facts.unmaps_dropped += life.unmap != never ? 1 : 0;
      continue;
    }
    spaces_used = std::max(spaces_used, space + 1);
    highest = std::max(highest, life.range.last.value);
    for (const std::uint32_t map : life.maps) placed.push_back({order_of(map), map, space, nullptr});
    if (life.unmap != never) placed.push_back({life.death, life.unmap, space, &life});
    if (space != 0) facts.moved_to_space += life.maps.size() + (life.unmap != never ? 1 : 0);
  }

  const unsigned stride_bits = static_cast<unsigned>(std::bit_width(highest));
  facts.spaces = spaces_used;
  if (spaces_used > 1) {
    if (stride_bits + static_cast<unsigned>(std::bit_width(spaces_used - 1)) > 63)
      return base::fail(Errc::limit_reached, Stage::validate, 0,
                        "the recording needs {} address spaces side by side and reaches up to IOVA {:#x}: together "
                        "they pass 2^63; record one device at a time",
                        spaces_used, highest);
    facts.space_stride = std::uint64_t{1} << stride_bits;
  }

  std::sort(placed.begin(), placed.end(), [](const Placed& a, const Placed& b) {
    return a.order != b.order ? a.order < b.order : a.position < b.position;
  });
  std::vector<Event> events;
  events.reserve(placed.size());
  for (const Placed& p : placed) {
    Event event = recorded[p.position];
    if (p.life != nullptr) event.range = p.life->range;
    event.range.start.value += p.space * facts.space_stride;
    event.range.last.value += p.space * facts.space_stride;
    events.push_back(event);
  }
  return events;
}

}  // namespace iovane::trace
