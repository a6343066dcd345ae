#include "engine/pin_domain.hpp"

#include <algorithm>

namespace iovane::engine {

pinning::PinBudget& PinDomain::budget() {
  constexpr unsigned percent_of_memlock = 90;
  const std::lock_guard held{lock_};
  if (!budget_) {
    pinning::PinBudget::Limits limits = pinning::PinBudget::below_memlock(percent_of_memlock);
    if (limits_.process.value != 0) limits.process = limits_.process;
    for (std::size_t n = 0; n < std::min<std::size_t>(limits_.nodes.size(), pinning::nodes_max); ++n)
      if (limits_.nodes[n].value != 0) limits.node[n] = limits_.nodes[n];
    budget_ = std::make_unique<pinning::PinBudget>(limits);
  }
  return *budget_;
}

Result<pinning::StalenessMonitor*> PinDomain::monitor(bool need_fork_events) {
  const std::lock_guard held{lock_};
  if (!monitor_) {
    auto opened = pinning::StalenessMonitor::open({.fd = userfault_fd_, .need_fork_events = need_fork_events});
    if (!opened) return opened.error();
    monitor_ = *std::move(opened);
  }
  if (need_fork_events && !monitor_->sees_forks())
    return make_error(Errc::permission, Stage::open,
                      "this engine's staleness monitor was opened without fork events, for a cache with "
                      "Staleness::monitored_except_fork; open the cache that needs them first");
  return monitor_.get();
}

}  // namespace iovane::engine
