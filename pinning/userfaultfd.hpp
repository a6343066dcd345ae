// The kernel's userfaultfd interface, as far as the staleness monitor needs it.
#pragma once

#include <cstdint>
#include <span>

#include "base/unique_fd.hpp"
#include "iovane/result.hpp"
#include "pinning/memory_range.hpp"

namespace iovane::pinning {

/// One userfaultfd with unmap, remap and remove events, fork events where the process may have them, and fault events
/// for OS pages that are missing. Any thread; the calls are thin.
class Userfaultfd {
 public:
  enum class EventKind : std::uint8_t { unmap, remap, remove, fork, fault };
  struct Event {
    EventKind kind = EventKind::fault;
    MemoryRange range{};         ///< whole OS pages; for a fault, one byte
    std::uint64_t moved_to = 0;  ///< remap only
    int child_fd = -1;           ///< fork only: the child's userfaultfd, the receiver's to close
  };

  /// Opens by userfaultfd(2), and where that is refused by /dev/userfaultfd. The error names what would allow it.
  /// unsupported: the kernel lacks events (before Linux 4.11).
  static Result<Userfaultfd> open(bool need_fork_events) noexcept;
  /// On a descriptor that the caller opened and has not shaken hands on (UFFDIO_API). It stays the caller's.
  static Result<Userfaultfd> adopt(int fd, bool need_fork_events) noexcept;

  int fd() const noexcept { return fd_.get(); }
  bool has_fork_events() const noexcept { return has_fork_events_; }
  /// Memory that is anonymous, shmem or hugetlbfs can be watched. Repeating it is harmless. From now on the touch of a
  /// missing OS page becomes a fault event whose thread waits until unwatch() of that page.
  Result<void> watch(const MemoryRange& range) noexcept;
  /// Takes the process's mmap lock for writing: when it returns, no discard that had begun is half done.
  void unwatch(const MemoryRange& range) noexcept;
  /// Takes what is there: as many events as fit. 0 when nothing waits. The authors of the events go on at once.
  std::size_t read(std::span<Event> out) noexcept;

 private:
  explicit Userfaultfd(base::UniqueFd fd) noexcept : fd_{std::move(fd)} {}
  Result<void> handshake(bool need_fork_events) noexcept;

  base::UniqueFd fd_;
  bool has_fork_events_ = false;
};

}  // namespace iovane::pinning
