// What the IOVA allocator promises, one sentence per test; random tapes and threads are in tests/model and
// tests/stress.
#include "iova/interval_allocator.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "support/seed.hpp"

namespace iovane::iova {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t gib = std::uint64_t{1} << 30;
constexpr IovaRange range(std::uint64_t start, std::uint64_t last) { return {Iova{start}, Iova{last}}; }
constexpr IovaRange pages(std::uint64_t first, std::uint64_t count) {
  return range(first * page, first * page + (count * page - 1));
}

/// A configuration that differs from the default in one thing.
template <typename T>
IntervalAllocatorConfig with(T IntervalAllocatorConfig::*member, T value) {
  IntervalAllocatorConfig config;
  config.*member = value;
  return config;
}

std::unique_ptr<IntervalAllocator> make(std::vector<IovaRange> windows, IntervalAllocatorConfig config = {}) {
  config.windows = windows;
  auto made = IntervalAllocator::create(config);
  EXPECT_TRUE(made) << made.error().message();
  return made ? *std::move(made) : nullptr;
}

TEST(IntervalAllocator, TheLastAddressOfAllIsLikeAnyOther) {
  const auto a = make({range(~std::uint64_t{0} - 3 * page + 1, ~std::uint64_t{0})});
  const auto top = a->allocate(Bytes{page});
  ASSERT_TRUE(top);
  EXPECT_EQ(top->last, iova_max);
  EXPECT_EQ(a->find(iova_max), *top);
  const auto rest = a->allocate(Bytes{2 * page});
  ASSERT_TRUE(rest);
  EXPECT_FALSE(a->allocate(Bytes{page}));
  std::vector<IovaRange> seen;
  a->for_each([&](const IovaRange& r) { seen.push_back(r); });
  EXPECT_THAT(seen, ElementsAre(*rest, *top));
  ASSERT_TRUE(a->free(*top));
  ASSERT_TRUE(a->free(*rest));
  EXPECT_TRUE(a->claim(range(~std::uint64_t{0} - 3 * page + 1, ~std::uint64_t{0})));
}

TEST(IntervalAllocator, TheWholeSpaceIsOneInterval) {
  const auto a = make({IovaRange::everything()});
  ASSERT_TRUE(a->claim(IovaRange::everything()));
  EXPECT_EQ(a->find(Iova{12345}), IovaRange::everything());
  EXPECT_FALSE(a->allocate(Bytes{page}));
  EXPECT_TRUE(a->free(IovaRange::everything()));
}

TEST(IntervalAllocator, AlignsToAGibibyteAndBeyond) {
  for (const Direction direction : {Direction::top_down, Direction::bottom_up}) {
    const auto a =
        make({range(page, (std::uint64_t{1} << 46) - 1)}, with(&IntervalAllocatorConfig::direction, direction));
    for (const Bytes align : {Bytes{page}, 2_MiB, 1_GiB, 1_TiB}) {
      const auto got = a->allocate(Bytes{3 * page}, {.align = align});
      ASSERT_TRUE(got) << got.error().message();
      EXPECT_EQ(got->start.value % align.value, 0U);
      EXPECT_EQ(got->length().value, 3 * page);
    }
  }
}

TEST(IntervalAllocator, AlignsInASpaceThatOnlyJustHasRoom) {
  const auto a = make({range(gib - page, 2 * gib - 1)});
  const auto got = a->allocate(1_GiB, {.align = 1_GiB});
  ASSERT_TRUE(got) << got.error().message();
  EXPECT_EQ(got->start.value, gib);
}

TEST(IntervalAllocator, KeepsBelowTheCeiling) {
  const auto a = make({range(page, (std::uint64_t{1} << 48) - 1)});
  for (unsigned i = 0; i < 100; ++i) {
    const auto low = a->allocate(Bytes{(1 + i % 5) * page}, {.ceiling = Iova{0xffff'ffff}});
    ASSERT_TRUE(low);
    EXPECT_LE(low->last.value, 0xffff'ffffU);
  }
  EXPECT_GT(a->allocate(Bytes{page})->start.value, 0xffff'ffffU) << "top-down does not begin at the top";
  EXPECT_EQ(a->allocate(Bytes{page}, {.ceiling = Iova{page - 2}}).error().code, Errc::iova_exhausted);
}

TEST(IntervalAllocator, LaysAScatterListOutInOneInterval) {
  const auto a = make({pages(1, 1000)});
  const std::array<Bytes, 3> parts{Bytes{100}, Bytes{page}, Bytes{2 * page + 1}};
  std::array<Iova, 3> starts{};
  const auto whole = a->allocate_contiguous(parts, starts);
  ASSERT_TRUE(whole);
  EXPECT_EQ(whole->length().value, 5 * page);
  EXPECT_THAT(starts, ElementsAre(whole->start, Iova{whole->start.value + page}, Iova{whole->start.value + 2 * page}));
  const std::array<Bytes, 2> too_much{Bytes{~std::uint64_t{0} - 2 * page}, Bytes{4 * page}};
  EXPECT_EQ(a->allocate_contiguous(too_much, std::span{starts}.first(2)).error().code, Errc::overflow);
}

// Each of these on the owner's fast path, on the shared level, and from another thread.
class WrongFrees : public ::testing::TestWithParam<bool> {
 protected:
  void expect(IovaRange r, Errc code) {
    for (int round = 0; round < 2; ++round) {
      const auto here = allocator_->free(r);
      ASSERT_FALSE(here) << r.start.value;
      EXPECT_EQ(here.error().code, code) << here.error().message();
      std::thread{[&] {
        const auto there = allocator_->free(r);
        ASSERT_FALSE(there);
        EXPECT_EQ(there.error().code, code) << there.error().message();
      }}.join();
    }
  }
  std::unique_ptr<IntervalAllocator> allocator_ =
      make({pages(16, 4096)}, with(&IntervalAllocatorConfig::magazines, GetParam()));
};

TEST_P(WrongFrees, ChangeNothing) {
  const IovaRange kept = *allocator_->allocate(Bytes{4 * page});
  const IovaRange other = *allocator_->allocate(Bytes{4 * page});
  const IovaRange gone = *allocator_->allocate(Bytes{4 * page});
  ASSERT_TRUE(allocator_->free(gone));
  expect(gone, Errc::not_found);                                                            // double
  expect(pages(2000, 4), Errc::not_found);                                                  // foreign
  expect({kept.start, Iova{kept.last.value - page}}, Errc::would_bisect);                   // its beginning
  expect({kept.start, Iova{kept.last.value + page}}, Errc::would_bisect);                   // more than it
  expect({Iova{kept.start.value + page}, kept.last}, Errc::would_bisect);                   // its end
  expect({Iova{kept.start.value + 1}, Iova{kept.last.value + 1}}, Errc::invalid_argument);  // no whole granules
  expect({Iova{kept.start.value + 512}, kept.last}, Errc::invalid_argument);
  expect({kept.last, kept.start}, Errc::invalid_argument);
  EXPECT_EQ(allocator_->find(kept.start), kept);
  EXPECT_EQ(allocator_->find(other.start), other);
  EXPECT_EQ(allocator_->stats().live_intervals, 2U);
  EXPECT_TRUE(allocator_->free(kept));
  EXPECT_TRUE(allocator_->free(other));
}

INSTANTIATE_TEST_SUITE_P(Levels, WrongFrees, ::testing::Values(true, false),
                         [](const auto& level) { return std::string{level.param ? "magazines" : "shared"}; });

TEST(IntervalAllocator, AGranuleLargerThan4KiBIsChecked) {
  const auto a = make({range(0, gib - 1)}, with(&IntervalAllocatorConfig::granule, 64_KiB));
  const IovaRange kept = *a->allocate(64_KiB);
  for (const std::uint64_t off : {std::uint64_t{1}, page, 8 * page, 15 * page}) {
    EXPECT_EQ(a->free({Iova{kept.start.value + off}, Iova{kept.last.value + off}}).error().code, Errc::invalid_argument)
        << off;
  }
  EXPECT_TRUE(a->free(kept));
  EXPECT_FALSE(a->free(kept));
}

TEST(IntervalAllocator, AClaimIsAllOrNothingAndNamesTheConflict) {
  const auto a = make({pages(0, 100), pages(200, 100)});
  ASSERT_TRUE(a->claim(pages(10, 4)));
  const auto busy = a->claim(pages(8, 4));
  ASSERT_FALSE(busy);
  EXPECT_EQ(busy.error().code, Errc::iova_busy);
  EXPECT_THAT(busy.error().detail(), HasSubstr("0xa000, 0xdfff"));
  const auto hole = a->claim(pages(98, 4));
  EXPECT_EQ(hole.error().code, Errc::iova_reserved);
  EXPECT_THAT(hole.error().detail(), HasSubstr("0x64000, 0x65fff"));
  EXPECT_EQ(a->stats().live_intervals, 1U);
  EXPECT_TRUE(a->claim(pages(8, 2)));
}

TEST(IntervalAllocator, WindowsOfEveryKind) {
  // Cut to granules, joined where they touch, out of order; too small ones hold nothing.
  const auto a = make({pages(50, 10), range(100, 3 * page - 1), pages(60, 10), range(0x9'0001, 0x9'0fff)});
  EXPECT_THAT(a->usable(), ElementsAre(pages(1, 2), pages(50, 20)));
  EXPECT_TRUE(a->claim(pages(50, 20)));
  EXPECT_FALSE(IntervalAllocator::create({.windows = {}})->get()->allocate(Bytes{page}));
  const std::array overlapping{pages(1, 3), pages(3, 3)};
  EXPECT_EQ(IntervalAllocator::create({.windows = overlapping}).error().code, Errc::invalid_argument);
  const std::array backwards{range(5 * page, 4 * page)};
  EXPECT_EQ(IntervalAllocator::create({.windows = backwards}).error().code, Errc::invalid_argument);
}

TEST(IntervalAllocator, WhatIsLiveOutsideOfNewWindowsIsReportedAndNotHandedOutAgain) {
  const auto a = make({pages(0, 64)});
  const IovaRange low = pages(4, 2);
  const IovaRange high = pages(40, 2);
  ASSERT_TRUE(a->claim(low));
  ASSERT_TRUE(a->claim(high));
  const std::array narrow{pages(0, 32)};
  const auto stranded = a->set_usable(narrow);
  ASSERT_TRUE(stranded);
  EXPECT_THAT(*stranded, ElementsAre(high));
  EXPECT_EQ(a->find(high.start), high) << "it stays live";
  EXPECT_TRUE(a->free(high));
  EXPECT_EQ(a->claim(high).error().code, Errc::iova_reserved);
  const std::array wide{pages(0, 64)};
  EXPECT_THAT(*a->set_usable(wide), IsEmpty());
  EXPECT_TRUE(a->claim(high));
}

TEST(IntervalAllocator, WithoutMetadataItSaysSoAndRecovers) {
  const auto a = make({range(0, (std::uint64_t{1} << 48) - 1)}, with(&IntervalAllocatorConfig::metadata_limit, 64_KiB));
  std::vector<IovaRange> live;
  Error refused;
  for (std::uint64_t i = 0; i < 100'000 && !refused; ++i) {
    // Far apart and each of its own length, so that nothing shares a run.
    const IovaRange r = pages(1000 + i * 100, 2 + i % 64);
    const auto claimed = a->claim(r);
    if (claimed) {
      live.push_back(r);
    } else {
      refused = claimed.error();
    }
  }
  EXPECT_EQ(refused.code, Errc::out_of_memory);
  EXPECT_THAT(refused.detail(), HasSubstr("metadata_limit"));
  ASSERT_FALSE(live.empty());
  EXPECT_EQ(a->stats().live_intervals, live.size());
  EXPECT_LE(a->stats().metadata_high_water.value, 64U * 1024);
  // Giving back never needs what is not there.
  for (const IovaRange& r : live) ASSERT_TRUE(a->free(r));
  a->trim();
  EXPECT_EQ(a->stats().idle.value, 0U);
  // What was retired last waits for the next reclaim, and memory keeps its kind: not quite as many fit as at first.
  std::size_t again = 0;
  while (again < live.size() && a->claim(live[again])) ++again;
  EXPECT_GE(again, live.size() / 2);
}

TEST(IntervalAllocator, AThreadThatExitsReturnsWhatItHeld) {
  const auto a = make({pages(0, 64)});
  std::thread{[&] {
    std::vector<IovaRange> all;
    while (const auto got = a->allocate(Bytes{page})) all.push_back(*got);
    EXPECT_EQ(all.size(), 64U);
    for (const IovaRange& r : all) EXPECT_TRUE(a->free(r));
  }}.join();
  EXPECT_EQ(a->stats().live_intervals, 0U);
  EXPECT_TRUE(a->claim(pages(0, 64))) << "its magazines still hold something";
}

TEST(IntervalAllocator, WhatAnExitedThreadLeftLiveIsFreedByOthersInOrder) {
  const auto a = make({pages(0, 4096)});
  std::vector<IovaRange> left;
  std::thread{[&] {
    for (unsigned i = 0; i < 500; ++i) left.push_back(*a->allocate(Bytes{(1 + i % 3) * page}));
  }}.join();
  EXPECT_EQ(a->stats().live_intervals, 500U);
  for (const IovaRange& r : left) ASSERT_TRUE(a->free(r));
  for (const IovaRange& r : left) ASSERT_EQ(a->free(r).error().code, Errc::not_found);
}

// How live intervals of one length become few: in which order they are freed.
struct Decline {
  std::string name;
  Bytes length;
  bool shuffled;
};
class HoardedSpace : public ::testing::TestWithParam<Decline> {};

TEST_P(HoardedSpace, FallsWithWhatIsLive) {
  const auto [name, length, shuffled] = GetParam();
  const auto a = make({range(0, (std::uint64_t{1} << 48) - 1)});
  std::vector<IovaRange> live;
  for (unsigned i = 0; i < 10'000; ++i) live.push_back(*a->allocate(length));
  if (shuffled) std::shuffle(live.begin(), live.end(), std::mt19937_64{test::seed()});
  for (const std::size_t left : {5'000U, 1'000U, 100U}) {
    while (live.size() > left) {
      ASSERT_TRUE(a->free(live.back()));
      live.pop_back();
    }
    const auto stats = a->stats();
    ASSERT_EQ(stats.live_intervals, left);
    // Three times what is live, where each run is only just not given back; a magazine; and what is kept whatever is
    // live.
    const std::uint64_t kept_always = std::min(1_GiB, Bytes{1024 * length.value}).value;
    EXPECT_LE(stats.idle.value, 3 * stats.live.value + 64 * length.value + kept_always) << "with " << left << " live";
    EXPECT_LE(stats.metadata.value, 1'000'000U);
  }
  for (const IovaRange& r : live) EXPECT_EQ(a->find(r.start), r);
  a->trim();
  EXPECT_EQ(a->stats().idle.value, 0U);
  for (const IovaRange& r : live) EXPECT_EQ(a->find(r.start), r);
}

INSTANTIATE_TEST_SUITE_P(Orders, HoardedSpace,
                         ::testing::Values(Decline{"4K_last_first", 4_KiB, false}, Decline{"4K_any_order", 4_KiB, true},
                                           Decline{"64K_last_first", 64_KiB, false},
                                           Decline{"64K_any_order", 64_KiB, true},
                                           Decline{"2M_last_first", 2_MiB, false},
                                           Decline{"2M_any_order", 2_MiB, true}),
                         [](const auto& decline) { return decline.param.name; });

TEST(IntervalAllocator, RefusesNonsense) {
  const auto a = make({pages(0, 64)});
  EXPECT_EQ(a->allocate(Bytes{0}).error().code, Errc::invalid_argument);
  EXPECT_EQ(a->allocate(Bytes{100}).error().code, Errc::invalid_argument);
  EXPECT_EQ(a->allocate(Bytes{page}, {.align = Bytes{3 * page}}).error().code, Errc::invalid_argument);
  EXPECT_EQ(a->allocate(Bytes{65 * page}).error().code, Errc::iova_exhausted);
  EXPECT_EQ(a->allocate(Bytes{~std::uint64_t{0} - page + 1}).error().code, Errc::iova_exhausted);
  EXPECT_EQ(IntervalAllocator::create(with(&IntervalAllocatorConfig::granule, Bytes{2048})).error().code,
            Errc::invalid_argument);
  EXPECT_EQ(IntervalAllocator::create(with(&IntervalAllocatorConfig::granule, Bytes{5000})).error().code,
            Errc::invalid_argument);
}

}  // namespace
}  // namespace iovane::iova
