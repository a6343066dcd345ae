#include "engine/mapping_index.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <vector>

namespace iovane::engine {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr std::uint64_t top = std::numeric_limits<std::uint64_t>::max();

MappingRecord at(std::uint64_t start, std::uint64_t last) {
  MappingRecord record;
  record.range = {Iova{start}, Iova{last}};
  return record;
}
MappingRecord page(std::uint64_t n) { return at(n * 4096, n * 4096 + 4095); }
MappingIndex make(std::uint32_t mappings_max = 1000) { return *MappingIndex::create(mappings_max); }

TEST(MappingIndex, IsEmptyAtFirst) {
  MappingIndex index = make();
  EXPECT_EQ(index.size(), 0U);
  EXPECT_EQ(index.bytes(), Bytes{0});
  EXPECT_EQ(index.covering(Iova{0}), MappingId{});
  EXPECT_EQ(index.first_in(IovaRange::everything()), MappingId{});
  EXPECT_EQ(index.find(MappingId{}), nullptr);
  EXPECT_FALSE(index.erase(MappingId{}));
}

TEST(MappingIndex, RefusesToHoldNothing) { EXPECT_EQ(MappingIndex::create(0).error().code, Errc::invalid_argument); }

TEST(MappingIndex, KeepsEveryFieldOfARecord) {
  MappingIndex index = make();
  MappingRecord record = page(1);
  record.memory = 0x1122'3344'5566'7788;
  record.region = 7;
  record.access = Access::read;
  record.state = MappingState::unmapping;
  record.flags = 0x8001;
  record.tag = 99;
  const MappingRecord* found = index.find(*index.insert(record));
  ASSERT_NE(found, nullptr);
  EXPECT_EQ(found->range, record.range);
  EXPECT_EQ(found->memory, record.memory);
  EXPECT_EQ(found->region, 7U);
  EXPECT_EQ(found->access, Access::read);
  EXPECT_EQ(found->state, MappingState::unmapping);
  EXPECT_EQ(found->flags, 0x8001);
  EXPECT_EQ(found->tag, 99U);
}

TEST(MappingIndex, FindsTheCoveringRecordFromEveryAddressOfIt) {
  MappingIndex index = make();
  const MappingId id = *index.insert(at(0x1000, 0x5fff));
  for (const std::uint64_t a : {0x1000U, 0x1001U, 0x3000U, 0x5fffU}) EXPECT_EQ(index.covering(Iova{a}), id) << a;
  for (const std::uint64_t a : {0x0ULL, 0xfffULL, 0x6000ULL, 0x1'0000'0000ULL}) {
    EXPECT_EQ(index.covering(Iova{a}), MappingId{}) << a;
  }
}

TEST(MappingIndex, ReachesTheTopOfTheSpace) {
  MappingIndex index = make();
  const MappingId last = *index.insert(at(top, top));
  const MappingId before = *index.insert(at(top - 4096, top - 1));
  EXPECT_EQ(index.covering(Iova{top}), last);
  EXPECT_EQ(index.covering(Iova{top - 1}), before);
  EXPECT_EQ(index.next(before), last);
  EXPECT_EQ(index.next(last), MappingId{});
  EXPECT_EQ(index.first_in({Iova{top}, Iova{top}}), last);
}

TEST(MappingIndex, HoldsTheWholeSpaceInOneRecord) {
  MappingIndex index = make();
  const MappingId all = *index.insert(at(0, top));
  EXPECT_EQ(index.bytes(), Bytes{top});  // 2^64 does not fit
  EXPECT_EQ(index.covering(Iova{0}), all);
  EXPECT_EQ(index.covering(Iova{top}), all);
  EXPECT_EQ(index.insert(at(top, top)).error().code, Errc::iova_busy);
  EXPECT_TRUE(index.erase(all));
  EXPECT_EQ(index.bytes(), Bytes{0});
}

TEST(MappingIndex, SumSaturatesWhenManyRecordsCoverEverything) {
  MappingIndex index = make();
  ASSERT_TRUE(index.insert(at(0, 9)));
  const MappingId rest = *index.insert(at(10, top));
  EXPECT_EQ(index.bytes(), Bytes{top});
  EXPECT_TRUE(index.erase(rest));
  EXPECT_EQ(index.bytes(), Bytes{10});
}

TEST(MappingIndex, AConflictNamesTheRangeInTheWayAndItsState) {
  MappingIndex index = make();
  MappingRecord record = at(0x4000, 0x7fff);
  record.state = MappingState::quarantined;
  ASSERT_TRUE(index.insert(record));
  for (const auto& other :
       {at(0x4000, 0x7fff), at(0x3000, 0x4000), at(0x7fff, 0x8000), at(0x5000, 0x5000), at(0, top)}) {
    const auto result = index.insert(other);
    ASSERT_EQ(result.error().code, Errc::iova_busy);
    EXPECT_THAT(result.error().detail(), HasSubstr("quarantined mapping [0x4000, 0x7fff]"));
  }
  EXPECT_EQ(index.size(), 1U);
}

TEST(MappingIndex, RefusesARangeThatEndsBeforeItStarts) {
  MappingIndex index = make();
  EXPECT_EQ(index.insert(at(1, 0)).error().code, Errc::invalid_argument);
}

TEST(MappingIndex, StopsAtItsLimitAndGoesOnAfterAnErase) {
  MappingIndex index = make(2);
  const MappingId first = *index.insert(page(0));
  ASSERT_TRUE(index.insert(page(1)));
  EXPECT_EQ(index.insert(page(2)).error().code, Errc::limit_reached);
  EXPECT_TRUE(index.erase(first));
  EXPECT_TRUE(index.insert(page(2)));
}

TEST(MappingIndex, AStaleNameNeverFindsTheNextTenant) {
  MappingIndex index = make();
  const MappingId old_id = *index.insert(page(3));
  ASSERT_TRUE(index.erase(old_id));
  const MappingId new_id = *index.insert(page(3));
  EXPECT_NE(old_id, new_id);
  EXPECT_EQ(static_cast<std::uint32_t>(old_id.value), static_cast<std::uint32_t>(new_id.value));  // the same slot
  EXPECT_EQ(index.find(old_id), nullptr);
  EXPECT_FALSE(index.erase(old_id));
  EXPECT_EQ(index.next(old_id), MappingId{});
  EXPECT_NE(index.find(new_id), nullptr);
}

TEST(MappingIndex, InventedNamesFindNothing) {
  MappingIndex index = make();
  const MappingId id = *index.insert(page(0));
  ASSERT_TRUE(index.erase(id));
  for (std::uint64_t generation = 0; generation < 8; ++generation) {
    for (const std::uint64_t slot : {0ULL, 1ULL, 2ULL, 999ULL, 0xffff'ffffULL}) {
      EXPECT_EQ(index.find(MappingId{generation << 32 | slot}), nullptr);
    }
  }
}

TEST(MappingIndex, WalksInAddressOrderWhateverTheOrderOfInsertion) {
  MappingIndex index = make();
  for (const std::uint64_t n : {70, 3, 1'000'000, 64, 5, 63}) ASSERT_TRUE(index.insert(page(n)));
  std::vector<std::uint64_t> pages;
  for (MappingId id = index.first_in(IovaRange::everything()); id; id = index.next(id)) {
    pages.push_back(index.find(id)->range.start.value / 4096);
  }
  EXPECT_THAT(pages, ElementsAre(3, 5, 63, 64, 70, 1'000'000));
}

TEST(MappingIndex, ForEachVisitsWhatOverlapsAndStopsWhenTold) {
  MappingIndex index = make();
  for (std::uint64_t n = 0; n < 10; ++n) ASSERT_TRUE(index.insert(page(n)));
  std::vector<std::uint64_t> pages;
  index.for_each({Iova{2 * 4096 + 7}, Iova{5 * 4096}},
                 [&](MappingId, const MappingRecord& record) { pages.push_back(record.range.start.value / 4096); });
  EXPECT_THAT(pages, ElementsAre(2, 3, 4, 5));
  pages.clear();
  index.for_each(IovaRange::everything(), [&](MappingId, const MappingRecord& record) {
    pages.push_back(record.range.start.value / 4096);
    return pages.size() < 3;
  });
  EXPECT_THAT(pages, ElementsAre(0, 1, 2));
}

TEST(MappingIndex, ForEachMayEraseWhatItVisits) {
  MappingIndex index = make();
  for (std::uint64_t n = 0; n < 100; ++n) ASSERT_TRUE(index.insert(page(n * 3)));
  index.for_each({Iova{0}, Iova{150 * 4096}},
                 [&](MappingId id, const MappingRecord&) { EXPECT_TRUE(index.erase(id)); });
  EXPECT_EQ(index.size(), 49U);
  EXPECT_EQ(index.find(index.first_in(IovaRange::everything()))->range.start, Iova{153 * 4096});
}

TEST(MappingIndex, SurvivesBeingMoved) {
  MappingIndex index = make();
  const MappingId id = *index.insert(page(1));
  ASSERT_TRUE(index.insert(page(2)));
  MappingIndex moved = std::move(index);
  EXPECT_NE(moved.find(id), nullptr);
  MappingIndex assigned = make();
  ASSERT_TRUE(assigned.insert(page(9)));
  assigned = std::move(moved);
  EXPECT_EQ(assigned.size(), 2U);
  EXPECT_EQ(assigned.covering(Iova{4096}), id);
  EXPECT_TRUE(assigned.insert(page(3)));
}

/// Counts what the index takes from its source.
class CountingMemory final : public base::MemorySource {
 public:
  void* allocate(std::size_t bytes, std::size_t alignment) noexcept override {
    ++allocations;
    live_bytes += bytes;
    return base::heap_memory().allocate(bytes, alignment);
  }
  void release(void* memory, std::size_t bytes, std::size_t alignment) noexcept override {
    live_bytes -= bytes;
    base::heap_memory().release(memory, bytes, alignment);
  }
  std::size_t allocations = 0;
  std::size_t live_bytes = 0;
};

TEST(MappingIndex, DoesNotAllocateInSteadyState) {
  CountingMemory memory;
  {
    MappingIndex index = *MappingIndex::create(1U << 20, memory);
    std::vector<MappingId> ids;
    const auto fill_and_empty = [&] {
      for (std::uint64_t n = 0; n < 5000; ++n) ids.push_back(*index.insert(page(n * 7919 % 5003)));
      for (const MappingId id : ids) ASSERT_TRUE(index.erase(id));
      ids.clear();
    };
    fill_and_empty();
    const std::size_t before = memory.allocations;
    for (int round = 0; round < 5; ++round) fill_and_empty();
    EXPECT_EQ(memory.allocations, before);
  }
  EXPECT_EQ(memory.live_bytes, 0U);
}

TEST(MappingIndex, MemoryStaysWithinWhatTheHeaderPromises) {
  CountingMemory memory;
  MappingIndex index = *MappingIndex::create(1U << 20, memory);
  // The worst case: large nodes that were grown and then thinned out as far as they stay large.
  std::vector<MappingId> spare;
  constexpr std::uint64_t nodes = 4000;
  for (std::uint64_t node = 0; node < nodes; ++node) {
    for (std::uint64_t n = 0; n < 6; ++n) {
      const MappingId id = *index.insert(page(node * 64 + n * 10));
      if (n >= 4) spare.push_back(id);
    }
  }
  for (const MappingId id : spare) ASSERT_TRUE(index.erase(id));
  // Twice 210: at most half of what the last chunks hold is unused.
  EXPECT_LE(memory.live_bytes / index.size(), 420U);
}

}  // namespace
}  // namespace iovane::engine
