#include "pinning/staleness_monitor.hpp"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <system_error>

#include "base/error_text.hpp"

// Linux 5.14; older C libraries do not name them.
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

namespace iovane::pinning {
namespace {

// Regions in use come free without a word to us; look for them this often.
constexpr std::chrono::milliseconds retry_after{20};

}  // namespace

Result<std::unique_ptr<StalenessMonitor>> StalenessMonitor::open(const Config& config) {
  auto uffd = config.fd >= 0 ? Userfaultfd::adopt(config.fd, config.need_fork_events)
                             : Userfaultfd::open(config.need_fork_events);
  if (!uffd) return uffd.error();
  base::UniqueFd stop{eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  if (!stop) return base::fail(Errc::io_error, Stage::open, errno, "eventfd failed");
  std::unique_ptr<StalenessMonitor> monitor{new StalenessMonitor{*std::move(uffd), std::move(stop)}};
  if (auto started = monitor->start(); !started) return started.error();
  return monitor;
}

Result<void> StalenessMonitor::start() {
  owner_pid_ = getpid();
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // threads inherit it
  int error = 0;
  try {
    events_thread_ = std::thread{[this] { watch_events(); }};
    pthread_setname_np(events_thread_.native_handle(), "iovane-uffd");
    unpin_thread_ = std::thread{[this] { drop_unused(); }};
    pthread_setname_np(unpin_thread_.native_handle(), "iovane-unpin");
  } catch (const std::system_error& e) {
    error = e.code().value();
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (error == 0) return {};
  return base::fail(Errc::out_of_memory, Stage::open, error, "the staleness monitor could not start its two threads");
}

StalenessMonitor::~StalenessMonitor() {
  if (owner_pid_ != getpid()) {
    // fork() copied the object but not its threads.
    if (events_thread_.joinable()) events_thread_.detach();
    if (unpin_thread_.joinable()) unpin_thread_.detach();
    static_cast<void>(conditions_.release());
    return;
  }
  const std::uint64_t one = 1;
  // Cannot fail: the counter is 0 and the descriptor ours.
  if (write(stop_.get(), &one, sizeof one) < 0) {
  }
  {
    const std::lock_guard held{wake_lock_};
    stopping_ = true;
  }
  conditions_->wake.notify_all();
  if (events_thread_.joinable()) events_thread_.join();
  if (unpin_thread_.joinable()) unpin_thread_.join();
}

Result<void> StalenessMonitor::add_listener(StalenessListener& listener) noexcept {
  const std::lock_guard held{lock_};
  for (Listener& l : listeners_)
    if (l.who == nullptr) {
      l = {&listener, false};
      return {};
    }
  return base::fail(Errc::limit_reached, Stage::open, 0, "{} caches use this monitor already", listeners_max);
}

void StalenessMonitor::remove_listener(StalenessListener& listener) noexcept {
  std::unique_lock held{lock_};
  for (Listener& l : listeners_) {
    if (l.who != &listener) continue;
    while (l.collecting) conditions_->collected.wait(held);
    l.who = nullptr;
  }
}

Result<void> StalenessMonitor::watch(const MemoryRange& range, Access access) noexcept {
  const auto os_page = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  const MemoryRange whole = range.grown_to(os_page);
  // Present first, so that nothing is missing unless it is discarded later (I2). The pin would fault it in anyway.
  const int advice = may_write(access) ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;
  while (madvise(reinterpret_cast<void*>(whole.start), whole.length().value, advice) != 0) {
    const int error = errno;
    if (error == EINTR || error == EAGAIN) continue;
    if (error == EINVAL)
      return base::fail(Errc::unsupported, Stage::pin, error,
                        "memory [{:#x}, {:#x}] cannot be made present: it is device memory, or this kernel has no "
                        "MADV_POPULATE_WRITE (Linux 5.14), which the monitor needs",
                        range.start, range.last);
    return base::fail(Errc::bad_memory, Stage::pin, error,
                      "memory [{:#x}, {:#x}] is not mapped, or not with the rights that were asked for", range.start,
                      range.last);
  }
  return uffd_.watch(range);
}

void StalenessMonitor::unwatch(const MemoryRange& range) noexcept { uffd_.unwatch(range); }

StalenessMonitor::Stats StalenessMonitor::stats() const noexcept {
  using Kind = Userfaultfd::EventKind;
  const auto of = [&](Kind kind) {
    return counts_[static_cast<std::size_t>(kind)].load(std::memory_order_relaxed);  // relaxed: a number
  };
  return {of(Kind::unmap), of(Kind::remap), of(Kind::remove), of(Kind::fork), of(Kind::fault)};
}

// Thread "iovane-uffd".
void StalenessMonitor::watch_events() noexcept {
  std::array<pollfd, 2> waits{pollfd{uffd_.fd(), POLLIN, 0}, pollfd{stop_.get(), POLLIN, 0}};
  for (;;) {
    // Fails only with EINTR, which blocked signals still allow (stop and continue), or for lack of memory.
    if (poll(waits.data(), waits.size(), -1) < 0) continue;
    if (waits[1].revents != 0) return;
    {
      const std::lock_guard held{lock_};
      for (const Listener& l : listeners_)
        if (l.who != nullptr) l.who->changes_begin();
      // Bounded, so that caches get their turn under a stream of events; the rest is the next round's.
      for (int round = 0; round < 16; ++round) {
        std::array<Userfaultfd::Event, 16> events;
        const std::size_t count = uffd_.read(events);
        for (std::size_t i = 0; i < count; ++i) work_off(events[i]);
        if (count < events.size()) break;
      }
      for (const Listener& l : listeners_)
        if (l.who != nullptr) l.who->changes_end();
    }
    {
      const std::lock_guard held{wake_lock_};
      work_left_ = true;
    }
    conditions_->wake.notify_one();
  }
}

// Under lock_.
void StalenessMonitor::work_off(const Userfaultfd::Event& event) noexcept {
  using Kind = Userfaultfd::EventKind;
  counts_[static_cast<std::size_t>(event.kind)].fetch_add(1, std::memory_order_relaxed);  // relaxed: a number
  const auto invalidate = [this](const MemoryRange& range) {
    for (const Listener& l : listeners_)
      if (l.who != nullptr) l.who->invalidate(range);
  };
  switch (event.kind) {
    case Kind::unmap: invalidate(event.range); break;
    case Kind::remap: {
      // The watch moved along with the memory.
      const MemoryRange to{event.moved_to, event.moved_to + (event.range.last - event.range.start)};
      uffd_.unwatch(to);
      invalidate(event.range);
      invalidate(to);
      break;
    }
    case Kind::remove:
      uffd_.unwatch(event.range);
      invalidate(event.range);
      break;
    case Kind::fork:
      // Closing it ends the watch in the child.
      if (event.child_fd >= 0) close(event.child_fd);
      for (const Listener& l : listeners_)
        if (l.who != nullptr) l.who->forked();
      break;
    case Kind::fault: {
      const auto os_page = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
      const MemoryRange page = event.range.grown_to(os_page);
      // Also lets the thread go on that touched it; hits stay off until we are done.
      uffd_.unwatch(page);
      invalidate(page);
      break;
    }
  }
}

// Thread "iovane-unpin".
void StalenessMonitor::drop_unused() noexcept {
  std::unique_lock held{wake_lock_};
  bool retry = false;
  while (!stopping_) {
    // A lease that ends says nothing, so look again while regions wait for one.
    if (!work_left_ && retry)
      conditions_->wake.wait_for(held, retry_after);
    else if (!work_left_)
      conditions_->wake.wait(held);
    work_left_ = false;
    if (stopping_) return;
    held.unlock();
    retry = false;
    for (Listener& l : listeners_) {
      StalenessListener* who = nullptr;
      {
        const std::lock_guard listeners_held{lock_};
        who = l.who;
        l.collecting = who != nullptr;
      }
      if (who == nullptr) continue;
      who->collect();
      retry |= who->has_retired();
      {
        const std::lock_guard listeners_held{lock_};
        l.collecting = false;
      }
      conditions_->collected.notify_all();
    }
    held.lock();
  }
}

}  // namespace iovane::pinning
