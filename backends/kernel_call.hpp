// Calls through Kernel in the shape that backends use: typed arguments, one way to say "failed", descriptors with
// owners.
#pragma once

#include <cerrno>
#include <string>
#include <string_view>
#include <utility>

#include "backends/kernel.hpp"

namespace iovane::backends {

/// The positive errno of an answer, 0 for success. These calls answer 0 and nothing else on success; a positive answer
/// is a kernel that did part of the work, and counts as a failure.
constexpr int errno_of(long answer) noexcept {
  if (answer == 0) [[likely]]
    return 0;
  return answer < 0 ? static_cast<int>(-answer) : EIO;
}

/// Runs the ioctl that `argument`'s type stands for. The result is 0 or a positive errno, see errno_of().
template <typename Argument>
int call(Kernel& kernel, int fd, Argument& argument) noexcept {
  return errno_of(kernel.ioctl(fd, Argument::request, &argument));
}

/// A descriptor that belongs to a Kernel. Owned ones are closed through it; borrowed ones are left open.
class KernelFd {
 public:
  KernelFd() noexcept = default;
  KernelFd(Kernel& kernel, int fd, bool owned) noexcept : kernel_{&kernel}, fd_{fd}, owned_{owned} {}
  KernelFd(KernelFd&& o) noexcept : kernel_{o.kernel_}, fd_{std::exchange(o.fd_, -1)}, owned_{o.owned_} {}
  KernelFd& operator=(KernelFd&& o) noexcept {
    if (this != &o) {
      reset();
      kernel_ = o.kernel_;
      fd_ = std::exchange(o.fd_, -1);
      owned_ = o.owned_;
    }
    return *this;
  }
  KernelFd(const KernelFd&) = delete;
  KernelFd& operator=(const KernelFd&) = delete;
  ~KernelFd() { reset(); }

  int get() const noexcept { return fd_; }
  explicit operator bool() const noexcept { return fd_ >= 0; }
  void reset() noexcept {
    if (fd_ >= 0 && owned_) kernel_->close(fd_);
    fd_ = -1;
  }

 private:
  Kernel* kernel_ = nullptr;
  int fd_ = -1;
  bool owned_ = false;
};

/// Where a descriptor comes from: opened by path, or handed in and then either borrowed or duplicated.
struct DescriptorSource {
  int fd = -1;             ///< -1: open the interface's own path
  bool duplicate = false;  ///< with `fd`: use a duplicate, so that the caller may close his
};

/// In words: why a path could not be opened, and what to do about it. Both empty where the errno says it all.
struct OpenFailure {
  std::string_view what;
  std::string_view cure;
  std::string text() const;  ///< ": what; cure", or nothing
};
OpenFailure why_open_fails(int os_errno) noexcept;

/// Opens `path` for reading and writing, or takes the descriptor that was handed in. The error names path and cure.
Result<KernelFd> open_descriptor(Kernel& kernel, const char* path, const DescriptorSource& source);

}  // namespace iovane::backends
