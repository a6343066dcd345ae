#include "backends/model/accounting.hpp"

#include <linux/capability.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "backends/model/page_table.hpp"

namespace iovane::backends::model {

MemlockOptions MemlockOptions::of_this_process() noexcept {
  MemlockOptions options;
  rlimit limit{};
  if (::getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
    options.limit = Bytes{limit.rlim_cur};
  __user_cap_header_struct header{.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {};
  if (::syscall(SYS_capget, &header, data) == 0) options.ipc_lock = ((data[0].effective >> CAP_IPC_LOCK) & 1U) != 0;
  return options;
}

Accounting::Accounting(const MemlockOptions& options) noexcept
    : limited_{options.limit.has_value() && !options.ipc_lock},
      ipc_lock_{options.ipc_lock},
      limit_pages_{options.limit.value_or(Bytes{0}).value / os_page_bytes} {}

bool Accounting::pin(Ledger ledger, std::uint64_t pages, SpaceUsage& usage) noexcept {
  const auto n = static_cast<std::int64_t>(pages);
  if (ledger != Ledger::none && limited_) {
    std::atomic<std::uint64_t>& used = counter(ledger);
    // relaxed: a count, through which nothing is read.
    std::uint64_t now = used.load(std::memory_order_relaxed);
    do {  // lock-free: another thread's success is what makes this one try again
      if (pages > limit_pages_ || now > limit_pages_ - pages) return false;
    } while (!used.compare_exchange_weak(now, now + pages, std::memory_order_relaxed, std::memory_order_relaxed));
  }
  usage.pinned += n;
  if (ledger == Ledger::user) usage.user += n;
  if (ledger == Ledger::process) usage.process += n;
  return true;
}

void Accounting::unpin(Ledger ledger, std::uint64_t pages, SpaceUsage& usage) noexcept {
  const auto n = static_cast<std::int64_t>(pages);
  // relaxed: as in pin().
  if (ledger != Ledger::none && limited_) counter(ledger).fetch_sub(pages, std::memory_order_relaxed);
  usage.pinned -= n;
  if (ledger == Ledger::user) usage.user -= n;
  if (ledger == Ledger::process) usage.process -= n;
}

}  // namespace iovane::backends::model
