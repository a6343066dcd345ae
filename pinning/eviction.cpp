#include "pinning/eviction.hpp"

namespace iovane::pinning {

EvictionPolicy::EvictionPolicy(PinIndex& index, std::uint32_t ghosts)
    : index_{index}, ghosts_{std::make_unique<Ghost[]>(ghosts)}, ghost_mask_{ghosts - 1} {}

void EvictionPolicy::push(Queue& queue, RegionId id) noexcept {
  RegionRecord& record = index_.record(id);
  record.set_list(queue.name);
  record.prev = no_region;  // towards the newest
  record.next = queue.newest;
  if (queue.newest != no_region)
    index_.record(queue.newest).prev = id;
  else
    queue.oldest = id;
  queue.newest = id;
  queue.bytes += record.range().length().value;
  ++queue.count;
}

void EvictionPolicy::unlink(Queue& queue, RegionId id) noexcept {
  RegionRecord& record = index_.record(id);
  (record.prev != no_region ? index_.record(record.prev).next : queue.newest) = record.next;
  (record.next != no_region ? index_.record(record.next).prev : queue.oldest) = record.prev;
  record.prev = record.next = no_region;
  record.set_list(RegionList::none);
  queue.bytes -= record.range().length().value;
  --queue.count;
}

EvictionPolicy::Queue& EvictionPolicy::queue_of(RegionId id) noexcept {
  return index_.record(id).list() == RegionList::main ? main_ : small_;
}

void EvictionPolicy::insert(RegionId id) noexcept {
  push(is_remembered(index_.record(id).start()) ? main_ : small_, id);
}

void EvictionPolicy::remove(RegionId id) noexcept { unlink(queue_of(id), id); }

void EvictionPolicy::put_back(RegionId id) noexcept { push(main_, id); }

std::size_t EvictionPolicy::select(std::uint64_t bytes, std::size_t count_min, std::uint8_t node,
                                   const MemoryRange* keep, std::span<RegionId> out) noexcept {
  std::size_t chosen = 0;
  std::uint64_t together = 0;
  // Two rounds at most over every region: the first may only clear marks, the second finds them clear.
  std::uint64_t steps = 2 * std::uint64_t{count()} + 2;
  std::uint32_t small_passed = 0;  // how many of the small queue were passed over
  while (chosen < out.size() && (together < bytes || chosen < count_min) && steps-- > 0 && count() != 0) {
    const bool from_small = small_passed < small_.count &&
                            (main_.count == 0 || small_.bytes * 100 >= (small_.bytes + main_.bytes) * small_percent);
    if (!from_small && main_.count == 0) break;
    Queue& queue = from_small ? small_ : main_;
    const RegionId id = queue.oldest;
    const RegionRecord& record = index_.record(id);
    unlink(queue, id);
    if ((node != any_node && record.node() != node) || (keep != nullptr && keep->overlaps(record.range()))) {
      push(queue, id);
      if (from_small) ++small_passed;
    } else if (index_.is_held(id) || index_.take_accessed(id)) {
      push(main_, id);
    } else {
      if (from_small) remember(id);
      together += record.range().length().value;
      out[chosen++] = id;
    }
  }
  return chosen;
}

std::uint64_t EvictionPolicy::hash(std::uint64_t start) noexcept {
  std::uint64_t h = (start >> 12) * 0x9e37'79b9'7f4a'7c15U;  // Fibonacci hashing; the high bits are the good ones
  return h ^ (h >> 29);
}

void EvictionPolicy::remember(RegionId id) noexcept {
  const std::uint64_t h = hash(index_.record(id).start());
  ghosts_[h & ghost_mask_] = {static_cast<std::uint32_t>(h >> 32), ++ghost_clock_};
}

bool EvictionPolicy::is_remembered(std::uint64_t start) const noexcept {
  const std::uint64_t h = hash(start);
  const Ghost& ghost = ghosts_[h & ghost_mask_];
  // As the paper's ghost queue: it remembers about as many regions as the main queue holds.
  const std::uint32_t age_max = main_.count < 16 ? 16 : main_.count;
  return ghost.when != 0 && ghost.tag == static_cast<std::uint32_t>(h >> 32) && ghost_clock_ - ghost.when < age_max;
}

}  // namespace iovane::pinning
