// WaitPoint: where a worker sleeps, until its doorbell rings or its time is up.
#pragma once

#include <liburing.h>

#include <chrono>
#include <cstdint>
#include <memory>

#include "base/unique_fd.hpp"
#include "iovane/result.hpp"

namespace iovane::engine {

/// One io_uring on which a read of an eventfd, the doorbell, is always outstanding. Where the process may not have an
/// io_uring (containers forbid it often) poll(2) takes its place. System calls: io_uring_enter or ppoll, and write.
class WaitPoint {
 public:
  /// Errors: of eventfd only.
  static Result<std::unique_ptr<WaitPoint>> create();
  ~WaitPoint();
  WaitPoint(const WaitPoint&) = delete;
  WaitPoint& operator=(const WaitPoint&) = delete;

  /// Ends the current or the next sleep(). Any thread; one system call.
  void ring() noexcept;
  /// The owner's: returns after ring(), after `timeout` (negative: none), or early for no reason.
  void sleep(std::chrono::nanoseconds timeout) noexcept;
  bool uses_io_uring() const noexcept { return has_ring_; }

 private:
  explicit WaitPoint(base::UniqueFd doorbell) noexcept;
  void sleep_on_ring(std::chrono::nanoseconds timeout) noexcept;
  void sleep_in_poll(std::chrono::nanoseconds timeout) noexcept;

  base::UniqueFd doorbell_;
  std::uint64_t rings_ = 0;  // where the outstanding read puts the eventfd's count
  bool reading_ = false;
  bool has_ring_ = false;
  io_uring uring_{};
};

}  // namespace iovane::engine
