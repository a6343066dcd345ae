#include "engine/direct_batch.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include "engine/space_core.hpp"
#include "iovane/address_space.hpp"

namespace iovane::engine {

namespace {

// Whether the lane's holder lives is looked at so often by one who looks in vain.
constexpr std::uint32_t empty_looks_per_watch = 4096;

}  // namespace

DirectBatch::DirectBatch(SpaceCore& space) noexcept : DirectBatch{space.executor(), space.lane()} {}

std::shared_ptr<SpaceCore> DirectBatch::join(const AddressSpace& space) {
  space.core_->expect_company();
  return space.core_;
}

base::OneShot* DirectBatch::run(bool for_another) noexcept {
  executing_ = true;
  executor_.run(*this, for_another);
  if (for_another) return tell();
  executing_ = false;
  return nullptr;
}

base::OneShot* DirectBatch::resume() noexcept {
  if (executing_) {
    executor_.resume(*this);
    return tell();
  }
  announce();  // the owner may know already, and may have submitted again
  return nullptr;
}

// What the lane fires when it is through with us; with a descriptor to be told after that, nothing.
base::OneShot* DirectBatch::tell() noexcept {
  executing_ = false;
  if (!event_fd_) return &done_;
  done_.fire();
  announce();
  return nullptr;
}

void DirectBatch::announce() noexcept {
  if (!event_fd_) return;
  const std::uint64_t one = 1;
  // A full counter (2^64-2 batches unread) is readable anyway; nothing else can fail on our own eventfd.
  [[maybe_unused]] const ssize_t written = ::write(event_fd_.get(), &one, sizeof one);
}

bool DirectBatch::has_ended() noexcept {
  if (!done_.has_fired()) {
    if ((++empty_looks_ & (empty_looks_per_watch - 1)) == 0) lane_.look();
    return false;
  }
  done_.rearm();
  pending_ = false;
  return true;
}

bool DirectBatch::wait(std::chrono::nanoseconds timeout) noexcept {
  return done() || (lane_.wait_for(done_, timeout) && has_ended());
}

int DirectBatch::event_fd() noexcept {
  if (!event_fd_) {
    const LaneHold held{lane_};  // nobody is about to tell
    event_fd_ = base::UniqueFd{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    if (pending_) announce();  // it has ended by now
  }
  return event_fd_.get();
}

void DirectBatch::settle() noexcept {
  (void)wait(std::chrono::nanoseconds{-1});
  // Whoever told us may still be about the descriptor, and is done with us once we held the lane.
  const LaneHold settled{lane_};
}

}  // namespace iovane::engine
