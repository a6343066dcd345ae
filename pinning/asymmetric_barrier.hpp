// A store-load barrier whose cost lies on one side.
//
// Purpose: a reader announces itself with a plain store and then looks; a reclaimer removes and then looks for
//   announcements. Dekker's argument needs a full barrier between store and load on both sides. Here the reader's is
//   only a promise of the compiler, and the reclaimer's, membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED), makes every
//   running thread of the process pass a full barrier (Documentation of membarrier(2), Linux 4.14).
// Guarantee: for a reader's (store S, light(), load L) and a reclaimer's (store T, heavy(), load M):
//   L sees T or M sees S.
// Where membarrier is refused (old kernel, seccomp), both sides use full fences and the guarantee stays.
// TSan: fences are invisible to it (g++ -Wtsan), so the fallback's full fence becomes a read-modify-write of a
//   thread's own word. The membarrier path needs nothing: the hardware does it, and the happens-before edges that
//   TSan checks are those of the guard words (release on drop, acquire in the scan), which do not rest on it.
// Proven by: tests/stress/pin_lease_stress_test.cpp in both modes; a litmus-like loop in
// tests/unit/pin_barrier_test.cpp.
#pragma once

#include <atomic>

namespace iovane::pinning {

class AsymmetricBarrier {
 public:
  enum class Mode : int { undecided, process_wide, full_fence };

  /// Registers the process with membarrier, once. Any thread; the first call may take a system call.
  static Mode prepare() noexcept;
  /// For tests of the fallback: from now on both sides use full fences. Call it before any lease exists.
  static void force_full_fence() noexcept;

  /// The reader's side, between its announcement and its first look.
  static void light() noexcept {
    // relaxed: the mode changes only before the first lease; a mode other than process_wide takes the strong path.
    if (mode_.load(std::memory_order_relaxed) == static_cast<int>(Mode::process_wide)) [[likely]]
      std::atomic_signal_fence(std::memory_order_seq_cst);
    else
      full_fence();
  }
  /// The reclaimer's side, between its removal and its look at the announcements. About 0.4 to 5 us.
  static void heavy() noexcept;

 private:
  static void full_fence() noexcept;
  static std::atomic<int> mode_;
};

}  // namespace iovane::pinning
