// First-stage faults, from a vIOMMU's event queue to the address space whose device caused them.
//
// A vIOMMU has one queue for all address spaces on it, so whoever reads it sorts the records: each goes into the inbox
// of the space that has the device. A space waits for one descriptor, an epoll set of the queues of its IOMMUs and of
// its own inbox; it is readable when there may be something, and reading may find that it was all for others.
//
// Bounded at both ends: the kernel keeps queue_depth records and numbers all of them, so losses show as gaps; an inbox
// keeps FaultInbox::records_max and counts the rest. Control plane: mutexes.
#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "backends/kernel_call.hpp"
#include "base/unique_fd.hpp"
#include "iovane/fault_record.hpp"
#include "iovane/result.hpp"

namespace iovane::backends::stage1 {

/// The records of one address space that were read and not yet asked for. Any thread.
class FaultInbox {
 public:
  static constexpr std::size_t records_max = 256;

  /// Makes the descriptor. False without one, or without memory.
  bool open() noexcept;
  bool is_open() const noexcept { return static_cast<bool>(poll_); }
  int poll_fd() const noexcept { return poll_.get(); }
  /// Another descriptor that makes poll_fd() readable; the same one twice is fine.
  void watch(int fd) noexcept;

  void put(const FaultRecord& record) noexcept;
  std::size_t take(std::span<FaultRecord> out) noexcept;

 private:
  void show() noexcept;

  std::mutex mutex_;
  std::vector<FaultRecord> ring_;
  std::size_t first_ = 0, count_ = 0;
  std::uint32_t lost_ = 0;
  base::UniqueFd ready_;  // readable while there is something
  base::UniqueFd poll_;
};

/// The kernel's queue of one vIOMMU. Any thread.
class EventQueue {
 public:
  static constexpr std::uint32_t depth = 1024;

  /// 0 or a positive errno; ENOTTY: Linux 6.15 or newer is needed.
  int open(Kernel& kernel, int fd, std::uint32_t viommu) noexcept;
  void close(Kernel& kernel, int fd) noexcept;
  bool is_open() const noexcept { return static_cast<bool>(file_); }
  int pollable(Kernel& kernel) const noexcept { return kernel.pollable(file_.get()); }

  /// Reads up to items_max of what is there, in order: `each(words)` for a record, `lost(n)` for a gap; `any`: there
  /// was something. 0 or a positive errno.
  template <typename Each, typename Lost>
  int drain(Kernel& kernel, bool& any, Each&& each, Lost&& lost) noexcept;

 private:
  struct Item {
    bool record;
    std::uint32_t lost;  // before it
    std::uint64_t words[4];
  };
  static constexpr std::size_t items_max = 64;
  int read(Kernel& kernel, Item (&items)[items_max], std::size_t& count) noexcept;

  std::mutex mutex_;
  KernelFd file_;
  std::uint32_t object_ = 0;
  std::uint32_t expected_ = 0;  // the number of the next record
};

template <typename Each, typename Lost>
int EventQueue::drain(Kernel& kernel, bool& any, Each&& each, Lost&& lost) noexcept {
  const std::lock_guard lock{mutex_};
  Item items[items_max];
  std::size_t count = 0;
  const int why = read(kernel, items, count);
  for (std::size_t i = 0; i < count; ++i) {
    if (items[i].lost != 0) lost(items[i].lost);
    if (items[i].record) each(items[i].words);
  }
  any = any || count != 0;
  return why;
}

}  // namespace iovane::backends::stage1
