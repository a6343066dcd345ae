#include "pinning/asymmetric_barrier.hpp"

#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace iovane::pinning {

constinit std::atomic<int> AsymmetricBarrier::mode_{static_cast<int>(Mode::undecided)};

AsymmetricBarrier::Mode AsymmetricBarrier::prepare() noexcept {
  // relaxed: the value decides only which barrier is used; nothing is read through it.
  int seen = mode_.load(std::memory_order_relaxed);
  if (seen == static_cast<int>(Mode::undecided)) {
    const bool registered = syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0) == 0;
    const int wanted = static_cast<int>(registered ? Mode::process_wide : Mode::full_fence);
    // relaxed, as above. A race with force_full_fence() leaves that one's choice.
    if (mode_.compare_exchange_strong(seen, wanted, std::memory_order_relaxed, std::memory_order_relaxed))
      seen = wanted;
  }
  return static_cast<Mode>(seen);
}

void AsymmetricBarrier::force_full_fence() noexcept {
  mode_.store(static_cast<int>(Mode::full_fence), std::memory_order_relaxed);  // relaxed: see prepare()
}

void AsymmetricBarrier::heavy() noexcept {
  // relaxed: see prepare().
  if (mode_.load(std::memory_order_relaxed) == static_cast<int>(Mode::process_wide))
    // After a successful registration this cannot fail (membarrier(2), ERRORS).
    syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0);
  else
    full_fence();
}

void AsymmetricBarrier::full_fence() noexcept {
#if defined(__SANITIZE_THREAD__)
  thread_local std::atomic<int> own{0};
  own.fetch_add(1, std::memory_order_seq_cst);  // a locked instruction on TSan's platforms: a full barrier there
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
  thread_local std::atomic<int> own{0};
  own.fetch_add(1, std::memory_order_seq_cst);  // seq_cst, as above: a full barrier
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

}  // namespace iovane::pinning
