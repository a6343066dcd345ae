#include "backends/type1/vfio_groups.hpp"

#include <algorithm>
#include <cerrno>
#include <optional>

#include "backends/kernel_error.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::type1 {
namespace {

namespace uapi = backends::uapi::vfio;

Error container_error(int os_errno, const std::string& group, const std::vector<IovaRange>& reserved) {
  std::string list;
  for (const IovaRange& range : reserved)
    list += fmt::format("{}[{:#x}, {:#x}]", list.empty() ? "" : ", ", range.start.value, range.last.value);
  switch (os_errno) {
    case EINVAL:
      return base::fail(Errc::iova_reserved, Stage::attach, os_errno,
                        "group {} cannot join the container: it reserves {} where something is "
                        "mapped, or its IOMMU reaches fewer addresses than are in use",
                        group, list.empty() ? "addresses" : list);
    case EPERM:
      return base::fail(Errc::permission, Stage::attach, os_errno,
                        "group {} cannot join the container: its interrupts are not isolated (no interrupt remapping); "
                        "vfio_iommu_type1.allow_unsafe_interrupts=1 accepts that",
                        group);
    case EBUSY:
      return base::fail(Errc::busy, Stage::attach, os_errno,
                        "group {} cannot join the container: it is in use through iommufd or another container", group);
    case ENODEV:
      return base::fail(Errc::no_device, Stage::attach, os_errno,
                        "group {} cannot join the container: no IOMMU driver of the container accepts it", group);
    default: return explain_call(Stage::attach, "VFIO_GROUP_SET_CONTAINER / VFIO_SET_IOMMU", os_errno);
  }
}

}  // namespace

VfioGroups::~VfioGroups() { leave_all(); }

void VfioGroups::leave_all() noexcept {
  for (Group& group : groups_) {
    group.devices.clear();
    leave(group);
  }
  groups_.clear();
}

bool VfioGroups::contains(DeviceId device) const noexcept {
  return std::any_of(groups_.begin(), groups_.end(), [&](const Group& g) {
    return std::any_of(g.devices.begin(), g.devices.end(), [&](const GroupDevice& d) { return d.id == device; });
  });
}

std::vector<int> VfioGroups::descriptors() const {
  std::vector<int> list;
  for (const Group& group : groups_) list.push_back(group.fd.get());
  return list;
}

bool VfioGroups::is_last(DeviceId device) const noexcept {
  return groups_.size() == 1 && groups_.front().devices.size() == 1 && groups_.front().devices.front().id == device;
}

Result<GroupDevice*> VfioGroups::add(const DeviceSource& source) {
  if (source.pci_address.empty())
    return base::fail(Errc::invalid_argument, Stage::attach, 0,
                      "a container opens devices by name: give the PCI address, also with a group descriptor");
  std::vector<IovaRange> reserved;
  std::string name = source.pci_address;
  const auto joined = join(source, reserved);
  if (!joined) return joined.error();
  Group& group = **joined;
  const long fd = kernel_.ioctl(group.fd.get(), uapi::group_get_device_fd, name.data());
  if (fd >= 0) {
    group.devices.push_back({.id = DeviceId{next_device_++},
                             .name = std::move(name),
                             .fd = KernelFd{kernel_, static_cast<int>(fd), true},
                             .reserved = std::move(reserved)});
    return &group.devices.back();
  }
  const int why = static_cast<int>(-fd);
  Error error = explain_call(Stage::attach, "VFIO_GROUP_GET_DEVICE_FD", why);
  if (why == ENODEV)
    error = base::fail(Errc::no_device, Stage::attach, why, "{} is not a device of group {} that vfio-pci drives",
                       source.pci_address, group.key);
  if (why == EADDRINUSE)
    error = base::fail(Errc::iova_reserved, Stage::attach, why,
                       "{} cannot be attached: it reserves addresses where something is mapped or promised",
                       source.pci_address);
  if (group.devices.empty()) {
    leave(group);
    groups_.pop_back();
  }
  return error;
}

