// Every short sequence of ring operations on every small ring, against a queue; and the arithmetic for all small
// values.
#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <vector>

#include "base/fault_point.hpp"
#include "base/spsc_ring.hpp"

namespace iovane::base {
namespace {

// Both sides act by turns on one thread: this covers all that the counters and copies can be between operations. A pop
// that the producer overtakes between its load and its store finds less, and leaves less room, than a whole one would
// (invariant I3); that, and the memory orders, are the stress test's business.
enum Step : unsigned { stage_one, stage_three, publish, pop_one, pop_three, ask, steps };

void run(std::uint32_t capacity, std::uint32_t offset, unsigned long sequence, unsigned length) {
  SpscRing<std::uint32_t> ring;
  ASSERT_TRUE(ring.allocate(capacity));
  std::deque<std::uint32_t> staged, published;
  std::uint32_t next = 0;
  for (std::uint32_t n = 0; n < offset; ++n) {  // begin anywhere in the array
    std::uint32_t value = 0;
    ASSERT_TRUE(ring.stage(value));
    ASSERT_EQ(ring.publish(), 1U);
    ASSERT_EQ(ring.pop({&value, 1}), 1U);
  }
  for (unsigned n = 0; n < length; ++n, sequence /= steps) {
    const std::size_t room = capacity - staged.size() - published.size();
    switch (sequence % steps) {
      case stage_one:
        ASSERT_EQ(ring.stage(next), room >= 1);
        if (room >= 1) staged.push_back(next++);
        break;
      case stage_three: {
        const std::uint32_t values[] = {next, next + 1, next + 2};
        const std::size_t count = ring.stage(values);
        ASSERT_EQ(count, std::min<std::size_t>(3, room));
        for (std::size_t i = 0; i < count; ++i) staged.push_back(next++);
        break;
      }
      case publish:
        ASSERT_EQ(ring.publish(), staged.size());
        published.insert(published.end(), staged.begin(), staged.end());
        staged.clear();
        break;
      case pop_one:
      case pop_three: {
        std::vector<std::uint32_t> out(sequence % steps == pop_one ? 1 : 3);
        out.resize(ring.pop(out));
        ASSERT_EQ(out.size(), std::min<std::size_t>(sequence % steps == pop_one ? 1 : 3, published.size()));
        for (const std::uint32_t value : out) {
          ASSERT_EQ(value, published.front());
          published.pop_front();
        }
        break;
      }
      case ask:
        ASSERT_EQ(ring.room(), room);
        ASSERT_EQ(ring.empty(), published.empty());
        break;
    }
    ASSERT_EQ(ring.staged_count(), staged.size());
    ASSERT_EQ(ring.looks_empty(), published.empty());
  }
}

TEST(SpscRingExhaustive, EveryShortSequenceOnEverySmallRing) {
  constexpr unsigned length = 6;  // shorter ones are its prefixes
  unsigned long sequences = 1;
  for (unsigned n = 0; n < length; ++n) sequences *= steps;
  for (const std::uint32_t capacity : {1U, 2U, 4U}) {
    for (std::uint32_t offset = 0; offset < capacity; ++offset) {
      for (unsigned long sequence = 0; sequence < sequences; ++sequence) {
        run(capacity, offset, sequence, length);
        if (testing::Test::HasFatalFailure()) {
          FAIL() << "capacity " << capacity << ", offset " << offset << ", sequence " << sequence;
        }
      }
    }
  }
}

TEST(SpscRingExhaustive, ArithmeticKeepsTheCountersInOrder) {
  for (const std::uint64_t capacity : {1ULL, 2ULL, 4ULL, 8ULL}) {
    const RingArithmetic index{capacity - 1};
    for (std::uint64_t taken = 0; taken < 20; ++taken) {
      for (std::uint64_t staged = taken; staged <= taken + capacity; ++staged) {
        EXPECT_EQ(index.room(staged, taken), capacity - (staged - taken));
        EXPECT_EQ(index.slot(staged), staged % capacity);
        EXPECT_EQ(index.slot(staged + index.until_wrap(staged)), 0U);
        EXPECT_LE(index.until_wrap(staged), capacity);
      }
    }
  }
}

TEST(SpscRing, RefusesSizesThatMakeNoSense) {
  SpscRing<std::uint64_t> ring;
  EXPECT_EQ(ring.allocate(0).error().code, Errc::invalid_argument);
  EXPECT_EQ(ring.allocate((1U << 31) + 1).error().code, Errc::invalid_argument);
  EXPECT_EQ(ring.capacity(), 0U);
  EXPECT_TRUE(ring.allocate(5));
  EXPECT_EQ(ring.capacity(), 8U);
  EXPECT_EQ(ring.allocate(16).error().code, Errc::busy);
  EXPECT_EQ(ring.capacity(), 8U);
}

TEST(SpscRing, WithoutMemoryItStaysEmptyAndCanBeTriedAgain) {
  SpscRing<std::uint64_t> ring;
  arm_fault(static_cast<std::uint32_t>(FaultKind::allocation), 1);
  EXPECT_EQ(ring.allocate(8).error().code, Errc::out_of_memory);
  disarm_fault();
  EXPECT_EQ(ring.capacity(), 0U);
  EXPECT_TRUE(ring.allocate(8));
}

}  // namespace
}  // namespace iovane::base
