#include "engine/wait_point.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "base/error_text.hpp"
#include "base/os_error.hpp"

namespace iovane::engine {

namespace {

constexpr unsigned ring_entries = 4;  // one read outstanding, one being prepared

template <typename Timespec>
Timespec timespec_of(std::chrono::nanoseconds duration) noexcept {
  Timespec spec{};
  spec.tv_sec = duration.count() / 1'000'000'000;
  spec.tv_nsec = duration.count() % 1'000'000'000;
  return spec;
}

}  // namespace

Result<std::unique_ptr<WaitPoint>> WaitPoint::create() {
  base::UniqueFd doorbell{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  if (!doorbell)
    return base::fail(base::errc_from_errno(errno), Stage::open, errno,
                      "no eventfd for a worker's doorbell; is the limit of open files reached?");
  return std::unique_ptr<WaitPoint>{new WaitPoint{std::move(doorbell)}};
}

WaitPoint::WaitPoint(base::UniqueFd doorbell) noexcept : doorbell_{std::move(doorbell)} {
  has_ring_ = io_uring_queue_init(ring_entries, &uring_, 0) == 0;
}

WaitPoint::~WaitPoint() {
  if (has_ring_) io_uring_queue_exit(&uring_);  // cancels the read
}

void WaitPoint::ring() noexcept {
  const std::uint64_t one = 1;
  // Fails only when 2^64-2 rings were not heard, and then it is readable anyway.
  [[maybe_unused]] const ssize_t written = ::write(doorbell_.get(), &one, sizeof one);
}

void WaitPoint::sleep(std::chrono::nanoseconds timeout) noexcept {
  if (has_ring_)
    sleep_on_ring(timeout);
  else
    sleep_in_poll(timeout);
}

void WaitPoint::sleep_on_ring(std::chrono::nanoseconds timeout) noexcept {
  if (!reading_) {
    io_uring_sqe* const sqe = io_uring_get_sqe(&uring_);
    if (sqe == nullptr) return sleep_in_poll(timeout);
    io_uring_prep_read(sqe, doorbell_.get(), &rings_, sizeof rings_, 0);
    reading_ = true;
  }
  io_uring_cqe* cqe = nullptr;
  auto limit = timespec_of<__kernel_timespec>(timeout);
  io_uring_submit_and_wait_timeout(&uring_, &cqe, 1, timeout.count() >= 0 ? &limit : nullptr, nullptr);
  unsigned head = 0;
  unsigned seen = 0;
  io_uring_for_each_cqe(&uring_, head, cqe) {
    ++seen;
    // -EAGAIN where the kernel does not wait for a non-blocking descriptor: go on by poll(2), which always works.
    if (cqe->res == -EAGAIN) has_ring_ = false;
    reading_ = false;
  }
  io_uring_cq_advance(&uring_, seen);
  if (!has_ring_) io_uring_queue_exit(&uring_);
}

void WaitPoint::sleep_in_poll(std::chrono::nanoseconds timeout) noexcept {
  pollfd doorbell{doorbell_.get(), POLLIN, 0};
  const auto limit = timespec_of<timespec>(timeout);
  if (::ppoll(&doorbell, 1, timeout.count() >= 0 ? &limit : nullptr, nullptr) > 0) [[maybe_unused]]
    const ssize_t got = ::read(doorbell_.get(), &rings_, sizeof rings_);
}

}  // namespace iovane::engine
