// Failures and latency on demand, per ioctl.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace iovane::backends::model {

/// Any thread. Costs one relaxed load per ioctl while nothing is set.
class Injection {
 public:
  /// The nth call (from 1) of `request` from now on fails with `os_errno` (positive) and does nothing else; so do the
  /// `count` - 1 calls after it.
  void fail(unsigned long request, std::uint64_t nth, int os_errno, std::uint64_t count = 1);
  /// Every call of `request` takes that much longer. type1's MAP and UNMAP spend it under the container's lock, as the
  /// kernel spends its time; all others before any lock.
  void delay(unsigned long request, std::chrono::nanoseconds latency);
  /// Opening `path` fails with `os_errno`.
  void deny(std::string path, int os_errno);
  void clear() noexcept;

  bool armed() const noexcept { return armed_.load(std::memory_order_relaxed); }  // relaxed: a hint
  /// 0 or the -errno to fail with. Counts the call.
  int failure(unsigned long request) noexcept;
  /// Spends the latency: spins below 50 us, sleeps above.
  void spend(unsigned long request) const noexcept;
  int open_failure(const char* path) const noexcept;

 private:
  struct Failure {
    unsigned long request;
    std::uint64_t nth;
    std::uint64_t count;
    int os_errno;
    std::uint64_t seen = 0;
  };
  struct Latency {
    unsigned long request;
    std::chrono::nanoseconds latency;
  };
  struct Denial {
    std::string path;
    int os_errno;
  };

  mutable std::mutex mutex_;
  std::atomic<bool> armed_{false};
  std::vector<Failure> failures_;
  std::vector<Latency> latencies_;
  std::vector<Denial> denials_;
};

}  // namespace iovane::backends::model
