#include "backends/kernel_call.hpp"

#include <fcntl.h>

#include "base/error_text.hpp"
#include "base/os_error.hpp"

namespace iovane::backends {

OpenFailure why_open_fails(int os_errno) noexcept {
  switch (os_errno) {
    case ENOENT: return {"it does not exist", "load the kernel module, or bind the device to vfio-pci"};
    case EACCES:
    case EPERM: return {"permission denied", "run as a user who may open it, or hand in an open descriptor"};
    case EBUSY: return {"it is in use", "another process, or another address space of this one, has it open"};
    case ENODEV:
    case ENXIO: return {"the kernel has no driver behind it", "load the kernel module"};
    default: return {};
  }
}

std::string OpenFailure::text() const {
  std::string whole;
  if (!what.empty()) whole.append(": ").append(what);
  if (!cure.empty()) whole.append("; ").append(cure);
  return whole;
}

Result<KernelFd> open_descriptor(Kernel& kernel, const char* path, const DescriptorSource& source) {
  if (source.fd >= 0 && !source.duplicate) return KernelFd{kernel, source.fd, false};
  if (source.fd >= 0) {
    const int copy = kernel.duplicate(source.fd);
    if (copy >= 0) return KernelFd{kernel, copy, true};
    return base::fail(base::errc_from_errno(-copy), Stage::open, -copy, "cannot duplicate descriptor {} for {}",
                      source.fd, path);
  }
  const int fd = kernel.open(path, O_RDWR);
  if (fd >= 0) return KernelFd{kernel, fd, true};
  return base::fail(base::errc_from_errno(-fd), Stage::open, -fd, "cannot open {}{}", path, why_open_fails(-fd).text());
}

}  // namespace iovane::backends
