// The shelf of a length class, and the arena that its nodes come from.
#include "iova/run_shelf.hpp"

#include <gtest/gtest.h>

#include <memory>
#include <set>
#include <thread>
#include <vector>

namespace iovane::iova {
namespace {

struct Shelf {
  MetadataArena arena = *MetadataArena::create(Bytes{std::uint64_t{1} << 24});
  std::unique_ptr<RunShelf> shelf = std::make_unique<RunShelf>();
};

TEST(RunShelf, FindsWhatIsReadyAndNothingElse) {
  Shelf s;
  EXPECT_FALSE(s.shelf->find_ready(s.arena, 0));
  const auto a = s.shelf->put(s.arena, 101);
  const auto b = s.shelf->put(s.arena, 102);
  ASSERT_TRUE(a && b);
  EXPECT_FALSE(s.shelf->find_ready(s.arena, 0));
  s.shelf->set_ready(s.arena, *b);
  ASSERT_TRUE(s.shelf->find_ready(s.arena, 0));
  EXPECT_EQ(s.shelf->find_ready(s.arena, 0)->run, 102U);
  s.shelf->clear_ready(s.arena, *b);
  EXPECT_FALSE(s.shelf->find_ready(s.arena, 0));
}

TEST(RunShelf, PrefersOlderPositionsAndReusesThem) {
  Shelf s;
  std::vector<RunShelf::Position> at;
  for (ObjectId run = 1; run <= 5000; ++run) {
    at.push_back(*s.shelf->put(s.arena, run));
    EXPECT_EQ(at.back(), run - 1);
  }
  for (const RunShelf::Position p : {4999U, 70U, 3000U}) s.shelf->set_ready(s.arena, at[p]);
  EXPECT_EQ(s.shelf->find_ready(s.arena, 0)->run, 71U);
  s.shelf->remove(s.arena, at[70]);
  EXPECT_EQ(s.shelf->find_ready(s.arena, 0)->run, 3001U);
  EXPECT_EQ(*s.shelf->put(s.arena, 9999), 70U);
}

TEST(RunShelf, SaysWhenTheArenaIsFull) {
  MetadataArena arena = *MetadataArena::create(Bytes{64U << 10});
  RunShelf shelf;
  ObjectId run = 1;
  while (shelf.put(arena, run)) ++run;
  EXPECT_GT(run, 64U);
  EXPECT_LT(run, RunShelf::levels * 100'000U);
}

TEST(RunShelf, ThreadsTakeEachReadyRunOnce) {
  Shelf s;
  constexpr ObjectId runs = 2000;
  for (ObjectId run = 1; run <= runs; ++run) s.shelf->set_ready(s.arena, *s.shelf->put(s.arena, run));
  std::vector<std::multiset<ObjectId>> taken(3);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < taken.size(); ++t)
    threads.emplace_back([&, t] {
      while (const auto found = s.shelf->find_ready(s.arena, t * 7)) {
        s.shelf->clear_ready(s.arena, found->position);
        taken[t].insert(found->run);
      }
    });
  for (std::thread& t : threads) t.join();
  std::set<ObjectId> all;
  for (const auto& some : taken) all.insert(some.begin(), some.end());
  EXPECT_EQ(all.size(), runs) << "a ready run was overlooked";
}

TEST(MetadataArena, ReusesObjectsOfTheirKindAndKeepsItsReserve) {
  MetadataArena arena = *MetadataArena::create(Bytes{64U << 10});
  const ObjectId first = arena.allocate(ObjectKind::magazine, 1000);
  ASSERT_NE(first, 0U);
  EXPECT_EQ(arena.bytes_in_use(), 1024U);
  arena.release(ObjectKind::magazine, 1000, first);
  EXPECT_EQ(arena.bytes_in_use(), 0U);
  EXPECT_NE(arena.allocate(ObjectKind::tree_node, 384), first) << "memory changed its kind";
  EXPECT_EQ(arena.allocate(ObjectKind::magazine, 1000), first);
  std::set<ObjectId> all;
  while (const ObjectId id = arena.allocate(ObjectKind::tree_node, 384)) EXPECT_TRUE(all.insert(id).second);
  EXPECT_NE(arena.allocate(ObjectKind::tree_node, 384, true), 0U) << "no reserve for giving space back";
  EXPECT_LE(arena.bytes_high_water(), 64U << 10);
  EXPECT_EQ(MetadataArena::create(Bytes{100}).error().code, Errc::invalid_argument);
}

}  // namespace
}  // namespace iovane::iova
