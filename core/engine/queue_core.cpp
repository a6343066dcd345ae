#include "engine/queue_core.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

#include "engine/space_core.hpp"

namespace iovane::engine {

namespace {

// Whether the worker lives is looked at so often by one who polls in vain.
constexpr std::uint32_t empty_polls_per_look = 4096;

}  // namespace

QueueCore::QueueCore(std::shared_ptr<SpaceCore> space, const QueueConfig& config, Worker* worker)
    : LaneNode{Kind::work},
      space_{std::move(space)},
      worker_{worker},
      never_block_{config.submit == SubmitMode::never_block},
      hand_over_bytes_{config.hand_over.value != 0 ? config.hand_over.value : ~std::uint64_t{0}},
      depth_{std::bit_ceil(config.depth)},
      mask_{depth_ - 1},
      operations_(depth_),
      completions_(depth_) {}

QueueCore::~QueueCore() {
  submit();
  std::array<Completion, 64> unread;
  while (outstanding() != 0) (void)wait(unread, 1, std::chrono::nanoseconds{-1});
  // The last delivery may still be on its way out of deliver(); whoever holds the lane is done with us once we held it.
  { const LaneHold settled{space_->lane()}; }
  if (worker_ != nullptr) worker_->forget(hand_over_);
}

void QueueCore::submit() noexcept {
  // relaxed: only this thread stores it.
  if (published_.load(std::memory_order_relaxed) == staged_) return;
  // R.publish - release, pairs with A.publish in take_published().
  published_.store(staged_, std::memory_order_release);
  const bool hand_over = never_block_ || staged_bytes_ >= hand_over_bytes_;
  staged_bytes_ = 0;
  if (!mark_queued()) return;
  if (hand_over && !worker_->is_dead())
    worker_->post(hand_over_);
  else
    space_->lane().enter(*this);
}

std::uint64_t QueueCore::HandOver::run_on_worker() noexcept {
  queue_.space_->lane().enter(queue_);
  return never;
}

std::size_t QueueCore::poll(std::span<Completion> out) noexcept {
  if (completed_seen_ == taken_) {
    // A.complete - acquire, pairs with R.complete in deliver().
    completed_seen_ = completed_.load(std::memory_order_acquire);
  }
  const std::size_t count = std::min<std::size_t>(out.size(), completed_seen_ - taken_);
  if (count == 0 && (++empty_polls_ & (empty_polls_per_look - 1)) == 0) [[unlikely]]
    look();
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

// Whether somebody has ended who had our batch: the worker it was handed to, or any that had the lane.
void QueueCore::look() noexcept {
  if (worker_ != nullptr) worker_->stand_in_if_dead();
  space_->lane().look();
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
      const bool watching = left.count() < 0 || left > Worker::death_watch;
      if (watching) left = Worker::death_watch;
      base::futex_wait(wakeups_, ticket, left);
      // relaxed: a look; poll() below takes with acquire.
      if (watching && completed_.load(std::memory_order_relaxed) == taken_) look();
    }
    sleeping_.store(false, std::memory_order_relaxed);  // relaxed: at worst one needless wake
    count += poll(out.subspan(count));
  }
  return count;
}

base::OneShot* QueueCore::run(bool for_another) noexcept {
  space_->executor().run(*this, for_another);
  return nullptr;
}

base::OneShot* QueueCore::resume() noexcept {
  space_->executor().resume(*this);
  return nullptr;
}

void QueueCore::deliver(std::uint32_t count) noexcept {
  executed_ += count;
  delivered_ = count;
  // R.complete - pairs with A.complete; sequentially consistent for the sake of sleeping_, see wait().
  completed_.store(executed_, std::memory_order_seq_cst);
  announce();
}

void QueueCore::announce() noexcept {
  // sequentially consistent: after the store in deliver(), see there.
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
  if (ring_post_) (void)ring_post_->post(delivered_);  // what the kernel cannot post stays to be polled
}

Result<void> QueueCore::deliver_to_ring(int ring_fd, std::uint64_t user_data) noexcept {
  std::unique_ptr<RingPost> post;
  if (ring_fd >= 0) {
    auto made = RingPost::create(ring_fd, user_data);
    if (!made) return made.error();
    post = *std::move(made);
  }
  const LaneHold held{space_->lane()};
  ring_post_ = std::move(post);
  // relaxed: the lane orders it.
  const std::uint64_t unread = completed_.load(std::memory_order_relaxed) - taken_;
  if (ring_post_ && unread != 0) (void)ring_post_->post(static_cast<std::uint32_t>(unread));
  return {};
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
