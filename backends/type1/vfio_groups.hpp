// The groups of one container, and the devices opened from them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backends/backend.hpp"
#include "backends/kernel_call.hpp"

namespace iovane::backends::type1 {

/// A device opened from a group of the container.
struct GroupDevice {
  DeviceId id{};
  std::string name;
  KernelFd fd;
  std::vector<IovaRange> reserved;
};

/// Order of life: group to container, IOMMU type to container (with the first group), device from group; in reverse on
/// the way out. Control plane, one thread at a time.
class VfioGroups {
 public:
  VfioGroups(Kernel& kernel, int container, unsigned long iommu_type) noexcept
      : kernel_{kernel}, container_{container}, iommu_type_{iommu_type} {}
  VfioGroups(const VfioGroups&) = delete;
  VfioGroups& operator=(const VfioGroups&) = delete;
  ~VfioGroups();

  /// Brings the device's group in (once) and opens the device. Undoes itself on failure.
  Result<GroupDevice*> add(const DeviceSource& source);
  /// The device's descriptor is closed; its group leaves with its last device.
  Result<void> remove(DeviceId device);
  /// Everything out of the container.
  void leave_all() noexcept;
  /// True when `device` is the only one left: its leaving takes the container's IOMMU away.
  bool is_last(DeviceId device) const noexcept;
  bool contains(DeviceId device) const noexcept;
  bool empty() const noexcept { return groups_.empty(); }
  /// The groups' descriptors, borrowed.
  std::vector<int> descriptors() const;

 private:
  struct Group {
    std::string key;  ///< "/dev/vfio/7", or "fd 12" for a descriptor without an address
    KernelFd fd;
    std::vector<GroupDevice> devices;
  };
  Result<Group*> join(const DeviceSource& source, std::vector<IovaRange>& reserved);
  Result<void> connect(const Group& group, const std::vector<IovaRange>& reserved);
  void leave(Group& group) noexcept;

  Kernel& kernel_;
  int container_;
  unsigned long iommu_type_;
  std::uint32_t next_device_ = 1;
  std::vector<Group> groups_;
};

}  // namespace iovane::backends::type1
