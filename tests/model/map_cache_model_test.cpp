// MapCache against its promises: random requests, releases, invalidations and failures; after each, what is served is
// pinned and fresh, the books balance, limits hold, and a refusal is justified.
#include <gtest/gtest.h>

#include <array>
#include <map>
#include <vector>

#include "pinning/counting_provider.hpp"
#include "pinning/map_cache.hpp"
#include "support/seed.hpp"

namespace iovane::pinning {
namespace {

constexpr std::uint64_t area_start = 0x7f00'0000'0000 - 0x6000;
constexpr std::uint64_t area_granules = 160;

struct Params {
  std::uint64_t chunk;
  std::uint64_t bytes_max;
  std::uint64_t chunk_max = 0;
};

class MapCacheModel : public testing::TestWithParam<Params> {};

TEST_P(MapCacheModel, KeepsItsPromises) {
  const std::uint64_t seed = test::seed();
  SCOPED_TRACE("IOVANE_SEED=" + std::to_string(seed));
  test::Random random{seed + GetParam().chunk};
  CountingProvider provider{{.traits = {.name = "counting", .border = Bytes{128 * 1024}}}};
  PinBudget budget;
  auto opened = MapCache::open(provider, budget,
                               {.chunk = Bytes{GetParam().chunk},
                                .chunk_max = Bytes{GetParam().chunk_max},
                                .bytes_max = Bytes{GetParam().bytes_max},
                                .evict_min = 2});
  ASSERT_TRUE(opened);
  MapCache& cache = **opened;

  // When a granule was invalidated last, and when each pin (by its address) was made.
  std::array<std::uint64_t, area_granules> invalidated{};
  std::uint64_t clock = 1;
  std::map<std::uint64_t, std::uint64_t> pinned_at;  // region address -> clock at first sight
  struct Out {
    Lease lease;
    MemoryRange range;
  };
  std::vector<Out> leases;
  struct OutHold {
    Hold hold;
    MemoryRange range;
  };
  std::vector<OutHold> holds;

  for (int step = 0; step < 4'000; ++step, ++clock) {
    const std::uint64_t first = random.below(area_granules);
    const std::uint64_t count =
        1 + random.below(std::min<std::uint64_t>(area_granules - first, random.one_in(4) ? 40 : 4));
    const MemoryRange range{area_start + first * granule_bytes, area_start + (first + count) * granule_bytes - 1};
    switch (random.below(10)) {
      case 0:
        cache.invalidate(range);
        for (std::uint64_t g = first; g < first + count; ++g) invalidated[g] = clock;
        ASSERT_FALSE(cache.try_acquire(range, Access::read));
        break;
      case 1: cache.collect(); break;
      case 2:
      case 3:
        if (!leases.empty()) {
          std::swap(leases[random.below(leases.size())], leases.back());
          leases.pop_back();
        }
        break;
      case 4:
        if (!holds.empty()) {
          std::swap(holds[random.below(holds.size())], holds.back());
          holds.pop_back();
        }
        break;
      default: {
        const auto access = static_cast<Access>(1 + random.below(3));
        const std::uint64_t used_before = cache.stats().bytes_pinned;
        auto lease = cache.acquire(range, access);
        if (!lease) {
          // Justified only by the limit, with everything that could go in use.
          ASSERT_EQ(lease.error().code, Errc::memlock_exceeded) << lease.error().message();
          ASSERT_GT(used_before + count * granule_bytes, GetParam().bytes_max) << step;
          ASSERT_FALSE(leases.empty() && holds.empty()) << step;
          break;
        }
        const MemoryRange served{range.start, range.start + lease->length().value - 1};
        ASSERT_TRUE(provider.is_pinned(served, lease->address())) << step;
        const Region region = lease->region();
        ASSERT_TRUE(includes(region.access, access));
        const auto [seen, fresh] = pinned_at.try_emplace(region.handle.address, clock);
        for (std::uint64_t g = (served.start - area_start) / granule_bytes;
             g <= (served.last - area_start) / granule_bytes; ++g)
          ASSERT_LT(invalidated[g], seen->second) << "a pin older than the invalidation was served, step " << step;
        if (random.one_in(3)) holds.push_back({lease->hold(), served});
        if (random.one_in(2)) leases.push_back({*std::move(lease), served});
        if (leases.size() > 20) leases.erase(leases.begin());
        if (holds.size() > 20) holds.erase(holds.begin());
      }
    }
    for (const auto& out : leases) ASSERT_TRUE(provider.is_pinned(out.range, out.lease.address())) << step;
    for (const auto& out : holds) ASSERT_TRUE(provider.is_pinned(out.range, out.hold.address())) << step;
    const auto counts = provider.counts();
    ASSERT_EQ(counts.bytes_pinned, cache.stats().bytes_pinned) << step;
    ASSERT_EQ(counts.bytes_pinned, budget.used()) << step;
    ASSERT_LE(counts.bytes_pinned, GetParam().bytes_max) << step;
    ASSERT_EQ(counts.wrong_unpins, 0U);
  }
  leases.clear();
  holds.clear();
  opened->reset();
  ASSERT_EQ(provider.counts().bytes_pinned, 0U);
  ASSERT_EQ(budget.used(), 0U);
}

INSTANTIATE_TEST_SUITE_P(Limits, MapCacheModel,
                         testing::Values(Params{4096, 1U << 30}, Params{4096, 40 * 4096}, Params{16384, 64 * 4096},
                                         Params{65536, 1U << 30}, Params{65536, 96 * 4096},
                                         Params{4096, 1U << 30, 65536}, Params{4096, 96 * 4096, 32768}));

}  // namespace
}  // namespace iovane::pinning
