#include "engine/space_events.hpp"

#include <poll.h>

#include <new>

#include "base/error_text.hpp"
#include "engine/monotonic.hpp"
#include "engine/space_core.hpp"
#include "iovane/watch.hpp"

namespace iovane::engine {

namespace {

bool is_nobody_there(const Error& error) noexcept {
  return error.code == Errc::no_device || error.code == Errc::closed;
}

}  // namespace

std::uint64_t PageFaultPump::run_on_worker() noexcept {
  constexpr std::uint64_t pause_ns = 10'000'000;  // after an error, so that it is not met in circles
  const auto pause = [&] {
    watch(-1);
    return monotonic_ns() + pause_ns;
  };
  watch(space_.page_fault_fd());
  for (;;) {
    if (!answer()) return pause();
    while (next_ < count_) {
      decide(events_[next_]);
      ++next_;
      if (!answer()) return pause();
    }
    next_ = count_ = 0;
    const auto got = space_.read_page_faults(events_);
    if (!got && !is_nobody_there(got.error())) return pause();
    if (!got || *got == 0) return never;
    count_ = *got;
  }
}

void PageFaultPump::decide(const PageFaultEvent& event) noexcept {
  std::optional<PageFaultAnswer> answer = PageFaultAnswer::fail;
  try {
    answer = handler_(event);
  } catch (...) {
    // The host's function threw: the page will not be there.
  }
  fail_ = fail_ || answer == PageFaultAnswer::fail;
  later_ = later_ || !answer;
  if (!event.last) return;
  if (!later_) unanswered_ = {event, fail_ ? PageFaultAnswer::fail : PageFaultAnswer::retry};
  fail_ = later_ = false;
}

// Gives the answer that is due, if one is; false when the kernel would not take it now. A device waits for it.
bool PageFaultPump::answer() noexcept {
  if (!unanswered_) return true;
  const auto taken = space_.answer_page_fault(unanswered_->event, unanswered_->answer);
  // Nobody to answer is no error: the device was detached, which answered.
  if (!taken && taken.error().code != Errc::not_found && !is_nobody_there(taken.error())) return false;
  unanswered_.reset();
  return true;
}

std::uint64_t DescriptorTask::run_on_worker() noexcept {
  watch(fd_);
  pollfd now{.fd = fd_, .events = POLLIN, .revents = 0};
  const timespec at_once{};
  if (::ppoll(&now, 1, &at_once, nullptr) <= 0) return never;  // called to begin with, or somebody else read it
  bool goes_on = false;
  try {
    goes_on = handler_();
  } catch (...) {
    // The host's function threw: it is not called again.
  }
  if (!goes_on) watch(-1);
  return never;
}

Result<void> SpaceCore::on_page_fault(PageFaultHandler handler) {
  if (handler && !config_.page_faults)
    return make_error(Errc::unsupported, Stage::query,
                      "this address space was made without AddressSpaceConfig::page_faults");
  if (const auto started = start_worker(); !started) return started;
  if (worker_->is_this_thread())
    return make_error(Errc::busy, Stage::query, "a handler of page faults cannot be changed from inside a handler");
  const std::lock_guard held{pump_lock_};
  if (pump_) worker_->forget(*pump_);
  pump_.reset();
  if (!handler) return {};
  pump_.reset(new (std::nothrow) PageFaultPump{*this, std::move(handler)});
  if (!pump_) return make_error(Errc::out_of_memory, Stage::query, "no memory to hand out page faults");
  worker_->post(*pump_);
  return {};
}

// A first device brings the descriptor.
void SpaceCore::devices_came() noexcept {
  const std::lock_guard held{pump_lock_};
  if (pump_) worker_->post(*pump_);
}

void SpaceCore::stop_pump() noexcept {
  const std::lock_guard held{pump_lock_};
  if (pump_) worker_->forget(*pump_);
  pump_.reset();
}

Result<std::unique_ptr<DescriptorTask>> SpaceCore::watch(int fd, std::function<bool()> handler) {
  pollfd now{.fd = fd, .events = POLLIN, .revents = 0};
  if (fd < 0 || !handler || ::poll(&now, 1, 0) < 0 || (now.revents & POLLNVAL) != 0)
    return base::fail(Errc::invalid_argument, Stage::query, 0,
                      "descriptor {} cannot be watched: it is not open, or there is no handler", fd);
  if (const auto started = start_worker(); !started) return started.error();
  std::unique_ptr<DescriptorTask> task{new (std::nothrow)
                                           DescriptorTask{shared_from_this(), *worker_, fd, std::move(handler)}};
  if (!task) return make_error(Errc::out_of_memory, Stage::query, "no memory to watch a descriptor");
  task->start();
  return task;
}

}  // namespace iovane::engine

namespace iovane {

Watch::Watch() noexcept = default;
Watch::Watch(std::unique_ptr<engine::DescriptorTask> task) noexcept : task_{std::move(task)} {}
Watch::Watch(Watch&&) noexcept = default;
Watch& Watch::operator=(Watch&& o) noexcept {
  if (this == &o) return *this;
  if (task_) task_->stop();
  task_ = std::move(o.task_);
  return *this;
}
Watch::~Watch() {
  if (task_) task_->stop();
}

}  // namespace iovane
