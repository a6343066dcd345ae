// What the kernel lets this process pin for I/O, and what it has pinned.
#pragma once

#include <optional>

#include "iovane/types.hpp"

namespace iovane::backends {

/// The process's account of pinned memory. The kernel charges pins to RLIMIT_MEMLOCK in two ways: type1 to the locked
/// memory of the process, iommufd to a count per user of which this process's part is visible as pinned memory.
/// CAP_IPC_LOCK waives both.
struct MemlockUse {
  std::optional<Bytes> limit{};       ///< RLIMIT_MEMLOCK's soft value; nothing when unlimited
  std::optional<Bytes> hard_limit{};  ///< what the process may raise it to by itself; nothing when unlimited
  Bytes locked{};                     ///< VmLck of /proc/self/status
  Bytes pinned{};                     ///< VmPin of /proc/self/status
  bool exempt = false;                ///< CAP_IPC_LOCK is effective
};

}  // namespace iovane::backends
