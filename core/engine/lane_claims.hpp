// LaneClaims: what a thread that may end at any system call has of lanes, for whoever inherits it.
//
// A worker runs under its host's seccomp filter, which may end the thread, and nothing of it, inside a call. What it
// wrote until then is in memory in the order of the program, so the place where it stopped is known: one of the calls
// that the executor and the lane make, each of which leaves a note of what it is about (BatchExecutor::recover(),
// Lane::take_over()). Written by its thread alone, and read by others only after that has ended, which the worker's
// robust mutex tells and orders.
#pragma once

#include <array>
#include <cstddef>

#include "base/futex.hpp"

namespace iovane::engine {

class Lane;

class LaneClaims {
 public:
  struct Claim {
    Lane* lane;
    const base::OneShot* grant;  ///< not fired: the thread waited for the lane; null: it held it
  };

  /// A thread holds at most two lanes itself (a device's move), in a handler that a third one called. Claims beyond the
  /// room are not kept, and nobody can inherit them.
  void add(Lane& lane, const base::OneShot* grant) noexcept {
    if (count_ < claims_.size()) claims_[count_++] = {&lane, grant};
  }
  void remove(const Lane& lane) noexcept {
    for (std::size_t i = count_; i-- != 0;) {
      if (claims_[i].lane != &lane) continue;
      claims_[i] = claims_[--count_];
      return;
    }
  }
  /// The next lane that is the thread's to give; null: none, or it waits for some that others hold.
  Lane* next_held() const noexcept {
    for (std::size_t i = count_; i-- != 0;)
      if (claims_[i].grant == nullptr || claims_[i].grant->has_fired()) return claims_[i].lane;
    return nullptr;
  }

 private:
  std::array<Claim, 4> claims_{};
  std::size_t count_ = 0;
};

/// Of this thread; null for threads whose end is their owner's business.
[[gnu::tls_model("initial-exec")]] inline constinit thread_local LaneClaims* my_lane_claims = nullptr;

}  // namespace iovane::engine
