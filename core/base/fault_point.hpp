// Fault points: places where a test can make the nth attempt fail.
//
// A point costs one relaxed load and a predictable branch when no plan is armed. Plans are process-wide: a test arms
// one, runs its sequence, and disarms it. The fail-the-nth sweep (tests/fault) runs a passing sequence, then the same
// with the 1st, 2nd, ... attempt failing, until a run ends without reaching its n.
#pragma once

#include <atomic>
#include <cstdint>

namespace iovane::base {

/// What a fault point guards. A plan selects kinds with a bit mask.
enum class FaultKind : std::uint32_t {
  allocation = 1U << 0,   ///< memory for metadata
  kernel_call = 1U << 1,  ///< a call through backends::Kernel
  system_call = 1U << 2,  ///< any other system call: no points of the library's, tests stand in for the C library
};

namespace detail {
// Attempts left until the one that fails; 0 when disarmed. Counts down through 1, where the failure happens.
extern constinit std::atomic<std::uint64_t> fault_countdown;
extern constinit std::atomic<std::uint32_t> fault_kinds;
bool count_attempt(FaultKind kind) noexcept;
}  // namespace detail

/// True when this attempt is to fail. Any thread, lock-free.
inline bool fault_now(FaultKind kind) noexcept {
  // relaxed: no data is read through the flag; a test arms the plan before it starts the threads it watches.
  if (detail::fault_countdown.load(std::memory_order_relaxed) == 0) [[likely]]
    return false;
  return detail::count_attempt(kind);
}

/// Makes the nth attempt (from 1) at any point of `kinds` fail, once. Replaces an armed plan.
void arm_fault(std::uint32_t kinds, std::uint64_t nth) noexcept;
/// Disarms; true when the armed plan had made its attempt fail (a sweep ends at the first false).
bool disarm_fault() noexcept;

}  // namespace iovane::base
