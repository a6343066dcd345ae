// Durations in bounded memory, with a known error.
//
// Log-linear buckets, as in HdrHistogram: values below 2 * sub_buckets nanoseconds have a bucket each; above, every
// power of two is divided into `sub_buckets` equal buckets. A value is known to within one bucket, so a percentile is
// at most 1/64 (1.6%) above the true value and never below it. Values beyond value_max count as value_max; least,
// greatest and mean are exact.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace iovane::base {

/// Counts durations in nanoseconds. record() costs a few instructions and never allocates. One thread at a time; to
/// collect from several, give each its own and merge() them once they are quiet. 18 KiB.
class LatencyHistogram {
 public:
  static constexpr unsigned sub_bucket_bits = 6;
  static constexpr std::uint64_t sub_buckets = 1U << sub_bucket_bits;
  static constexpr unsigned value_bits = 40;
  /// 2^40 - 1 ns, a little over 18 minutes.
  static constexpr std::uint64_t value_max = (std::uint64_t{1} << value_bits) - 1;
  static constexpr std::size_t buckets = (value_bits - sub_bucket_bits + 1) * sub_buckets;

  void record(std::uint64_t nanoseconds) noexcept { record(nanoseconds, 1); }
  /// The same value `times` times, for operations that were timed as one.
  void record(std::uint64_t nanoseconds, std::uint64_t times) noexcept {
    if (times == 0) return;
    const std::uint64_t value = std::min(nanoseconds, value_max);
    counts_[bucket_of(value)] += times;
    count_ += times;
    sum_ += value * times;
    least_ = std::min(least_, value);
    greatest_ = std::max(greatest_, value);
  }

  void merge(const LatencyHistogram& other) noexcept {
    for (std::size_t i = 0; i < buckets; ++i) counts_[i] += other.counts_[i];
    count_ += other.count_;
    sum_ += other.sum_;
    least_ = std::min(least_, other.least_);
    greatest_ = std::max(greatest_, other.greatest_);
  }

  std::uint64_t count() const noexcept { return count_; }
  /// Exact; 0 when nothing was recorded.
  std::uint64_t least() const noexcept { return count_ == 0 ? 0 : least_; }
  std::uint64_t greatest() const noexcept { return greatest_; }
  std::uint64_t mean() const noexcept { return count_ == 0 ? 0 : sum_ / count_; }
  /// The sum of all values. Wraps only after 2^64 ns, 584 years.
  std::uint64_t sum() const noexcept { return sum_; }

  /// The smallest value v of which it can be said that at least `share` (0 to 1) of all values are at most v: the
  /// upper edge of the bucket, never more than greatest(). 0 when nothing was recorded.
  std::uint64_t percentile(double share) const noexcept {
    if (count_ == 0) return 0;
    const double wanted = std::clamp(share, 0.0, 1.0) * static_cast<double>(count_);
    std::uint64_t rank = static_cast<std::uint64_t>(wanted);
    if (static_cast<double>(rank) < wanted || rank == 0) ++rank;
    std::uint64_t seen = 0;
    for (std::size_t i = 0; i < buckets; ++i) {
      seen += counts_[i];
      if (seen >= rank) return std::min(upper_edge(i), greatest_);
    }
    return greatest_;
  }

  /// Which bucket counts a value of at most value_max.
  static constexpr std::size_t bucket_of(std::uint64_t value) noexcept {
    if (value < sub_buckets) return value;
    const unsigned shift = static_cast<unsigned>(std::bit_width(value)) - (sub_bucket_bits + 1);
    return shift * sub_buckets + (value >> shift);
  }
  /// The largest value that the bucket counts.
  static constexpr std::uint64_t upper_edge(std::size_t bucket) noexcept {
    if (bucket < 2 * sub_buckets) return bucket;
    const std::size_t shift = bucket / sub_buckets - 1;
    return ((bucket - shift * sub_buckets + 1) << shift) - 1;
  }

 private:
  std::array<std::uint64_t, buckets> counts_{};
  std::uint64_t count_ = 0;
  std::uint64_t sum_ = 0;
  std::uint64_t least_ = ~std::uint64_t{0};
  std::uint64_t greatest_ = 0;
};

static_assert(LatencyHistogram::bucket_of(LatencyHistogram::value_max) == LatencyHistogram::buckets - 1);
static_assert(LatencyHistogram::upper_edge(LatencyHistogram::buckets - 1) == LatencyHistogram::value_max);

}  // namespace iovane::base
