#include "backends/model/page_table.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <map>
#include <random>

#include "base/fault_point.hpp"

namespace iovane::backends::model {
namespace {

constexpr std::uint64_t all_sizes = (1ULL << 12) | (1ULL << 21) | (1ULL << 30);
constexpr std::uint64_t k4 = 1ULL << 12;
constexpr std::uint64_t m2 = 1ULL << 21;
constexpr std::uint64_t g1 = 1ULL << 30;

// Tables hold addresses and never touch what is there, so tests may name memory that does not exist.
std::byte* at(std::uint64_t address) { return std::bit_cast<std::byte*>(address); }
IovaRange span(std::uint64_t start, std::uint64_t bytes) { return {Iova{start}, Iova{start + (bytes - 1)}}; }
std::uint64_t leads_to(const PageTable& t, std::uint64_t iova) {
  return std::bit_cast<std::uint64_t>(t.walk(Iova{iova}).memory);
}

TEST(PageTable, UsesTheLargestLeafThatBothAlignmentsAllow) {
  PageTable t{4, all_sizes};
  ASSERT_EQ(t.map(span(0, 2 * g1 + m2 + k4), at(64 * g1), Access::read_write), 0);
  auto c = t.census();
  EXPECT_EQ(c.leaves[2], 2U);
  EXPECT_EQ(c.leaves[1], 1U);
  EXPECT_EQ(c.leaves[0], 1U);
  EXPECT_EQ(c.bytes, 2 * g1 + m2 + k4);
  // The memory is off by one page: nothing but small leaves fits.
  ASSERT_EQ(t.map(span(8 * g1, m2), at(80 * g1 + k4), Access::read), 0);
  c = t.census();
  EXPECT_EQ(c.leaves[1], 1U);
  EXPECT_EQ(c.leaves[0], 513U);
  // From small leaves into large ones and out again.
  ASSERT_EQ(t.map(span(16 * g1 - k4, k4 + m2 + k4), at(96 * g1 - k4), Access::write), 0);
  c = t.census();
  EXPECT_EQ(c.leaves[1], 2U);
  EXPECT_EQ(c.leaves[0], 515U);
  EXPECT_EQ(leads_to(t, 16 * g1 - k4 + 5), 96 * g1 - k4 + 5);
  EXPECT_EQ(leads_to(t, 16 * g1 + m2 + 7), 96 * g1 + m2 + 7);
}

TEST(PageTable, KeepsToTheSizesItWasGiven) {
  PageTable no_giants{4, (1ULL << 12) | (1ULL << 21)};
  ASSERT_EQ(no_giants.map(span(0, g1), at(g1), Access::read), 0);
  EXPECT_EQ(no_giants.census().leaves[1], 512U);
  PageTable t{4, all_sizes};
  ASSERT_EQ(t.map(span(0, m2), at(g1), Access::read, false), 0);
  EXPECT_EQ(t.census().leaves[0], 512U);
}

TEST(PageTable, RespectsItsAperture) {
  for (const auto& [levels, bits] : {std::pair{3U, 39U}, {4U, 48U}, {5U, 57U}}) {
    PageTable t{levels, all_sizes};
    EXPECT_EQ(t.aperture().last.value, (1ULL << bits) - 1);
    EXPECT_EQ(t.map(span((1ULL << bits) - k4, k4), at(g1), Access::read), 0);
    EXPECT_EQ(t.map(span((1ULL << bits) - k4, 2 * k4), at(g1), Access::read), -EINVAL);
    EXPECT_EQ(t.map(span(1ULL << bits, k4), at(g1), Access::read), -EINVAL);
    EXPECT_EQ(leads_to(t, (1ULL << bits) - 1), g1 + k4 - 1);
    EXPECT_EQ(leads_to(t, 1ULL << bits), 0U);
    EXPECT_EQ(t.unmap(IovaRange::everything()), static_cast<std::int64_t>(k4));
  }
}

TEST(PageTable, RefusesMisalignedAndRightlessMaps) {
  PageTable t{4, all_sizes};
  EXPECT_EQ(t.map(span(0, k4), at(g1 + 1), Access::read), -EINVAL);
  EXPECT_EQ(t.map(span(12, k4), at(g1), Access::read), -EINVAL);
  EXPECT_EQ(t.map(span(0, 100), at(g1), Access::read), -EINVAL);
  EXPECT_EQ(t.map(span(0, k4), at(g1), Access::none), -EINVAL);
}

TEST(PageTable, AnOverlapChangesNothing) {
  PageTable t{4, all_sizes};
  ASSERT_EQ(t.map(span(m2 + 4 * k4, k4), at(3 * g1), Access::read), 0);
  EXPECT_EQ(t.map(span(0, 4 * m2), at(4 * g1), Access::read), -EEXIST);
  EXPECT_EQ(t.census().bytes, k4);
  EXPECT_EQ(leads_to(t, 0), 0U);
  ASSERT_EQ(t.map(span(g1, g1), at(8 * g1), Access::read), 0);
  EXPECT_EQ(t.map(span(g1 + m2, k4), at(9 * g1), Access::read), -EEXIST);
  EXPECT_EQ(leads_to(t, g1 + m2), 8 * g1 + m2);
}

TEST(PageTable, CutsALargeLeafExactlyAtTheBorders) {
  PageTable t{4, all_sizes};
  ASSERT_EQ(t.map(span(0, g1), at(4 * g1), Access::read_write), 0);
  ASSERT_EQ(t.unmap(span(m2 + 8 * k4, 3 * k4)), static_cast<std::int64_t>(3 * k4));
  auto c = t.census();
  EXPECT_EQ(c.leaves[2], 0U);
  EXPECT_EQ(c.leaves[1], 511U);
  EXPECT_EQ(c.leaves[0], 509U);
  EXPECT_EQ(leads_to(t, m2 + 7 * k4), 4 * g1 + m2 + 7 * k4);
  EXPECT_EQ(leads_to(t, m2 + 8 * k4), 0U);
  EXPECT_EQ(leads_to(t, m2 + 10 * k4), 0U);
  EXPECT_EQ(leads_to(t, m2 + 11 * k4), 4 * g1 + m2 + 11 * k4);
  EXPECT_EQ(t.walk(Iova{m2 + 11 * k4}).access, Access::read_write);
  // A cut on leaf borders splits nothing further.
  ASSERT_EQ(t.unmap(span(2 * m2, m2)), static_cast<std::int64_t>(m2));
  EXPECT_EQ(t.census().leaves[1], 510U);
}

TEST(PageTable, TakesEmptyTablesAwayAndGivesTheirPlaceToLargerLeaves) {
  PageTable t{4, all_sizes};
  for (std::uint64_t i = 0; i < 512; ++i) ASSERT_EQ(t.map(span(i * k4, k4), at(g1 + i * k4), Access::read), 0);
  const auto tables = t.census().tables;
  for (std::uint64_t i = 0; i < 512; ++i) ASSERT_EQ(t.unmap(span(i * k4, k4)), static_cast<std::int64_t>(k4));
  EXPECT_EQ(t.census().tables, tables) << "single pages leave their table in place, as kernels do";
  ASSERT_EQ(t.map(span(0, m2), at(g1), Access::read), 0);
  EXPECT_EQ(t.census().leaves[1], 1U);
  EXPECT_TRUE(t.has_retired());
  t.reclaim();
  EXPECT_EQ(t.census().tables, tables - 1);
  EXPECT_EQ(t.unmap(IovaRange::everything()), static_cast<std::int64_t>(m2));
  t.reclaim();
  EXPECT_EQ(t.census().tables, 1U) << "only the root is left";
}

TEST(PageTable, MarksDirtyOnlyWhatIsStillThere) {
  PageTable t{4, all_sizes};
  ASSERT_EQ(t.map(span(0, 2 * k4), at(g1), Access::read_write), 0);
  const Translation first = t.walk(Iova{0});
  const Translation second = t.walk(Iova{k4});
  EXPECT_TRUE(PageTable::mark_dirty(first));
  EXPECT_TRUE(PageTable::mark_dirty(first)) << "marking twice is no change";
  ASSERT_EQ(t.unmap(span(k4, k4)), static_cast<std::int64_t>(k4));
  EXPECT_FALSE(PageTable::mark_dirty(second));
  EXPECT_EQ(leads_to(t, k4), 0U);
  std::vector<IovaRange> dirty;
  const auto record = [&](IovaRange r) { dirty.push_back(r); };
  t.read_dirty(IovaRange::everything(), false, record);
  ASSERT_EQ(dirty.size(), 1U);
  EXPECT_EQ(dirty[0], span(0, k4));
  t.read_dirty(IovaRange::everything(), true, record);
  dirty.clear();
  t.read_dirty(IovaRange::everything(), true, record);
  EXPECT_TRUE(dirty.empty());
}

TEST(PageTable, ACutKeepsTheDirtyMark) {
  PageTable t{4, all_sizes};
  ASSERT_EQ(t.map(span(0, m2), at(g1), Access::read_write), 0);
  ASSERT_TRUE(PageTable::mark_dirty(t.walk(Iova{5})));
  ASSERT_EQ(t.unmap(span(0, k4)), static_cast<std::int64_t>(k4));
  std::size_t leaves = 0;
  t.read_dirty(IovaRange::everything(), false, [&](IovaRange) { ++leaves; });
  EXPECT_EQ(leaves, 511U);
}

// Every allocation of a mixed sequence fails once; the table then is what it was before the failing call.
TEST(PageTable, AFailedAllocationChangesNothing) {
  for (std::uint64_t nth = 1;; ++nth) {
    PageTable t{4, all_sizes};
    base::arm_fault(static_cast<std::uint32_t>(base::FaultKind::allocation), nth);
    const int mapped = t.map(span(g1 - m2 - k4, 2 * m2 + 2 * k4), at(8 * g1 - m2 - k4), Access::read_write);
    const bool map_failed = mapped != 0;
    if (map_failed) {
      EXPECT_EQ(mapped, -ENOMEM);
      EXPECT_EQ(t.census().bytes, 0U);
    } else {
      const auto before = t.census().bytes;
      const std::int64_t gone = t.unmap(span(g1 - m2 + k4, m2));
      if (gone < 0) {
        EXPECT_EQ(gone, -ENOMEM);
        EXPECT_EQ(t.census().bytes, before);
      } else {
        EXPECT_EQ(t.census().bytes, before - m2);
      }
    }
    if (!base::disarm_fault()) {
      EXPECT_GT(nth, 4U) << "the sequence must allocate";
      break;
    }
  }
}

// Random maps and unmaps of a small space against a plain map of pages.
TEST(PageTable, AgreesWithAReferenceOnRandomEdits) {
  const char* given = std::getenv("IOVANE_SEED");
  const std::uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 0) : std::random_device{}();
  SCOPED_TRACE("IOVANE_SEED=" + std::to_string(seed));
  std::mt19937_64 random{seed};
  PageTable t{3, all_sizes};
  std::map<std::uint64_t, std::uint64_t> pages;  // page number -> memory
  constexpr std::uint64_t space_pages = 4 * 512;
  for (int step = 0; step < 3000; ++step) {
    const std::uint64_t first = random() % space_pages;
    std::uint64_t count = 1 + random() % 4;
    if (random() % 8 == 0) count = 1 + random() % (space_pages - first);
    count = std::min(count, space_pages - first);
    if (random() % 2 == 0) {
      const std::uint64_t memory = 64 * g1 + (random() % 2 == 0 ? first * k4 : (random() % 1024) * k4);
      const auto there = pages.lower_bound(first);
      const bool free = there == pages.end() || there->first >= first + count;
      const int rc = t.map(span(first * k4, count * k4), at(memory), Access::read_write);
      ASSERT_EQ(rc, free ? 0 : -EEXIST);
      if (free) {
        for (std::uint64_t i = 0; i < count; ++i) pages[first + i] = memory + i * k4;
      }
    } else {
      std::uint64_t expected = 0;
      for (std::uint64_t i = 0; i < count; ++i) expected += pages.erase(first + i) * k4;
      ASSERT_EQ(t.unmap(span(first * k4, count * k4)), static_cast<std::int64_t>(expected));
      if (random() % 2 == 0) t.reclaim();
    }
    if (step % 50 == 0) {
      for (std::uint64_t p = 0; p < space_pages; ++p) {
        const auto it = pages.find(p);
        ASSERT_EQ(leads_to(t, p * k4), it == pages.end() ? 0 : it->second) << "page " << p << " at step " << step;
      }
      ASSERT_EQ(t.census().bytes, pages.size() * k4);
    }
  }
}

}  // namespace
}  // namespace iovane::backends::model
