#include "base/slab.hpp"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <unordered_map>
#include <vector>

#include "base/fault_point.hpp"
#include "base/object_pool.hpp"
#include "support/seed.hpp"

namespace iovane::base {
namespace {

struct Thing {
  std::uint64_t a = 7;
  std::uint64_t b = 8;
};

TEST(Slab, MakesObjectsWithTheirDefaultsOrWithWhatIsGiven) {
  Slab<Thing> slab{10};
  const Thing* plain = slab.acquire();
  EXPECT_EQ(plain->a, 7U);
  EXPECT_EQ(plain->b, 8U);
  const Thing* given = slab.acquire(1U, 2U);
  EXPECT_EQ(given->a, 1U);
  EXPECT_EQ(given->b, 2U);
}

TEST(Slab, AReusedCellHoldsNothingOfItsLastTenant) {
  Slab<Thing> slab{1};
  Thing* first = slab.acquire(100U, 200U);
  slab.release(first);
  const Thing* second = slab.acquire();
  EXPECT_EQ(second, first);
  EXPECT_EQ(second->a, 7U);
}

TEST(Slab, HoldsAsManyAsItWasToldAndNoMore) {
  for (const std::uint32_t entries_max : {1U, 2U, 127U, 128U, 129U, 1000U}) {
    Slab<Thing> slab{entries_max};
    std::set<Thing*> live;
    for (std::uint32_t n = 0; n < entries_max; ++n) live.insert(slab.acquire());
    EXPECT_EQ(live.size(), entries_max);
    EXPECT_EQ(live.count(nullptr), 0U);
    EXPECT_EQ(slab.acquire(), nullptr);
    slab.release(*live.begin());
    EXPECT_NE(slab.acquire(), nullptr);
  }
}

TEST(Slab, HandlesAreNeverZeroAndFindTheirObjectOnlyWhileItLives) {
  Slab<Thing> slab{10};
  Thing* thing = slab.acquire();
  const std::uint64_t handle = slab.handle_of(thing);
  EXPECT_NE(handle, 0U);
  EXPECT_EQ(slab.find(handle), thing);
  slab.release(thing);
  EXPECT_EQ(slab.find(handle), nullptr);
  EXPECT_EQ(slab.acquire(), thing);
  EXPECT_EQ(slab.find(handle), nullptr);
  EXPECT_EQ(slab.find(0), nullptr);
}

TEST(Slab, NoInventedHandleNamesAFreeCell) {
  Slab<Thing> slab{10};
  for (int n = 0; n < 3; ++n) slab.release(slab.acquire());
  for (std::uint64_t generation = 0; generation < 16; ++generation) {
    for (std::uint64_t number = 0; number < 12; ++number) EXPECT_EQ(slab.find(generation << 32 | number), nullptr);
    EXPECT_EQ(slab.find(generation << 32 | 0xffff'ffff), nullptr);
  }
}

TEST(Slab, ObjectsStayWhereTheyAreWhileItGrowsAndMoves) {
  Slab<Thing> slab{100'000};
  std::unordered_map<std::uint64_t, Thing*> live;
  for (std::uint64_t n = 0; n < 50'000; ++n) {
    Thing* thing = slab.acquire(n, n);
    live[slab.handle_of(thing)] = thing;
  }
  Slab<Thing> moved = std::move(slab);
  for (const auto& [handle, thing] : live) ASSERT_EQ(moved.find(handle), thing);
}

TEST(Slab, AnswersAsAMapOfHandlesDoes) {
  std::mt19937_64 random{test::seed()};
  Slab<Thing> slab{300};
  std::unordered_map<std::uint64_t, std::uint64_t> live;
  std::vector<std::uint64_t> handles;
  for (std::uint64_t step = 0; step < 50'000; ++step) {
    if (random() % 2 == 0) {
      Thing* thing = slab.acquire(step, step);
      ASSERT_EQ(thing == nullptr, live.size() == 300);
      if (thing == nullptr) continue;
      const std::uint64_t handle = slab.handle_of(thing);
      ASSERT_TRUE(live.emplace(handle, step).second) << "a handle was given twice";
      handles.push_back(handle);
    } else if (!handles.empty()) {
      const std::uint64_t handle = handles[random() % handles.size()];
      Thing* thing = slab.find(handle);
      const auto expected = live.find(handle);
      ASSERT_EQ(thing != nullptr, expected != live.end());
      if (thing == nullptr) continue;
      ASSERT_EQ(thing->a, expected->second);
      slab.release(thing);
      live.erase(expected);
    }
  }
}

TEST(Slab, AFailedAllocationChangesNothing) {
  Slab<Thing> slab{1000};
  std::uint32_t made = 0;
  for (std::uint32_t n = 0; n < 1000; ++n) {
    arm_fault(static_cast<std::uint32_t>(FaultKind::allocation), 1);
    Thing* thing = slab.acquire();
    const bool failed = disarm_fault();
    ASSERT_EQ(thing == nullptr, failed);
    if (failed) thing = slab.acquire();
    ASSERT_NE(thing, nullptr);
    ++made;
  }
  EXPECT_EQ(made, 1000U);
}

TEST(ObjectPool, ReusesWhatCameBackLastFirst) {
  ObjectPool<Thing> pool{2};
  Thing* a = pool.acquire();
  Thing* b = pool.acquire();
  EXPECT_EQ(pool.acquire(), nullptr);
  pool.release(a);
  pool.release(b);
  EXPECT_EQ(pool.acquire(), b);
  EXPECT_EQ(pool.acquire(), a);
  EXPECT_EQ(a->a, 7U);
}

}  // namespace
}  // namespace iovane::base
