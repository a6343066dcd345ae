#include "backends/stage1/event_queue.hpp"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

#include "backends/iommufd/ioas_calls.hpp"
#include "backends/uapi/iommufd.hpp"

namespace iovane::backends::stage1 {

namespace uapi = backends::uapi::iommufd;

bool FaultInbox::open() noexcept {
  if (is_open()) return true;
  try {
    ring_.resize(records_max);
  } catch (const std::bad_alloc&) {
    return false;
  }
  ready_ = base::UniqueFd{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  base::UniqueFd poll{::epoll_create1(EPOLL_CLOEXEC)};
  if (!ready_ || !poll) return false;
  poll_ = std::move(poll);
  watch(ready_.get());
  return true;
}

void FaultInbox::watch(int fd) noexcept {
  epoll_event event{.events = EPOLLIN, .data = {.fd = fd}};
  if (fd >= 0) ::epoll_ctl(poll_.get(), EPOLL_CTL_ADD, fd, &event);
}

void FaultInbox::show() noexcept {
  std::uint64_t one = 1;
  if (count_ != 0 || lost_ != 0)
    (void)!::write(ready_.get(), &one, sizeof one);
  else
    (void)!::read(ready_.get(), &one, sizeof one);
}

void FaultInbox::put(const FaultRecord& record) noexcept {
  const std::lock_guard lock{mutex_};
  if (ring_.empty()) return;
  const bool full = count_ == records_max;
  if (record.reason == FaultRecord::Reason::lost || full) {
    const std::uint32_t more = record.reason == FaultRecord::Reason::lost ? record.lost : 1;
    lost_ = more > std::numeric_limits<std::uint32_t>::max() - lost_ ? ~0U : lost_ + more;
  } else {
    ring_[(first_ + count_++) % records_max] = record;
  }
  show();
}

std::size_t FaultInbox::take(std::span<FaultRecord> out) noexcept {
  const std::lock_guard lock{mutex_};
  std::size_t taken = 0;
  for (; taken < out.size() && count_ != 0; ++taken, --count_) {
    out[taken] = ring_[first_];
    first_ = (first_ + 1) % records_max;
  }
  // How many were lost is told after those that were there before.
  if (taken < out.size() && lost_ != 0) {
    out[taken] = {};
    out[taken].reason = FaultRecord::Reason::lost;
    out[taken++].lost = std::exchange(lost_, 0);
  }
  show();
  return taken;
}

int EventQueue::open(Kernel& kernel, int fd, std::uint32_t viommu) noexcept {
  uapi::VeventqAlloc alloc{.viommu_id = viommu, .type = uapi::veventq_type_arm_smmuv3, .veventq_depth = depth};
  if (const int why = call(kernel, fd, alloc); why != 0) return why;
  object_ = alloc.out_veventq_id;
  file_ = KernelFd{kernel, static_cast<int>(alloc.out_veventq_fd), true};
  return 0;
}

// The descriptor holds the queue, so it goes first.
void EventQueue::close(Kernel& kernel, int fd) noexcept {
  if (!is_open()) return;
  file_.reset();
  iommufd::destroy(kernel, fd, object_);
}

int EventQueue::read(Kernel& kernel, Item (&items)[items_max], std::size_t& count) noexcept {
  std::byte bytes[items_max * (sizeof(uapi::VeventHeader) + sizeof(uapi::VeventArmSmmuv3))];
  const long got = kernel.read(file_.get(), bytes, sizeof bytes);
  count = 0;
  if (got == -EAGAIN) return 0;
  if (got < 0) return static_cast<int>(-got);
  std::size_t at = 0;
  const auto left = [&] { return static_cast<std::size_t>(got) - at; };
  while (count < items_max && left() >= sizeof(uapi::VeventHeader)) {
    uapi::VeventHeader header;
    std::memcpy(&header, bytes + at, sizeof header);
    at += sizeof header;
    Item& item = items[count++];
    item = {.record = (header.flags & uapi::veventq_flag_lost_events) == 0, .lost = 0, .words = {}};
    // Numbers run from 0 to 2^31 - 1 and begin again.
    item.lost = (header.sequence - expected_) & 0x7fff'ffff;
    expected_ = (header.sequence + 1) & 0x7fff'ffff;
    if (!item.record) {
      ++item.lost;  // the header is a lost record's
      continue;
    }
    if (left() < sizeof item.words) {
      --count;
      return EIO;
    }
    std::memcpy(item.words, bytes + at, sizeof item.words);
    at += sizeof item.words;
  }
  return 0;
}

}  // namespace iovane::backends::stage1
