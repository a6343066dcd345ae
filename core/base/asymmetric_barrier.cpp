#include "base/asymmetric_barrier.hpp"

#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace iovane::base {
namespace detail {
constinit std::atomic<bool> asymmetric_barrier_ready{false};

void full_fence() noexcept {
#if defined(IOVANE_SANITIZED)
  // ThreadSanitizer sees no fences (g++ -Wtsan). A locked instruction is one on the platforms it runs on.
  thread_local std::atomic<unsigned> own{0};
  own.fetch_add(1, std::memory_order_seq_cst);  // seq_cst: it stands in for a full fence
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);  // seq_cst: store before load, on both sides
#endif
}
}  // namespace detail

namespace {
// The textbook form's meeting point: every revoker passes through one location in one total order.
constinit std::atomic<unsigned> revocations{0};
constinit std::atomic<bool> refused{false};

[[maybe_unused]] long membarrier(int command) noexcept { return ::syscall(SYS_membarrier, command, 0, 0); }
}  // namespace

void prepare_asymmetric_barrier() noexcept {
  if constexpr (asymmetric_barrier_possible) {
    // relaxed: registering twice is harmless.
    if (detail::asymmetric_barrier_ready.load(std::memory_order_relaxed)) return;
    if (refused.load(std::memory_order_relaxed)) return;  // relaxed: tests only, see refuse_asymmetric_barrier()
    const long offered = membarrier(MEMBARRIER_CMD_QUERY);
    if (offered < 0 || (offered & MEMBARRIER_CMD_PRIVATE_EXPEDITED) == 0) return;
    if (membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED) != 0) return;
    // seq_cst: threads that used the strong form before stay correct, the weak form only starts after registration.
    detail::asymmetric_barrier_ready.store(true, std::memory_order_seq_cst);
  }
}

void refuse_asymmetric_barrier() noexcept {
  refused.store(true, std::memory_order_relaxed);                            // relaxed: before the first announcement
  detail::asymmetric_barrier_ready.store(false, std::memory_order_relaxed);  // relaxed: as above
}

void heavy_barrier() noexcept {
  // seq_cst: the strong form of the fence, needed when announcers use seq_cst stores.
  revocations.fetch_add(1, std::memory_order_seq_cst);
  detail::full_fence();  // for announcers that use light_barrier()
  if constexpr (asymmetric_barrier_possible) {
    // relaxed: set before any announcer could rely on the weak form.
    if (detail::asymmetric_barrier_ready.load(std::memory_order_relaxed)) membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED);
  }
}

}  // namespace iovane::base
