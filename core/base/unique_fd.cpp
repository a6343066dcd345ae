#include "base/unique_fd.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <string_view>

#include "base/error_text.hpp"
#include "base/os_error.hpp"

namespace iovane::base {

void UniqueFd::reset() noexcept {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

Result<UniqueFd> UniqueFd::open(const char* path, int flags) {
  const int fd = ::open(path, flags | O_CLOEXEC);
  if (fd >= 0) return UniqueFd{fd};
  const int why = errno;
  std::string_view cure = "";
  if (why == ENOENT) cure = "; it does not exist on this host (is the kernel module loaded and the device bound?)";
  if (why == EACCES || why == EPERM) cure = "; run as a user who may open it, or pass in an open descriptor";
  if (why == EBUSY) cure = "; another process has it open";
  return fail(errc_from_errno(why), Stage::open, why, "cannot open {}{}", path, cure);
}

Result<UniqueFd> UniqueFd::duplicate(int fd) {
  const int copy = ::fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (copy >= 0) return UniqueFd{copy};
  const int why = errno;
  return fail(errc_from_errno(why), Stage::open, why, "cannot duplicate descriptor {}", fd);
}

}  // namespace iovane::base
