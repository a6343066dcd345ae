// How regions leave the map cache: eviction, invalidation, and the unpin that follows when nobody uses them.
#include <algorithm>

#include "pinning/map_cache.hpp"

namespace iovane::pinning {

// Under lock_. A live region leaves the index and waits for its users on the retired list.
void MapCache::retire_locked(RegionId id) noexcept {
  policy_.remove(id);
  index_.erase(id);
  push_retired(id, RegionList::retired);
}

void MapCache::push_retired(RegionId id, RegionList list) noexcept {
  RegionRecord& record = index_.record(id);
  record.set_list(list);
  record.prev = no_region;
  record.next = retired_newest_;
  if (retired_newest_ != no_region)
    index_.record(retired_newest_).prev = id;
  else
    retired_oldest_ = id;
  retired_newest_ = id;
  ++stats_.regions_retired;
}

RegionId MapCache::pop_retired() noexcept {
  const RegionId id = retired_oldest_;
  if (id == no_region) return id;
  retired_oldest_ = index_.record(id).prev;
  if (retired_oldest_ != no_region)
    index_.record(retired_oldest_).next = no_region;
  else
    retired_newest_ = no_region;
  --stats_.regions_retired;
  return id;
}

std::size_t MapCache::invalidate(const MemoryRange& range) noexcept {
  if (!range.well_formed()) return 0;
  // First: who misses from here on must not be given the old pages.
  if (!range.is_file()) provider_.memory_changed(range);
  return retire(range);
}

std::size_t MapCache::retire(const MemoryRange& range) noexcept {
  const std::lock_guard held{lock_};
  if (in_flight_count_ != 0)
    for (InFlight& f : in_flight_)
      if (f.used && f.range.overlaps(range)) f.poisoned = true;
  std::size_t count = 0;
  std::uint64_t key = range.start;
  while (const auto live = index_.first_in({key, range.last})) {
    retire_locked(live->id);
    ++count;
    if (live->range.last >= range.last) break;
    key = live->range.last + 1;
  }
  stats_.invalidations += count;
  return count;
}

std::uint64_t MapCache::collect() noexcept {
  std::uint64_t freed = 0;
  std::uint64_t left = 0;
  bool first = true;
  do {
    std::array<RegionId, PinIndex::batch_max> ids;
    std::array<bool, PinIndex::batch_max> in_use;
    std::array<MemoryRange, PinIndex::batch_max> reports;
    std::size_t unused = 0;
    std::size_t report_count = 0;
    {
      const std::lock_guard held{lock_};
      if (std::exchange(first, false)) {
        left = stats_.regions_retired;  // one pass over what waits now
        waits_for_walk_ = false;
      }
      std::size_t count = 0;
      while (count < ids.size() && left != 0) {
        const RegionId id = pop_retired();
        if (id == no_region) break;
        ids[count++] = id;
        --left;
      }
      if (count == 0) break;
      const std::uint64_t walked = index_.find_users({ids.data(), count}, {in_use.data(), count});
      waits_for_walk_ = waits_for_walk_ || walked != 0;
      for (std::size_t i = 0; i < count; ++i) {
        if (!in_use[i]) {
          ids[unused++] = ids[i];
          continue;
        }
        if (((walked >> i) & 1U) != 0) {
          push_retired(ids[i], index_.record(ids[i]).list());
          continue;
        }
        if (index_.record(ids[i]).list() != RegionList::reported) {
          ++stats_.stale_in_use;
          reports[report_count++] = index_.record(ids[i]).range();
        }
        push_retired(ids[i], RegionList::reported);
      }
      unpins_under_way_ += static_cast<std::uint32_t>(unused);
    }
    freed += unpin({ids.data(), unused});
    if (config_.on_stale_use)
      for (std::size_t i = 0; i < report_count; ++i) config_.on_stale_use(reports[i]);
  } while (left != 0);
  return freed;
}

std::uint64_t MapCache::evict(std::uint64_t bytes, std::uint8_t node) noexcept {
  return evict_beside(bytes, node, nullptr);
}

// `keep`: what a request is bringing together must not be evicted to make room for the rest of it.
std::uint64_t MapCache::evict_beside(std::uint64_t bytes, std::uint8_t node, const MemoryRange* keep) noexcept {
  std::uint64_t freed = 0;
  // Victims that turn out to be leased go back as the newest; there are at most as many of them as guard words, so a
  // bounded number of rounds finds the others if there are any.
  std::uint64_t rounds_left = 4;
  bool first = true;
  while (freed < bytes && rounds_left-- != 0) {
    std::array<RegionId, PinIndex::batch_max> ids;
    std::array<bool, PinIndex::batch_max> in_use;
    std::size_t unused = 0;
    {
      const std::lock_guard held{lock_};
      if (std::exchange(first, false)) rounds_left += policy_.count() / ids.size();
      // A share of a small cache only: one batch must not empty it.
      const std::size_t count_min = std::min<std::size_t>(config_.evict_min, policy_.count() / 16 + 1);
      const std::size_t count = policy_.select(bytes - freed, count_min, node, keep, ids);
      if (count == 0) break;
      for (std::size_t i = 0; i < count; ++i) index_.erase(ids[i]);
      index_.find_users({ids.data(), count}, {in_use.data(), count});
      for (std::size_t i = 0; i < count; ++i) {
        if (!in_use[i])
          ids[unused++] = ids[i];
        else if (index_.restore(ids[i]))
          policy_.put_back(ids[i]);
        else
          push_retired(ids[i], RegionList::reported);
      }
      stats_.evictions += unused;
      unpins_under_way_ += static_cast<std::uint32_t>(unused);
    }
    freed += unpin({ids.data(), unused});
  }
  return freed;
}

// Without lock_. The regions are out of the index, on no list, counted in unpins_under_way_, and nobody uses them.
std::uint64_t MapCache::unpin(std::span<const RegionId> ids) noexcept {
  if (ids.empty()) return 0;
  std::array<UnpinRequest, PinIndex::batch_max> requests;
  std::array<Error, PinIndex::batch_max> errors{};
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const Region region = index_.region(ids[i]);
    requests[i] = {region.range, region.access, region.handle};
  }
  provider_.unpin({requests.data(), ids.size()}, {errors.data(), ids.size()});
  std::uint64_t freed = 0;
  {
    const std::lock_guard held{lock_};
    for (std::size_t i = 0; i < ids.size(); ++i) {
      RegionRecord& record = index_.record(ids[i]);
      if (errors[i]) {
        record.set_state(RegionState::quarantined);
        ++stats_.regions_lost;
        continue;
      }
      const MemoryRange range = record.range();
      const std::uint64_t bytes = provider_.memlock_charge(request_for(range, record.access())).value;
      uncharge(record.node(), bytes);
      freed += bytes;
      index_.forget(ids[i]);
      unwatch_locked(range);
    }
    unpins_under_way_ -= static_cast<std::uint32_t>(ids.size());
    // R.unpins - release, pairs with A.unpins in charge() and ensure(): who sees the count sees the room.
    unpins_ended_.fetch_add(1, std::memory_order_release);
  }
  changed_->notify_all();
  return freed;
}

// Under lock_, so that no pin of the same memory can be watched in between.
void MapCache::unwatch_locked(const MemoryRange& range) noexcept {
  if (watcher_ == nullptr || range.is_file() || index_.first_in(range) || is_in_flight(range)) return;
  watcher_->unwatch(range);
}

}  // namespace iovane::pinning
