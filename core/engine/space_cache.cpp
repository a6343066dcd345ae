#include "engine/space_cache.hpp"

#include <new>

#include "base/error_text.hpp"
#include "engine/space_core.hpp"

namespace iovane::engine {

using pinning::MemoryRange;

namespace {

constexpr std::uint64_t window_start(std::uint64_t word) noexcept {
  return pinning::file_key_first + ((word & 0xffff'ffffU) - 1) * pinning::FileWindows::unit_bytes;
}

}  // namespace

Result<std::unique_ptr<SpaceCache>> SpaceCache::open(SpaceCore& space, PinDomain& domain, const CacheConfig& config,
                                                     std::uint32_t memories_max) {
  pinning::StalenessMonitor* monitor = nullptr;
  if (config.staleness != Staleness::explicit_only) {
    auto opened = domain.monitor(config.staleness == Staleness::monitored);
    if (!opened) return opened.error();
    monitor = *opened;
  }
  try {
    std::unique_ptr<SpaceCache> cache{new SpaceCache{space, config.ceiling, memories_max}};
    pinning::MapCacheConfig settings;
    settings.chunk = config.chunk;
    settings.chunk_max = config.chunk_max;
    settings.bytes_max = config.bytes_max;
    settings.regions_max = config.regions_max;
    settings.evict_min = config.evict_min;
    auto opened = pinning::MapCache::open(cache->provider_, domain.budget(), std::move(settings), monitor);
    if (!opened) {
      cache->provider_.close();
      return opened.error();
    }
    cache->cache_ = *std::move(opened);
    return cache;
  } catch (const std::bad_alloc&) {
    return make_error(Errc::out_of_memory, Stage::open, "no memory for the address space's cache");
  }
}

Error SpaceCache::refuse(const MemoryPiece& piece) noexcept {
  return base::fail(Errc::invalid_argument, Stage::validate, 0,
                    "{} bytes at {:#x} of {} are not memory that can be acquired: expected at least one byte, inside "
                    "the process's address space or inside the registered memory",
                    piece.length.value, piece.offset, piece.memory ? "registered memory" : "this process");
}

Result<MemoryRange> SpaceCache::keys_of_registered(const MemoryPiece& piece) noexcept {
  const auto place = static_cast<std::uint32_t>(piece.memory.value) - 1;
  const auto generation = static_cast<std::uint32_t>(piece.memory.value >> 32);
  if (place >= memories_max_) return refuse(piece);
  for (int attempt = 0; attempt < 2; ++attempt) {
    // A.window - acquire, pairs with R.window in add_window(): the length belongs to this window.
    const std::uint64_t word = windows_[place].word.load(std::memory_order_acquire);
    if (static_cast<std::uint32_t>(word >> 32) == generation && word != 0) {
      const std::uint64_t length = windows_[place].length.load(std::memory_order_relaxed);  // relaxed: see A.window
      if (piece.length.value == 0 || piece.offset >= length || piece.length.value > length - piece.offset)
        return refuse(piece);
      return *MemoryRange::from_length(window_start(word) + piece.offset, piece.length);
    }
    if (auto added = add_window(piece.memory); !added) return added.error();
  }
  return base::fail(Errc::stale_handle, Stage::validate, 0, "the registered memory is being unregistered");
}

Result<void> SpaceCache::add_window(MemoryId memory) noexcept {
  const auto length = space_.memory_length(memory);
  if (!length) return length.error();
  const auto place = static_cast<std::uint32_t>(memory.value) - 1;
  const std::uint64_t generation = memory.value >> 32 << 32;
  const std::lock_guard held{windows_lock_};
  Window& window = windows_[place];
  // relaxed: written under the lock.
  if (const std::uint64_t word = window.word.load(std::memory_order_relaxed);
      word != 0 && (word >> 32 << 32) == generation)
    return {};
  const auto keys = cache_->add_named(memory.value, *length);
  if (!keys) return keys.error();
  const std::uint64_t number = (keys->start - pinning::file_key_first) / pinning::FileWindows::unit_bytes + 1;
  window.length.store(length->value, std::memory_order_relaxed);  // relaxed: R.window publishes it
  // R.window - release, pairs with A.window in keys_of_registered().
  window.word.store(generation | number, std::memory_order_release);
  return {};
}

void SpaceCache::forget(MemoryId memory) noexcept {
  const auto place = static_cast<std::uint32_t>(memory.value) - 1;
  if (place >= memories_max_) return;
  const std::lock_guard held{windows_lock_};
  Window& window = windows_[place];
  const std::uint64_t word = window.word.load(std::memory_order_relaxed);  // relaxed: written under the lock
  if (word == 0 || word >> 32 != memory.value >> 32) return;
  window.word.store(0, std::memory_order_relaxed);  // relaxed: who still has the keys finds nothing behind them
  const auto keys =
      MemoryRange::from_length(window_start(word), Bytes{window.length.load(std::memory_order_relaxed)});  // relaxed:
  if (keys) (void)cache_->remove_file(*keys);                                                              // as above
}

Bytes SpaceCache::evict(Bytes bytes) noexcept {
  const std::uint64_t retired = cache_->collect();
  return {retired + (retired < bytes.value ? cache_->evict(bytes.value - retired, pinning::any_node) : 0)};
}

void SpaceCache::drop_all() noexcept {
  cache_->drop_all();
  cache_->collect();
}

CacheStats SpaceCache::stats() const noexcept {
  const pinning::MapCacheStats now = cache_->stats();
  return {now.misses,       now.waits,           now.pins,
          now.evictions,    now.invalidations,   now.stale_in_use,
          now.regions_lost, now.regions_retired, Bytes{now.bytes_pinned}};
}

void SpaceCache::close() noexcept {
  drop_all();
  provider_.close();
}

}  // namespace iovane::engine
