// Worker: a thread for what no caller should wait for.
//
// Purpose: runs relaxed flushes when their time is up, batches of queues that must not block, and lanes that their
//   holder has served for long enough. Everything else runs on the callers' threads: handing one request to a sleeping
//   thread costs more than a hundred ioctls.
// Roles: any thread posts; the worker's thread alone takes tasks, runs them, and touches timers.
// Progress: post() is lock-free (a CAS loop in which each retry means that another post took effect), plus one system
//   call when the worker sleeps.
// State: `head_`, a stack of posted tasks, newest first, taken as a whole and run in the order of posting;
//   `sleeping_`; per task `posted_`, true while it is in the stack or taken and not begun.
// Invariants: I1 a task is in the stack at most once, between the exchange of posted_ to true and the one to false;
//   I2 the worker sleeps only after it saw an empty stack with sleeping_ set, so a post either is seen there or sees
//   sleeping_ (Dekker; both sides sequentially consistent).
// Linearization: post: the CAS on head_, or the exchange that found posted_ true. Taking: the exchange of head_.
// Death: the worker's role (taking the stack, running tasks, timers and watches) is a robust mutex that its thread
// holds
//   for life. A second thread, the understudy, waits for it. When something else ends the first (a host's seccomp
//   filter, say), the kernel gives the role to the second, which finishes what the first had begun in lanes
//   (LaneClaims) and goes on. Where there is no understudy, or it has ended too, whoever waits for the worker notices,
//   and stands in: takes the role, runs what was posted, and lets the role go.
// Edges: R.post/A.take on head_; posted_ by exchanges on both sides, so what was written before a post() that found it
//   true is visible to the run that follows.
// ABA: none; the stack is only taken as a whole.
// Reclamation: none. A task belongs to its owner again after forget().
// System calls: docs/ENGINE.md has the list for each thread, which tests/unit/syscalls_test.cpp enforces.
// Proven by: tests/unit/worker_test.cpp, tests/fault/worker_death_test.cpp, tests/stress/worker_stress_test.cpp (TSan).
#pragma once

#include <pthread.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <thread>

#include "base/cacheline.hpp"
#include "base/topology.hpp"
#include "engine/lane_claims.hpp"
#include "engine/wait_point.hpp"
#include "iovane/config.hpp"
#include "iovane/result.hpp"

namespace iovane::engine {

/// Something that a worker does. Lives until its owner has called Worker::forget() for it.
class WorkerTask {
 public:
  /// "Not before it is posted again."
  static constexpr std::uint64_t never = std::numeric_limits<std::uint64_t>::max();

  WorkerTask() noexcept = default;
  virtual ~WorkerTask() = default;
  WorkerTask(const WorkerTask&) = delete;
  WorkerTask& operator=(const WorkerTask&) = delete;

 protected:
  /// On the worker's thread. Returns when it wants to run again, in nanoseconds of the monotonic clock, or `never`.
  virtual std::uint64_t run_on_worker() noexcept = 0;
  /// Whether the understudy runs the task once more when the thread ended in it. What holds lanes needs it not.
  virtual bool runs_again() const noexcept { return false; }
  /// Of run_on_worker(): from then on the task also runs when `fd` is readable; -1 for no longer. The descriptor stays
  /// open until forget().
  void watch(int fd) noexcept { watched_fd_ = fd; }

 private:
  friend class Worker;
  explicit WorkerTask(bool is_farewell) noexcept : is_farewell_{is_farewell} {}
  const bool is_farewell_ = false;
  WorkerTask* next_posted_ = nullptr;
  std::atomic<bool> posted_{false};
  // The worker's: its list of timers.
  WorkerTask* next_timer_ = nullptr;
  WorkerTask** timer_link_ = nullptr;  // what points at this one; null: no timer
  std::uint64_t deadline_ns_ = never;
  // The worker's: its list of watches.
  int watched_fd_ = -1;
  struct Watch : DescriptorWatch {
    WorkerTask* task = nullptr;
  } watch_{};
};

class Worker {
 public:
  /// Starts the threads, with every signal blocked, named `name` (15 characters at most), on the CPUs of `node` when
  /// `config.pin` and `topology` allow. `index` is passed to config.on_start.
  static Result<std::unique_ptr<Worker>> start(const WorkerConfig& config, const base::Topology* topology,
                                               unsigned node, unsigned index);
  /// Runs what was posted, then ends the thread.
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  /// Lets the task run soon, once however often it is posted before that.
  void post(WorkerTask& task) noexcept;
  /// Waits until the worker is through with the task, for good: nobody may post it any more. Not on the worker's
  /// thread, not while holding what the task waits for.
  void forget(WorkerTask& task) noexcept;
  /// How often one who waits for a worker looks whether it lives.
  static constexpr std::chrono::milliseconds death_watch{20};
  /// For those who wait for something posted: if the worker's thread has died, runs what is posted on this thread. Not
  /// while holding what a task may wait for.
  void stand_in_if_dead() noexcept;
  /// For those who wait for a lane: if the worker's thread has died, takes over the lanes that it held. Also while
  /// holding another lane.
  void inherit_if_dead() noexcept;
  /// True once somebody noticed that the thread is gone. Posting still works, but nothing runs before
  /// stand_in_if_dead().
  bool is_dead() const noexcept {
    return dead_.load(std::memory_order_relaxed);  // relaxed: a hint; the role's mutex orders what it protects
  }
  /// True on the thread that is this worker just now.
  bool is_this_thread() const noexcept;
  bool has_understudy() const noexcept { return threads_[1].joinable(); }
  bool uses_io_uring() const noexcept { return wait_->uses_io_uring(); }

 private:
  class Farewell;

  Worker(const WorkerConfig& config, std::unique_ptr<WaitPoint> wait) noexcept;
  void push(WorkerTask& task) noexcept;
  void take_role() noexcept;
  bool take_role_of_dead() noexcept;
  void give_role_back(const Worker* own) noexcept;
  void take_over_lanes() noexcept;
  void note_unfinished() noexcept;
  void main() noexcept;
  bool run_posted() noexcept;
  /// Runs timers that are due; when the next one is.
  std::uint64_t run_timers() noexcept;
  /// Runs tasks whose descriptors are readable.
  bool run_watches() noexcept;
  void run(WorkerTask& task) noexcept;
  void set_watch(WorkerTask& task) noexcept;
  void set_timer(WorkerTask& task, std::uint64_t deadline_ns) noexcept;
  bool spin() const noexcept;
  void rest(std::uint64_t deadline_ns) noexcept;

  const std::chrono::nanoseconds spin_;
  std::unique_ptr<WaitPoint> wait_;
  std::array<std::thread, 2> threads_;
  std::array<LaneClaims, 2> claims_;  // by thread
  WorkerTask* running_ = nullptr;
  WorkerTask* unfinished_ = nullptr;  // in which a thread ended
  WorkerTask* taken_ = nullptr;       // from the stack, oldest first, and not begun
  WorkerTask* timers_ = nullptr;      // unordered: there are as many as relaxed address spaces
  alignas(base::cacheline_bytes) std::atomic<WorkerTask*> head_{nullptr};
  std::atomic<bool> sleeping_{false};
  std::atomic<bool> stopping_{false};
  std::atomic<bool> dead_{false};
  pthread_mutex_t role_;  // robust
};

}  // namespace iovane::engine
