// Counters that one thread at a time writes and any thread reads.
#pragma once

#include <atomic>
#include <cstdint>

namespace iovane::base {

/// A 64-bit number without read-modify-write: its writers take turns (something else orders them), so adding is a load
/// and a store, as cheap as a plain variable, and a reader sees some recent value, never a torn one.
class Counter {
 public:
  constexpr Counter() noexcept = default;
  Counter(const Counter& o) noexcept : value_{o.get()} {}
  Counter& operator=(const Counter& o) noexcept {
    set(o.get());
    return *this;
  }

  // relaxed throughout: a statistic, nobody reads other data through it.
  std::uint64_t get() const noexcept { return value_.load(std::memory_order_relaxed); }
  void set(std::uint64_t value) noexcept { value_.store(value, std::memory_order_relaxed); }
  void add(std::uint64_t n = 1) noexcept { set(get() + n); }
  void subtract(std::uint64_t n = 1) noexcept { set(get() - n); }
  void raise_to(std::uint64_t value) noexcept {
    if (value > get()) set(value);
  }

 private:
  std::atomic<std::uint64_t> value_{0};
};
static_assert(sizeof(Counter) == 8 && std::atomic<std::uint64_t>::is_always_lock_free);

}  // namespace iovane::base
