#include "pinning/map_cache.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <thread>
#include <vector>

#include "pinning/counting_provider.hpp"

namespace iovane::pinning {
namespace {

using namespace iovane::literals;

constexpr std::uint64_t base_key = 0x7f12'3450'0000;
constexpr MemoryRange granules(std::uint64_t first, std::uint64_t count) {
  return {base_key + first * granule_bytes, base_key + (first + count) * granule_bytes - 1};
}

class MapCacheTest : public testing::Test {
 protected:
  void open(MapCacheConfig config = {.chunk = 16_KiB}) {
    auto opened = MapCache::open(provider, budget, std::move(config));
    ASSERT_TRUE(opened) << opened.error().message();
    cache = *std::move(opened);
  }
  void expect_books_balance() {
    EXPECT_EQ(provider.counts().bytes_pinned, cache->stats().bytes_pinned);
    EXPECT_EQ(provider.counts().bytes_pinned, budget.used());
    EXPECT_EQ(provider.counts().wrong_unpins, 0U);
  }
  CountingProvider provider;
  PinBudget budget;
  std::unique_ptr<MapCache> cache;
};

TEST_F(MapCacheTest, HitNeedsNoCallAndMissPinsTheWholeChunk) {
  open();
  const auto first = cache->acquire(granules(1, 1), Access::read);
  ASSERT_TRUE(first) << first.error().message();
  EXPECT_TRUE(provider.is_pinned(granules(1, 1), first->address()));
  EXPECT_EQ(provider.counts().pin_calls, 1U);
  EXPECT_EQ(provider.counts().bytes_pinned, 4 * granule_bytes);
  for (std::uint64_t g = 0; g < 4; ++g) EXPECT_TRUE(cache->acquire(granules(g, 1), Access::read));
  EXPECT_EQ(provider.counts().pin_calls, 1U);
  EXPECT_EQ(cache->stats().misses, 1U);
  expect_books_balance();
}

TEST_F(MapCacheTest, OverlapPinsOnlyWhatIsMissingInOneCall) {
  open({.chunk = 4_KiB});
  ASSERT_TRUE(cache->acquire(granules(2, 2), Access::read_write));
  ASSERT_TRUE(cache->acquire(granules(6, 1), Access::read_write));
  const auto before = provider.counts();
  std::array<Lease, 8> leases;
  const auto count = cache->acquire_all(granules(0, 10), Access::read_write, leases);
  ASSERT_TRUE(count) << count.error().message();
  EXPECT_EQ(*count, 5U);
  const auto after = provider.counts();
  EXPECT_EQ(after.bytes_pinned_ever - before.bytes_pinned_ever, 7 * granule_bytes);
  EXPECT_EQ(after.pin_calls - before.pin_calls, 1U);
  EXPECT_EQ(after.double_pins, 0U);
  std::uint64_t at = granules(0, 1).start;
  for (std::size_t i = 0; i < *count; ++i) {
    EXPECT_TRUE(provider.is_pinned({at, at + leases[i].length().value - 1}, leases[i].address()));
    at += leases[i].length().value;
  }
  EXPECT_EQ(at, granules(10, 1).start);
  expect_books_balance();
}

TEST_F(MapCacheTest, ASequentialUserPinsMoreEachTime) {
  open({.chunk = 16_KiB, .chunk_max = 128_KiB});
  std::vector<std::uint64_t> pins;
  provider.set_pin_hook([&](const PinRequest& r) { pins.push_back(r.range.length().value / granule_bytes); });
  const auto walk = [&](std::uint64_t from, std::uint64_t count) {
    for (std::uint64_t g = from; g < from + count; ++g) ASSERT_TRUE(cache->acquire(granules(g, 1), Access::read)) << g;
  };
  walk(0, 100);
  EXPECT_THAT(pins, testing::ElementsAre(4U, 4U, 8U, 16U, 32U, 32U, 32U)) << "each ends at a border of its size";
  pins.clear();
  // Two of them at once, each with its own pace; and one that jumps about.
  for (std::uint64_t g = 0; g < 24; ++g) {
    walk(1024 + g, 1);
    walk(2048 + g, 1);
    ASSERT_TRUE(cache->acquire(granules(4096 + g * 64, 1), Access::read));
  }
  EXPECT_EQ(std::count(pins.begin(), pins.end(), 8U), 2);
  EXPECT_EQ(std::count(pins.begin(), pins.end(), 16U), 2);
  EXPECT_EQ(std::count(pins.begin(), pins.end(), 4U), 2 * 2 + 24);
  pins.clear();
  walk(8192 + 4 * 7, 64);  // begins just before a border
  EXPECT_THAT(pins, testing::ElementsAre(4U, 8U, 8U, 16U, 32U)) << "a border close by does not stop the growth";
  EXPECT_EQ(provider.counts().double_pins, 0U);
  expect_books_balance();
}

TEST_F(MapCacheTest, ASequentialUserAtAHoleGetsItsChunkAndThenWhatItAskedFor) {
  provider.set_hole(granules(14, 100));
  open({.chunk = 16_KiB, .chunk_max = 128_KiB});
  for (std::uint64_t g = 0; g < 14; ++g) ASSERT_TRUE(cache->acquire(granules(g, 1), Access::read)) << g;
  EXPECT_FALSE(cache->acquire(granules(14, 1), Access::read));
  EXPECT_EQ(provider.counts().bytes_pinned, 14 * granule_bytes);
  expect_books_balance();
}

TEST_F(MapCacheTest, AChunkLimitThatMakesNoSenseIsRefused) {
  for (const Bytes bad : {8_KiB, Bytes{48 * 1024}, 4_GiB})
    EXPECT_EQ(MapCache::open(provider, budget, {.chunk = 16_KiB, .chunk_max = bad}).error().code,
              Errc::invalid_argument);
  EXPECT_FALSE(MapCache::open(provider, budget, {.chunk = 16_KiB, .chunk_max = 64_KiB, .bytes_max = 256_KiB}));
  EXPECT_TRUE(MapCache::open(provider, budget, {.chunk = 16_KiB, .chunk_max = 64_KiB, .bytes_max = 512_KiB}));
}

TEST_F(MapCacheTest, ReleaseKeepsTheMappingUntilTheBudgetNeedsIt) {
  open({.chunk = 4_KiB, .bytes_max = 16_KiB, .evict_min = 1});
  for (std::uint64_t g = 0; g < 4; ++g) ASSERT_TRUE(cache->acquire(granules(g, 1), Access::read));
  EXPECT_EQ(provider.counts().unpins, 0U);
  ASSERT_TRUE(cache->acquire(granules(9, 1), Access::read));
  EXPECT_EQ(provider.counts().unpins, 1U);
  EXPECT_EQ(provider.counts().bytes_pinned, 16U * 1024);
  expect_books_balance();
}

TEST_F(MapCacheTest, LeasedAndHeldRegionsAreNeverEvicted) {
  open({.chunk = 4_KiB, .bytes_max = 8_KiB, .evict_min = 1});
  auto leased = cache->acquire(granules(0, 1), Access::read);
  auto held = cache->acquire_hold(granules(1, 1), Access::read);
  ASSERT_TRUE(leased && held);
  const auto refused = cache->acquire(granules(2, 1), Access::read);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, Errc::memlock_exceeded);
  const std::string text = refused.error().detail();
  EXPECT_NE(text.find("4096"), std::string::npos) << text;           // need
  EXPECT_NE(text.find("8192"), std::string::npos) << text;           // limit and use
  EXPECT_NE(text.find("address-space"), std::string::npos) << text;  // which limit
  EXPECT_TRUE(provider.is_pinned(granules(0, 1), leased->address()));
  EXPECT_TRUE(cache->try_acquire(granules(0, 1), Access::read)) << "a refused request must leave the others in place";
  leased->drop();
  EXPECT_TRUE(cache->acquire(granules(2, 1), Access::read));
  EXPECT_TRUE(provider.is_pinned(granules(1, 1), held->address()));
  expect_books_balance();
}

TEST_F(MapCacheTest, ProcessAndNodeLimitsAreNamed) {
  PinBudget::Limits limits;
  limits.process = 64_KiB;
  limits.node[1] = 8_KiB;
  PinBudget tight{limits};
  auto opened = MapCache::open(provider, tight, {.chunk = 4_KiB, .evict_min = 1, .node_of = [](const MemoryRange& r) {
                                                   return static_cast<std::uint8_t>((r.start >> 12) & 1U);
                                                 }});
  ASSERT_TRUE(opened);
  MapCache& c = **opened;
  std::vector<Hold> holds;
  for (const std::uint64_t g : {1U, 3U}) holds.push_back(*c.acquire_hold(granules(g, 1), Access::read));
  const auto refused = c.acquire(granules(5, 1), Access::read);
  ASSERT_FALSE(refused);
  EXPECT_NE(refused.error().detail().find("node limit of 8192"), std::string::npos) << refused.error().detail();
  EXPECT_TRUE(c.acquire(granules(4, 1), Access::read)) << "the other node has room";
  holds.clear();
  EXPECT_TRUE(c.acquire(granules(5, 1), Access::read));
  EXPECT_TRUE(c.try_acquire(granules(4, 1), Access::read)) << "evicting for node 1 must not touch node 0";
}

TEST_F(MapCacheTest, CachesThatShareABudgetMakeRoomForEachOther) {
  PinBudget::Limits limits;
  limits.process = 16_KiB;
  PinBudget shared{limits};
  CountingProvider other_provider;
  auto a = MapCache::open(provider, shared, {.chunk = 4_KiB, .evict_min = 1});
  auto b = MapCache::open(other_provider, shared, {.chunk = 4_KiB, .evict_min = 1});
  ASSERT_TRUE(a && b);
  for (std::uint64_t g = 0; g < 4; ++g) ASSERT_TRUE((*a)->acquire(granules(g, 1), Access::read));
  ASSERT_TRUE((*b)->acquire(granules(0, 1), Access::read));
  EXPECT_EQ(provider.counts().bytes_pinned, 12U * 1024);
  EXPECT_EQ(shared.used(), 16U * 1024);
}

TEST_F(MapCacheTest, ConcurrentMissesOnOneRangePinOnce) {
  open();
  std::atomic<int> inside{0};
  provider.set_pin_hook([&](const PinRequest&) {
    inside.fetch_add(1, std::memory_order_relaxed);
    std::this_thread::sleep_for(std::chrono::milliseconds{30});
  });
  std::vector<std::thread> threads;
  std::atomic<int> served{0};
  for (int t = 0; t < 6; ++t)
    threads.emplace_back([&, t] {
      const auto lease = cache->acquire(granules(static_cast<std::uint64_t>(t) % 4, 1), Access::read);
      if (lease) served.fetch_add(1, std::memory_order_relaxed);
    });
  for (auto& t : threads) t.join();
  EXPECT_EQ(served, 6);
  EXPECT_EQ(inside, 1);
  EXPECT_EQ(provider.counts().double_pins, 0U);
  expect_books_balance();
}

TEST_F(MapCacheTest, InvalidateIsNeverServedAgainAndInUseStaysPinned) {
  std::vector<MemoryRange> reports;
  open({.chunk = 16_KiB, .on_stale_use = [&](const MemoryRange& r) { reports.push_back(r); }});
  auto lease = cache->acquire(granules(0, 1), Access::read);
  ASSERT_TRUE(lease);
  const std::uint64_t old_address = lease->address();
  EXPECT_EQ(cache->invalidate(granules(3, 1)), 1U);
  EXPECT_FALSE(cache->try_acquire(granules(0, 1), Access::read));
  EXPECT_EQ(cache->collect(), 0U);
  EXPECT_EQ(cache->collect(), 0U);
  EXPECT_THAT(reports, testing::ElementsAre(granules(0, 4)));
  EXPECT_TRUE(provider.is_pinned(granules(0, 1), old_address));
  const auto fresh = cache->acquire(granules(0, 1), Access::read);
  ASSERT_TRUE(fresh);
  EXPECT_NE(fresh->address(), old_address);
  EXPECT_EQ(cache->stats().regions_retired, 1U);
  lease->drop();
  EXPECT_EQ(cache->collect(), 16U * 1024);
  EXPECT_FALSE(provider.is_pinned(granules(0, 1), old_address));
  EXPECT_EQ(cache->stats().stale_in_use, 1U);
  expect_books_balance();
}

TEST_F(MapCacheTest, InvalidateDuringAPinThrowsThePinAway) {
  open();
  int pins = 0;
  provider.set_pin_hook([&](const PinRequest& r) {
    if (++pins == 1) cache->invalidate(r.range);
  });
  const auto lease = cache->acquire(granules(0, 1), Access::read);
  ASSERT_TRUE(lease);
  EXPECT_EQ(pins, 2);
  EXPECT_EQ(provider.counts().unpins, 1U);
  EXPECT_EQ(cache->stats().poisoned, 1U);
  expect_books_balance();
}

TEST_F(MapCacheTest, MemoryThatNeverComesToRestIsAnErrorNotALoop) {
  open();
  provider.set_pin_hook([&](const PinRequest& r) { cache->invalidate(r.range); });
  const auto lease = cache->acquire(granules(0, 1), Access::read);
  ASSERT_FALSE(lease);
  EXPECT_EQ(lease.error().code, Errc::busy);
  EXPECT_EQ(provider.counts().bytes_pinned, 0U);
  expect_books_balance();
}

TEST_F(MapCacheTest, AHoleInTheChunkFallsBackToWhatWasAsked) {
  open();
  provider.set_hole(granules(0, 1));
  EXPECT_TRUE(cache->acquire(granules(2, 1), Access::read));
  EXPECT_EQ(provider.counts().bytes_pinned, granule_bytes);
  const auto in_hole = cache->acquire(granules(0, 2), Access::read);
  ASSERT_FALSE(in_hole);
  EXPECT_EQ(in_hole.error().code, Errc::bad_memory);
  expect_books_balance();
}

TEST_F(MapCacheTest, MoreRightsReplaceTheRegion) {
  open({.chunk = 4_KiB});
  auto reader = cache->acquire(granules(0, 1), Access::read);
  ASSERT_TRUE(reader);
  const auto writer = cache->acquire(granules(0, 1), Access::write);
  ASSERT_TRUE(writer);
  EXPECT_EQ(writer->region().access, Access::read_write);
  EXPECT_TRUE(provider.is_pinned(granules(0, 1), reader->address())) << "the first lease must stay good";
  reader->drop();
  cache->collect();
  EXPECT_EQ(provider.counts().bytes_pinned, granule_bytes);
  expect_books_balance();
}

TEST_F(MapCacheTest, PinsAreCutAtTheProvidersBorder) {
  CountingProvider cutting{{.traits = {.name = "cutting", .border = 64_KiB}}};
  auto opened = MapCache::open(cutting, budget, {.chunk = 16_KiB});
  ASSERT_TRUE(opened);
  std::vector<Lease> leases(80);
  const MemoryRange large{base_key + 8192, base_key + (4U << 20) - 1};
  const auto count = (*opened)->acquire_all(large, Access::read, leases);
  ASSERT_TRUE(count) << count.error().message();
  EXPECT_EQ(*count, 64U);
  EXPECT_EQ(leases[0].length().value, 64U * 1024 - 8192);
  EXPECT_EQ(leases[0].region().range.last - leases[0].region().range.start + 1, 64U * 1024);
}

TEST_F(MapCacheTest, TooFewLeasesForTheRangeTakesNone) {
  CountingProvider cutting{{.traits = {.name = "cutting", .border = 64_KiB}}};
  auto opened = MapCache::open(cutting, budget, {.chunk = 16_KiB});
  ASSERT_TRUE(opened);
  std::array<Lease, 2> leases;
  const auto count = (*opened)->acquire_all({base_key, base_key + 4 * 65536 - 1}, Access::read, leases);
  ASSERT_FALSE(count);
  EXPECT_EQ(count.error().code, Errc::limit_reached);
  EXPECT_FALSE(leases[0]);
}

TEST_F(MapCacheTest, FilesLiveBesideMemory) {
  open();
  const int fd = memfd_create("iovane-test", MFD_CLOEXEC);
  ASSERT_GE(fd, 0);
  const auto window = cache->add_file(fd, 40_KiB);
  ASSERT_TRUE(window) << window.error().message();
  int seen_fd = -1;
  std::uint64_t seen_offset = 1;
  provider.set_pin_hook([&](const PinRequest& r) {
    seen_fd = r.fd;
    seen_offset = r.offset;
    EXPECT_LE(r.range.last, window->last);
  });
  EXPECT_TRUE(cache->acquire({window->start + 36864, window->last}, Access::read));
  EXPECT_GE(seen_fd, 0);
  EXPECT_NE(seen_fd, fd) << "the cache owns a duplicate";
  EXPECT_EQ(seen_offset, 32768U);
  const auto beyond = cache->acquire({window->start, window->last + 1}, Access::read);
  EXPECT_EQ(beyond.error().code, Errc::invalid_argument);
  EXPECT_TRUE(cache->remove_file(*window));
  EXPECT_EQ(provider.counts().bytes_pinned, 0U);
  EXPECT_EQ(cache->acquire({window->start, window->start}, Access::read).error().code, Errc::invalid_argument);
  EXPECT_EQ(cache->remove_file(*window).error().code, Errc::not_found);
  close(fd);
}

TEST_F(MapCacheTest, BadRequestsAreRefused) {
  open();
  EXPECT_EQ(cache->acquire({5, 4}, Access::read).error().code, Errc::invalid_argument);
  EXPECT_EQ(cache->acquire(granules(0, 1), Access::none).error().code, Errc::invalid_argument);
  EXPECT_EQ(cache->acquire({0, ~std::uint64_t{0}}, Access::read).error().code, Errc::invalid_argument);
  EXPECT_EQ(cache->acquire({file_key_first - 1, file_key_first}, Access::read).error().code, Errc::invalid_argument);
  EXPECT_EQ(MapCache::open(provider, budget, {.chunk = Bytes{12345}}).error().code, Errc::invalid_argument);
}

TEST_F(MapCacheTest, RegionLimitEvictsAndThenRefuses) {
  open({.chunk = 4_KiB, .regions_max = 4, .evict_min = 1});
  for (std::uint64_t g = 0; g < 20; ++g) ASSERT_TRUE(cache->acquire(granules(g * 2, 1), Access::read));
  EXPECT_LE(cache->index().region_count(), 4U);
  std::vector<Hold> holds;
  for (std::uint64_t g = 0; g < 4; ++g) holds.push_back(*cache->acquire_hold(granules(100 + g * 2, 1), Access::read));
  EXPECT_EQ(cache->acquire(granules(200, 1), Access::read).error().code, Errc::entry_limit);
}

TEST_F(MapCacheTest, FailedUnpinStaysChargedAndCounted) {
  open({.chunk = 4_KiB});
  ASSERT_TRUE(cache->acquire(granules(0, 1), Access::read));
  cache->invalidate(granules(0, 1));
  provider.fail_nth(1);
  EXPECT_EQ(cache->collect(), 0U);
  EXPECT_EQ(cache->stats().regions_lost, 1U);
  EXPECT_EQ(cache->stats().bytes_pinned, granule_bytes);
  EXPECT_TRUE(cache->acquire(granules(0, 1), Access::read));
  expect_books_balance();
}

TEST_F(MapCacheTest, ClosingUnpinsEverything) {
  open();
  for (std::uint64_t g = 0; g < 1000; g += 3) ASSERT_TRUE(cache->acquire(granules(g, 1), Access::read));
  cache.reset();
  EXPECT_EQ(provider.counts().bytes_pinned, 0U);
  EXPECT_EQ(provider.counts().pins, provider.counts().unpins);
  EXPECT_EQ(budget.used(), 0U);
}

TEST_F(MapCacheTest, ForkedChildIsClosedAndLeavesThePinsAlone) {
  open();
  ASSERT_TRUE(cache->acquire(granules(0, 1), Access::read));
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const bool closed = cache->acquire(granules(0, 1), Access::read).error().code == Errc::closed;
    cache.reset();
    _exit(closed && provider.counts().unpins == 0 ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

// Holds every unpin up until told otherwise.
class SlowUnpins final : public PinProvider {
 public:
  const ProviderTraits& traits() const noexcept override { return inner.traits(); }
  void pin(std::span<const PinRequest> requests, std::span<PinOutcome> outcomes) noexcept override {
    inner.pin(requests, outcomes);
  }
  void unpin(std::span<const UnpinRequest> requests, std::span<Error> outcomes) noexcept override {
    began.store(true, std::memory_order_release);
    while (!go_on.load(std::memory_order_acquire)) std::this_thread::yield();
    inner.unpin(requests, outcomes);
  }
  CountingProvider inner;
  std::atomic<bool> began{false};
  std::atomic<bool> go_on{false};
};

TEST_F(MapCacheTest, ARequestWaitsForRoomThatAnotherThreadIsMaking) {
  SlowUnpins slow;
  auto opened = MapCache::open(slow, budget, {.chunk = 4_KiB, .bytes_max = 4_KiB});
  ASSERT_TRUE(opened);
  MapCache& tight = **opened;
  ASSERT_TRUE(tight.acquire(granules(0, 1), Access::read));
  tight.invalidate(granules(0, 1));
  std::thread unpinning{[&] { tight.collect(); }};
  while (!slow.began.load(std::memory_order_acquire)) std::this_thread::yield();
  // The only room there is belongs to a region that is neither live nor retired now.
  Result<void> done;
  std::thread asking{[&] {
    if (const auto lease = tight.acquire(granules(1, 1), Access::read); !lease) done = lease.error();
  }};
  std::this_thread::sleep_for(std::chrono::milliseconds{20});
  slow.go_on.store(true, std::memory_order_release);
  unpinning.join();
  asking.join();
  EXPECT_TRUE(done) << done.error().message();
}

TEST_F(MapCacheTest, HitsStopWhileChangesArePending) {
  open();
  ASSERT_TRUE(cache->acquire(granules(0, 1), Access::read));
  cache->changes_begin();
  EXPECT_FALSE(cache->try_acquire(granules(0, 1), Access::read));
  std::atomic<bool> served{false};
  std::thread waiter{[&] { served = bool{cache->acquire(granules(0, 1), Access::read)}; }};
  std::this_thread::sleep_for(std::chrono::milliseconds{20});
  EXPECT_FALSE(served);
  cache->changes_end();
  waiter.join();
  EXPECT_TRUE(served);
  EXPECT_EQ(provider.counts().pin_calls, 1U);
}

}  // namespace
}  // namespace iovane::pinning
