// Sleeping on a 32-bit word, with a timeout (std::atomic::wait has none).
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>

namespace iovane::base {

static_assert(sizeof(std::atomic<std::uint32_t>) == sizeof(std::uint32_t));

/// Sleeps while `word` holds `expected`, at most `timeout` (negative: for ever). May return early for no reason; the
/// caller looks at its condition again.
inline void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t expected,
                       std::chrono::nanoseconds timeout) noexcept {
  timespec limit{};
  if (timeout.count() >= 0) {
    limit.tv_sec = static_cast<time_t>(timeout.count() / 1'000'000'000);
    limit.tv_nsec = static_cast<long>(timeout.count() % 1'000'000'000);
  }
  ::syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, timeout.count() >= 0 ? &limit : nullptr, nullptr, 0);
}

/// Wakes everyone who sleeps on `word`. The word may be gone already: then nobody wakes, or someone wakes early.
inline void futex_wake_all(std::atomic<std::uint32_t>& word) noexcept {
  ::syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 0x7fffffff, nullptr, nullptr, 0);
}

/// Something that happens once, for one waiter. The waiter owns the object and may destroy it as soon as wait()
/// returned.
class OneShot {
 public:
  /// A short look, before one sleeps: a batch takes microseconds, a sleep and a wake tens of them. True: it happened.
  bool spin() const noexcept {
    for (int spins = 0; spins < 1000; ++spins) {
      // A.fired - acquire, pairs with R.fire.
      if (word_.load(std::memory_order_acquire) == fired) return true;
    }
    return false;
  }
  /// Spins briefly, then sleeps, until fire(). What the firing thread did before is visible after.
  void wait() noexcept {
    if (spin()) return;
    std::uint32_t seen = idle;
    // A.fired on failure; success only tells fire() that a wake is needed.
    if (!word_.compare_exchange_strong(seen, sleeping, std::memory_order_acquire, std::memory_order_acquire)) return;
    while (word_.load(std::memory_order_acquire) != fired) futex_wait(word_, sleeping, std::chrono::nanoseconds{-1});
  }
  /// The same for at most about `timeout`; false when it ran out. For a waiter that looks around between.
  bool wait_for(std::chrono::nanoseconds timeout) noexcept {
    std::uint32_t seen = idle;
    // A.fired on failure; success only tells fire() that a wake is needed.
    if (!word_.compare_exchange_strong(seen, sleeping, std::memory_order_acquire, std::memory_order_acquire) &&
        seen == fired)
      return true;
    futex_wait(word_, sleeping, timeout);
    return word_.load(std::memory_order_acquire) == fired;  // A.fired
  }
  bool has_fired() const noexcept { return word_.load(std::memory_order_acquire) == fired; }  // A.fired
  /// For the next time: by the waiter, after it happened and before whoever fires can hear of it again.
  void rearm() noexcept {
    word_.store(idle, std::memory_order_relaxed);  // relaxed: goes along with what tells the one who fires
  }
  /// The object may be gone when this returns: after the exchange only its address is used.
  void fire() noexcept {
    std::atomic<std::uint32_t>& word = word_;
    // R.fire - release, pairs with A.fired.
    if (word.exchange(fired, std::memory_order_release) == sleeping) futex_wake_all(word);
  }

 private:
  static constexpr std::uint32_t idle = 0;
  static constexpr std::uint32_t sleeping = 1;
  static constexpr std::uint32_t fired = 2;
  std::atomic<std::uint32_t> word_{idle};
};

}  // namespace iovane::base
