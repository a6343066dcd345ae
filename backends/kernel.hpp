// The one seam between iovane and the operating system's IOMMU interfaces.
//
// Every backend reaches its kernel interface through a Kernel and nothing else, so that each call can be counted,
// delayed or failed (kernel_decorators.hpp), and so that the same backend code runs on real kernels (SystemKernel) and
// on the software IOMMU (model/model_kernel.hpp), which answers the same ioctls with the same errnos.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "backends/memlock_use.hpp"
#include "iovane/result.hpp"
#include "iovane/types.hpp"

namespace iovane::backends {

/// A PCI function as sysfs shows it.
struct PciDevice {
  std::string address;  ///< "0000:00:03.0"
  std::uint16_t vendor = 0;
  std::uint16_t device = 0;
  std::string driver;  ///< bound driver, empty for none; only "vfio-pci" and its kin can be attached
  int group = -1;      ///< IOMMU group number, -1 when no IOMMU translates for it
  std::string cdev;    ///< "/dev/vfio/devices/vfio0", empty when the kernel offers none
  int numa_node = -1;
  std::vector<IovaRange> reserved;  ///< the group's reserved regions (sysfs reserved_regions), sorted
};

/// System calls as the backends need them. Implementations: SystemKernel, model::ModelKernel, and decorators.
/// Any thread. Returns what the system call returns, or -errno: never touches errno.
class Kernel {
 public:
  virtual ~Kernel() = default;

  /// open(2), O_CLOEXEC added.
  virtual int open(const char* path, int flags) noexcept = 0;
  virtual int close(int fd) noexcept = 0;
  /// F_DUPFD_CLOEXEC.
  virtual int duplicate(int fd) noexcept = 0;
  /// ioctl(2) with a structure argument; may sleep as long as the kernel does.
  virtual long ioctl(int fd, unsigned long request, void* argument) noexcept = 0;
  /// ioctl(2) with a number as argument.
  virtual long ioctl_value(int fd, unsigned long request, unsigned long value) noexcept = 0;
  /// read(2) and write(2), for descriptors that carry events; -ENOSYS where there are none.
  virtual long read(int, void*, std::size_t) noexcept { return -38; }
  virtual long write(int, const void*, std::size_t) noexcept { return -38; }
  /// A descriptor of this process that poll(2) can wait on for `fd`; it lives as long as `fd`.
  virtual int pollable(int fd) noexcept { return fd; }
  /// mmap(2) of `length` bytes of `fd` at `offset`, shared. Unmap with unmap_memory().
  virtual Result<void*> map_memory(int fd, std::uint64_t offset, std::size_t length, bool writable) noexcept = 0;
  virtual void unmap_memory(void* address, std::size_t length) noexcept = 0;

  /// All PCI functions of the host. Reads sysfs; control plane only.
  virtual Result<std::vector<PciDevice>> pci_devices() = 0;
  /// Limit and use of pinned memory now. Reads /proc; control plane and failures only. A kernel that charges nothing
  /// keeps this default.
  virtual MemlockUse memlock() noexcept { return {}; }
  /// "Linux 6.12.117" or "model"; for reports.
  virtual std::string description() = 0;
};

}  // namespace iovane::backends
