#include "base/os_error.hpp"

#include <cerrno>

namespace iovane::base {

Errc errc_from_errno(int os_errno) noexcept {
  switch (os_errno) {
    case 0: return Errc::ok;
    case EINVAL: return Errc::invalid_argument;
    case EOVERFLOW: return Errc::overflow;
    case EEXIST: return Errc::iova_busy;
    case ENOSPC: return Errc::iova_exhausted;
    case ENOENT: return Errc::not_found;
    case ENOMEM: return Errc::out_of_memory;
    case EFAULT: return Errc::bad_memory;
    case EPERM:
    case EACCES: return Errc::permission;
    case EBUSY: return Errc::busy;
    case ENOTTY:
    case EOPNOTSUPP:
    case ENOSYS:
    case E2BIG: return Errc::unsupported;
    case ENODEV:
    case ENXIO: return Errc::no_device;
    case ETIME:
    case ETIMEDOUT: return Errc::timed_out;
    case EBADMSG: return Errc::bad_format;
    default: return Errc::io_error;
  }
}

}  // namespace iovane::base
