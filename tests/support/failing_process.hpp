// The process itself as a place where things fail: linked into a test program, failing_process.cpp stands in for
// operator new and for the system calls that the library makes beside backends::Kernel, and asks base::fault_now()
// whether this one fails: FaultKind::allocation and FaultKind::system_call.
#pragma once

#include "backends/kernel_decorators.hpp"

namespace iovane::test {

/// While one lives, what its thread allocates and calls is the test's own business: neither counted nor failed.
class OwnBusiness {
 public:
  OwnBusiness() noexcept;
  ~OwnBusiness();
  OwnBusiness(const OwnBusiness&) = delete;
  OwnBusiness& operator=(const OwnBusiness&) = delete;
};

/// A kernel in this process whose allocations are its own business. It has fault points where a kernel may fail.
class OwnKernel final : public backends::KernelDecorator {
 public:
  using KernelDecorator::KernelDecorator;

  int open(const char* path, int flags) noexcept override {
    const OwnBusiness kernel;
    return inner().open(path, flags);
  }
  int close(int fd) noexcept override {
    const OwnBusiness kernel;
    return inner().close(fd);
  }
  int duplicate(int fd) noexcept override {
    const OwnBusiness kernel;
    return inner().duplicate(fd);
  }
  long ioctl(int fd, unsigned long request, void* argument) noexcept override {
    const OwnBusiness kernel;
    return inner().ioctl(fd, request, argument);
  }
  long ioctl_value(int fd, unsigned long request, unsigned long value) noexcept override {
    const OwnBusiness kernel;
    return inner().ioctl_value(fd, request, value);
  }
  long read(int fd, void* buffer, std::size_t bytes) noexcept override {
    const OwnBusiness kernel;
    return inner().read(fd, buffer, bytes);
  }
  long write(int fd, const void* buffer, std::size_t bytes) noexcept override {
    const OwnBusiness kernel;
    return inner().write(fd, buffer, bytes);
  }
  int pollable(int fd) noexcept override {
    const OwnBusiness kernel;
    return inner().pollable(fd);
  }
  Result<void*> map_memory(int fd, std::uint64_t offset, std::size_t length, bool writable) noexcept override {
    const OwnBusiness kernel;
    return inner().map_memory(fd, offset, length, writable);
  }
  Result<std::vector<backends::PciDevice>> pci_devices() override {
    const OwnBusiness kernel;
    return inner().pci_devices();
  }
};

}  // namespace iovane::test
