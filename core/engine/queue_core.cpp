#include "engine/queue_core.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "engine/space_core.hpp"

namespace iovane::engine {

QueueCore::QueueCore(std::shared_ptr<SpaceCore> space, std::uint32_t depth)
    : LaneNode{Kind::work},
      space_{std::move(space)},
      depth_{depth},
      mask_{depth - 1},
      operations_(depth),
      completions_(depth) {}

QueueCore::~QueueCore() {
  submit();
  std::array<Completion, 64> unread;
  while (outstanding() != 0) (void)wait(unread, 1, std::chrono::nanoseconds{-1});
  // The last delivery may still be on its way out of deliver(); whoever holds the lane is done with us once we held it.
  const LaneHold settled{space_->lane()};
}

void QueueCore::submit() noexcept {
  // relaxed: only this thread stores it.
  if (published_.load(std::memory_order_relaxed) == staged_) return;
  // R.publish - release, pairs with A.publish in take_published().
  published_.store(staged_, std::memory_order_release);
  if (mark_queued()) space_->lane().enter(*this);
}

std::size_t QueueCore::poll(std::span<Completion> out) noexcept {
  if (completed_seen_ == taken_) {
    // A.complete - acquire, pairs with R.complete in deliver().
    completed_seen_ = completed_.load(std::memory_order_acquire);
  }
  const std::size_t count = std::min<std::size_t>(out.size(), completed_seen_ - taken_);
  for (std::size_t i = 0; i < count; ++i) {
    // Member by member, as it was written, perhaps just now: see stage().
    const Completion& from = completions_[taken_++ & mask_];
    Completion& to = out[i];
    to.user_data = from.user_data;
    to.error = from.error;
    to.iova = from.iova;
    to.bytes = from.bytes;
    to.mapping = from.mapping;
  }
  return count;
}

std::size_t QueueCore::wait(std::span<Completion> out, std::size_t count_min,
                            std::chrono::nanoseconds timeout) noexcept {
  using Clock = std::chrono::steady_clock;
  std::size_t count = poll(out);
  const std::size_t wanted = std::min(count_min, out.size());
  const Clock::time_point start = count < wanted && timeout.count() > 0 ? Clock::now() : Clock::time_point{};
  while (count < wanted) {
    // relaxed: our own store in submit(); what was never submitted never completes.
    if (published_.load(std::memory_order_relaxed) == taken_) break;
    const std::uint32_t ticket = wakeups_.load(std::memory_order_acquire);
    // sequentially consistent, pairs with the load in deliver(): either it sees that we sleep, or our poll() below
    // sees its completions. (Store-to-load order: Dekker.)
    sleeping_.store(true, std::memory_order_seq_cst);
    if (completed_.load(std::memory_order_seq_cst) == taken_) {
      std::chrono::nanoseconds left{-1};
      if (timeout.count() >= 0) {
        left = timeout - (timeout.count() > 0 ? Clock::now() - start : std::chrono::nanoseconds{0});
        if (left.count() <= 0) {
          sleeping_.store(false, std::memory_order_relaxed);  // relaxed: at worst one needless wake
          break;
        }
      }
      base::futex_wait(wakeups_, ticket, left);
    }
    sleeping_.store(false, std::memory_order_relaxed);  // relaxed: at worst one needless wake
    count += poll(out.subspan(count));
  }
  return count;
}

void QueueCore::run() noexcept { space_->executor().run(*this); }

void QueueCore::deliver(std::uint32_t count) noexcept {
  executed_ += count;
  // R.complete - pairs with A.complete; sequentially consistent for the sake of sleeping_, see wait().
  completed_.store(executed_, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst)) {
    wakeups_.fetch_add(1, std::memory_order_release);
    base::futex_wake_all(wakeups_);
  }
  // acquire: pairs with the release in event_fd(), after which the descriptor is open.
  if (const int target = event_target_.load(std::memory_order_acquire); target >= 0) {
    const std::uint64_t one = 1;
    // A full counter (2^64-2 deliveries unread) is readable anyway; nothing else can fail on our own eventfd.
    [[maybe_unused]] const ssize_t written = ::write(target, &one, sizeof one);
  }
}

int QueueCore::event_fd() noexcept {
  if (!event_fd_) {
    event_fd_ = base::UniqueFd{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    // release: pairs with the acquire in deliver().
    event_target_.store(event_fd_.get(), std::memory_order_release);
    // Completions that arrived before are announced too.
    if (event_fd_ && completed_.load(std::memory_order_acquire) != taken_) {
      const std::uint64_t one = 1;
      [[maybe_unused]] const ssize_t written = ::write(event_fd_.get(), &one, sizeof one);
    }
  }
  return event_fd_.get();
}

}  // namespace iovane::engine
