// A mutex with a shared side whose users do not meet: what is done often and changes nothing enters shared, whatever
// changes something enters alone.
//
// Roles. lock() and unlock() alone, lock_shared() and unlock_shared() together; any thread; both by the same thread.
// Progress. Blocking on both sides. Shared entry is one RMW on a line of the thread's own (`slots_max` threads share
//   none) unless somebody is inside alone or on the way in.
// Invariant. Whoever is inside alone has seen every slot at 0 after `closed_` was set. Whoever counts in and then finds
//   `closed_` set counts out again and waits for the mutex. So never both.
// Edges. Dekker: slot RMW then closed_.load | closed_.store then slot.load, all seq_cst. R.inside / A.inside: what a
//   shared user did happens before whoever enters alone next. R.open / A.open: the other way round.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <mutex>
#include <thread>

#include "base/cacheline.hpp"

namespace iovane::backends::model {

class SharedGate {
 public:
  void lock() {
    mutex_.lock();
    closed_.store(true, std::memory_order_seq_cst);  // seq_cst: before the looks below
    for (Slot& slot : slots_)
      // A.inside - pairs with R.inside. seq_cst: after the store above.
      while (slot.inside.load(std::memory_order_seq_cst) != 0) std::this_thread::yield();
  }
  void unlock() {
    closed_.store(false, std::memory_order_release);  // R.open - pairs with A.open
    mutex_.unlock();
  }
  void lock_shared() {
    std::atomic<unsigned>& inside = own().inside;
    inside.fetch_add(1, std::memory_order_seq_cst);           // seq_cst: before the look below
    if (!closed_.load(std::memory_order_seq_cst)) [[likely]]  // A.open - what was done alone
      return;
    inside.fetch_sub(1, std::memory_order_release);  // R.inside - nothing was done
    const std::lock_guard wait{mutex_};              // nobody is alone now, and the next one looks at the slots
    inside.fetch_add(1, std::memory_order_relaxed);  // relaxed: published by the mutex
  }
  void unlock_shared() { own().inside.fetch_sub(1, std::memory_order_release); }  // R.inside

 private:
  struct alignas(base::cacheline_bytes) Slot {
    std::atomic<unsigned> inside{0};
  };
  static constexpr std::size_t slots_max = 16;

  Slot& own() noexcept {
    static std::atomic<unsigned> threads{0};
    thread_local const unsigned mine = threads.fetch_add(1, std::memory_order_relaxed);  // relaxed: a number
    return slots_[mine % slots_max];
  }

  std::mutex mutex_;
  alignas(base::cacheline_bytes) std::atomic<bool> closed_{false};
  std::array<Slot, slots_max> slots_{};
};

}  // namespace iovane::backends::model
