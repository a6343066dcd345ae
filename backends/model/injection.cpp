#include "backends/model/injection.hpp"

#include <thread>
#include <utility>

namespace iovane::backends::model {

void Injection::fail(unsigned long request, std::uint64_t nth, int os_errno, std::uint64_t count) {
  const std::lock_guard lock{mutex_};
  failures_.push_back({.request = request, .nth = nth, .count = count, .os_errno = os_errno});
  armed_.store(true, std::memory_order_relaxed);  // relaxed: a hint, the lists are read under the mutex
}

void Injection::delay(unsigned long request, std::chrono::nanoseconds latency) {
  const std::lock_guard lock{mutex_};
  latencies_.push_back({request, latency});
  armed_.store(true, std::memory_order_relaxed);  // relaxed: as above
}

void Injection::deny(std::string path, int os_errno) {
  const std::lock_guard lock{mutex_};
  denials_.push_back({std::move(path), os_errno});
}

void Injection::clear() noexcept {
  const std::lock_guard lock{mutex_};
  failures_.clear();
  latencies_.clear();
  denials_.clear();
  armed_.store(false, std::memory_order_relaxed);  // relaxed: as above
}

int Injection::failure(unsigned long request) noexcept {
  const std::lock_guard lock{mutex_};
  int rc = 0;
  for (Failure& f : failures_) {
    if (f.request != request) continue;
    ++f.seen;
    if (f.seen >= f.nth && f.seen - f.nth < f.count) rc = -f.os_errno;
  }
  return rc;
}

void Injection::spend(unsigned long request) const noexcept {
  std::chrono::nanoseconds latency{0};
  {
    const std::lock_guard lock{mutex_};
    for (const Latency& l : latencies_) {
      if (l.request == request) latency += l.latency;
    }
  }
  if (latency.count() <= 0) return;
  if (latency >= std::chrono::microseconds{50}) {
    std::this_thread::sleep_for(latency);
    return;
  }
  const auto until = std::chrono::steady_clock::now() + latency;
  while (std::chrono::steady_clock::now() < until) {  // bounded by the latency
  }
}

int Injection::open_failure(const char* path) const noexcept {
  const std::lock_guard lock{mutex_};
  for (const Denial& d : denials_) {
    if (d.path == path) return -d.os_errno;
  }
  return 0;
}

}  // namespace iovane::backends::model
