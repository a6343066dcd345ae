#include "engine/worker.hpp"

#include <cxxabi.h>
#include <fmt/format.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "base/cpu_relax.hpp"
#include "base/error_text.hpp"
#include "base/fault_point.hpp"
#include "base/futex.hpp"
#include "engine/lane.hpp"
#include "engine/monotonic.hpp"

namespace iovane::engine {

namespace {

/// The worker whose role this thread has.
thread_local const Worker* my_role = nullptr;

/// A new thread inherits the mask: signals are the host's business, none may ever be handled here.
class SignalsBlocked {
 public:
  SignalsBlocked() noexcept {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

}  // namespace

/// The last thing that a worker hears of a task.
class Worker::Farewell final : public WorkerTask {
 public:
  Farewell(Worker& worker, WorkerTask& task) noexcept : WorkerTask{true}, worker_{worker}, task_{task} {}
  void wait() noexcept {
    while (!done_.wait_for(death_watch)) worker_.stand_in_if_dead();
  }
  void take() noexcept {
    worker_.set_timer(task_, never);
    if (worker_.unfinished_ == &task_) worker_.unfinished_ = nullptr;
    task_.watched_fd_ = -1;
    worker_.set_watch(task_);
    done_.fire();
  }

 private:
  std::uint64_t run_on_worker() noexcept override { return never; }
  Worker& worker_;
  WorkerTask& task_;
  base::OneShot done_;
};

Worker::Worker(const WorkerConfig& config, std::unique_ptr<WaitPoint> wait) noexcept
    : spin_{config.spin}, wait_{std::move(wait)} {
  pthread_mutexattr_t robust;
  pthread_mutexattr_init(&robust);
  pthread_mutexattr_setrobust(&robust, PTHREAD_MUTEX_ROBUST);
  pthread_mutex_init(&role_, &robust);  // cannot fail: nothing of these allocates
  pthread_mutexattr_destroy(&robust);
}

Result<std::unique_ptr<Worker>> Worker::start(const WorkerConfig& config, const base::Topology* topology, unsigned node,
                                              unsigned index) {
  auto wait = WaitPoint::create();
  if (!wait) return wait.error();
  try {
    std::unique_ptr<Worker> worker{new Worker{config, *std::move(wait)}};
    const SignalsBlocked inherited;
    try {
      for (unsigned thread = 0; thread < (config.understudy ? 2U : 1U); ++thread) {
        if (base::fault_now(base::FaultKind::allocation)) throw std::system_error{EAGAIN, std::system_category()};
        base::OneShot begun;  // from here on the role is the first thread's
        worker->threads_[thread] =
            std::thread{[=, self = worker.get(), &begun, pin = config.pin, on_start = config.on_start] {
              const std::string name = fmt::format("iovane-{}{}", thread == 0 ? 'w' : 'u', index).substr(0, 15);
              pthread_setname_np(pthread_self(), name.c_str());
              // Where it may not be pinned it runs anywhere: slower, not wrong.
              if (pin && topology != nullptr && topology->node_count() > 1) (void)topology->pin_this_thread(node);
              my_lane_claims = &self->claims_[thread];
              if (thread == 0) self->take_role();
              begun.fire();
              try {
                if (on_start) on_start(index);
                if (thread != 0) self->take_role();
                self->take_over_lanes();
                if (WorkerTask* const task = std::exchange(self->unfinished_, nullptr)) self->run(*task);
                self->main();
              } catch (const abi::__forced_unwind&) {
                throw;  // the thread is being ended, which cannot be stopped
              } catch (...) {
                // The host's function threw: a thread that never was. Whoever waits for the worker stands in.
                if (thread != 0) return;
              }
              pthread_mutex_unlock(&self->role_);
            }};
        begun.wait();
      }
    } catch (const std::system_error& refused) {
      if (!worker->threads_[0].joinable())
        return base::fail(
            Errc::out_of_memory, Stage::open, refused.code().value(),
            "no thread for worker iovane-w{}; the limit of processes (ulimit -u, pids.max) may be reached", index);
      // without an understudy: callers stand in
    } catch (const std::bad_alloc&) {
      if (!worker->threads_[0].joinable()) throw;
    }
    return worker;
  } catch (const std::bad_alloc&) {
    return make_error(Errc::out_of_memory, Stage::open, "no memory for a worker");
  }
}

Worker::~Worker() {
  if (threads_[0].joinable()) {
    // sequentially consistent: with sleeping_, as a post.
    stopping_.store(true, std::memory_order_seq_cst);
    wait_->ring();
    for (std::thread& thread : threads_)
      if (thread.joinable()) thread.join();
    stand_in_if_dead();
  }
  pthread_mutex_destroy(&role_);
}

bool Worker::is_this_thread() const noexcept { return my_role == this; }

// Waits for the role.
void Worker::take_role() noexcept {
  if (pthread_mutex_lock(&role_) == EOWNERDEAD) pthread_mutex_consistent(&role_);
  my_role = this;
  note_unfinished();
  dead_.store(false, std::memory_order_relaxed);  // relaxed: see is_dead()
}

void Worker::note_unfinished() noexcept {
  WorkerTask* const task = std::exchange(running_, nullptr);
  if (task != nullptr && task->runs_again()) unfinished_ = task;
}

bool Worker::take_role_of_dead() noexcept {
  const int taken = pthread_mutex_trylock(&role_);
  if (taken == EOWNERDEAD)
    pthread_mutex_consistent(&role_);
  else if (taken != 0)
    return false;  // alive, or somebody else stands in, who looks at the stack once more after letting go
  my_role = this;
  note_unfinished();
  dead_.store(true, std::memory_order_relaxed);  // relaxed: see is_dead()
  return true;
}

void Worker::give_role_back() noexcept {
  my_role = nullptr;
  pthread_mutex_unlock(&role_);
}

// By the one who has the role: what threads that had it before hold is theirs no more.
void Worker::take_over_lanes() noexcept {
  for (LaneClaims& claims : claims_) {
    if (&claims == my_lane_claims) continue;
    while (Lane* const lane = claims.next_held()) {
      claims.remove(*lane);
      if (my_lane_claims != nullptr) my_lane_claims->add(*lane, nullptr);
      lane->take_over();
    }
  }
}

void Worker::inherit_if_dead() noexcept {
  if (my_role == this) return take_over_lanes();
  if (!take_role_of_dead()) return;
  take_over_lanes();
  give_role_back();
}

void Worker::stand_in_if_dead() noexcept {
  do {
    if (!take_role_of_dead()) return;
    take_over_lanes();
    while (run_posted()) {
    }
    (void)run_timers();
    give_role_back();
    // sequentially consistent: after the unlock. A post whose owner found the role taken came before, and is seen here.
  } while (head_.load(std::memory_order_seq_cst) != nullptr);
}

void Worker::push(WorkerTask& task) noexcept {
  // relaxed: only a guess for the CAS.
  WorkerTask* seen = head_.load(std::memory_order_relaxed);
  do {
    task.next_posted_ = seen;
    // R.post - sequentially consistent: release for A.take, and before the load of sleeping_ (I2).
  } while (!head_.compare_exchange_weak(seen, &task, std::memory_order_seq_cst, std::memory_order_relaxed));
  if (sleeping_.load(std::memory_order_seq_cst) && sleeping_.exchange(false, std::memory_order_seq_cst)) wait_->ring();
}

void Worker::post(WorkerTask& task) noexcept {
  // acquire-release: see Edges.
  if (!task.posted_.exchange(true, std::memory_order_acq_rel)) push(task);
}

void Worker::forget(WorkerTask& task) noexcept {
  Farewell farewell{*this, task};
  push(farewell);
  farewell.wait();
}

void Worker::main() noexcept {
  for (;;) {
    const bool worked = run_posted();
    const std::uint64_t next = run_timers();
    if (wait_->watches_any()) wait_->look();
    if (run_watches() || worked) continue;
    // sequentially consistent, pairs with the destructor's store.
    if (stopping_.load(std::memory_order_seq_cst)) return;
    if (!spin()) rest(next);
  }
}

bool Worker::run_posted() noexcept {
  // A.take - acquire, pairs with R.post.
  WorkerTask* newest = head_.exchange(nullptr, std::memory_order_acquire);
  if (newest == nullptr && taken_ == nullptr) return false;
  WorkerTask** end = &taken_;  // not empty only where a worker died
  while (*end != nullptr) end = &(*end)->next_posted_;
  while (newest != nullptr) {
    WorkerTask* const next = newest->next_posted_;
    newest->next_posted_ = *end;
    *end = newest;
    newest = next;
  }
  while (taken_ != nullptr) {
    WorkerTask& task = *taken_;
    taken_ = task.next_posted_;
    if (task.is_farewell_) {
      static_cast<Farewell&>(task).take();  // it and the task that it names may be gone now
      continue;
    }
    // acquire-release: see Edges. From here on it may be posted again.
    task.posted_.exchange(false, std::memory_order_acq_rel);
    run(task);
  }
  return true;
}

void Worker::run(WorkerTask& task) noexcept {
  running_ = &task;
  std::uint64_t again = task.run_on_worker();
  running_ = nullptr;
  set_watch(task);
  // Where no further descriptor can be watched, the task looks for itself.
  constexpr std::uint64_t look_ns = 1'000'000;
  if (task.watched_fd_ >= 0 && !task.watch_.watched) again = std::min(again, monotonic_ns() + look_ns);
  set_timer(task, again);
}

void Worker::set_watch(WorkerTask& task) noexcept {
  WorkerTask::Watch& watch = task.watch_;
  if (watch.watched && watch.fd == task.watched_fd_) return;
  wait_->unwatch(watch);
  if (task.watched_fd_ < 0) return;
  watch.task = &task;
  watch.fd = task.watched_fd_;
  (void)wait_->watch(watch);
}

bool Worker::run_watches() noexcept {
  bool worked = false;
  while (DescriptorWatch* const ready = wait_->next_ready()) {
    run(*static_cast<WorkerTask::Watch*>(ready)->task);
    worked = true;
  }
  return worked;
}

void Worker::set_timer(WorkerTask& task, std::uint64_t deadline_ns) noexcept {
  task.deadline_ns_ = deadline_ns;
  const bool wanted = deadline_ns != WorkerTask::never;
  const bool there = task.timer_link_ != nullptr;
  if (wanted == there) return;
  if (wanted) {
    task.next_timer_ = timers_;
    if (timers_ != nullptr) timers_->timer_link_ = &task.next_timer_;
    timers_ = &task;
    task.timer_link_ = &timers_;
  } else {
    *task.timer_link_ = task.next_timer_;
    if (task.next_timer_ != nullptr) task.next_timer_->timer_link_ = task.timer_link_;
    task.timer_link_ = nullptr;
  }
}

std::uint64_t Worker::run_timers() noexcept {
  if (timers_ == nullptr) return WorkerTask::never;
  const std::uint64_t now = monotonic_ns();
  std::uint64_t next = WorkerTask::never;
  for (WorkerTask* task = timers_; task != nullptr;) {
    WorkerTask* const following = task->next_timer_;  // running it may take it out
    if (task->deadline_ns_ <= now) run(*task);
    next = std::min(next, task->deadline_ns_);
    task = following;
  }
  return next;
}

/// Looks for work for a little while; true when there is some.
bool Worker::spin() const noexcept {
  if (spin_.count() <= 0) return false;
  const std::uint64_t until = monotonic_ns() + static_cast<std::uint64_t>(spin_.count());
  do {
    for (int i = 0; i < 64; ++i) {
      // relaxed: a look; run_posted() takes with acquire.
      if (head_.load(std::memory_order_relaxed) != nullptr || stopping_.load(std::memory_order_relaxed)) return true;
      base::cpu_relax();
    }
  } while (monotonic_ns() < until);
  return false;
}

void Worker::rest(std::uint64_t deadline_ns) noexcept {
  // sequentially consistent, all three: I2, a store before loads.
  sleeping_.store(true, std::memory_order_seq_cst);
  if (head_.load(std::memory_order_seq_cst) == nullptr && !stopping_.load(std::memory_order_seq_cst)) {
    std::chrono::nanoseconds timeout{-1};
    if (deadline_ns != WorkerTask::never) {
      const std::uint64_t now = monotonic_ns();
      timeout = std::chrono::nanoseconds{deadline_ns > now ? static_cast<std::int64_t>(deadline_ns - now) : 0};
    }
    wait_->sleep(timeout);
  }
  // relaxed: at worst one needless ring.
  sleeping_.store(false, std::memory_order_relaxed);
}

}  // namespace iovane::engine
