#include "backends/model/event_queue.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>

namespace iovane::backends::model {

namespace uapi_fd = uapi::iommufd;

EventQueue::EventQueue(std::uint32_t depth) : depth_{depth}, event_{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)} {}

std::uint32_t EventQueue::next_sequence() noexcept {
  const std::uint32_t now = sequence_;
  sequence_ = (sequence_ + 1) & 0x7fff'ffff;
  return now;
}

void EventQueue::push(const Record& record) noexcept {
  const std::lock_guard lock{mutex_};
  if (!open_) return;
  const std::uint32_t sequence = next_sequence();
  lost_at_tail_ = true;
  if (records_.size() < depth_) {
    try {
      records_.push_back({sequence, record});
      lost_at_tail_ = false;
    } catch (const std::bad_alloc&) {
    }
  }
  if (lost_at_tail_) lost_sequence_ = sequence;
  show();
}

long EventQueue::read(void* buffer, std::size_t bytes) noexcept {
  constexpr std::size_t header_bytes = sizeof(uapi_fd::VeventHeader), record_bytes = sizeof(Record);
  if (bytes < header_bytes) return -EINVAL;
  const std::lock_guard lock{mutex_};
  auto* const out = static_cast<std::byte*>(buffer);
  std::size_t done = 0;
  while (!records_.empty()) {
    if (bytes - done < header_bytes + record_bytes) return done == 0 ? -EINVAL : static_cast<long>(done);
    const uapi_fd::VeventHeader header{.flags = 0, .sequence = records_.front().sequence};
    std::memcpy(out + done, &header, header_bytes);
    std::memcpy(out + done + header_bytes, &records_.front().record, record_bytes);
    done += header_bytes + record_bytes;
    records_.pop_front();
  }
  if (lost_at_tail_ && bytes - done >= header_bytes) {
    const uapi_fd::VeventHeader header{.flags = uapi_fd::veventq_flag_lost_events, .sequence = lost_sequence_};
    std::memcpy(out + done, &header, header_bytes);
    done += header_bytes;
    lost_at_tail_ = false;
  }
  show();
  return static_cast<long>(done);
}

// Makes the eventfd say whether there is something to read.
void EventQueue::show() noexcept {
  std::uint64_t count = 1;
  if (!records_.empty() || lost_at_tail_) {
    (void)!::write(event_.get(), &count, sizeof count);
  } else {
    (void)!::read(event_.get(), &count, sizeof count);
  }
}

void EventQueue::close() noexcept {
  const std::lock_guard lock{mutex_};
  open_ = false;
  records_.clear();
}

bool EventQueue::is_open() const noexcept {
  const std::lock_guard lock{mutex_};
  return open_;
}

}  // namespace iovane::backends::model
