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

bool Accounting::take(Ledger ledger, std::uint64_t pages) noexcept {
  std::atomic<std::uint64_t>& used = counter(ledger);
  // relaxed: a count, through which nothing is read.
  std::uint64_t now = used.load(std::memory_order_relaxed);
  do {  // lock-free: another thread's success is what makes this one try again
    if (pages > limit_pages_ || now > limit_pages_ - pages) return false;
  } while (!used.compare_exchange_weak(now, now + pages, std::memory_order_relaxed, std::memory_order_relaxed));
  return true;
}

}  // namespace iovane::backends::model
