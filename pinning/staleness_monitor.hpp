// Sees that pinned memory was unmapped, moved, discarded or forked, whoever did it and by whatever call.
//
// Purpose: no cache serves a pin of a page that is no longer the one behind the address. Libraries that hook malloc or
//   munmap miss raw system calls; the kernel's userfaultfd does not.
// Roles: caches register themselves and watch() what they pin; thread "iovane-uffd" takes events; thread "iovane-unpin"
//   drops what nobody uses any more (it may block in the kernel; the first may not).
// What the kernel does (fs/userfaultfd.c): unmap, remap and fork events are queued after the change, remove events
//   before it; in each case the author sleeps until the event has been read, not until it has been worked off.
//   Hence:
//   I1 before every read() all caches stop serving hits (changes_begin), after working off they resume: so whoever
//      returned from the call finds the old pin gone.
//   I2 a remove's author may discard long after its event was worked off, and memory pinned meanwhile would be the old
//      page. So memory is watched in MISSING mode, made present first: once it is discarded, its next touch by anybody
//      is a fault event, and the caches drop it before the touch goes on. In all other cases no fault event occurs.
//   I3 the watch of a range is taken back before the range is invalidated, never after: an invalidation leaves no
//   region
//      that believes to be watched.
// Guarantee: an acquire that begins after munmap, mremap, mmap over it, madvise(DONTNEED, FREE, REMOVE) or fork has
//   returned never gets a pin from before. For fork and for need_fork_events = false see docs/PINNING.md, likewise for
//   what is not seen: fallocate(PUNCH_HOLE) and truncation by descriptor, and another thread's mapping that reuses an
//   address while the munmap that freed it has not returned.
// I4 the first thread allocates nothing, frees nothing, and waits only for caches' locks, under which nobody else does
//   either: otherwise it might wait for a thread that waits for it.
// Proven by: tests/unit/staleness_monitor_test.cpp (real system calls), tests/stress/staleness_stress_test.cpp.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

#include "pinning/staleness.hpp"
#include "pinning/userfaultfd.hpp"

namespace iovane::pinning {

class StalenessMonitor final : public MemoryWatcher {
 public:
  static constexpr std::size_t listeners_max = 64;

  struct Config {
    /// A userfaultfd from a manager, without handshake; -1: open one. Duplicated.
    int fd = -1;
    /// Refuse to open when forks cannot be seen (that needs CAP_SYS_PTRACE).
    bool need_fork_events = true;
  };

  struct Stats {
    std::uint64_t unmaps = 0;
    std::uint64_t remaps = 0;
    std::uint64_t removes = 0;
    std::uint64_t forks = 0;
    std::uint64_t late_discards = 0;  ///< fault events: a discard that came after its memory was pinned again
  };

  /// Starts both threads, with all signals blocked. Errors: permission (with the knobs), unsupported, out_of_memory.
  static Result<std::unique_ptr<StalenessMonitor>> open(const Config& config);
  static Result<std::unique_ptr<StalenessMonitor>> open() { return open(Config{}); }
  /// Precondition: no cache uses it any more. In a forked child it leaves the parent's threads and descriptor alone.
  ~StalenessMonitor() override;

  Result<void> add_listener(StalenessListener& listener) noexcept override;
  void remove_listener(StalenessListener& listener) noexcept override;
  Result<void> watch(const MemoryRange& range, Access access) noexcept override;
  void unwatch(const MemoryRange& range) noexcept override;

  bool sees_forks() const noexcept { return uffd_.has_fork_events(); }
  Stats stats() const noexcept;

 private:
  struct Listener {
    StalenessListener* who = nullptr;
    bool collecting = false;
  };

  explicit StalenessMonitor(Userfaultfd uffd, base::UniqueFd stop) : uffd_{std::move(uffd)}, stop_{std::move(stop)} {}
  Result<void> start();
  void watch_events() noexcept;
  void work_off(const Userfaultfd::Event& event) noexcept;
  void drop_unused() noexcept;

  Userfaultfd uffd_;
  base::UniqueFd stop_;  // an eventfd that ends the first thread's poll
  int owner_pid_ = 0;

  mutable std::mutex lock_;  // listeners_; held by the first thread from changes_begin to changes_end
  std::array<Listener, listeners_max> listeners_{};

  /// On the heap, to be left behind in a forked child: pthread_cond_destroy waits for threads that it does not have.
  struct Conditions {
    std::condition_variable collected;
    std::condition_variable wake;
  };
  std::unique_ptr<Conditions> conditions_ = std::make_unique<Conditions>();
  std::mutex wake_lock_;  // the second thread's; its own, so that waking it never waits for lock_
  bool work_left_ = false;
  bool stopping_ = false;

  std::array<std::atomic<std::uint64_t>, 5> counts_{};  // by Userfaultfd::EventKind
  std::thread events_thread_;
  std::thread unpin_thread_;
};

}  // namespace iovane::pinning
