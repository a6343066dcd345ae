#include "backends/model/fault_queue.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>

namespace iovane::backends::model {

namespace uapi_fd = uapi::iommufd;

FaultQueue::FaultQueue() : event_{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)} {}

bool FaultQueue::request(std::uint32_t device, Iova address, Access access) noexcept {
  std::unique_lock lock{mutex_};
  if (!open_) return false;
  const std::uint32_t cookie = next_cookie_++;
  try {
    uapi_fd::PageFault fault{.flags = uapi_fd::pgfault_last_page, .dev_id = device, .grpid = cookie & 511};
    fault.perm =
        (may_read(access) ? uapi_fd::pgfault_perm_read : 0) | (may_write(access) ? uapi_fd::pgfault_perm_write : 0);
    fault.addr = address.value;
    fault.cookie = cookie;
    requests_.emplace(cookie, Request{fault, State::waiting});
    waiting_.push_back(cookie);
  } catch (const std::bad_alloc&) {
    requests_.erase(cookie);
    return false;
  }
  show();
  const auto settled = [&] {
    const State state = requests_.at(cookie).state;
    return state == State::granted || state == State::denied;
  };
  answered_.wait_for(lock, answer_within, settled);
  const bool granted = requests_.at(cookie).state == State::granted;
  requests_.erase(cookie);
  std::erase(waiting_, cookie);
  show();
  return granted;
}

void FaultQueue::drop(std::uint32_t device) noexcept {
  const std::lock_guard lock{mutex_};
  for (auto& [cookie, request] : requests_)
    if (request.fault.dev_id == device) request.state = State::denied;
  answered_.notify_all();
}

// Makes the eventfd say whether requests wait.
void FaultQueue::show() noexcept {
  std::uint64_t count = 0;
  const bool readable = !waiting_.empty();
  if (readable) {
    count = 1;
    (void)!::write(event_.get(), &count, sizeof count);
  } else {
    (void)!::read(event_.get(), &count, sizeof count);
  }
}

long FaultQueue::read(void* buffer, std::size_t bytes) noexcept {
  if (bytes % sizeof(uapi_fd::PageFault) != 0) return -ESPIPE;
  const std::lock_guard lock{mutex_};
  std::size_t done = 0;
  while (!waiting_.empty() && bytes - done >= sizeof(uapi_fd::PageFault)) {
    Request& request = requests_.at(waiting_.front());
    waiting_.pop_front();
    if (request.state != State::waiting) continue;  // dropped meanwhile
    request.state = State::delivered;
    std::memcpy(static_cast<std::byte*>(buffer) + done, &request.fault, sizeof request.fault);
    done += sizeof request.fault;
  }
  show();
  return static_cast<long>(done);
}

long FaultQueue::write(const void* buffer, std::size_t bytes) noexcept {
  if (bytes % sizeof(uapi_fd::PageResponse) != 0) return -ESPIPE;
  const std::lock_guard lock{mutex_};
  std::size_t done = 0;
  for (; done < bytes; done += sizeof(uapi_fd::PageResponse)) {
    uapi_fd::PageResponse response;
    std::memcpy(&response, static_cast<const std::byte*>(buffer) + done, sizeof response);
    const auto at = requests_.find(response.cookie);
    const bool known_code = response.code == uapi_fd::page_resp_success || response.code == uapi_fd::page_resp_invalid;
    if (!known_code || at == requests_.end() || at->second.state != State::delivered)
      return done != 0 ? static_cast<long>(done) : -EINVAL;
    at->second.state = response.code == uapi_fd::page_resp_success ? State::granted : State::denied;
    answered_.notify_all();
  }
  return static_cast<long>(done);
}

void FaultQueue::close() noexcept {
  const std::lock_guard lock{mutex_};
  open_ = false;
  for (auto& [cookie, request] : requests_) request.state = State::denied;
  answered_.notify_all();
}

bool FaultQueue::is_open() const noexcept {
  const std::lock_guard lock{mutex_};
  return open_;
}

long FaultQueueFile::ioctl(unsigned long, std::uint64_t) noexcept { return -ENOTTY; }

void FaultQueueFile::release() noexcept {
  queue_->close();
  queue_.reset();
}

}  // namespace iovane::backends::model
