// VFIO groups (/dev/vfio/N), devices from groups, and device cdevs (/dev/vfio/devices/vfioN).
#pragma once

#include <cstdint>
#include <vector>

#include "backends/model/host.hpp"
#include "backends/model/iommufd.hpp"
#include "backends/model/type1.hpp"

namespace iovane::backends::model {

/// The calls that every open VFIO device answers.
class VfioDevice {
 public:
  VfioDevice(Host& host, SimulatedDevice& device) noexcept : host_{&host}, device_{&device} {}
  long ioctl(unsigned long request, std::uint64_t argument) const noexcept;
  void* mappable(std::uint64_t offset, std::size_t length) const noexcept;
  SimulatedDevice& device() const noexcept { return *device_; }

 private:
  Host* host_;
  SimulatedDevice* device_;
};

/// An open group. Its container is a type1 or sPAPR container or, on the compatibility interface, a /dev/iommu.
class GroupFile final : public File {
 public:
  explicit GroupFile(Host& host) noexcept : host_{host} {}
  /// For a file fresh from the table: which group it is. Host::vfio_mutex is held.
  void open(IommuGroup& group) noexcept;

  long ioctl(unsigned long request, std::uint64_t argument) noexcept override;
  void release() noexcept override;
  /// A device file of this group was closed.
  void close_device(SimulatedDevice& device) noexcept;

 private:
  struct OpenDevice {
    SimulatedDevice* device;
    unsigned files;
    std::uint32_t iommufd_id;
  };
  long set_container(std::uint64_t argument) noexcept;
  long unset_container() noexcept;
  long get_device(std::uint64_t argument) noexcept;
  int open_device(SimulatedDevice& device);
  void leave_container() noexcept;

  Host& host_;
  IommuGroup* group_ = nullptr;
  Container* container_ = nullptr;  // one of the two, or neither; a reference is held
  IommufdFile* iommufd_ = nullptr;
  std::vector<OpenDevice> devices_;
};

/// A device that a group gave out.
class GroupDeviceFile final : public File {
 public:
  explicit GroupDeviceFile(Host& host) noexcept : host_{host} {}
  void open(GroupFile& group, SimulatedDevice& device) noexcept;
  long ioctl(unsigned long request, std::uint64_t argument) noexcept override;
  void* mappable(std::uint64_t offset, std::size_t length) noexcept override;
  void release() noexcept override;

 private:
  Host& host_;
  GroupFile* group_ = nullptr;
  SimulatedDevice* device_ = nullptr;
};

/// An open cdev: useless until it is bound to a /dev/iommu.
class CdevFile final : public File {
 public:
  explicit CdevFile(Host& host) noexcept : host_{host} {}
  void open(SimulatedDevice& device) noexcept;
  long ioctl(unsigned long request, std::uint64_t argument) noexcept override;
  void* mappable(std::uint64_t offset, std::size_t length) noexcept override;
  void release() noexcept override;

 private:
  long bind(std::uint64_t argument) noexcept;
  long attach(std::uint64_t argument) noexcept;
  long detach(std::uint64_t argument) noexcept;

  Host& host_;
  SimulatedDevice* device_ = nullptr;
  IommufdFile* iommufd_ = nullptr;  // a reference is held
  std::uint32_t id_ = 0;
};

}  // namespace iovane::backends::model
