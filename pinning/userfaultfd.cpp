#include "pinning/userfaultfd.hpp"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "base/error_text.hpp"
#include "base/os_error.hpp"

namespace iovane::pinning {
namespace {

// linux/userfaultfd.h, Linux 6.1: absent from older headers of build machines.
constexpr unsigned long ioctl_new = _IO(0xAA, 0x00);
constexpr std::uint64_t features_needed = UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE |
                                          UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_MISSING_SHMEM |
                                          UFFD_FEATURE_MISSING_HUGETLBFS;

uffdio_range pages_of(const MemoryRange& range) noexcept {
  const auto os_page = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  const MemoryRange whole = range.grown_to(os_page);
  return {.start = whole.start, .len = whole.length().value};
}

}  // namespace

Result<Userfaultfd> Userfaultfd::open(bool need_fork_events) noexcept {
  // Not UFFD_USER_MODE_ONLY: kernel faults (a pin's, for one) must be reported too, and events need full rights.
  base::UniqueFd fd{static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK))};
  int error = errno;
  // ENOSYS is also what some containers' filters say; the device is another way in (Linux 6.1).
  if (!fd && (error == EPERM || error == EACCES || error == ENOSYS)) {
    if (const base::UniqueFd device{::open("/dev/userfaultfd", O_RDWR | O_CLOEXEC)}; device) {
      fd = base::UniqueFd{ioctl(device.get(), ioctl_new, O_CLOEXEC | O_NONBLOCK)};
      error = errno;
    }
  }
  if (!fd) {
    if (error == ENOSYS)
      return base::fail(
          Errc::unsupported, Stage::open, error,
          "this kernel has no userfaultfd (CONFIG_USERFAULTFD), or a seccomp filter hides it; without the "
          "monitor, call invalidate() before memory is unmapped or discarded");
    return base::fail(base::errc_from_errno(error), Stage::open, error,
                      "this process may not use userfaultfd for kernel faults; one of these allows it: sysctl "
                      "vm.unprivileged_userfaultfd=1, read and write access to /dev/userfaultfd (Linux 6.1), "
                      "CAP_SYS_PTRACE, or a descriptor from a manager (StalenessMonitor::Config::fd)");
  }
  Userfaultfd opened{std::move(fd)};
  if (auto shaken = opened.handshake(need_fork_events); !shaken) return shaken.error();
  return opened;
}

Result<Userfaultfd> Userfaultfd::adopt(int fd, bool need_fork_events) noexcept {
  auto own = base::UniqueFd::duplicate(fd);
  if (!own) return own.error();
  const int flags = fcntl(own->get(), F_GETFL);
  if (flags < 0 || fcntl(own->get(), F_SETFL, flags | O_NONBLOCK) != 0)
    return base::fail(Errc::invalid_argument, Stage::open, errno, "descriptor {} cannot be made non-blocking", fd);
  Userfaultfd adopted{*std::move(own)};
  if (auto shaken = adopted.handshake(need_fork_events); !shaken) return shaken.error();
  return adopted;
}

Result<void> Userfaultfd::handshake(bool need_fork_events) noexcept {
  // Fork events need CAP_SYS_PTRACE, since each brings a new descriptor; a refused handshake can be repeated.
  uffdio_api api{.api = UFFD_API, .features = features_needed | UFFD_FEATURE_EVENT_FORK, .ioctls = 0};
  if (ioctl(fd_.get(), UFFDIO_API, &api) == 0) {
    has_fork_events_ = true;
    return {};
  }
  int error = errno;
  if (!need_fork_events) {
    api = {.api = UFFD_API, .features = features_needed, .ioctls = 0};
    if (ioctl(fd_.get(), UFFDIO_API, &api) == 0) return {};
    error = errno;
  }
  if (error == EPERM)
    return base::fail(Errc::permission, Stage::open, error,
                      "fork events of userfaultfd need CAP_SYS_PTRACE; without them open the monitor with "
                      "need_fork_events = false and call invalidate() after a fork");
  return base::fail(Errc::unsupported, Stage::open, error,
                    "this kernel's userfaultfd lacks some of the features {:#x}: unmap, remap and remove events and "
                    "missing faults of shmem and hugetlbfs (Linux 4.11)",
                    features_needed);
}

Result<void> Userfaultfd::watch(const MemoryRange& range) noexcept {
  uffdio_register request{.range = pages_of(range), .mode = UFFDIO_REGISTER_MODE_MISSING, .ioctls = 0};
  if (ioctl(fd_.get(), UFFDIO_REGISTER, &request) == 0) return {};
  const int error = errno;
  const char* why = "the kernel refused to watch it";
  Errc code = base::errc_from_errno(error);
  if (error == EINVAL) {
    why =
        "nothing is mapped there, or it is neither anonymous, shmem nor hugetlbfs: use a cache without a monitor for "
        "such memory and call invalidate()";
    code = Errc::bad_memory;
  } else if (error == EBUSY) {
    why = "another userfaultfd of this process watches it already";
  } else if (error == EPERM) {
    why = "it is a file mapping that may not be written";
  } else if (error == ENOMEM) {
    why = "it is not mapped, or the process has as many mappings as it may (sysctl vm.max_map_count)";
    code = Errc::bad_memory;
  }
  return base::fail(code, Stage::pin, error, "memory [{:#x}, {:#x}] cannot be watched: {}", range.start, range.last,
                    why);
}

void Userfaultfd::unwatch(const MemoryRange& range) noexcept {
  uffdio_range pages = pages_of(range);
  // It fails when the memory is gone, which is what unwatching wants.
  (void)ioctl(fd_.get(), UFFDIO_UNREGISTER, &pages);
  // It wakes the threads that wait for a page there only where it found a watched mapping. One that was replaced
  // meanwhile (mmap over it) is not, and its waiters would sleep for good.
  (void)ioctl(fd_.get(), UFFDIO_WAKE, &pages);
}

std::size_t Userfaultfd::read(std::span<Event> out) noexcept {
  std::array<uffd_msg, 16> messages;
  const std::size_t want = std::min(out.size(), messages.size());
  const ssize_t got = ::read(fd_.get(), messages.data(), want * sizeof(uffd_msg));
  if (got <= 0) return 0;  // EAGAIN: nothing waits
  const std::size_t count = static_cast<std::size_t>(got) / sizeof(uffd_msg);
  for (std::size_t i = 0; i < count; ++i) {
    const uffd_msg& m = messages[i];
    Event& e = out[i];
    e = {};
    switch (m.event) {
      case UFFD_EVENT_UNMAP:
      case UFFD_EVENT_REMOVE:
        e.kind = m.event == UFFD_EVENT_UNMAP ? EventKind::unmap : EventKind::remove;
        e.range = {m.arg.remove.start, m.arg.remove.end - 1};
        break;
      case UFFD_EVENT_REMAP:
        e.kind = EventKind::remap;
        e.range = {m.arg.remap.from, m.arg.remap.from + m.arg.remap.len - 1};
        e.moved_to = m.arg.remap.to;
        break;
      case UFFD_EVENT_FORK:
        e.kind = EventKind::fork;
        e.child_fd = static_cast<int>(m.arg.fork.ufd);
        break;
      default:
        e.kind = EventKind::fault;
        e.range = {m.arg.pagefault.address, m.arg.pagefault.address};
        break;
    }
  }
  return count;
}

}  // namespace iovane::pinning
