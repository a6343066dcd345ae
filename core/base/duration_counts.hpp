// A histogram of durations that one thread at a time writes and any thread reads, small enough to have several per
// address space and plain enough to lie in memory that processes share.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "base/counter.hpp"

namespace iovane::base {

/// Log-linear like LatencyHistogram, coarser: eight buckets per power of two, so a percentile is at most an eighth
/// above the true value. 2.4 KiB. record() by one thread at a time; the rest by any, exact when nothing is recorded
/// meanwhile.
class DurationCounts {
 public:
  static constexpr unsigned sub_bucket_bits = 3;
  static constexpr std::uint64_t sub_buckets = 1U << sub_bucket_bits;
  static constexpr unsigned value_bits = 40;  // 18 minutes; longer ones count as that
  static constexpr std::size_t buckets = (value_bits - sub_bucket_bits + 1) * sub_buckets;

  void record(std::uint64_t nanoseconds) noexcept {
    const std::uint64_t value = std::min(nanoseconds, (std::uint64_t{1} << value_bits) - 1);
    counts_[bucket_of(value)].add();
    greatest_.raise_to(value);
  }

  std::uint64_t greatest() const noexcept { return greatest_.get(); }
  std::uint64_t count() const noexcept {
    std::uint64_t sum = 0;
    for (const Counter& counter : counts_) sum += counter.get();
    return sum;
  }
  /// The upper edge of the bucket in which the value of this rank lies, never more than greatest(); 0 without values.
  std::uint64_t percentile(double share) const noexcept {
    const std::uint64_t total = count();
    if (total == 0) return 0;
    const auto rank = std::max<std::uint64_t>(
        1, static_cast<std::uint64_t>(std::clamp(share, 0.0, 1.0) * static_cast<double>(total) + 0.999999));
    std::uint64_t seen = 0;
    for (std::size_t i = 0; i < buckets; ++i) {
      seen += counts_[i].get();
      if (seen >= rank) return std::min(upper_edge(i), greatest());
    }
    return greatest();
  }

  static constexpr std::size_t bucket_of(std::uint64_t value) noexcept {
    if (value < sub_buckets) return value;
    const unsigned shift = static_cast<unsigned>(std::bit_width(value)) - (sub_bucket_bits + 1);
    return shift * sub_buckets + (value >> shift);
  }
  static constexpr std::uint64_t upper_edge(std::size_t bucket) noexcept {
    if (bucket < 2 * sub_buckets) return bucket;
    const std::size_t shift = bucket / sub_buckets - 1;
    return ((bucket - shift * sub_buckets + 1) << shift) - 1;
  }

 private:
  std::array<Counter, buckets> counts_;
  Counter greatest_;
};

}  // namespace iovane::base
