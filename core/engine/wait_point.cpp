#include "engine/wait_point.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <new>
#include <utility>

#include "base/error_text.hpp"
#include "base/os_error.hpp"

namespace iovane::engine {

namespace {

constexpr unsigned ring_entries = 64;  // prepared at once; more are submitted in turns
// Beside watches (place and generation), completions are of:
constexpr std::uint64_t of_doorbell = ~std::uint64_t{0};
constexpr std::uint64_t of_removal = ~std::uint64_t{0} - 1;

constexpr std::uint64_t tag_of(std::uint32_t place, std::uint32_t generation) noexcept {
  return std::uint64_t{generation} << 32 | place;
}

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
  try {
    return std::unique_ptr<WaitPoint>{new WaitPoint{std::move(doorbell)}};
  } catch (const std::bad_alloc&) {
    return make_error(Errc::out_of_memory, Stage::open, "no memory for a worker's wait point");
  }
}

WaitPoint::WaitPoint(base::UniqueFd doorbell) : doorbell_{std::move(doorbell)}, polled_(1) {
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

bool WaitPoint::watch(DescriptorWatch& watch) noexcept {
  std::size_t place = 0;
  while (place < slots_.size() && slots_[place].watch != nullptr) ++place;
  if (place == slots_.size()) {
    if (place == watches_max) return false;
    try {
      polled_.reserve(slots_.size() + 2);
      slots_.emplace_back();
    } catch (const std::bad_alloc&) {
      return false;
    }
  }
  slots_[place].watch = &watch;
  watch.place = static_cast<std::uint32_t>(place);
  watch.watched = true;
  ++watched_;
  unarmed_ = true;
  return true;
}

void WaitPoint::unwatch(DescriptorWatch& watch) noexcept {
  if (!watch.watched) return;
  Slot& slot = slots_[watch.place];
  const std::uint64_t tag = tag_of(watch.place, slot.generation);
  watch.watched = false;
  slot.watch = nullptr;
  if (slot.ready) --ready_;
  slot.ready = false;
  --watched_;
  // Its poll holds the file until it completes. A thousand tries: the kernel answers the first.
  bool asked = false;
  for (int tries = 0; has_ring_ && slot.armed && tries < 1000; ++tries) {
    if (!asked) {
      if (io_uring_sqe* const sqe = next_sqe()) {
        io_uring_prep_poll_remove(sqe, tag);
        io_uring_sqe_set_data64(sqe, of_removal);
        asked = true;
      }
    }
    io_uring_submit_and_wait(&uring_, 1);
    reap();
  }
  ++slot.generation;
  slot.armed = false;
}

DescriptorWatch* WaitPoint::next_ready() noexcept {
  if (ready_ == 0) return nullptr;
  for (Slot& slot : slots_) {
    if (!slot.ready) continue;
    slot.ready = false;
    --ready_;
    unarmed_ = true;
    return slot.watch;
  }
  return nullptr;
}

void WaitPoint::look() noexcept {
  if (!has_ring_) return sleep_in_poll(std::chrono::nanoseconds{0});
  if (unarmed_ && prepare()) io_uring_submit(&uring_);
  reap();
}

io_uring_sqe* WaitPoint::next_sqe() noexcept {
  io_uring_sqe* sqe = io_uring_get_sqe(&uring_);
  if (sqe != nullptr) return sqe;
  io_uring_submit(&uring_);
  return io_uring_get_sqe(&uring_);
}

// Asks for everything that is not asked for; false when the ring takes no more just now.
bool WaitPoint::prepare() noexcept {
  if (!reading_) {
    io_uring_sqe* const sqe = next_sqe();
    if (sqe == nullptr) return false;
    io_uring_prep_read(sqe, doorbell_.get(), &rings_, sizeof rings_, 0);
    io_uring_sqe_set_data64(sqe, of_doorbell);
    reading_ = true;
  }
  if (!unarmed_) return true;
  for (std::size_t place = 0; place < slots_.size(); ++place) {
    Slot& slot = slots_[place];
    if (slot.watch == nullptr || slot.armed || slot.ready) continue;
    io_uring_sqe* const sqe = next_sqe();
    if (sqe == nullptr) return false;
    io_uring_prep_poll_add(sqe, slot.watch->fd, POLLIN);
    io_uring_sqe_set_data64(sqe, tag_of(static_cast<std::uint32_t>(place), slot.generation));
    slot.armed = true;
  }
  unarmed_ = false;
  return true;
}

void WaitPoint::reap() noexcept {
  io_uring_cqe* cqe = nullptr;
  unsigned head = 0;
  unsigned seen = 0;
  io_uring_for_each_cqe(&uring_, head, cqe) {
    ++seen;
    const std::uint64_t tag = io_uring_cqe_get_data64(cqe);
    if (tag == of_removal) continue;
    if (tag == of_doorbell) {
      // -EAGAIN where the kernel does not wait for a non-blocking descriptor: go on by poll(2), which always works.
      if (cqe->res == -EAGAIN) has_ring_ = false;
      reading_ = false;
      continue;
    }
    const auto place = static_cast<std::uint32_t>(tag);
    Slot& slot = slots_[place];
    if (tag != tag_of(place, slot.generation)) continue;
    slot.armed = false;
    unarmed_ = true;
    // The thread that asked has ended: what it asked for is cancelled, and asked for anew.
    if (cqe->res == -ECANCELED || slot.watch == nullptr) continue;
    if (!slot.ready) ++ready_;
    slot.ready = true;  // also on an error: who reads the descriptor meets it
  }
  io_uring_cq_advance(&uring_, seen);
  if (!has_ring_) leave_ring();
}

void WaitPoint::leave_ring() noexcept {
  io_uring_queue_exit(&uring_);
  for (Slot& slot : slots_) slot.armed = false;
}

void WaitPoint::sleep_on_ring(std::chrono::nanoseconds timeout) noexcept {
  if (!prepare()) return sleep_in_poll(timeout);
  io_uring_cqe* cqe = nullptr;
  auto limit = timespec_of<__kernel_timespec>(timeout);
  io_uring_submit_and_wait_timeout(&uring_, &cqe, 1, timeout.count() >= 0 ? &limit : nullptr, nullptr);
  reap();
}

void WaitPoint::sleep_in_poll(std::chrono::nanoseconds timeout) noexcept {
  polled_.clear();
  polled_.push_back({doorbell_.get(), POLLIN, 0});  // watch() made the room
  for (const Slot& slot : slots_)
    polled_.push_back({slot.watch != nullptr && !slot.ready ? slot.watch->fd : -1, POLLIN, 0});
  const auto limit = timespec_of<timespec>(timeout);
  if (::ppoll(polled_.data(), polled_.size(), timeout.count() >= 0 ? &limit : nullptr, nullptr) <= 0) return;
  if (polled_[0].revents != 0) [[maybe_unused]]
    const ssize_t got = ::read(doorbell_.get(), &rings_, sizeof rings_);
  for (std::size_t place = 0; place < slots_.size(); ++place) {
    if (polled_[place + 1].revents == 0) continue;
    slots_[place].ready = true;
    ++ready_;
  }
}

}  // namespace iovane::engine
