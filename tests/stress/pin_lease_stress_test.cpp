// Threads that lease against a thread that erases: nobody may hold a lease on a region whose record was given up.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "pinning/pin_index.hpp"
#include "support/seed.hpp"

namespace iovane::pinning {
namespace {

constexpr std::uint64_t base_key = 0x7f00'0000'0000 - 0x8000;
constexpr std::size_t places = 24;

// What a region's pin stands for: a counter that readers may touch only while they lease it. Plain memory, so that
// TSan and ASan see a use after the unpin.
struct Pinned {
  std::uint64_t value = 0;
};

MemoryRange place(std::size_t i, std::uint64_t granules) {
  const std::uint64_t start = base_key + i * 8 * granule_bytes;
  return {start, start + granules * granule_bytes - 1};
}

void race(std::chrono::milliseconds time) {
  const std::uint64_t seed = test::seed();
  SCOPED_TRACE("IOVANE_SEED=" + std::to_string(seed));
  PinIndex index;
  ASSERT_TRUE(index.open());
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> hits{0};
  std::atomic<std::uint64_t> wrong{0};

  std::vector<std::thread> readers;
  for (std::uint64_t t = 0; t < 3; ++t)
    readers.emplace_back([&, t] {
      test::Random random{seed + t};
      std::array<Lease, 4> kept;
      std::vector<Hold> holds;
      std::uint64_t mine = 0;
      while (!stop.load(std::memory_order_relaxed)) {
        const MemoryRange asked = place(random.below(places), 1 + random.below(8));
        Lease lease = index.acquire(asked, Access::read);
        if (lease) {
          ++mine;
          // The handle's address is the Pinned object; each offset byte is a byte of the range.
          const Region region = lease.region();
          const auto* pinned = reinterpret_cast<const Pinned*>(region.handle.token);
          if (pinned->value != region.handle.address || !region.range.contains(asked.start) ||
              lease.address() != region.handle.address + (asked.start - region.range.start))
            wrong.fetch_add(1, std::memory_order_relaxed);
          if (random.one_in(8)) {
            holds.push_back(lease.hold());
            if (holds.size() > 5) holds.erase(holds.begin());
          }
          kept[random.below(kept.size())] = std::move(lease);
        }
        if (random.one_in(16)) (void)index.translate(asked.start);
      }
      hits.fetch_add(mine, std::memory_order_relaxed);
    });

  test::Random random{seed ^ 0x5555};
  struct Live {
    RegionId id = no_region;
    std::unique_ptr<Pinned> pinned;
  };
  std::array<Live, places> live;
  std::vector<Live> erased;
  std::uint64_t next_address = 0x1000'0000;
  std::uint64_t freed = 0;
  const auto until = std::chrono::steady_clock::now() + time;
  while (std::chrono::steady_clock::now() < until) {
    for (int i = 0; i < 16; ++i) {
      const std::size_t p = random.below(places);
      if (live[p].id == no_region) {
        auto pinned = std::make_unique<Pinned>(Pinned{next_address});
        auto id = index.insert(place(p, 1 + random.below(8)), Access::read,
                               {next_address, reinterpret_cast<std::uint64_t>(pinned.get())});
        ASSERT_TRUE(id) << id.error().message();
        next_address += 0x10000;
        live[p] = {*id, std::move(pinned)};
      } else {
        index.erase(live[p].id);
        if (random.one_in(4)) {
          ASSERT_TRUE(index.restore(live[p].id));
        } else {
          erased.push_back(std::move(live[p]));
          live[p] = {};
        }
      }
    }
    for (std::size_t handled = 0; handled < erased.size();) {
      std::array<RegionId, PinIndex::batch_max> ids;
      std::array<bool, PinIndex::batch_max> used;
      const std::size_t n = std::min(erased.size() - handled, ids.size());
      for (std::size_t i = 0; i < n; ++i) ids[i] = erased[handled + i].id;
      index.find_users({ids.data(), n}, {used.data(), n});
      for (std::size_t i = 0; i < n; ++i) {
        if (used[i]) continue;
        erased[handled + i].pinned->value = 0;
        erased[handled + i].pinned.reset();
        index.forget(ids[i]);
        ++freed;
      }
      handled += n;
    }
    std::erase_if(erased, [](const Live& l) { return l.pinned == nullptr; });
  }
  stop.store(true, std::memory_order_relaxed);
  for (auto& r : readers) r.join();
  EXPECT_EQ(wrong.load(std::memory_order_relaxed), 0U);
  EXPECT_GT(hits.load(std::memory_order_relaxed), 1000U);
  EXPECT_GT(freed, 100U);
}

TEST(PinLeaseStress, EraseRacesLeasesWithMembarrier) {
  base::prepare_asymmetric_barrier();
  if (!base::asymmetric_barrier_possible || !base::fast_announce_allowed())
    GTEST_SKIP() << "membarrier(PRIVATE_EXPEDITED) is not available here";
  race(std::chrono::milliseconds{1500});
}

// Its own process in ctest: the mode is chosen before any lease exists.
TEST(PinLeaseStress, EraseRacesLeasesWithFullFences) {
  base::refuse_asymmetric_barrier();
  race(std::chrono::milliseconds{1500});
}

// The barrier's own promise, as a litmus test: not both sides may miss each other's store.
TEST(PinLeaseStress, BarrierNeverLetsBothSidesMiss) {
  base::prepare_asymmetric_barrier();
  std::atomic<int> x{0};
  std::atomic<int> y{0};
  std::atomic<int> round{0};
  std::atomic<int> done{0};
  int seen_x = 0;
  constexpr int rounds = 20'000;
  std::thread reader{[&] {
    for (int r = 1; r <= rounds; ++r) {
      while (round.load(std::memory_order_acquire) < r) std::this_thread::yield();
      x.store(r, std::memory_order_relaxed);
      base::light_barrier();
      seen_x = y.load(std::memory_order_relaxed);
      done.store(r, std::memory_order_release);
    }
  }};
  int both_missed = 0;
  for (int r = 1; r <= rounds; ++r) {
    round.store(r, std::memory_order_release);
    y.store(r, std::memory_order_relaxed);
    base::heavy_barrier();
    const int seen_y = x.load(std::memory_order_relaxed);
    while (done.load(std::memory_order_acquire) < r) std::this_thread::yield();
    if (seen_x < r && seen_y < r) ++both_missed;
  }
  reader.join();
  EXPECT_EQ(both_missed, 0);
}

}  // namespace
}  // namespace iovane::pinning
