#include "viommu/shadow_index.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <thread>

#include "guest_ram.hpp"

namespace iovane::viommu {
namespace {

IovaRange pages(std::uint64_t first, std::uint64_t count) {
  return {Iova{first << 12}, Iova{((first + count) << 12) - 1}};
}

TEST(ShadowIndex, ARangeOfAnyLengthCostsAFewLeaves) {
  ShadowIndex index{12, 64, 64};
  // 2^63 bytes from one granule above zero: at most 511 slots per level and side.
  const IovaRange huge{Iova{0x1000}, Iova{0x7fff'ffff'ffff'ffff}};
  const auto filled = index.fill(huge, LeafWord::make(0x5000, Access::read), 0);
  ASSERT_TRUE(filled);
  EXPECT_LT(*filled, 512U * 6);
  EXPECT_EQ(index.translate(0x1234)->first, 0x5234U);
  EXPECT_EQ(index.translate(0x7fff'ffff'ffff'ffff)->first, 0x8000'0000'0000'3fffU);
  EXPECT_FALSE(index.translate(0xfff));
  EXPECT_FALSE(index.translate(0x8000'0000'0000'0000));
  EXPECT_EQ(index.clear(huge).leaves, *filled);
  EXPECT_EQ(index.leaves(), 0U);
}

TEST(ShadowIndex, ReachesTheLastAddress) {
  ShadowIndex index{12, 64, 64};
  const IovaRange top{Iova{0xffff'ffff'ffff'f000}, iova_max};
  ASSERT_TRUE(index.fill(top, LeafWord::make(0, Access::read_write), 0));
  EXPECT_TRUE(index.translate(iova_max.value));
  EXPECT_FALSE(index.is_free(IovaRange::everything()));
  EXPECT_EQ(index.next(0, iova_max.value)->range, top);
  EXPECT_EQ(index.clear(IovaRange::everything()).leaves, 1U);
}

TEST(ShadowIndex, ASuperpageMayTakeTheFormerPlaceOfSmallOnes) {
  ShadowIndex index{12, 48, 64};
  for (std::uint64_t i = 0; i < 512; i += 2)
    ASSERT_TRUE(index.fill(pages(512 + i, 1), LeafWord::make(i << 12, Access::read), 0));
  static_cast<void>(index.clear(pages(512, 512)));
  const auto nodes = index.nodes_in_use();
  EXPECT_EQ(*index.fill(pages(512, 512), LeafWord::make(0x40000000, Access::read), 0), 1U);
  EXPECT_LT(index.nodes_in_use(), nodes) << "the empty node was given back";
  ASSERT_TRUE(index.split_at((512 + 3) << 12));
  EXPECT_EQ(index.leaves(), 512U);
  EXPECT_EQ(index.match(pages(512, 512), LeafWord::make(0x40000000, Access::read)), ShadowIndex::Match::equal);
  EXPECT_EQ(index.match(pages(512, 512), LeafWord::make(0x40000000, Access::read_write)),
            ShadowIndex::Match::different);
  EXPECT_EQ(index.match(pages(511, 3), LeafWord::make(0x40000000 - 0x1000, Access::read)),
            ShadowIndex::Match::different)
      << "a hole at the start";
}

TEST(ShadowIndex, NodesAreBoundedAndEmptyOnesComeBack) {
  ShadowIndex index{12, 48, 16};
  std::uint64_t mapped = 0;
  Error error{};
  for (; mapped < 100; ++mapped) {
    const auto filled = index.fill(pages(mapped << 9, 1), LeafWord::make(0, Access::read), 0);
    if (!filled) {
      error = filled.error();
      break;
    }
  }
  EXPECT_EQ(error.code, Errc::limit_reached);
  EXPECT_GT(mapped, 8U);
  for (std::uint64_t i = 0; i < mapped; ++i) static_cast<void>(index.clear(pages(i << 9, 1)));
  EXPECT_TRUE(index.fill(pages(200 << 9, 1), LeafWord::make(0, Access::read), 0)) << "after a prune";
  EXPECT_EQ(index.leaves(), 1U);
}

// Against a map of granules, with the tree small enough that nodes run out and are pruned.
TEST(ShadowIndex, AgreesWithAMapOfGranules) {
  std::mt19937_64 random{test_seed()};
  ShadowIndex index{12, 40, 40};
  std::map<std::uint64_t, std::uint64_t> model;  // granule number to guest word
  for (int step = 0; step < 40000; ++step) {
    const std::uint64_t spread = random() % 3 == 0 ? 20000 : 2048;
    const std::uint64_t first = random() % spread;
    const std::uint64_t count = random() % 8 == 0 ? 1 + random() % 1200 : 1 + random() % 6;
    const IovaRange range = pages(first, count);
    const auto low = model.lower_bound(first);
    const bool free = low == model.end() || low->first >= first + count;
    ASSERT_EQ(index.is_free(range), free) << "step " << step;
    if (random() % 2 == 0) {
      if (!free) continue;
      const std::uint64_t word = LeafWord::make((random() % 100000) << 12, Access::read_write);
      if (!index.fill(range, word, LeafWord::unit)) {
        ASSERT_TRUE(index.is_free(range)) << "all or nothing";
        continue;
      }
      for (std::uint64_t i = 0; i < count; ++i) model[first + i] = word + (i << 12);
    } else {
      if (!index.split_at(range.start.value) || !index.split_at(range.last.value + 1)) continue;
      static_cast<void>(index.clear(range));
      model.erase(model.lower_bound(first), model.lower_bound(first + count));
    }
    const std::uint64_t probe = random() % spread;
    const auto expected = model.find(probe);
    const auto found = index.translate(probe << 12);
    ASSERT_EQ(found.has_value(), expected != model.end()) << "step " << step;
    if (found) {
      ASSERT_EQ(found->first, LeafWord::gpa(expected->second));
    }
  }
  // Every leaf, in order.
  std::map<std::uint64_t, std::uint64_t> listed;
  std::uint64_t at = 0;
  for (auto leaf = index.next(0, iova_max.value); leaf; leaf = index.next(at, iova_max.value)) {
    for (std::uint64_t a = leaf->range.start.value; a < leaf->range.last.value; a += 0x1000)
      listed[a >> 12] = (leaf->word & LeafWord::guest_mask) + (a - leaf->range.start.value);
    at = leaf->range.last.value + 1;
  }
  EXPECT_EQ(listed, model);
}

// A reader translates one address that is always mapped to the same page, and one whose two meanings both are legal,
// while the writer turns superpages into small pages and back and prunes.
TEST(ShadowIndex, ReadersNeverSeeAReusedNode) {
  ShadowIndex index{12, 48, 12};
  ASSERT_TRUE(index.fill(pages(0, 1), LeafWord::make(0xabc000, Access::read), 0));
  std::atomic<bool> stop{false};
  std::thread reader{[&] {
    // relaxed: a flag.
    while (!stop.load(std::memory_order_relaxed)) {
      const auto steady = index.translate(0x10);
      ASSERT_TRUE(steady);
      ASSERT_EQ(steady->first, 0xabc010U);
      for (std::uint64_t block = 1; block < 9; ++block)
        if (const auto changing = index.translate(block << 21); changing) {
          ASSERT_EQ(changing->first, block << 32);
        }
    }
  }};
  for (int round = 0; round < 20000; ++round) {
    const std::uint64_t block = 1 + static_cast<std::uint64_t>(round) % 8;
    const IovaRange whole = pages(block << 9, 512);
    const std::uint64_t word = LeafWord::make(block << 32, Access::read);
    if (round % 3 == 0) {
      static_cast<void>(index.fill(whole, word, 0));
    } else {
      static_cast<void>(index.fill(pages(block << 9, 1), word, 0));
    }
    static_cast<void>(index.clear(whole));
    if (round % 16 == 0) index.prune();
  }
  stop.store(true, std::memory_order_relaxed);
  reader.join();
}

}  // namespace
}  // namespace iovane::viommu
