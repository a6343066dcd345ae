// Threads racing hits, misses, evictions and invalidations; the provider's book says whether what is served is pinned.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "pinning/counting_provider.hpp"
#include "pinning/map_cache.hpp"
#include "support/seed.hpp"

namespace iovane::pinning {
namespace {

TEST(MapCacheStress, ServedMemoryIsAlwaysPinnedAndNeverOlderThanItsInvalidation) {
  const std::uint64_t seed = test::seed();
  SCOPED_TRACE("IOVANE_SEED=" + std::to_string(seed));
  constexpr std::uint64_t base_key = 0x7f00'0000'0000 - 0x8000;
  constexpr std::uint64_t granules = 96;
  CountingProvider provider;
  PinBudget budget;
  auto opened = MapCache::open(
      provider, budget,
      {.chunk = Bytes{16384}, .chunk_max = Bytes{32768}, .bytes_max = Bytes{64 * granule_bytes}, .evict_min = 2});
  ASSERT_TRUE(opened);
  MapCache& cache = **opened;

  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> wrong{0};
  std::atomic<std::uint64_t> served{0};
  std::atomic<std::uint64_t> refused{0};
  // Below this address, pins of granule g were made before its last invalidation returned.
  std::array<std::atomic<std::uint64_t>, granules> stale_below{};

  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      test::Random random{seed + t};
      std::vector<Hold> holds;
      while (!stop.load(std::memory_order_relaxed)) {
        const std::uint64_t first = random.below(granules);
        const std::uint64_t count = 1 + random.below(std::min<std::uint64_t>(4, granules - first));
        const MemoryRange range{base_key + first * granule_bytes, base_key + (first + count) * granule_bytes - 1};
        const std::uint64_t limit = stale_below[first].load(std::memory_order_acquire);
        auto lease = cache.acquire(range, random.one_in(8) ? Access::read_write : Access::read);
        if (!lease) {
          refused.fetch_add(1, std::memory_order_relaxed);
          holds.clear();
          continue;
        }
        served.fetch_add(1, std::memory_order_relaxed);
        if (!provider.is_pinned({range.start, range.start + lease->length().value - 1}, lease->address()) ||
            lease->address() < limit)
          wrong.fetch_add(1, std::memory_order_relaxed);
        if (random.one_in(16)) holds.push_back(lease->hold());
        if (holds.size() > 2) holds.erase(holds.begin());
      }
    });
  threads.emplace_back([&] {
    test::Random random{seed ^ 0x77};
    while (!stop.load(std::memory_order_relaxed)) {
      const std::uint64_t g = random.below(granules);
      // Addresses only grow, so a pin that begins now gets one that is not below this.
      const std::uint64_t next = provider.next_address();
      cache.invalidate({base_key + g * granule_bytes, base_key + (g + 1) * granule_bytes - 1});
      stale_below[g].store(next, std::memory_order_release);
      if (random.one_in(4)) cache.collect();
      if (random.one_in(8)) cache.evict(8 * granule_bytes, any_node);
    }
  });
  std::this_thread::sleep_for(std::chrono::milliseconds{2500});
  stop.store(true, std::memory_order_relaxed);
  for (auto& t : threads) t.join();
  EXPECT_EQ(wrong.load(std::memory_order_relaxed), 0U);
  EXPECT_GT(served.load(std::memory_order_relaxed), 1000U);
  cache.collect();
  EXPECT_EQ(provider.counts().bytes_pinned, cache.stats().bytes_pinned);
  EXPECT_LE(cache.stats().bytes_pinned, 64 * granule_bytes);
  EXPECT_EQ(provider.counts().wrong_unpins, 0U);
  opened->reset();
  EXPECT_EQ(provider.counts().bytes_pinned, 0U);
}

}  // namespace
}  // namespace iovane::pinning
