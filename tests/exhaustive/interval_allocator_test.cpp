// Every sequence of four operations on a space of five pages with a hole, and of two in every layout of such a space,
// against the plain reference.
#include "iova/interval_allocator.hpp"

#include <gtest/gtest.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "support/reference_intervals.hpp"

namespace iovane::iova {
namespace {

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t pages_in_space = 5;  // 0, 1, hole, 3, 4
constexpr unsigned depth = 4;

constexpr IovaRange pages(std::uint64_t first, std::uint64_t last) {
  return {Iova{first * page}, Iova{last * page + page - 1}};
}

struct Step {
  enum class Kind { allocate, claim, free, find } kind;
  std::uint64_t length_pages = 0;
  std::uint64_t align_pages = 0;
  IovaRange range{};
};

std::vector<Step> alphabet() {
  std::vector<Step> steps{{Step::Kind::allocate, 1, 1}, {Step::Kind::allocate, 2, 1}, {Step::Kind::allocate, 1, 2}};
  for (std::uint64_t first = 0; first < pages_in_space; ++first)
    for (std::uint64_t last = first; last < std::min(first + 2, pages_in_space); ++last)
      for (const Step::Kind kind : {Step::Kind::claim, Step::Kind::free})
        steps.push_back({kind, 0, 0, pages(first, last)});
  steps.push_back({Step::Kind::find, 0, 0, pages(3, 3)});
  return steps;
}

// The step on both; what they answer must agree.
void perform(const Step& step, IntervalAllocator& allocator, test::ReferenceIntervals& reference) {
  switch (step.kind) {
    case Step::Kind::allocate: {
      const auto got = allocator.allocate(Bytes{step.length_pages * page}, {.align = Bytes{step.align_pages * page}});
      if (!got) {
        EXPECT_FALSE(reference.fits(step.length_pages * page, step.align_pages * page, iova_max));
        break;
      }
      EXPECT_TRUE(reference.usable(*got) && !reference.overlap(*got));
      EXPECT_EQ(got->start.value % (step.align_pages * page), 0U);
      reference.add(*got);
      break;
    }
    case Step::Kind::claim: {
      const bool may = reference.usable(step.range) && !reference.overlap(step.range);
      EXPECT_EQ(allocator.claim(step.range).has_value(), may);
      if (may) reference.add(step.range);
      break;
    }
    case Step::Kind::free: {
      const bool live = reference.has(step.range);
      const auto freed = allocator.free(step.range);
      EXPECT_EQ(freed.has_value(), live);
      if (live) {
        reference.remove(step.range);
      } else {
        EXPECT_EQ(freed.error().code, reference.find(step.range.start) ? Errc::would_bisect : Errc::not_found);
      }
      break;
    }
    case Step::Kind::find: EXPECT_EQ(allocator.find(step.range.start), reference.find(step.range.start)); break;
  }
}

void expect_equal(const IntervalAllocator& allocator, const test::ReferenceIntervals& reference) {
  std::vector<IovaRange> seen;
  allocator.for_each([&](const IovaRange& r) { seen.push_back(r); });
  EXPECT_EQ(seen, reference.all());
}

class AllSequences : public ::testing::TestWithParam<std::tuple<Direction, bool>> {};

TEST_P(AllSequences, AgreeWithTheReference) {
  const auto [direction, magazines] = GetParam();
  const std::array<IovaRange, 2> windows{pages(0, 1), pages(3, 4)};
  auto made = IntervalAllocator::create(
      {.windows = windows, .direction = direction, .metadata_limit = 16_MiB, .magazines = magazines});
  ASSERT_TRUE(made) << made.error().message();
  IntervalAllocator& allocator = **made;
  const std::vector<Step> steps = alphabet();
  std::array<std::size_t, depth> at{};
  std::uint64_t sequences = 0;
  for (bool more = true; more && !HasFailure();) {
    test::ReferenceIntervals reference{page};
    reference.set_windows({windows.begin(), windows.end()});
    for (const std::size_t which : at) perform(steps[which], allocator, reference);
    expect_equal(allocator, reference);
    for (const IovaRange& r : reference.all()) EXPECT_TRUE(allocator.free(r));
    if (sequences++ % 3 == 0) allocator.trim();  // some begin with idle slots about, some without
    std::size_t digit = 0;
    while (digit < depth && ++at[digit] == steps.size()) at[digit++] = 0;
    more = digit < depth;
    if (HasFailure()) {
      std::string tape;
      for (const std::size_t which : at) tape += std::to_string(which) + " ";
      ADD_FAILURE() << "near sequence " << tape;
    }
  }
  RecordProperty("sequences", std::to_string(sequences));
  std::uint64_t all = 1;
  for (unsigned i = 0; i < depth; ++i) all *= steps.size();
  EXPECT_EQ(sequences, all);
}

// Windows of a space of five pages: bit i says whether page i is usable.
std::vector<IovaRange> windows_of(unsigned mask) {
  std::vector<IovaRange> windows;
  for (std::uint64_t first = 0; first < pages_in_space;) {
    if ((mask >> first & 1) == 0) {
      ++first;
      continue;
    }
    std::uint64_t last = first;
    while ((mask >> (last + 1) & 1) != 0) ++last;
    windows.push_back(pages(first, last));
    first = last + 1;
  }
  return windows;
}

// Every set of windows and holes: all sequences of two steps in it, and every change to every other set with whatever
// one step has made live.
TEST_P(AllSequences, AgreeWithTheReferenceInEveryLayoutAndAcrossEveryChange) {
  const auto [direction, magazines] = GetParam();
  auto made = IntervalAllocator::create(
      {.windows = {}, .direction = direction, .metadata_limit = 16_MiB, .magazines = magazines});
  ASSERT_TRUE(made) << made.error().message();
  IntervalAllocator& allocator = **made;
  const std::vector<Step> steps = alphabet();
  constexpr unsigned layouts = 1U << pages_in_space;
  for (unsigned before = 0; before < layouts && !HasFailure(); ++before) {
    SCOPED_TRACE("pages " + std::to_string(before));
    test::ReferenceIntervals reference{page};
    reference.set_windows(windows_of(before));
    ASSERT_TRUE(allocator.set_usable(reference.windows()));
    for (const Step& first : steps)
      for (const Step& second : steps) {
        perform(first, allocator, reference);
        perform(second, allocator, reference);
        expect_equal(allocator, reference);
        for (const IovaRange& r : reference.all()) {
          EXPECT_TRUE(allocator.free(r));
          reference.remove(r);
        }
      }
    for (unsigned after = 0; after < layouts && !HasFailure(); ++after)
      for (const Step& step : steps) {
        reference.set_windows(windows_of(before));
        ASSERT_TRUE(allocator.set_usable(reference.windows()));
        perform(step, allocator, reference);
        reference.set_windows(windows_of(after));
        const auto stranded = allocator.set_usable(reference.windows());
        ASSERT_TRUE(stranded) << stranded.error().message();
        std::vector<IovaRange> outside;
        for (const IovaRange& r : reference.all())
          if (!reference.usable(r)) outside.push_back(r);
        EXPECT_EQ(*stranded, outside) << "then pages " << after;
        expect_equal(allocator, reference);
        for (std::uint64_t i = 0; i < pages_in_space; ++i) {
          const bool may = reference.usable(pages(i, i)) && !reference.overlap(pages(i, i));
          EXPECT_EQ(allocator.claim(pages(i, i)).has_value(), may) << "page " << i << ", then pages " << after;
          if (may) {
            EXPECT_TRUE(allocator.free(pages(i, i)));
          }
        }
        for (const IovaRange& r : reference.all()) {
          EXPECT_TRUE(allocator.free(r));
          reference.remove(r);
        }
      }
  }
}

INSTANTIATE_TEST_SUITE_P(Modes, AllSequences,
                         ::testing::Combine(::testing::Values(Direction::top_down, Direction::bottom_up),
                                            ::testing::Values(true, false)),
                         [](const auto& mode) {
                           return std::string{std::get<0>(mode.param) == Direction::top_down ? "down" : "up"} +
                                  (std::get<1>(mode.param) ? "" : "_shared");
                         });

}  // namespace
}  // namespace iovane::iova
