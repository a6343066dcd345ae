// What the budget throws out, and what it keeps.
#include "pinning/eviction.hpp"

#include <gtest/gtest.h>

#include <list>
#include <unordered_map>

#include "pinning/counting_provider.hpp"
#include "pinning/map_cache.hpp"
#include "support/seed.hpp"

namespace iovane::pinning {
namespace {

constexpr std::uint64_t base_key = 0x7f00'0000'0000;
constexpr MemoryRange granule(std::uint64_t n) {
  return {base_key + n * granule_bytes, base_key + (n + 1) * granule_bytes - 1};
}

// The policy to beat.
class Lru {
 public:
  explicit Lru(std::size_t size) : size_{size} {}
  bool use(std::uint64_t n) {
    if (const auto it = where_.find(n); it != where_.end()) {
      order_.splice(order_.begin(), order_, it->second);
      return true;
    }
    order_.push_front(n);
    where_[n] = order_.begin();
    if (order_.size() > size_) {
      where_.erase(order_.back());
      order_.pop_back();
    }
    return false;
  }

 private:
  std::size_t size_;
  std::list<std::uint64_t> order_;
  std::unordered_map<std::uint64_t, std::list<std::uint64_t>::iterator> where_;
};

TEST(PinEviction, AScanDoesNotPushOutTheWorkingSet) {
  constexpr std::uint64_t room = 200;
  constexpr std::uint64_t working_set = 150;
  CountingProvider provider{{.find_double_pins = false}};
  PinBudget budget;
  auto opened = MapCache::open(
      provider, budget, {.chunk = Bytes{granule_bytes}, .bytes_max = Bytes{room * granule_bytes}, .evict_min = 1});
  ASSERT_TRUE(opened);
  Lru lru{room};
  test::Random random{7};
  const auto use = [&](std::uint64_t n) {
    return bool{(*opened)->try_acquire(granule(n), Access::read)} || !(*opened)->acquire(granule(n), Access::read);
  };
  for (int i = 0; i < 5000; ++i) {
    const std::uint64_t n = random.below(working_set);
    use(n);
    lru.use(n);
  }
  std::uint64_t hits = 0;
  std::uint64_t lru_hits = 0;
  std::uint64_t uses = 0;
  std::uint64_t scanned = 10'000;
  for (int round = 0; round < 40; ++round) {
    for (int i = 0; i < 400; ++i, ++scanned) {  // a backup, once over everything
      use(scanned);
      lru.use(scanned);
    }
    for (int i = 0; i < 150; ++i, ++uses) {
      const std::uint64_t n = random.below(working_set);
      hits += use(n) ? 1U : 0U;
      lru_hits += lru.use(n) ? 1U : 0U;
    }
  }
  EXPECT_GT(hits * 100, uses * 90) << "of " << uses;
  EXPECT_LT(lru_hits * 100, uses * 60) << "the test must be one that LRU fails";
}

TEST(PinEviction, ARegionThatComesBackSoonGoesToTheMainQueue) {
  PinIndex index;
  ASSERT_TRUE(index.open());
  EvictionPolicy policy{index, 64};
  const RegionId first = *index.insert(granule(1), Access::read, {});
  policy.insert(first);
  EXPECT_EQ(policy.main_bytes(), 0U);
  RegionId victim = no_region;
  ASSERT_EQ(policy.select(1, 1, any_node, nullptr, {&victim, 1}), 1U);
  EXPECT_EQ(victim, first);
  index.erase(first);
  bool used = true;
  index.find_users({&victim, 1}, {&used, 1});
  index.forget(first);
  policy.insert(*index.insert(granule(1), Access::read, {}));
  EXPECT_EQ(policy.main_bytes(), granule_bytes);
}

TEST(PinEviction, OneBatchOfUnpinsForManyRegions) {
  CountingProvider provider{{.find_double_pins = false}};
  PinBudget budget;
  auto opened = MapCache::open(
      provider, budget, {.chunk = Bytes{granule_bytes}, .bytes_max = Bytes{1000 * granule_bytes}, .evict_min = 32});
  ASSERT_TRUE(opened);
  for (std::uint64_t n = 0; n < 3000; ++n) ASSERT_TRUE((*opened)->acquire(granule(n), Access::read));
  const auto counts = provider.counts();
  EXPECT_GE(counts.unpins, 2000U);
  EXPECT_LE(counts.unpin_calls * 30, counts.unpins);
}

TEST(PinBudget, LowersToWhatMemlockLeaves) {
  const auto limits = PinBudget::below_memlock(50);
  EXPECT_GT(limits.process.value, 0U);
  PinBudget budget{{.process = Bytes{100}}};
  EXPECT_FALSE(budget.try_charge(0, 100));
  const auto refusal = budget.try_charge(3, 1);
  ASSERT_TRUE(refusal);
  EXPECT_EQ(refusal->which, BudgetRefusal::Limit::process);
  EXPECT_EQ(refusal->used, 100U);
  EXPECT_EQ(refusal->limit, 100U);
  budget.uncharge(0, 100);
  EXPECT_FALSE(budget.try_charge(3, 1));
}

}  // namespace
}  // namespace iovane::pinning
