#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

#include "backends/iommufd/ioas_calls.hpp"
#include "backends/iommufd/iommufd_space.hpp"
#include "backends/kernel_error.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/error_text.hpp"
#include "base/os_error.hpp"

namespace iovane::backends::iommufd {

SharedDescriptor::SharedDescriptor(Kernel& kernel, KernelFd fd, bool exclusive, StagingOptions staging)
    : kernel_{kernel},
      fd_{std::move(fd)},
      exclusive_{exclusive},
      map_file_{has_map_file(kernel, fd_.get())},
      granule_{static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE))},
      staging_{kernel, fd_.get(), map_file_, granule_, std::move(staging)} {}

Result<BoundDevice> SharedDescriptor::bind(const DeviceSource& source) {
  BoundDevice device;
  std::string path;
  if (!source.pci_address.empty()) {
    device.name = source.pci_address;
    const auto inventory = kernel_.pci_devices();
    if (!inventory && source.cdev_fd < 0) return inventory.error();
    const PciDevice* found = nullptr;
    for (const PciDevice& candidate : inventory ? *inventory : std::vector<PciDevice>{})
      if (candidate.address == source.pci_address) {
        device.reserved = candidate.reserved;
        device.numa_node = candidate.numa_node;
        path = candidate.cdev;
        found = &candidate;
        if (path.empty() && source.cdev_fd < 0)
          return base::fail(Errc::no_device, Stage::attach, 0,
                            "{} has no VFIO device node: it is bound to '{}'; bind it to vfio-pci on a kernel with "
                            "CONFIG_VFIO_DEVICE_CDEV",
                            source.pci_address, candidate.driver.empty() ? "no driver" : candidate.driver);
      }
    if (found == nullptr && source.cdev_fd < 0)
      return base::fail(Errc::no_device, Stage::attach, 0, "there is no PCI device {} on this host",
                        source.pci_address);
  }
  if (source.cdev_fd < 0 && path.empty())
    return base::fail(Errc::invalid_argument, Stage::attach, 0,
                      "iommufd attaches devices by PCI address or by an open cdev descriptor; neither was given");
  if (device.name.empty()) device.name = fmt::format("cdev fd {}", source.cdev_fd);

  auto fd = open_descriptor(kernel_, path.c_str(), {.fd = source.cdev_fd, .duplicate = true});
  if (!fd) {
    Error error = fd.error();
    error.stage = Stage::attach;
    return error;
  }
  device.fd = std::move(*fd);
  const auto object = bind_cdev(device.fd.get(), source.cdev_fd, device.name);
  if (!object) return object.error();
  device.object = *object;
  device.hardware = hardware_info(kernel_, fd_.get(), device.object).value_or(HardwareInfo{});
  if (const auto pinned = staging_.device_bound(device.object); !pinned) return pinned.error();
  // relaxed: an id is only compared.
  device.id = DeviceId{next_device_.fetch_add(1, std::memory_order_relaxed)};
  return device;
}

Result<std::uint32_t> SharedDescriptor::bind_cdev(int cdev, int callers_fd, const std::string& name) {
  uapi::vfio::DeviceBindIommufd bind{.iommufd = fd()};
  const int why = call(kernel_, cdev, bind);
  const std::lock_guard lock{mutex_};
  if (why == 0) {
    if (callers_fd >= 0) {
      std::erase_if(remembered_, [&](const Remembered& r) { return r.callers_fd == callers_fd; });
      remembered_.push_back({callers_fd, bind.out_devid});
    }
    return bind.out_devid;
  }
  if (why == EINVAL && callers_fd >= 0) {
    for (const Remembered& known : remembered_)
      if (known.callers_fd == callers_fd) return known.object;
  }
  switch (why) {
    case EINVAL:
      return base::fail(Errc::busy, Stage::attach, why,
                        "{} cannot be bound: its descriptor is bound to another iommufd, or is not a device cdev",
                        name);
    case EBUSY:
      return base::fail(Errc::busy, Stage::attach, why,
                        "{} cannot be bound: it, or another device of its group, is in use through VFIO", name);
    case EPERM:
    case EACCES:
      return base::fail(Errc::permission, Stage::attach, why,
                        "{} cannot be bound: its group is not isolated (no interrupt remapping?) or has a device with "
                        "another driver",
                        name);
    default: return explain_call(Stage::attach, "VFIO_DEVICE_BIND_IOMMUFD", why);
  }
}

void SharedDescriptor::unbind(const BoundDevice& device) noexcept { staging_.device_unbound(device.object); }

}  // namespace iovane::backends::iommufd
