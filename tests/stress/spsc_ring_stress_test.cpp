// Two threads on one ring: every value arrives once, in order, whole.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <span>
#include <thread>
#include <vector>

#include "base/spsc_ring.hpp"
#include "support/seed.hpp"

namespace iovane::base {
namespace {

// Several words, so that a value read while it is written would not add up.
struct Value {
  std::uint64_t number;
  std::uint64_t inverse;
  std::uint64_t sum;
};
Value value_of(std::uint64_t n) { return {n, ~n, n * 3}; }

class SpscRingStress : public testing::TestWithParam<std::uint32_t> {};

TEST_P(SpscRingStress, EveryValueArrivesOnceInOrderWhole) {
  constexpr std::uint64_t total = 300'000;
  SpscRing<Value> ring;
  ASSERT_TRUE(ring.allocate(GetParam()));
  const std::uint64_t seed = test::seed();
  std::thread producer{[&] {
    std::mt19937_64 random{seed};
    std::array<Value, 48> batch;
    std::uint64_t next = 0;
    while (next < total) {
      const std::size_t wanted = std::min<std::uint64_t>(1 + random() % batch.size(), total - next);
      for (std::size_t i = 0; i < wanted; ++i) batch[i] = value_of(next + i);
      const std::size_t count = ring.stage(std::span<const Value>{batch.data(), wanted});
      next += count;
      if (count < wanted || random() % 3 == 0) ring.publish();
      if (count == 0) std::this_thread::yield();
    }
    ring.publish();
  }};
  std::mt19937_64 random{~seed};
  std::vector<Value> out(64);
  std::uint64_t expected = 0;
  bool whole = true;
  while (expected < total && whole) {
    const std::size_t count = ring.pop(std::span{out}.first(1 + random() % out.size()));
    for (std::size_t i = 0; i < count; ++i, ++expected) {
      const Value right = value_of(expected);
      whole = whole && out[i].number == right.number && out[i].inverse == right.inverse && out[i].sum == right.sum;
    }
    if (count == 0) std::this_thread::yield();
  }
  // A consumer that gave up lets the producer finish.
  while (!whole && expected < total) expected += ring.pop(out);
  producer.join();
  EXPECT_TRUE(whole) << "about value " << expected;
  EXPECT_TRUE(ring.empty());
}

INSTANTIATE_TEST_SUITE_P(Capacities, SpscRingStress, testing::Values(1U, 2U, 16U, 1024U));

}  // namespace
}  // namespace iovane::base
