// One side of Dekker's handshake for free.
//
// Purpose: a frequent thread announces (stores A, then reads B) and a rare one revokes (stores B, then reads A). At
//   least one of the two must see the other's store. Normally both need a full fence between store and load. Here the
//   frequent side has only a compiler barrier, and the rare side makes every running thread of the process execute a
//   fence: membarrier(2), MEMBARRIER_CMD_PRIVATE_EXPEDITED.
// Roles: announce() on the frequent side, heavy_barrier() on the rare side, any number of threads on both.
// Progress: announce() is wait-free. heavy_barrier() is one system call that interrupts running threads and waits for
//   no stopped one.
// Edges: announce(A) ... B.load  |  B.store ... heavy_barrier() ... A.load. If the announcing thread's load of B did
//   not see the store, its store of A reached memory before the barrier ended: the kernel's barrier is a full fence on
//   each CPU that runs one of our threads, and a thread that does not run passed one when it was switched out.
// Without membarrier (old kernels, seccomp filters), under sanitizers and under the yield-point scheduler, announce()
//   is a seq_cst store and heavy_barrier() a seq_cst read-modify-write: the textbook form, which ThreadSanitizer
//   understands. light_barrier() is then a full fence, and so is heavy_barrier().
// Source: membarrier(2); Linux Documentation/scheduler/membarrier.rst.
#pragma once

#include <atomic>

namespace iovane::base {

#if defined(IOVANE_SANITIZED) || defined(IOVANE_YIELD_POINTS) || !defined(__linux__)
inline constexpr bool asymmetric_barrier_possible = false;
#else
inline constexpr bool asymmetric_barrier_possible = true;
#endif

namespace detail {
// Set once, before the first announce(), by prepare_asymmetric_barrier(); never changes afterwards.
extern constinit std::atomic<bool> asymmetric_barrier_ready;
void full_fence() noexcept;
}  // namespace detail

/// Registers the process with membarrier(2). Call before the first announce() on data that heavy_barrier() revokes;
/// later calls do nothing. Any thread; one system call the first time.
void prepare_asymmetric_barrier() noexcept;

/// Stores `value` so that it takes part in the handshake with a following seq_cst load.
template <typename T>
inline void announce(std::atomic<T>& word, T value) noexcept {
  if constexpr (asymmetric_barrier_possible) {
    // relaxed: written once, before this thread could know the data structure.
    if (detail::asymmetric_barrier_ready.load(std::memory_order_relaxed)) [[likely]] {
      // W.announce - release: who sees this announcement sees what the thread did before it.
      word.store(value, std::memory_order_release);
      // Keeps the compiler from moving the following load up; the processor is kept from it by heavy_barrier().
      asm volatile("" ::: "memory");
      return;
    }
  }
  // W.announce - seq_cst: totally ordered with the revoker's store and load.
  word.store(value, std::memory_order_seq_cst);
}

/// Whether announce_fast() may be used. Constant once prepare_asymmetric_barrier() has returned.
inline bool fast_announce_allowed() noexcept {
  // relaxed: written once.
  return !asymmetric_barrier_possible || detail::asymmetric_barrier_ready.load(std::memory_order_relaxed);
}

/// announce() without asking at run time. Only where fast_announce_allowed() was true.
template <typename T>
inline void announce_fast(std::atomic<T>& word, T value) noexcept {
  if constexpr (asymmetric_barrier_possible) {
    // W.announce - as in announce().
    word.store(value, std::memory_order_release);
    asm volatile("" ::: "memory");
  } else {
    // W.announce - as in announce().
    word.store(value, std::memory_order_seq_cst);
  }
}

/// For a walk: between the announcement (a store of any order) and loads that are weaker than seq_cst. Where announce()
/// would be a seq_cst store this is a full fence, since such loads may pass that store (POWER, Arm with RCpc loads).
inline void light_barrier() noexcept {
  if constexpr (asymmetric_barrier_possible) {
    // relaxed: written once, before this thread could know the data structure.
    if (detail::asymmetric_barrier_ready.load(std::memory_order_relaxed)) [[likely]] {
      asm volatile("" ::: "memory");
      return;
    }
  }
  detail::full_fence();
}

/// Store before load, for both sides of a handshake that are frequent: nobody is interrupted and no line is shared.
inline void full_barrier() noexcept { detail::full_fence(); }

/// For tests of the strong form: from now on neither side uses membarrier(2). Before the first announcement.
void refuse_asymmetric_barrier() noexcept;

/// The rare side's fence: everything announced before it by a thread that did not see our store is visible after it.
/// Any thread; one system call of about a microsecond.
void heavy_barrier() noexcept;

}  // namespace iovane::base
