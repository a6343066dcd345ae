// QueueCore: the rings behind Queue.
//
// Purpose: carry operations from one owner thread to whoever holds the address space's lane, and completions back.
// Roles: the owner stages, publishes, and takes completions; the lane's holder (one at a time, ordered by the lane)
//   reads operations and publishes completions.
// Progress: every call is wait-free but wait(), which sleeps.
// State: two rings of one capacity. An operation occupies a place from stage() until its completion was taken, so the
//   owner alone knows what is free: staged_ - taken_, both its own, and neither ring can overflow.
// Invariants: I1 executed_ <= published_ <= staged_; I2 taken_ <= completed_ == executed_ at every release of the lane.
//   Indices are 64-bit counts that never wrap in practice (2^64 operations).
// Linearization: R.publish makes a batch part of the queue; R.complete makes a completion takeable.
// Edges: R.publish/A.publish (operations), R.complete/A.complete (completions), and `queued_`, see mark_queued().
// Proven by: tests/unit/queue_test.cpp, tests/stress/engine_stress_test.cpp (TSan).
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <type_traits>
#include <vector>

#include "base/cacheline.hpp"
#include "base/unique_fd.hpp"
#include "engine/lane.hpp"
#include "engine/operation.hpp"
#include "engine/ring_post.hpp"
#include "engine/worker.hpp"
#include "iovane/config.hpp"
#include "iovane/request.hpp"

namespace iovane::engine {

class SpaceCore;

class QueueCore final : public LaneNode {
 public:
  /// `worker`: for batches that are handed over; null where there are none. Throws std::bad_alloc.
  QueueCore(std::shared_ptr<SpaceCore> space, const QueueConfig& config, Worker* worker);
  ~QueueCore();

  // --- The owner's side.
  /// Makes the operation in its place: what was written in pieces a moment ago is slow to copy as a whole.
  template <typename Request>
  bool stage(const Request& request) noexcept {
    if (staged_ - taken_ == depth_) return false;
    if constexpr (std::is_same_v<Request, MapRequest>) staged_bytes_ += request.memory.length.value;
    std::construct_at(&operations_[staged_++ & mask_], request);
    return true;
  }
  void submit() noexcept;
  std::size_t poll(std::span<Completion> out) noexcept;
  std::size_t wait(std::span<Completion> out, std::size_t count_min, std::chrono::nanoseconds timeout) noexcept;
  int event_fd() noexcept;
  Result<void> deliver_to_ring(int ring_fd, std::uint64_t user_data) noexcept;
  std::size_t space_left() const noexcept { return depth_ - (staged_ - taken_); }
  std::size_t outstanding() const noexcept { return staged_ - taken_; }

  // --- The lane holder's side.
  base::OneShot* run(bool for_another) noexcept override;
  base::OneShot* resume() noexcept override;
  /// Forgets that the node was queued, then says how far the owner has published. In this order: an owner that
  /// publishes later queues the node again.
  std::uint64_t take_published() noexcept {
    // acquire-release: pairs with mark_queued(); the owner's publication before its exchange is visible below.
    queued_.exchange(false, std::memory_order_acq_rel);
    // A.publish - acquire, pairs with R.publish in submit().
    return published_.load(std::memory_order_acquire);
  }
  std::uint64_t executed() const noexcept { return executed_; }
  /// The operations from executed() on, and the places of their completions: these are the holder's until deliver().
  Slice next_slice() noexcept { return {operations_.data(), completions_.data(), executed_, mask_}; }
  /// Shows the completions of the next `count` operations to the owner.
  void deliver(std::uint32_t count) noexcept;
  /// Tells the owner of the last delivery, wherever it wants to hear of it; again where a thread ended over that.
  void announce() noexcept;
  void look() noexcept;
  /// True when an operation that was linked to the next one failed; lives as long as the queue, so a chain may span
  /// batches.
  bool link_broken = false;

 private:
  /// The worker's errand: to enter the lane for the queue.
  class HandOver final : public WorkerTask {
   public:
    explicit HandOver(QueueCore& queue) noexcept : queue_{queue} {}

   private:
    std::uint64_t run_on_worker() noexcept override;
    QueueCore& queue_;
  };

  /// True when the node has to be published in the lane; false when it waits there already.
  bool mark_queued() noexcept {
    // acquire-release: a holder that cleared the flag before us has read `published_` before us too, so we queue again;
    // one that clears it after us sees our publication.
    return !queued_.exchange(true, std::memory_order_acq_rel);
  }

  const std::shared_ptr<SpaceCore> space_;
  Worker* const worker_;
  const bool never_block_;
  const std::uint64_t hand_over_bytes_;  // batches that map so much go to the worker; UINT64_MAX: none
  const std::uint64_t depth_;
  const std::uint64_t mask_;
  std::vector<Operation> operations_;
  std::vector<Completion> completions_;

  // The owner's own.
  std::uint64_t staged_ = 0;
  std::uint64_t taken_ = 0;
  std::uint64_t completed_seen_ = 0;
  std::uint64_t staged_bytes_ = 0;  // by maps, since the last submit
  std::uint32_t empty_polls_ = 0;   // counted where there is a worker
  HandOver hand_over_{*this};
  base::UniqueFd event_fd_;

  alignas(base::cacheline_bytes) std::atomic<std::uint64_t> published_{0};
  std::atomic<bool> queued_{false};

  // The holder's.
  alignas(base::cacheline_bytes) std::atomic<std::uint64_t> completed_{0};
  std::atomic<std::uint32_t> wakeups_{0};  // futex word: changes with every delivery that somebody waits for
  std::uint64_t executed_ = 0;
  std::uint32_t delivered_ = 0;  // by the last delivery
  std::unique_ptr<RingPost> ring_post_;

  // Written by the owner before it sleeps, read by the holder after it published.
  alignas(base::cacheline_bytes) std::atomic<bool> sleeping_{false};
  std::atomic<int> event_target_{-1};
};

}  // namespace iovane::engine
