// A vIOMMU's event queue: devices that translate through it leave records, its descriptor hands them out.
//
// Bounded and lossy, as the kernel's (drivers/iommu/iommufd/eventq.c): every record has a number, also those for which
// there was no room, so that a reader sees the gap; a loss at the tail shows as a header without a record.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>

#include "backends/model/file.hpp"
#include "backends/uapi/iommufd.hpp"
#include "base/unique_fd.hpp"

namespace iovane::backends::model {

/// Any thread.
class EventQueue {
 public:
  using Record = uapi::iommufd::VeventArmSmmuv3;

  explicit EventQueue(std::uint32_t depth);
  EventQueue(const EventQueue&) = delete;
  EventQueue& operator=(const EventQueue&) = delete;

  void push(const Record& record) noexcept;
  /// As the kernel's read.
  long read(void* buffer, std::size_t bytes) noexcept;
  int event_fd() const noexcept { return event_.get(); }
  void close() noexcept;
  bool is_open() const noexcept;

 private:
  struct Numbered {
    std::uint32_t sequence;
    Record record;
  };
  std::uint32_t next_sequence() noexcept;
  void show() noexcept;

  const std::uint32_t depth_;
  mutable std::mutex mutex_;
  std::deque<Numbered> records_;
  std::uint32_t sequence_ = 0;
  bool lost_at_tail_ = false;
  std::uint32_t lost_sequence_ = 0;
  bool open_ = true;
  base::UniqueFd event_;
};

/// Where the page tables of a vIOMMU send records: its queue, when it has one. Any thread.
class EventPort {
 public:
  void connect(std::shared_ptr<EventQueue> queue) noexcept {
    const std::lock_guard lock{mutex_};
    queue_ = std::move(queue);
  }
  std::shared_ptr<EventQueue> queue() const noexcept {
    const std::lock_guard lock{mutex_};
    return queue_;
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<EventQueue> queue_;
};

/// The descriptor.
class EventQueueFile final : public File {
 public:
  void open(std::shared_ptr<EventQueue> queue) noexcept { queue_ = std::move(queue); }
  long ioctl(unsigned long, std::uint64_t) noexcept override { return -25; }
  long read(void* buffer, std::size_t bytes) noexcept override { return queue_->read(buffer, bytes); }
  int pollable() const noexcept override { return queue_->event_fd(); }
  void release() noexcept override {
    queue_->close();
    queue_.reset();
  }

 private:
  std::shared_ptr<EventQueue> queue_;
};

}  // namespace iovane::backends::model