Result<VfioGroups::Group*> VfioGroups::join(const DeviceSource& source, std::vector<IovaRange>& reserved) {
  const auto inventory = kernel_.pci_devices();
  if (!inventory && source.group_fd < 0) return inventory.error();
  std::optional<PciDevice> found;
  for (const PciDevice& candidate : inventory ? *inventory : std::vector<PciDevice>{})
    if (candidate.address == source.pci_address) found = candidate;
  if (!found && source.group_fd < 0)
    return base::fail(Errc::no_device, Stage::attach, 0, "there is no PCI device {} on this host", source.pci_address);
  if (source.group_fd < 0 && found->group < 0)
    return base::fail(Errc::no_device, Stage::attach, 0, "{} is in no IOMMU group: no IOMMU translates for it",
                      source.pci_address);
  if (found) reserved = found->reserved;

  const std::string key =
      found && found->group >= 0 ? fmt::format("/dev/vfio/{}", found->group) : fmt::format("fd {}", source.group_fd);
  for (Group& group : groups_)
    if (group.key == key) {
      group.devices.reserve(group.devices.size() + 1);
      return &group;
    }

  groups_.reserve(groups_.size() + 1);
  auto fd = open_descriptor(kernel_, key.c_str(), {.fd = source.group_fd, .duplicate = true});
  if (!fd) {
    Error error = fd.error();
    error.stage = Stage::attach;
    return error;
  }
  Group group{.key = key, .fd = std::move(*fd), .devices = {}};
  group.devices.reserve(1);  // nothing may fail after the group has joined
  if (const auto connected = connect(group, reserved); !connected) return connected.error();
  groups_.push_back(std::move(group));
  return &groups_.back();
}

Result<void> VfioGroups::connect(const Group& group, const std::vector<IovaRange>& reserved) {
  uapi::GroupStatus status;
  if (const int why = call(kernel_, group.fd.get(), status); why != 0)
    return explain_call(Stage::attach, "VFIO_GROUP_GET_STATUS", why);
  if ((status.flags & uapi::group_flags_viable) == 0)
    return base::fail(
        Errc::busy, Stage::attach, 0,
        "group {} is not viable: another of its devices has a driver that is not VFIO's; bind all devices "
        "of the group to vfio-pci",
        group.key);
  if ((status.flags & uapi::group_flags_container_set) != 0)
    return base::fail(Errc::busy, Stage::attach, 0, "group {} is in another container already", group.key);
  int container = container_;
  if (const int why = errno_of(kernel_.ioctl(group.fd.get(), uapi::group_set_container, &container)); why != 0)
    return container_error(why, group.key, reserved);
  if (!groups_.empty()) return {};
  if (const int why = errno_of(kernel_.ioctl_value(container_, uapi::set_iommu, iommu_type_)); why != 0) {
    kernel_.ioctl_value(group.fd.get(), uapi::group_unset_container, 0);
    return container_error(why, group.key, reserved);
  }
  return {};
}

void VfioGroups::leave(Group& group) noexcept {
  kernel_.ioctl_value(group.fd.get(), uapi::group_unset_container, 0);
  group.fd.reset();
}

Result<void> VfioGroups::remove(DeviceId device) {
  for (auto group = groups_.begin(); group != groups_.end(); ++group) {
    const auto at = std::find_if(group->devices.begin(), group->devices.end(),
                                 [&](const GroupDevice& d) { return d.id == device; });
    if (at == group->devices.end()) continue;
    group->devices.erase(at);
    if (group->devices.empty()) {
      leave(*group);
      groups_.erase(group);
    }
    return {};
  }
  return base::fail(Errc::not_found, Stage::detach, 0, "device {} is not attached to this space", device.value);
}

}  // namespace iovane::backends::type1
