// What the kernel lets this process lock, and what it has locked.
#pragma once

#include <cstdint>

#include "iovane/result.hpp"

namespace iovane::pinning {

/// In bytes. `locked` is VmLck (mlock, and what type1 and sPAPR containers charge), `pinned` VmPin (iommufd in
/// process mode, io_uring). Charges per user (io_uring, iommufd's default) are shown by no file of the kernel.
struct MemlockState {
  static constexpr std::uint64_t unlimited = ~std::uint64_t{0};
  std::uint64_t soft_limit = unlimited;
  std::uint64_t hard_limit = unlimited;
  std::uint64_t locked = 0;
  std::uint64_t pinned = 0;
  /// CAP_IPC_LOCK: type1, sPAPR, io_uring and iommufd do not enforce the limit then.
  bool exempt = false;

  /// What fits below the soft limit beside `used` bytes.
  std::uint64_t room_beside(std::uint64_t used) const noexcept {
    if (exempt || soft_limit == unlimited) return unlimited;
    return soft_limit > used ? soft_limit - used : 0;
  }
};

/// Reads getrlimit(2), /proc/self/status and the effective capabilities. Two or three system calls.
Result<MemlockState> read_memlock_state() noexcept;

}  // namespace iovane::pinning
