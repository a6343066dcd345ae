// Leases against erasure, step by step: seeded interleavings of all atomic steps, and every step of a reader frozen in
// turn while everybody else must finish.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <set>
#include <string>

#include "pinning/pin_index.hpp"
#include "support/seed.hpp"
#include "support/seeded_scheduler.hpp"

namespace iovane::pinning {
namespace {

static_assert(base::yield_points_enabled, "this program must be compiled with IOVANE_YIELD_POINTS");

constexpr std::uint64_t base_key = 0x7f00'0000'0000 - 2 * granule_bytes;  // across a border of every level
constexpr MemoryRange granules(std::uint64_t first, std::uint64_t count) {
  return {base_key + first * granule_bytes, base_key + (first + count) * granule_bytes - 1};
}

// One area, covered by one region at a time; the region's token says whether its pin is still there.
struct Scene {
  /// `company`: neighbours, so that the area's blocks have tables. Without them slots send lookups to the record.
  explicit Scene(bool company) {
    EXPECT_TRUE(index.open());
    if (company) {
      EXPECT_TRUE(index.insert(granules(std::uint64_t{0} - 8, 1), Access::read_write, {}));
      EXPECT_TRUE(index.insert(granules(6, 1), Access::read_write, {}));
    }
    neighbours = index.region_count();
    live = pin();
  }
  RegionId pin() {
    const std::uint64_t n = next++;
    alive[n % alive.size()].store(n, std::memory_order_relaxed);  // relaxed: one thread runs at a time
    return *index.insert(granules(0, 3), Access::read_write, {n << 20, n});
  }
  bool is_pinned(std::uint64_t n) const { return alive[n % alive.size()].load(std::memory_order_relaxed) == n; }

  void read(std::uint64_t seed) {
    for (std::uint64_t i = 0; i < 4; ++i) {
      const std::uint64_t first = (seed + i) % 3;
      Lease lease = index.acquire(granules(first, 3 - first), Access::read);
      if (!lease) continue;
      const Region region = lease.region();
      const std::uint64_t n = region.handle.token;
      EXPECT_TRUE(is_pinned(n)) << "leased region " << n << " is not pinned";
      EXPECT_EQ(lease.address(), (n << 20) + first * granule_bytes);
      base::yield_point("reader uses");
      EXPECT_TRUE(is_pinned(n));
      if ((seed + i) % 2 == 0) {
        Hold hold = lease.hold();
        lease.drop();
        base::yield_point("reader holds");
        EXPECT_TRUE(is_pinned(n));
      }
    }
  }
  void replace() {
    for (int i = 0; i < 3; ++i) {
      const RegionId old = live;
      index.erase(old);
      live = pin();
      retired.push_back(old);
      drop_unused();
    }
  }
  void drop_unused() {
    std::array<bool, PinIndex::batch_max> used{};
    index.find_users(retired, {used.data(), retired.size()});
    std::vector<RegionId> left;
    for (std::size_t i = 0; i < retired.size(); ++i) {
      if (used[i]) {
        left.push_back(retired[i]);
        continue;
      }
      const std::uint64_t n = index.region(retired[i]).handle.token;
      alive[n % alive.size()].store(0, std::memory_order_relaxed);  // relaxed: as above
      index.forget(retired[i]);
    }
    retired = left;
  }
  void finish() {
    drop_unused();
    EXPECT_TRUE(retired.empty()) << "nobody uses it, so it must go";
    EXPECT_EQ(index.region_count(), neighbours + 1);
  }

