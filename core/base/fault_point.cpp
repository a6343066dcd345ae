#include "base/fault_point.hpp"

namespace iovane::base {
namespace detail {

constinit std::atomic<std::uint64_t> fault_countdown{0};
constinit std::atomic<std::uint32_t> fault_kinds{0};

namespace {
constinit std::atomic<bool> fired{false};
}

bool count_attempt(FaultKind kind) noexcept {
  // relaxed throughout: the countdown is a number nobody reads data through.
  if ((fault_kinds.load(std::memory_order_relaxed) & static_cast<std::uint32_t>(kind)) == 0) return false;
  std::uint64_t left = fault_countdown.load(std::memory_order_relaxed);
  while (left != 0 &&
         !fault_countdown.compare_exchange_weak(left, left - 1, std::memory_order_relaxed, std::memory_order_relaxed)) {
    // bounded: each retry means that another thread made its own attempt count.
  }
  if (left != 1) return false;
  fired.store(true, std::memory_order_relaxed);
  return true;
}

}  // namespace detail

void arm_fault(std::uint32_t kinds, std::uint64_t nth) noexcept {
  detail::fault_kinds.store(kinds, std::memory_order_relaxed);
  detail::fired.store(false, std::memory_order_relaxed);
  // release: pairs with nothing in the library; a test that arms before it starts threads is ordered by their start.
  detail::fault_countdown.store(nth, std::memory_order_release);
}

bool disarm_fault() noexcept {
  detail::fault_countdown.store(0, std::memory_order_relaxed);
  return detail::fired.exchange(false, std::memory_order_relaxed);
}

}  // namespace iovane::base
