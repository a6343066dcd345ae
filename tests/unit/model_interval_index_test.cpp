#include "backends/model/interval_index.hpp"

#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <random>
#include <string>

namespace iovane::backends::model {
namespace {

TEST(IntervalIndex, FindsByAnyAddressOfAnEntry) {
  IntervalIndex<int> index;
  int a = 0;
  int b = 0;
  ASSERT_TRUE(index.insert({Iova{100}, Iova{199}}, &a));
  ASSERT_TRUE(index.insert({Iova{200}, iova_max}, &b));
  EXPECT_EQ(index.containing(Iova{99}), nullptr);
  EXPECT_EQ(index.containing(Iova{100}), &a);
  EXPECT_EQ(index.containing(Iova{199}), &a);
  EXPECT_EQ(index.containing(iova_max), &b);
  EXPECT_EQ(index.overlapping({Iova{0}, Iova{99}}), nullptr);
  EXPECT_EQ(index.overlapping({Iova{0}, Iova{100}}), &a);
  const IntervalIndex<int> empty;
  EXPECT_FALSE(empty.valid(empty.at_or_after(Iova{0})));
  EXPECT_FALSE(empty.valid(empty.first()));
  index.erase(Iova{100});
  EXPECT_EQ(index.overlapping({Iova{0}, Iova{199}}), nullptr);
  EXPECT_EQ(index.size(), 1U);
}

TEST(IntervalIndex, AgreesWithAMapOnRandomEdits) {
  const char* given = std::getenv("IOVANE_SEED");
  const std::uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 0) : std::random_device{}();
  SCOPED_TRACE("IOVANE_SEED=" + std::to_string(seed));
  std::mt19937_64 random{seed};
  IntervalIndex<int> index;
  std::map<std::uint64_t, std::pair<std::uint64_t, int*>> reference;
  std::vector<int> items(64);
  // Grow, churn, shrink, so that runs fill, split, thin out and join.
  for (int step = 0; step < 60000; ++step) {
    const bool grow = step < 20000 ? random() % 4 != 0 : step < 40000 ? random() % 2 == 0 : random() % 4 == 0;
    const std::uint64_t start = random() % 100000;
    if (grow) {
      const std::uint64_t last = start + random() % 8;
      const auto next = reference.upper_bound(start);
      const bool clash = (next != reference.end() && next->first <= last) ||
                         (next != reference.begin() && std::prev(next)->second.first >= start);
      ASSERT_EQ(index.overlapping({Iova{start}, Iova{last}}) != nullptr, clash);
      if (!clash) {
        int* item = &items[static_cast<std::size_t>(step) % items.size()];
        ASSERT_TRUE(index.insert({Iova{start}, Iova{last}}, item));
        reference[start] = {last, item};
      }
    } else if (!reference.empty()) {
      auto it = reference.lower_bound(start);
      if (it == reference.end()) it = reference.begin();
      index.erase(Iova{it->first});
      reference.erase(it);
    }
    ASSERT_EQ(index.size(), reference.size());
    if (step % 5000 == 0) {
      auto p = index.first();
      for (const auto& [first, rest] : reference) {
        ASSERT_TRUE(index.valid(p));
        ASSERT_EQ(index.range(p), (IovaRange{Iova{first}, Iova{rest.first}}));
        ASSERT_EQ(index.item(p), rest.second);
        p = index.next(p);
      }
      ASSERT_FALSE(index.valid(p));
    }
  }
}

TEST(IntervalIndex, MemoryFollowsWhatIsLive) {
  IntervalIndex<int> index;
  int item = 0;
  for (std::uint64_t i = 0; i < 100000; ++i) ASSERT_TRUE(index.insert({Iova{i * 2}, Iova{i * 2}}, &item));
  const std::size_t full = index.memory_bytes();
  EXPECT_LT(full, 100000U * 24 * 5 / 4) << "appending keeps runs full";
  for (std::uint64_t i = 0; i < 100000; ++i) {
    if (i % 100 != 0) index.erase(Iova{i * 2});
  }
  EXPECT_LT(index.memory_bytes(), full / 8);
}

}  // namespace
}  // namespace iovane::backends::model
