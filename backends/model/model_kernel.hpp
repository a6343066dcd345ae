// A host without a kernel: the Kernel seam answered by a software IOMMU.
//
// It answers the ioctls of iommufd, of VFIO type1 (versions 1 and 2, also on iommufd's compatibility interface), of
// VFIO sPAPR TCE (versions 1 and 2) and of VFIO's groups and devices with the kernels' errnos and side effects, on
// descriptors of its own. The backends run on it unchanged, natively and under sanitizers; where it and a kernel
// differ, it is wrong. Source of the behaviour: Linux 6.12 to 7.2, drivers/iommu/iommufd, drivers/vfio.
//
// Not imitated: argument addresses that are not mapped in the process (only null is EFAULT), nested tables, PASIDs.
// Memory that a device can reach must stay mapped in the process: a kernel's pin would keep the pages when the process
// unmaps them, this one cannot; pages_leave() imitates it for registered memory of sPAPR.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "backends/kernel.hpp"
#include "backends/model/host.hpp"
#include "backends/model/options.hpp"
#include "backends/model/simulated_device.hpp"

namespace iovane::backends::model {

/// What is in use. All zero on a host that everything was given back to.
struct ModelUsage {
  std::size_t descriptors = 0;  ///< open
  std::size_t objects = 0;      ///< iommufd's IOASes, HWPTs and bound devices
  std::size_t mappings = 0;     ///< areas of all IOASes, mappings of all containers
  Bytes pinned{};               ///< each IOAS_MAP's or container's pages counted once
  Bytes charged_user{};         ///< counted against the user (iommufd)
  Bytes charged_process{};      ///< counted against the process (type1, iommufd in RLIMIT_MODE 1)
  constexpr bool operator==(const ModelUsage&) const noexcept = default;
};

class ModelKernel final : public Kernel {
 public:
  /// Errors: invalid_argument for options that describe no host.
  static Result<std::unique_ptr<ModelKernel>> create(const ModelOptions& options = {});
  ~ModelKernel() override;

  int open(const char* path, int flags) noexcept override;
  int close(int fd) noexcept override;
  int duplicate(int fd) noexcept override;
  long ioctl(int fd, unsigned long request, void* argument) noexcept override;
  long ioctl_value(int fd, unsigned long request, unsigned long value) noexcept override;
  long read(int fd, void* buffer, std::size_t bytes) noexcept override;
  long write(int fd, const void* buffer, std::size_t bytes) noexcept override;
  int pollable(int fd) noexcept override;
  Result<void*> map_memory(int fd, std::uint64_t offset, std::size_t length, bool writable) noexcept override;
  void unmap_memory(void* address, std::size_t length) noexcept override;
  Result<std::vector<PciDevice>> pci_devices() override;
  /// As the imitated host's /proc would have it: iommufd's pins as pinned, type1's as locked.
  MemlockUse memlock() noexcept override;
  std::string description() override;

  /// The devices, in the order of the options. They live as long as the kernel.
  SimulatedDevice& device(std::size_t index) noexcept { return *host_.devices[index]; }
  std::size_t device_count() const noexcept { return host_.devices.size(); }
  /// nullptr when there is none of that PCI address.
  SimulatedDevice* device(const std::string& address) noexcept { return host_.device(address); }

  /// Failures and latency on demand.
  Injection& injection() noexcept { return host_.injection; }
  /// To be called before the process exchanges the pages at [address, address + length), by munmap(), madvise() or
  /// mremap(): what is registered with sPAPR leads on to the old ones, as a kernel's pins do.
  void pages_leave(const void* address, std::size_t length);
  /// A snapshot; exact when no call is under way.
  ModelUsage usage() const;

 private:
  explicit ModelKernel(const ModelOptions& options);
  long dispatch(int fd, unsigned long request, std::uint64_t argument) noexcept;

  mutable Host host_;
};

}  // namespace iovane::backends::model
