// PinDomain: what the caches of one engine share - the budget of pinned bytes and the staleness monitor.
#pragma once

#include <memory>
#include <mutex>

#include "iovane/config.hpp"
#include "iovane/result.hpp"
#include "pinning/budget.hpp"
#include "pinning/staleness_monitor.hpp"

namespace iovane::engine {

/// Any thread; control plane. Outlives the caches.
class PinDomain {
 public:
  /// Before the first budget() or monitor().
  void configure(const PinLimits& limits, int userfault_fd) {
    limits_ = limits;
    userfault_fd_ = userfault_fd;
  }
  /// Made with the first cache, so that the limit is what RLIMIT_MEMLOCK leaves then. Throws std::bad_alloc.
  pinning::PinBudget& budget();
  /// One for all caches: the kernel lets only one userfaultfd watch a range. Opened on first use; a later caller that
  /// needs fork events of a monitor without them gets the reason.
  Result<pinning::StalenessMonitor*> monitor(bool need_fork_events);

 private:
  std::mutex lock_;
  PinLimits limits_;
  int userfault_fd_ = -1;
  std::unique_ptr<pinning::PinBudget> budget_;
  std::unique_ptr<pinning::StalenessMonitor> monitor_;
};

}  // namespace iovane::engine
