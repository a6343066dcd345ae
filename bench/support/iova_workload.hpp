// What the IOVA benchmarks ask of an allocator, and the live intervals among which they do it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "support/iova_peers.hpp"

namespace iovane::bench {

// splitmix64, as in tests/support/seed.hpp.
inline std::uint64_t mix(std::uint64_t z) {
  z += 0x9e37'79b9'7f4a'7c15U;
  z = (z ^ (z >> 30)) * 0xbf58'476d'1ce4'e5b9U;
  z = (z ^ (z >> 27)) * 0x94d0'49bb'1331'11ebU;
  return z ^ (z >> 31);
}

struct Interval {
  std::uint64_t start;
  std::uint64_t length;
};

/// mixed: half 4 KiB, 30% 8 to 64 KiB, 15% 128 KiB to 1 MiB, 5% 2 MiB; powers of two. mixed_any: the same shares, but
/// any multiple of 4 KiB, 242 different lengths.
enum class Lengths { k4, k64, m2, g1, mixed, mixed_any };
inline constexpr std::array all_lengths{Lengths::k4, Lengths::k64,   Lengths::m2,
                                        Lengths::g1, Lengths::mixed, Lengths::mixed_any};

inline const char* name_of(Lengths lengths) {
  switch (lengths) {
    case Lengths::k4: return "4K";
    case Lengths::k64: return "64K";
    case Lengths::m2: return "2M";
    case Lengths::g1: return "1G";
    case Lengths::mixed: return "mixed";
    case Lengths::mixed_any: break;
  }
  return "mixed_any";
}

inline std::uint64_t draw_length(Lengths lengths, std::uint64_t dice) {
  switch (lengths) {
    case Lengths::k4: return granule;
    case Lengths::k64: return std::uint64_t{64} << 10;
    case Lengths::m2: return std::uint64_t{2} << 20;
    case Lengths::g1: return std::uint64_t{1} << 30;
    default: break;
  }
  const bool any = lengths == Lengths::mixed_any;
  const std::uint64_t share = dice % 100;
  const std::uint64_t rest = dice / 100;
  if (share < 50) return granule;
  if (share < 80) return granule * (any ? 2 + rest % 15 : std::uint64_t{2} << (rest % 4));
  if (share < 95) return granule * (any ? 32 + rest % 225 : std::uint64_t{32} << (rest % 4));
  return granule * 512;
}

/// A circle of lengths, drawn before the clock starts.
class LengthCircle {
 public:
  static constexpr std::size_t count = 1U << 14;
  LengthCircle(Lengths lengths, std::uint64_t seed) {
    for (std::size_t i = 0; i < count; ++i) drawn_[i] = draw_length(lengths, mix(seed + i));
  }
  std::uint64_t operator[](std::size_t i) const { return drawn_[i % count]; }

 private:
  std::vector<std::uint64_t> drawn_ = std::vector<std::uint64_t>(count);
};

inline constexpr std::uint64_t average_length(Lengths lengths) {
  switch (lengths) {
    case Lengths::k4: return granule;
    case Lengths::k64: return std::uint64_t{64} << 10;
    case Lengths::m2: return std::uint64_t{2} << 20;
    case Lengths::g1: return std::uint64_t{1} << 30;
    default: return std::uint64_t{200} << 10;
  }
}

/// One thread's part: `live` intervals in a space that was fragmented by freeing every other one, in random order.
template <typename Peer>
class Tenant {
 public:
  Tenant(Peer& peer, Lengths lengths, std::size_t live, std::uint64_t seed)
      : peer_{peer}, circle_{lengths, seed}, fixed_{draw_length(lengths, 0)} {
    for (std::size_t i = 0; i < 2 * live; ++i) live_.push_back(take(circle_[i]));
    for (std::size_t i = 1; i < live_.size(); ++i) std::swap(live_[i], live_[mix(seed + i) % (i + 1)]);
    for (std::size_t i = live; i < live_.size(); ++i) peer_.free(live_[i].start, live_[i].length);
    live_.resize(live);
    dice_ = seed;
  }
  ~Tenant() {
    for (const Interval& i : live_) peer_.free(i.start, i.length);
  }
  Tenant(const Tenant&) = delete;
  Tenant& operator=(const Tenant&) = delete;

  template <bool one_length>
  void pair() {
    const Interval got = take(next_length<one_length>());
    peer_.free(got.start, got.length);
  }
  static constexpr std::size_t batch = 256;
  template <bool one_length>
  void batch_pair() {
    for (Interval& i : batch_) i = take(next_length<one_length>());
    for (const Interval& i : batch_) peer_.free(i.start, i.length);
  }
  /// Precondition: live intervals.
  template <bool one_length>
  void churn() {
    Interval& victim = live_[pick()];
    peer_.free(victim.start, victim.length);
    victim = take(next_length<one_length>());
  }
  std::size_t pick() {
    dice_ = dice_ * 6364136223846793005U + 1442695040888963407U;  // Knuth's MMIX
    return static_cast<std::size_t>((dice_ >> 32) * live_.size() >> 32);
  }
  std::vector<Interval>& live() { return live_; }
  template <bool one_length>
  std::uint64_t next_length() {
    if constexpr (one_length) return fixed_;
    return circle_[turn_++];
  }
  Interval take(std::uint64_t length) {
    const std::uint64_t start = peer_.allocate(length);
    if (start == 0) [[unlikely]]
      std::abort();
    return {start, length};
  }

 private:
  Peer& peer_;
  LengthCircle circle_;
  std::uint64_t fixed_;
  std::size_t turn_ = 0;
  std::uint64_t dice_ = 0;
  std::vector<Interval> live_;
  std::array<Interval, batch> batch_{};
};

inline bool is_mixed(Lengths lengths) { return lengths == Lengths::mixed || lengths == Lengths::mixed_any; }

/// Whether such a benchmark fits the machine for this peer.
template <typename Peer>
bool fits(Lengths lengths, std::uint64_t live) {
  return 2 * live * average_length(lengths) <= Peer::bytes_max && live * average_length(lengths) <= space_last / 4;
}

}  // namespace iovane::bench
