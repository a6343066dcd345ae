// DirectBatch: operations that a caller hands over as a whole and whose answers it wants as a whole, without a queue.
//
// Purpose: the way into an address space for who has all of a batch in hand: the synchronous calls, and a vIOMMU front
//   end's notification. The operations lie in an array of the caller's, their completions go into another. Where the
//   address space is idle the calling thread executes them before submit() returns, and of what a queue needs (rings,
//   indices, announcements) nothing is touched; where it is not, whoever is at work takes the batch along. The lane,
//   the executor and the contract are the queues'.
// Roles: the owner, one thread at a time, submits, waits and reads; the lane's holder executes, once per submit().
// Progress: submit() and done() never wait for another thread; wait() sleeps.
// Invariants: I1 from a submit() that says false until done() or wait() says true, both arrays and everything below
//   "the holder's" are the lane holder's; I2 a batch is in its lane at most once.
// Linearization: as the lane's; its end is the return of a submit() that says true, or the firing of `done_`.
// Edges: the lane's R.publish/A.collect bring the operations to another thread, `done_` (base::OneShot) brings the
//   completions back. On the owner's own thread neither is needed, and `done_` stays as it is.
// Reclamation: firing `done_` is the last thing that another thread does with the batch, so it may lie on the owner's
//   stack. With an event_fd() it writes to that afterwards, and the destructor waits for the end of the turn.
// Death: `executing_` says whether a thread that ended had more to do than to tell (resume()).
// Proven by: tests/unit/direct_batch_test.cpp, tests/model/direct_batch_model_test.cpp (beside a queue),
//   tests/stress/engine_stress_test.cpp (TSan), tests/fault/direct_batch_sweep_test.cpp,
//   tests/fault/worker_death_test.cpp.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "base/futex.hpp"
#include "base/unique_fd.hpp"
#include "engine/lane.hpp"
#include "engine/operation.hpp"

namespace iovane {
class AddressSpace;
}

namespace iovane::engine {

class BatchExecutor;
class SpaceCore;

class DirectBatch final : public LaneNode {
 public:
  /// `space` outlives it.
  explicit DirectBatch(SpaceCore& space) noexcept;
  DirectBatch(BatchExecutor& executor, Lane& lane) noexcept : LaneNode{Kind::work}, executor_{executor}, lane_{lane} {}
  /// Waits until what was submitted is final.
  ~DirectBatch() {
    if (pending_ || event_fd_) settle();
  }

  /// For owners who will submit again and again: what their batches are made with, and must not outlive. Whoever works
  /// for them too can be relieved from here on. Throws std::bad_alloc.
  static std::shared_ptr<SpaceCore> join(const AddressSpace& space);

  /// Hands the operations over, each of which completes in the place of the same number. True: all are final, and the
  /// completions the caller's again. False: another thread is at work in the address space and takes them along; both
  /// arrays are in use until done() or wait() says true. Precondition: done(). A link from the last operation leads
  /// nowhere.
  bool submit(std::span<const Operation> operations, std::span<Completion> completions) noexcept {
    operations_ = operations.data();
    completions_ = completions.data();
    count_ = operations.size();
    executed_ = 0;
    failures_ = 0;
    link_broken = false;
    pending_ = count_ != 0 && !lane_.enter(*this);
    return !pending_;
  }
  bool done() noexcept { return !pending_ || has_ended(); }
  /// The same, after sleeping for as long as `timeout` if need be; negative: without end.
  bool wait(std::chrono::nanoseconds timeout) noexcept;
  /// Of the last batch, once it is done: how many operations failed.
  std::size_t failures() const noexcept { return failures_; }
  /// An eventfd that becomes readable when a batch ends that submit() said false to; made on first use, which waits for
  /// a batch that is under way. -1 when that failed. Read it (it is a counter), then ask done().
  int event_fd() noexcept;

  // --- The lane holder's side.
  std::size_t left() const noexcept { return count_ - executed_; }
  Slice next_slice() const noexcept { return {operations_, completions_, executed_, ~std::uint64_t{0}}; }
  void executed(std::uint32_t operations, std::uint32_t failed) noexcept {
    executed_ += operations;
    failures_ += failed;
  }
  /// As QueueCore::link_broken, but a chain ends with its batch.
  bool link_broken = false;

 private:
  friend class Lane;
  base::OneShot* run(bool for_another) noexcept override;
  base::OneShot* resume() noexcept override;
  base::OneShot* tell() noexcept;
  void announce() noexcept;
  bool has_ended() noexcept;
  void settle() noexcept;

  // The owner's.
  BatchExecutor& executor_;
  Lane& lane_;
  bool pending_ = false;           // submit() said false, and nobody has looked at done_ since it was fired
  std::uint32_t empty_looks_ = 0;  // of has_ended()
  base::UniqueFd event_fd_;        // set while no batch is under way
  // The holder's.
  const Operation* operations_ = nullptr;
  Completion* completions_ = nullptr;
  std::size_t count_ = 0;
  std::size_t executed_ = 0;
  std::size_t failures_ = 0;
  bool executing_ = false;
  base::OneShot done_;
};

}  // namespace iovane::engine
