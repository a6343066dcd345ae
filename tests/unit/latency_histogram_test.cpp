#include "base/latency_histogram.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "support/seed.hpp"

namespace iovane::base {
namespace {

using H = LatencyHistogram;

TEST(LatencyHistogram, BucketsAreContiguousAndTheirErrorIsBounded) {
  for (std::size_t bucket = 0; bucket < H::buckets; ++bucket) {
    const std::uint64_t upper = H::upper_edge(bucket);
    const std::uint64_t lower = bucket == 0 ? 0 : H::upper_edge(bucket - 1) + 1;
    ASSERT_LE(lower, upper);
    ASSERT_EQ(H::bucket_of(lower), bucket);
    ASSERT_EQ(H::bucket_of(upper), bucket);
    ASSERT_LE(upper - lower, lower / H::sub_buckets) << bucket;
  }
}

TEST(LatencyHistogram, EmptyIsZeroEverywhere) {
  const H h;
  EXPECT_EQ(h.count() + h.least() + h.greatest() + h.mean() + h.percentile(0.5), 0U);
}

TEST(LatencyHistogram, PercentilesOfSmallValuesAreExact) {
  H h;
  for (std::uint64_t v = 1; v <= 100; ++v) h.record(v);
  EXPECT_EQ(h.percentile(0.0), 1U);
  EXPECT_EQ(h.percentile(0.5), 50U);
  EXPECT_EQ(h.percentile(0.99), 99U);
  EXPECT_EQ(h.percentile(1.0), 100U);
  EXPECT_EQ(h.mean(), 50U);
}

TEST(LatencyHistogram, ValuesBeyondTheRangeCountAsItsEnd) {
  H h;
  h.record(~std::uint64_t{0});
  EXPECT_EQ(h.greatest(), H::value_max);
  EXPECT_EQ(h.percentile(1.0), H::value_max);
}

TEST(LatencyHistogram, PercentilesAreNeverBelowAndAtMostOneSixtyFourthAboveTheTruth) {
  std::mt19937_64 random{test::seed()};
  std::lognormal_distribution<double> durations{9.0, 2.0};
  std::vector<std::uint64_t> values;
  H whole, first, second;
  for (int i = 0; i < 50'000; ++i) {
    const auto value = std::min(static_cast<std::uint64_t>(durations(random)), H::value_max);
    values.push_back(value);
    whole.record(value);
    (i % 3 == 0 ? first : second).record(value);
  }
  first.merge(second);
  std::sort(values.begin(), values.end());
  for (const double share : {0.01, 0.5, 0.9, 0.99, 0.999, 0.9999}) {
    const std::uint64_t truth = values[static_cast<std::size_t>(std::ceil(share * 50'000)) - 1];
    EXPECT_GE(whole.percentile(share), truth);
    EXPECT_LE(whole.percentile(share), truth + truth / 64);
    EXPECT_EQ(first.percentile(share), whole.percentile(share));
  }
  EXPECT_EQ(whole.least(), values.front());
  EXPECT_EQ(whole.greatest(), values.back());
  EXPECT_EQ(first.sum(), whole.sum());
}

TEST(LatencyHistogram, WeighsOperationsThatWereTimedTogether) {
  H h;
  h.record(10, 99);
  h.record(1000, 1);
  h.record(5, 0);
  EXPECT_EQ(h.count(), 100U);
  EXPECT_EQ(h.least(), 10U);
  EXPECT_EQ(h.percentile(0.99), 10U);
  EXPECT_GE(h.percentile(0.995), 1000U);
}

}  // namespace
}  // namespace iovane::base
