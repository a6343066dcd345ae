// An I/O page-fault queue: devices put requests in and wait, its descriptor hands them out and takes the answers.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>

#include "backends/model/file.hpp"
#include "backends/uapi/iommufd.hpp"
#include "base/unique_fd.hpp"
#include "iovane/types.hpp"

namespace iovane::backends::model {

/// Any thread.
class FaultQueue {
 public:
  FaultQueue();
  FaultQueue(const FaultQueue&) = delete;
  FaultQueue& operator=(const FaultQueue&) = delete;

  /// A device's request for the page at `address`: waits for the answer, true when it may try again. No answer within
  /// ten seconds, a device that is taken out and a closed queue are "no".
  bool request(std::uint32_t device, Iova address, Access access) noexcept;
  /// Answers everything of `device` with "no", as a detach does.
  void drop(std::uint32_t device) noexcept;

  // The descriptor's side: as the kernel's read and write, and an eventfd that is readable while requests wait.
  long read(void* buffer, std::size_t bytes) noexcept;
  long write(const void* buffer, std::size_t bytes) noexcept;
  int event_fd() const noexcept { return event_.get(); }
  void close() noexcept;
  bool is_open() const noexcept;

 private:
  enum class State : std::uint8_t { waiting, delivered, granted, denied };
  struct Request {
    uapi::iommufd::PageFault fault;
    State state = State::waiting;
  };
  void show() noexcept;

  static constexpr std::chrono::seconds answer_within{10};
  mutable std::mutex mutex_;
  std::condition_variable answered_;
  std::deque<std::uint32_t> waiting_;  // cookies, oldest first
  std::map<std::uint32_t, Request> requests_;
  std::uint32_t next_cookie_ = 1;
  bool open_ = true;
  base::UniqueFd event_;
};

/// The descriptor.
class FaultQueueFile final : public File {
 public:
  void open(std::shared_ptr<FaultQueue> queue) noexcept { queue_ = std::move(queue); }
  long ioctl(unsigned long, std::uint64_t) noexcept override;
  long read(void* buffer, std::size_t bytes) noexcept override { return queue_->read(buffer, bytes); }
  long write(const void* buffer, std::size_t bytes) noexcept override { return queue_->write(buffer, bytes); }
  int pollable() const noexcept override { return queue_->event_fd(); }
  void release() noexcept override;

 private:
  std::shared_ptr<FaultQueue> queue_;
};

}  // namespace iovane::backends::model
