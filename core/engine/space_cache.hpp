// SpaceCache: the map cache behind AddressSpace::acquire().
//
// Registered memory has no process address of its own in the cache's key space: each gets a window of keys on first
// use. The way from a MemoryId to its window is two loads, since it is on the way of every hit.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "engine/pin_domain.hpp"
#include "engine/space_provider.hpp"
#include "iovane/memory_lease.hpp"
#include "iovane/request.hpp"
#include "iovane/stats.hpp"
#include "pinning/map_cache.hpp"

namespace iovane::engine {

/// A lease beyond its thread, or beyond the guard words of its thread. Keeps the space's cache alive.
struct CountedLease {
  std::shared_ptr<SpaceCore> space;  // declared first: the hold ends before the cache may
  pinning::Hold hold;
};

class SpaceCache {
 public:
  static Result<std::unique_ptr<SpaceCache>> open(SpaceCore& space, PinDomain& domain, const CacheConfig& config,
                                                  std::uint32_t memories_max);

  pinning::MapCache& map_cache() noexcept { return *cache_; }

  /// The keys of a piece. invalid_argument, stale_handle. Any thread.
  Result<pinning::MemoryRange> keys_of(const MemoryPiece& piece) noexcept {
    if (!piece.memory) [[likely]] {
      const auto keys = pinning::MemoryRange::from_length(piece.offset, piece.length);
      if (keys && keys->last < pinning::file_key_first) [[likely]]
        return *keys;
      return refuse(piece);
    }
    return keys_of_registered(piece);
  }
  /// Registered memory is going. Without the lane.
  void forget(MemoryId memory) noexcept;
  /// Everything that nobody uses is unmapped. Without the lane.
  Bytes evict(Bytes bytes) noexcept;
  /// The mappings do not outlive what the caller is about to do: none is handed out again.
  void drop_all() noexcept;
  CacheStats stats() const noexcept;
  /// The space closes. Leases that still live stay safe to release.
  void close() noexcept;

 private:
  struct Window {
    /// Generation of the MemoryId in the upper half, window number + 1 in the lower; 0: none yet.
    std::atomic<std::uint64_t> word{0};
    std::atomic<std::uint64_t> length{0};
  };

  SpaceCache(SpaceCore& space, Iova ceiling, std::uint32_t memories_max)
      : space_{space},
        provider_{space, ceiling},
        memories_max_{memories_max},
        windows_{std::make_unique<Window[]>(memories_max)} {}
  Result<pinning::MemoryRange> keys_of_registered(const MemoryPiece& piece) noexcept;
  Result<void> add_window(MemoryId memory) noexcept;
  static Error refuse(const MemoryPiece& piece) noexcept;

  SpaceCore& space_;
  SpaceProvider provider_;
  std::uint32_t memories_max_;
  std::unique_ptr<Window[]> windows_;  // by the MemoryId's place in the MemoryTable
  std::mutex windows_lock_;            // writers
  std::unique_ptr<pinning::MapCache> cache_;
};

}  // namespace iovane::engine
