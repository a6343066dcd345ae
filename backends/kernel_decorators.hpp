// Kernels around a kernel: count every call, delay it, or make it fail. They stack in any order.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <string_view>
#include <vector>

#include "backends/kernel.hpp"

namespace iovane::backends {

/// The name of an ioctl of iommufd or VFIO, "IOAS_MAP" or "VFIO_IOMMU_MAP_DMA"; numbers that mean several things carry
/// the more frequent name. "other" for everything else.
std::string_view ioctl_name(unsigned long request) noexcept;

/// Passes everything on to `inner`, which outlives it.
class KernelDecorator : public Kernel {
 public:
  explicit KernelDecorator(Kernel& inner) noexcept : inner_{inner} {}

  int open(const char* path, int flags) noexcept override { return inner_.open(path, flags); }
  int close(int fd) noexcept override { return inner_.close(fd); }
  int duplicate(int fd) noexcept override { return inner_.duplicate(fd); }
  long ioctl(int fd, unsigned long request, void* argument) noexcept override {
    return inner_.ioctl(fd, request, argument);
  }
  long ioctl_value(int fd, unsigned long request, unsigned long value) noexcept override {
    return inner_.ioctl_value(fd, request, value);
  }
  long read(int fd, void* buffer, std::size_t bytes) noexcept override { return inner_.read(fd, buffer, bytes); }
  long write(int fd, const void* buffer, std::size_t bytes) noexcept override {
    return inner_.write(fd, buffer, bytes);
  }
  int pollable(int fd) noexcept override { return inner_.pollable(fd); }
  Result<void*> map_memory(int fd, std::uint64_t offset, std::size_t length, bool writable) noexcept override {
    return inner_.map_memory(fd, offset, length, writable);
  }
  void unmap_memory(void* address, std::size_t length) noexcept override { inner_.unmap_memory(address, length); }
  Result<std::vector<PciDevice>> pci_devices() override { return inner_.pci_devices(); }
  MemlockUse memlock() noexcept override { return inner_.memlock(); }
  std::string description() override { return inner_.description(); }

 protected:
  Kernel& inner() noexcept { return inner_; }

 private:
  Kernel& inner_;
};

/// Counts ioctls by number, and descriptors opened and closed. Any thread; counts are exact once threads have joined.
class CountingKernel final : public KernelDecorator {
 public:
  using KernelDecorator::KernelDecorator;

  int open(const char* path, int flags) noexcept override;
  int close(int fd) noexcept override;
  int duplicate(int fd) noexcept override;
  long ioctl(int fd, unsigned long request, void* argument) noexcept override;
  long ioctl_value(int fd, unsigned long request, unsigned long value) noexcept override;

  /// Calls of one ioctl so far.
  std::uint64_t calls(unsigned long request) const noexcept;
  /// ioctls of every number so far.
  std::uint64_t calls() const noexcept;
  /// ioctls that failed.
  std::uint64_t failures() const noexcept;
  /// Descriptors that are open: opened, duplicated or returned by GET_DEVICE_FD, and not closed.
  std::int64_t open_descriptors() const noexcept;

 private:
  void count(unsigned long request, long answer) noexcept;

  // One counter per low byte of the number: iommufd and VFIO share the type byte and stay below 0x100.
  std::array<std::atomic<std::uint64_t>, 256> calls_{};
  std::atomic<std::uint64_t> failures_{0};
  std::atomic<std::int64_t> open_{0};
};

/// Adds time before ioctls. Delays are set before threads start.
class DelayingKernel final : public KernelDecorator {
 public:
  using KernelDecorator::KernelDecorator;

  long ioctl(int fd, unsigned long request, void* argument) noexcept override;
  long ioctl_value(int fd, unsigned long request, unsigned long value) noexcept override;

  /// Waits that long before each call of `request`. Below 50 microseconds it spins, above it sleeps.
  void delay(unsigned long request, std::chrono::nanoseconds time) noexcept;
  /// The same for every ioctl that has no delay of its own.
  void delay_all(std::chrono::nanoseconds time) noexcept { all_ = time; }

 private:
  void wait_before(unsigned long request) noexcept;

  std::array<std::chrono::nanoseconds, 256> delays_{};
  std::chrono::nanoseconds all_{0};
};

/// Makes ioctls fail: by rule, and where base::fault_now(FaultKind::kernel_call) says so. Any thread.
class FailingKernel final : public KernelDecorator {
 public:
  using KernelDecorator::KernelDecorator;

  /// One plan. `request` 0 means any ioctl; calls are counted from 1 after the rule was added.
  struct Rule {
    unsigned long request = 0;
    std::uint64_t nth = 1;    ///< the first call that fails
    std::uint64_t times = 1;  ///< how many fail from there on
    int os_errno = 0;         ///< what the caller sees
    bool after_call = false;  ///< the call takes effect first, and then reports failure
  };

  int open(const char* path, int flags) noexcept override;
  int duplicate(int fd) noexcept override;
  long ioctl(int fd, unsigned long request, void* argument) noexcept override;
  long ioctl_value(int fd, unsigned long request, unsigned long value) noexcept override;
  long read(int fd, void* buffer, std::size_t bytes) noexcept override;
  long write(int fd, const void* buffer, std::size_t bytes) noexcept override;

  void add(const Rule& rule);
  void clear() noexcept;
  /// The errno of calls that fault points make fail; ENOMEM unless set.
  void set_fault_errno(int os_errno) noexcept { fault_errno_ = os_errno; }

 private:
  struct Verdict {
    int os_errno = 0;
    bool after_call = false;
  };
  struct Armed {
    Rule rule;
    std::uint64_t seen = 0;
  };
  Verdict judge(unsigned long request) noexcept;

  // Guards rules_: tests only, so a lock is the plain choice.
  std::mutex mutex_;
  std::vector<Armed> rules_;
  int fault_errno_ = 12;
};

}  // namespace iovane::backends
