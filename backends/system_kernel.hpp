// The kernel that this process runs on: real system calls, and the inventory that sysfs gives.
#pragma once

#include <string>

#include "backends/kernel.hpp"

namespace iovane::backends {

/// Stateless but for the root of sysfs; any thread.
class SystemKernel final : public Kernel {
 public:
  SystemKernel() = default;
  /// For tests: an inventory from another tree than /sys.
  explicit SystemKernel(std::string sysfs_root) : sysfs_{std::move(sysfs_root)} {}

  int open(const char* path, int flags) noexcept override;
  int close(int fd) noexcept override;
  int duplicate(int fd) noexcept override;
  long ioctl(int fd, unsigned long request, void* argument) noexcept override;
  long ioctl_value(int fd, unsigned long request, unsigned long value) noexcept override;
  long read(int fd, void* buffer, std::size_t bytes) noexcept override;
  long write(int fd, const void* buffer, std::size_t bytes) noexcept override;
  Result<void*> map_memory(int fd, std::uint64_t offset, std::size_t length, bool writable) noexcept override;
  void unmap_memory(void* address, std::size_t length) noexcept override;
  Result<std::vector<PciDevice>> pci_devices() override;
  MemlockUse memlock() noexcept override;
  std::string description() override;

 private:
  std::string sysfs_ = "/sys";
};

}  // namespace iovane::backends
