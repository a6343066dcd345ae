#include "backends/kernel_call.hpp"

#include <fcntl.h>

#include <string_view>

#include "base/error_text.hpp"
#include "base/os_error.hpp"

namespace iovane::backends {

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
  std::string_view cure = "";
  if (fd == -ENOENT) cure = "; it does not exist: load the kernel module, or bind the device to vfio-pci";
  if (fd == -EACCES || fd == -EPERM) cure = "; run as a user who may open it, or hand in an open descriptor";
  if (fd == -EBUSY) cure = "; another process, or another address space of this one, has it open";
  if (fd == -ENODEV) cure = "; the kernel has no driver behind it";
  return base::fail(base::errc_from_errno(-fd), Stage::open, -fd, "cannot open {}{}", path, cure);
}

}  // namespace iovane::backends
