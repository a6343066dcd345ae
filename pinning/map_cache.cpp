#include "pinning/map_cache.hpp"

#include <sys/syscall.h>
#include <unistd.h>

#include "base/checked_math.hpp"
#include "base/error_text.hpp"
#include "pinning/map_cache_batch.hpp"

namespace iovane::pinning {

std::uint8_t node_of_memory(const MemoryRange& range) noexcept {
  void* page = reinterpret_cast<void*>(range.start & ~(granule_bytes - 1));
  int status = -1;
  if (!range.is_file() && syscall(SYS_move_pages, 0, 1UL, &page, nullptr, &status, 0) == 0 && status >= 0)
    return static_cast<std::uint8_t>(static_cast<unsigned>(status) % nodes_max);
  unsigned node = 0;
  if (syscall(SYS_getcpu, nullptr, &node, nullptr) != 0) return 0;
  return static_cast<std::uint8_t>(node % nodes_max);
}

MapCache::MapCache(PinProvider& provider, PinBudget& budget, MapCacheConfig config, MemoryWatcher* watcher)
    : provider_{provider},
      budget_{budget},
      config_{std::move(config)},
      watcher_{watcher},
      policy_{index_},
      space_{config_.bytes_max.value} {
  if (!config_.node_of) config_.node_of = node_of_memory;
}

Result<std::unique_ptr<MapCache>> MapCache::open(PinProvider& provider, PinBudget& budget, MapCacheConfig config,
                                                 MemoryWatcher* watcher) {
  const ProviderTraits& traits = provider.traits();
  if (!base::is_power_of_two(config.chunk.value) || config.chunk < traits.granule || config.chunk > traits.border ||
      config.evict_min == 0 || config.evict_min > PinIndex::batch_max || config.regions_max == 0 ||
      config.regions_max > RegionTable::regions_max)
    return base::fail(Errc::invalid_argument, Stage::open, 0,
                      "map cache: chunk {} must be a power of two from {} to {} ({}'s limits), evict_min {} from 1 to "
                      "{}, regions_max {} from 1 to {}",
                      config.chunk.value, traits.granule.value, traits.border.value, traits.name, config.evict_min,
                      PinIndex::batch_max, config.regions_max, RegionTable::regions_max);
  if (config.chunk_max.value != 0 &&
      (!base::is_power_of_two(config.chunk_max.value) || config.chunk_max < config.chunk ||
       config.chunk_max > traits.border || config.chunk_max.value > config.bytes_max.value / 8))
    return base::fail(
        Errc::invalid_argument, Stage::open, 0,
        "map cache: chunk_max {} must be 0 or a power of two from the chunk of {} to {} ({}'s border), and "
        "at most an eighth of bytes_max {}",
        config.chunk_max.value, config.chunk.value, traits.border.value, traits.name, config.bytes_max.value);
  std::unique_ptr<MapCache> cache{new MapCache{provider, budget, std::move(config), watcher}};
  if (auto opened = cache->index_.open(); !opened) return opened.error();
  if (auto added = budget.add_evictor(*cache); !added) return added.error();
  if (watcher != nullptr)
    if (auto added = watcher->add_listener(*cache); !added) return added.error();
  return cache;
}

MapCache::~MapCache() {
  if (!index_.is_open()) return;  // open() failed, and nothing was begun
  if (index_.is_forked_copy()) {
    // The pins, the monitor's threads and the budget's other caches are the parent's business.
    static_cast<void>(changed_.release());
    return;
  }
  if (watcher_ != nullptr) watcher_->remove_listener(*this);
  budget_.remove_evictor(*this);
  drop_all();
  collect();
}

Result<Lease> MapCache::acquire_missing(MemoryRange range, Access access) noexcept {
  for (unsigned attempt = 0; attempt < attempts_max; ++attempt) {
    if (auto done = ensure(range, access); !done) return done.error();
    if (Lease lease = index_.acquire<false>(range, access); lease) return lease;
  }
  return base::fail(Errc::busy, Stage::pin, 0,
                    "memory [{:#x}, {:#x}] was pinned {} times and taken away each time before it could be used: the "
                    "budget is too small for what is in use at once, or the memory keeps being unmapped",
                    range.start, range.last, attempts_max);
}

Result<std::size_t> MapCache::acquire_all(const MemoryRange& range, Access access, std::span<Lease> out) noexcept {
  std::size_t count = 0;
  MemoryRange rest = range;
  while (count < out.size()) {
    Lease lease = try_acquire(rest, access);
    if (!lease) {
      auto got = acquire_missing(rest, access);
      if (!got) {
        for (std::size_t i = 0; i < count; ++i) out[i].drop();
        return got.error();
      }
      lease = *std::move(got);
    }
    const std::uint64_t covered = lease.length().value;
    out[count++] = std::move(lease);
    if (covered > rest.last - rest.start) return count;
    rest.start += covered;
  }
  for (std::size_t i = 0; i < count; ++i) out[i].drop();
  return base::fail(Errc::limit_reached, Stage::pin, 0,
                    "memory [{:#x}, {:#x}] lies in more than {} regions: ask for smaller parts, or with a larger chunk",
                    range.start, range.last, out.size());
}

Result<Hold> MapCache::acquire_hold(const MemoryRange& range, Access access) noexcept {
  auto lease = acquire(range, access);
  if (!lease) return lease.error();
  return lease->hold();
}

Result<MemoryRange> MapCache::add_file(int fd, Bytes length) noexcept {
  if (!provider_.traits().files)
    return base::fail(Errc::unsupported, Stage::validate, 0,
                      "{} cannot pin files: map the file and give its addresses instead", provider_.traits().name);
  return files_.add(fd, length);
}

Result<void> MapCache::remove_file(const MemoryRange& window) noexcept {
  (void)retire(window);
  {
    std::unique_lock held{lock_};
    while (is_in_flight(window)) changed_->wait(held);
  }
  collect();
  if (files_.remove(window)) return {};
  return base::fail(Errc::not_found, Stage::validate, 0, "no file is registered at keys [{:#x}, {:#x}]", window.start,
                    window.last);
}

MapCacheStats MapCache::stats() const noexcept {
  const std::lock_guard held{lock_};
  MapCacheStats s = stats_;
  s.bytes_pinned = space_.used();
  return s;
}

bool MapCache::has_retired() const noexcept {
  const std::lock_guard held{lock_};
  return retired_oldest_ != no_region;
}

void MapCache::changes_begin() noexcept {
  // seq_cst: before the monitor's read(2), whose wake-up of the event's author carries it to that thread (A.changes).
  changes_pending_.store(1, std::memory_order_seq_cst);
}

void MapCache::changes_end() noexcept {
  {
    const std::lock_guard held{lock_};
    // R.changes - release, pairs with A.changes in try_acquire(): what was invalidated is out of the index.
    changes_pending_.store(0, std::memory_order_release);
  }
  changed_->notify_all();
}

// Providers whose pins go by address have nothing to do here: kernels that have such (sPAPR, Linux 6.12) give the child
// copies of pinned pages, and the parent keeps its own.
void MapCache::forked() noexcept { (void)retire({0, file_key_first - 1}); }

}  // namespace iovane::pinning