  PinIndex index;
  std::uint32_t neighbours = 0;
  RegionId live = no_region;
  std::uint64_t next = 1;
  std::array<std::atomic<std::uint64_t>, 64> alive{};
  std::vector<RegionId> retired;
};

std::vector<std::function<void()>> bodies(Scene& scene, std::uint64_t seed) {
  return {[&scene, seed] { scene.read(seed); }, [&scene, seed] { scene.read(seed + 1); },
          [&scene] { scene.replace(); }};
}

TEST(PinLeaseSchedules, ALeasedRegionStaysPinned) {
  const std::uint64_t seed = test::seed();
  for (std::uint64_t round = 0; round < 150; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    Scene scene{round % 2 == 0};
    test::SeededScheduler scheduler{seed + round};
    scheduler.run(bodies(scene, seed + round), {});
    scene.finish();
    if (HasFailure()) return;
  }
}

TEST(PinLeaseSchedules, AFrozenReaderBlocksNobody) {
  const std::uint64_t seed = test::seed();
  std::set<std::string> frozen_at;
  // Several schedules: in a short one a reader may find nothing at all.
  for (std::uint64_t schedule = 0; schedule < 8; ++schedule)
    for (std::uint64_t step = 1;; ++step) {
      SCOPED_TRACE("schedule " + std::to_string(schedule) + ", step " + std::to_string(step));
      Scene scene{schedule % 4 < 2};
      test::SeededScheduler scheduler{seed + schedule};
      const auto report = scheduler.run(bodies(scene, seed + schedule), {.thread = schedule % 2, .at_step = step});
      EXPECT_TRUE(report.others_finished) << "frozen at " << report.frozen_at;
      frozen_at.insert(report.frozen_at);
      scene.finish();
      if (HasFailure()) return;
      if (!report.froze) break;
    }
  EXPECT_GT(frozen_at.size(), 6U);
}

// Readers need nothing that a stopped writer has.
TEST(PinLeaseSchedules, AFrozenWriterBlocksNoReader) {
  const std::uint64_t seed = test::seed();
  for (const bool company : {false, true})
    for (std::uint64_t step = 1;; ++step) {
      SCOPED_TRACE("company " + std::to_string(company) + ", step " + std::to_string(step));
      Scene scene{company};
      test::SeededScheduler scheduler{seed};
      const auto report = scheduler.run(bodies(scene, seed), {.thread = 2, .at_step = step});
      EXPECT_TRUE(report.others_finished) << "frozen at " << report.frozen_at;
      scene.finish();
      if (HasFailure()) return;
      if (!report.froze) break;
    }
}

// Regions come and go in one block, one at a time and each in another place, with the same id: a lookup that was sent
// to the record of one must not read the range or the address of the next.
TEST(PinLeaseSchedules, ALookupBesideALoneRegionNeverMixesTwo) {
  const std::uint64_t seed = test::seed();
  for (std::uint64_t round = 0; round < 500; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    PinIndex index;
    ASSERT_TRUE(index.open());
    // The address says where it belongs: key plus a bias of its own that no other region has.
    const auto range_of = [](std::uint64_t n) { return granules(3 + n % 3 * 2, 2 + n % 2); };
    const auto read = [&](std::uint64_t start) {
      for (std::uint64_t i = 0; i < 60; ++i) {
        const std::uint64_t key = granules(3 + (start + i) % 7, 1).start;
        if (const auto found = index.translate(key)) {
          const std::uint64_t n = (found->address - key) >> 44;
          EXPECT_EQ(found->address, key + (n << 44));
          EXPECT_TRUE(range_of(n).contains(key)) << "region " << n << " answers for a key beside it";
        }
      }
    };
    const auto replace = [&] {
      for (std::uint64_t n = 1; n < 20; ++n) {
        const MemoryRange range = range_of(n);
        const auto id = index.insert(range, Access::read, {range.start + (n << 44), n});
        EXPECT_TRUE(id);
        base::yield_point("writer waits");
        index.erase(*id);
        bool used = true;
        index.find_users({&*id, 1}, {&used, 1});
        if (!used) index.forget(*id);
      }
    };
    test::SeededScheduler scheduler{seed + round};
    scheduler.run({[&] { read(seed + round); }, replace}, {});
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace iovane::pinning
