// Who may pin how much: the two counters that RLIMIT_MEMLOCK bounds.
//
// iommufd counts per user by default and per process in RLIMIT_MODE 1; type1 counts per process. A space (an IOAS, a
// container) keeps its own share under its own mutex; the common counters exist only where a limit makes spaces
// compete, so that without a limit two spaces share no cache line.
#pragma once

#include <atomic>
#include <cstdint>

#include "backends/model/options.hpp"

namespace iovane::backends::model {

/// Which counter a pin goes to.
enum class Ledger : std::uint8_t {
  none,     ///< not counted (iommufd with CAP_IPC_LOCK)
  user,     ///< all processes of the user
  process,  ///< the process's locked memory
};

/// One space's share, in os_pages. Shares may go below zero when another space drops a pin that this one made; only
/// sums over all spaces mean something.
struct SpaceUsage {
  std::int64_t pinned = 0;
  std::int64_t user = 0;
  std::int64_t process = 0;

  constexpr SpaceUsage& operator+=(const SpaceUsage& o) noexcept {
    pinned += o.pinned;
    user += o.user;
    process += o.process;
    return *this;
  }
};

class Accounting {
 public:
  explicit Accounting(const MemlockOptions& options) noexcept;

  bool ipc_lock() const noexcept { return ipc_lock_; }
  /// Counts `pages` more in `usage` and `ledger`. False, and nothing is counted, when that would pass the limit.
  /// Any thread, with the mutex of the space that `usage` belongs to.
  [[nodiscard]] bool pin(Ledger ledger, std::uint64_t pages, SpaceUsage& usage) noexcept {
    if (limited_ && ledger != Ledger::none && !take(ledger, pages)) return false;
    add(ledger, static_cast<std::int64_t>(pages), usage);
    return true;
  }
  void unpin(Ledger ledger, std::uint64_t pages, SpaceUsage& usage) noexcept {
    // relaxed: a count, through which nothing is read.
    if (limited_ && ledger != Ledger::none) counter(ledger).fetch_sub(pages, std::memory_order_relaxed);
    add(ledger, -static_cast<std::int64_t>(pages), usage);
  }

 private:
  bool take(Ledger ledger, std::uint64_t pages) noexcept;
  static void add(Ledger ledger, std::int64_t pages, SpaceUsage& usage) noexcept {
    usage.pinned += pages;
    if (ledger == Ledger::user) usage.user += pages;
    if (ledger == Ledger::process) usage.process += pages;
  }
  std::atomic<std::uint64_t>& counter(Ledger ledger) noexcept { return ledger == Ledger::user ? user_ : process_; }

  const bool limited_;
  const bool ipc_lock_;
  const std::uint64_t limit_pages_;
  std::atomic<std::uint64_t> user_{0};
  std::atomic<std::uint64_t> process_{0};
};

}  // namespace iovane::backends::model
