// WaitPoint: where a worker sleeps, until its doorbell rings, a descriptor that it watches is readable, or its time is
// up.
#pragma once

#include <liburing.h>
#include <poll.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/unique_fd.hpp"
#include "iovane/result.hpp"

namespace iovane::engine {

/// A descriptor that somebody waits for: embedded in what is to happen then.
struct DescriptorWatch {
  int fd = -1;
  std::uint32_t place = 0;  ///< the WaitPoint's
  bool watched = false;     ///< likewise
};

/// One io_uring on which a read of an eventfd, the doorbell, is always outstanding, and a poll of every descriptor that
/// is watched. Where the process may not have an io_uring (containers forbid it often) poll(2) takes its place. System
/// calls: io_uring_enter or ppoll, read and write.
class WaitPoint {
 public:
  static constexpr std::size_t watches_max = 4096;

  /// Errors: of eventfd, and out_of_memory.
  static Result<std::unique_ptr<WaitPoint>> create();
  ~WaitPoint();
  WaitPoint(const WaitPoint&) = delete;
  WaitPoint& operator=(const WaitPoint&) = delete;

  /// Ends the current or the next sleep(). Any thread; one system call.
  void ring() noexcept;

  // The owner's:
  /// Returns after ring(), when a watched descriptor is readable, after `timeout` (negative: none), or early for no
  /// reason.
  void sleep(std::chrono::nanoseconds timeout) noexcept;
  /// False without room: watches_max are there, or there is no memory.
  bool watch(DescriptorWatch& watch) noexcept;
  /// Returns when the kernel has let go of the descriptor.
  void unwatch(DescriptorWatch& watch) noexcept;
  /// A watched descriptor that is readable as of the last look, each once; null: no more. It is looked at again from
  /// the next sleep() on, or the next look().
  DescriptorWatch* next_ready() noexcept;
  /// Looks without sleeping. No system call on the ring while nothing is to be watched anew.
  void look() noexcept;
  bool watches_any() const noexcept { return watched_ != 0; }
  bool uses_io_uring() const noexcept { return has_ring_; }

 private:
  struct Slot {
    DescriptorWatch* watch = nullptr;
    std::uint32_t generation = 0;  // of the slot: completions of an earlier watch are told apart by it
    bool armed = false;            // the kernel polls it
    bool ready = false;
  };

  explicit WaitPoint(base::UniqueFd doorbell);
  void sleep_on_ring(std::chrono::nanoseconds timeout) noexcept;
  void sleep_in_poll(std::chrono::nanoseconds timeout) noexcept;
  bool prepare() noexcept;
  io_uring_sqe* next_sqe() noexcept;
  void reap() noexcept;
  void leave_ring() noexcept;

  base::UniqueFd doorbell_;
  std::uint64_t rings_ = 0;  // where the outstanding read puts the eventfd's count
  bool reading_ = false;
  bool has_ring_ = false;
  bool unarmed_ = false;  // some watched descriptor may not be polled
  std::size_t watched_ = 0;
  std::size_t ready_ = 0;
  std::vector<Slot> slots_;
  std::vector<pollfd> polled_;  // room for all slots and the doorbell
  io_uring uring_{};
};

}  // namespace iovane::engine
