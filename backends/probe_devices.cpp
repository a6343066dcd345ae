#include "backends/probe_devices.hpp"

#include <algorithm>
#include <map>

#include "backends/open.hpp"
#include "backends/range_list.hpp"
#include "base/error_text.hpp"

namespace iovane::backends {
namespace {

bool is_vfio_driver(std::string_view driver) { return driver.find("vfio") != std::string_view::npos; }

void judge(DeviceReport& device, const std::vector<GroupReport>& groups) {
  const PciDevice& pci = device.pci;
  if (pci.group < 0) {
    device.reason = "in no IOMMU group: no IOMMU translates for it";
    device.cure = "enable the IOMMU in the firmware and on the kernel command line";
    return;
  }
  if (!is_vfio_driver(pci.driver)) {
    device.reason = pci.driver.empty() ? "bound to no driver" : fmt::format("in use by the driver '{}'", pci.driver);
    device.cure = fmt::format(
        "echo vfio-pci > /sys/bus/pci/devices/{0}/driver_override, unbind it from its driver, and "
        "echo {0} > /sys/bus/pci/drivers_probe",
        pci.address);
    return;
  }
  const auto group =
      std::find_if(groups.begin(), groups.end(), [&](const GroupReport& g) { return g.number == pci.group; });
  if (group != groups.end() && !group->viable) {
    device.reason = fmt::format("its group {} has a device with a driver that is not VFIO's", pci.group);
    device.cure = "bind every device of the group to vfio-pci, or to no driver";
    return;
  }
  device.attachable = true;
}

void learn(Backend& backend, DeviceReport& device) {
  auto space = backend.create_space({});
  if (!space) {
    device.reason = space.error().detail();
    return;
  }
  const auto attached = (*space)->attach({.pci_address = device.pci.address});
  if (!attached) {
    device.reason = attached.error().detail();
    device.attachable = attached.error().code == Errc::busy;  // free it, and it is
    return;
  }
  device.iommu = attached->iommu;
  device.dirty_tracking = attached->dirty_tracking;
  device.attached_through = backend.interface();
  if (auto usable = (*space)->usable_ranges()) device.usable = std::move(*usable);
  device.page_sizes = (*space)->facts().page_sizes;
  device.entries_max = (*space)->facts().entries_max;
}

}  // namespace

std::vector<GroupReport> group_reports(const std::vector<PciDevice>& inventory) {
  std::map<int, GroupReport> groups;
  for (const PciDevice& device : inventory) {
    if (device.group < 0) continue;
    auto [at, fresh] =
        groups.try_emplace(device.group, GroupReport{.number = device.group, .devices = {}, .viable = true});
    at->second.devices.push_back(device.address);
    // Bridges stay with their port driver; the kernel does not count them against the group.
    const bool harmless = device.driver.empty() || is_vfio_driver(device.driver) || device.driver == "pcieport" ||
                          device.driver == "pci-stub";
    at->second.viable = at->second.viable && harmless;
  }
  std::vector<GroupReport> list;
  for (auto& [number, group] : groups) list.push_back(std::move(group));
  return list;
}

std::vector<DeviceReport> device_reports(const std::vector<PciDevice>& inventory,
                                         const std::vector<GroupReport>& groups) {
  std::vector<DeviceReport> devices;
  for (const PciDevice& pci : inventory) {
    if (pci.group < 0 && !is_vfio_driver(pci.driver)) continue;
    DeviceReport device;
    device.pci = pci;
    judge(device, groups);
    device.usable = without({IovaRange::everything()}, pci.reserved);
    devices.push_back(std::move(device));
  }
  return devices;
}

void attach_for_facts(Kernel& kernel, Interface interface, std::vector<DeviceReport>& devices) {
  const auto backend = open_backend(kernel, {.name = std::string{to_string(interface)}});
  if (!backend) return;
  std::vector<int> seen;
  for (DeviceReport& device : devices) {
    if (!device.attachable || std::find(seen.begin(), seen.end(), device.pci.group) != seen.end()) continue;
    seen.push_back(device.pci.group);
    learn(**backend, device);
  }
}

}  // namespace iovane::backends
