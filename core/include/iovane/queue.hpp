// Queue: one thread's pair of rings into an address space.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <span>

#include "iovane/request.hpp"
#include "iovane/result.hpp"

namespace iovane {

namespace engine {
class QueueCore;
}

/// Stage operations, submit them as a batch, poll their completions. One thread at a time; different queues of one
/// address space may be used by different threads. Bounded: an operation occupies one of `depth` places from stage()
/// until its completion was polled, so no completion is ever lost and a full queue is a short count.
///
/// submit() runs the batch on the calling thread when the address space is idle; when another thread is at work in it,
/// that thread takes this batch along and submit() returns at once. Either way completions arrive by poll() or wait().
class Queue {
 public:
  Queue() noexcept;
  Queue(Queue&&) noexcept;
  Queue& operator=(Queue&&) noexcept;
  /// Submits what is staged, waits until everything submitted is final, and drops unread completions.
  ~Queue();

  /// Stages one operation; false when the queue is full (poll, then try again). Malformed requests are staged too and
  /// complete with their error: one error path. Never blocks, allocates or enters the kernel.
  [[nodiscard]] bool stage(const MapRequest& request) noexcept;
  [[nodiscard]] bool stage(const UnmapRequest& request) noexcept;
  [[nodiscard]] bool stage(const ReplaceRequest& request) noexcept;
  /// Everything staged before is final before anything staged after begins. Completes like an operation.
  [[nodiscard]] bool stage_fence(std::uint64_t user_data) noexcept;

  /// Relaxed mode: when it completes, no device can reach what was unmapped before it; `bytes` says how much that was.
  /// A fence in strict mode.
  [[nodiscard]] bool stage_flush(std::uint64_t user_data) noexcept;

  /// Stages a prefix in order; returns its length, short only when the queue is full.
  template <typename Request>
  [[nodiscard]] std::size_t stage(std::span<const Request> requests) noexcept {
    std::size_t staged = 0;
    while (staged < requests.size() && stage(requests[staged])) ++staged;
    return staged;
  }

  /// Publishes everything staged as one batch. May run it, or batches of other threads, on the calling thread.
  void submit() noexcept;
  /// Takes up to out.size() completions. Never blocks.
  [[nodiscard]] std::size_t poll(std::span<Completion> out) noexcept;
  /// As poll(), but blocks until `count_min` completions were taken or the time ran out; then returns what there is.
  /// Returns at once when fewer than `count_min` operations are outstanding and all of them were taken.
  [[nodiscard]] std::size_t wait(std::span<Completion> out, std::size_t count_min,
                                 std::chrono::nanoseconds timeout) noexcept;
  /// An eventfd that becomes readable when completions arrive while none were waiting; created on first use, -1 when
  /// that failed. Read it (it is a counter), then poll() until empty. Owned by the queue.
  [[nodiscard]] int event_fd() noexcept;

  /// From now on posts an entry into the caller's own io_uring whenever completions arrive: user_data as given, res =
  /// how many; poll() takes them. The ring (its ring_fd) is borrowed until the queue is destroyed or another is given;
  /// -1 ends it. Costs whoever executes the batch one system call per batch. What is unread already is announced at
  /// once. Errors: unsupported, invalid_argument (not a ring); then nothing changes.
  Result<void> deliver_to_ring(int ring_fd, std::uint64_t user_data) noexcept;

  /// Places left for stage().
  [[nodiscard]] std::size_t space_left() const noexcept;
  /// Operations submitted or staged whose completions were not taken yet.
  [[nodiscard]] std::size_t outstanding() const noexcept;

 private:
  friend class AddressSpace;
  explicit Queue(std::unique_ptr<engine::QueueCore> core) noexcept;
  std::unique_ptr<engine::QueueCore> core_;
};

}  // namespace iovane
