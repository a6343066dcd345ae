#include "backends/probe.hpp"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <system_error>

#include "backends/iommufd/ioas_calls.hpp"
#include "backends/kernel_call.hpp"
#include "backends/open.hpp"
#include "backends/probe_devices.hpp"
#include "backends/range_list.hpp"
#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/error_text.hpp"

namespace iovane::backends {
namespace {

constexpr bool on_spapr(Interface interface) noexcept {
  return interface == Interface::spapr_v1 || interface == Interface::spapr_v2;
}
constexpr bool on_container(Interface interface) noexcept {
  return interface == Interface::type1_v1 || interface == Interface::type1_v2 || on_spapr(interface);
}

std::string cure_of_open(int os_errno, Interface interface) {
  const bool iommufd = !on_container(interface);
  switch (os_errno) {
    case ENOENT:
    case ENODEV:
    case ENXIO:
      if (on_spapr(interface)) return "only POWER has it: there, modprobe vfio vfio_iommu_spapr_tce vfio_pci";
      return iommufd ? "modprobe iommufd; a kernel built with CONFIG_IOMMUFD (6.2 or newer)"
                     : "modprobe vfio vfio_iommu_type1; a kernel built with CONFIG_VFIO_CONTAINER";
    case EACCES:
    case EPERM: return "run as root, change the device node's owner, or hand in an open descriptor";
    default: return {};
  }
}

/// Opens a space without devices: what the interface itself can do.
void ask_interface(Kernel& kernel, InterfaceReport& report) {
  const auto backend = open_backend(kernel, {.name = std::string{to_string(report.interface)}});
  if (!backend) {
    report.reason = backend.error().detail();
    if (on_spapr(report.interface)) report.cure = cure_of_open(ENODEV, report.interface);
    return;
  }
  const auto space = (*backend)->create_space({});
  if (!space) {
    report.reason = space.error().detail();
    return;
  }
  report.capabilities = (*space)->facts().capabilities;
  report.usable = true;
}

void ask_extensions(Kernel& kernel, int fd, InterfaceReport& report) {
  namespace vfio = uapi::vfio;
  if (report.interface == Interface::stage1) return;
  if (report.interface == Interface::iommufd) {
    const bool map_file = iommufd::has_map_file(kernel, fd);
    report.version = map_file ? "Linux 6.13 or newer" : "Linux 6.2 to 6.12";
    if (map_file) report.extensions.emplace_back("IOAS_MAP_FILE");
    uapi::iommufd::Option mode{.option_id = uapi::iommufd::option_rlimit_mode, .op = uapi::iommufd::option_op_get};
    if (call(kernel, fd, mode) == 0)
      report.extensions.emplace_back(mode.val64 == 0 ? "memlock per user" : "memlock per process");
    return;
  }
  const long version = kernel.ioctl_value(fd, vfio::get_api_version, 0);
  report.version = fmt::format("VFIO API version {}", version);
  struct Extension {
    unsigned long number;
    const char* name;
  };
  for (const Extension& extension :
       {Extension{vfio::type1_iommu, "TYPE1"}, Extension{vfio::type1_v2_iommu, "TYPE1v2"},
        Extension{vfio::dma_cc_iommu, "DMA_CC"}, Extension{vfio::unmap_all, "UNMAP_ALL"},
        Extension{vfio::update_vaddr, "UPDATE_VADDR"}, Extension{vfio::noiommu_iommu, "NOIOMMU"},
        Extension{vfio::spapr_tce_iommu, "SPAPR_TCE"}, Extension{vfio::spapr_tce_v2_iommu, "SPAPR_TCE_v2"},
        Extension{vfio::eeh, "EEH"}})
    if (kernel.ioctl_value(fd, vfio::check_extension, extension.number) > 0)
      report.extensions.emplace_back(extension.name);
}

InterfaceReport probe_interface(Kernel& kernel, Interface interface) {
  InterfaceReport report;
  report.interface = interface;
  report.path = on_container(interface) ? "/dev/vfio/vfio" : "/dev/iommu";
  const int fd = kernel.open(report.path.c_str(), O_RDWR);
  if (fd < 0) {
    report.present = fd != -ENOENT;
    const std::string_view what = why_open_fails(-fd).what;
    report.reason = fmt::format("{}: {}", report.path, what.empty() ? std::generic_category().message(-fd) : what);
    report.cure = cure_of_open(-fd, interface);
    return report;
  }
  report.present = true;
  ask_extensions(kernel, fd, report);
  kernel.close(fd);
  ask_interface(kernel, report);
  return report;
}

/// An interface can only be used when a device can come in through it.
void require_device(InterfaceReport& report, const std::vector<DeviceReport>& devices) {
  if (!report.usable) return;
  const bool by_cdev = report.interface == Interface::iommufd || report.interface == Interface::stage1;
  for (const DeviceReport& device : devices)
    if (device.attachable && (!by_cdev || !device.pci.cdev.empty())) return;
  report.usable = false;
  report.reason = devices.empty() ? "no device of this host is behind an IOMMU"
                  : by_cdev       ? "no device with a VFIO device node (/dev/vfio/devices) is free"
                                  : "no device is bound to a VFIO driver";
  report.cure = devices.empty()
                    ? "enable the IOMMU in the firmware and on the kernel command line (intel_iommu=on, amd_iommu=on)"
                    : "bind a device to vfio-pci (driver_override), with every other device of its group";
}

/// Only the attempt tells whether an IOMMU nests, and its refusal says why not.
void require_nesting(Kernel& kernel, InterfaceReport& report, const std::vector<DeviceReport>& devices, bool ask) {
  if (!report.usable) return;
  report.usable = false;
  if (!ask) {
    report.reason = "not asked whether an IOMMU here translates in two stages";
    return;
  }
  const auto backend = open_backend(kernel, {.name = std::string{to_string(Interface::stage1)}});
  const auto space = backend ? (*backend)->create_space({}) : Result<std::unique_ptr<BackendSpace>>{backend.error()};
  if (!space) {
    report.reason = space.error().detail();
    return;
  }
  for (const DeviceReport& device : devices) {
    if (!device.attachable || device.pci.cdev.empty()) continue;
    const auto attached = (*space)->attach({.pci_address = device.pci.address});
    report.usable = attached.has_value();
    report.reason = attached ? "" : attached.error().detail();
    if (attached) {
      report.extensions.push_back(attached->iommu);
      if ((*space)->fault_record_fd() >= 0) report.extensions.emplace_back("fault records");
    }
    if (attached || attached.error().code != Errc::busy) break;
  }
  if (!report.usable)
    report.cure =
        "an IOMMU with two stages (Arm SMMUv3 with CANWBS or S2FWB, Intel VT-d in scalable mode) and Linux 6.13 or "
        "newer";
}

std::vector<ParityLine> parity(const std::vector<InterfaceReport>& interfaces) {
  Capability iommufd = Capability::none, type1 = Capability::none, compat = Capability::none, spapr = Capability::none;
  Capability stage1 = Capability::none;
  for (const InterfaceReport& report : interfaces) {
    if (report.interface == Interface::iommufd) iommufd = report.capabilities;
    if (report.interface == Interface::type1_v2) type1 = report.capabilities;
    if (report.interface == Interface::compat_v2) compat = report.capabilities;
    if (report.interface == Interface::spapr_v2) spapr = report.capabilities;
    if (report.interface == Interface::stage1 && report.usable) stage1 = report.capabilities;
  }
  std::vector<ParityLine> lines;
  for (std::uint32_t bit = 1; bit <= static_cast<std::uint32_t>(Capability::unmap_all); bit <<= 1U) {
    const auto capability = static_cast<Capability>(bit);
    if (has(iommufd | type1 | compat | spapr | stage1, capability))
      lines.push_back({capability, has(iommufd, capability), has(type1, capability), has(compat, capability),
                       has(spapr, capability), has(stage1, capability)});
  }
  return lines;
}

void choose(HostReport& report) {
  for (const InterfaceReport& interface : report.interfaces) {
    if (interface.interface != Interface::stage1 || !interface.usable) continue;
    report.choice = Interface::stage1;
    report.why = "stage1: usable, and a map there is a store instead of a kernel call";
    return;
  }
  std::string reasons;
  for (const InterfaceReport& interface : report.interfaces) {
    const bool candidate = interface.interface == Interface::iommufd || interface.interface == Interface::type1_v2 ||
                           (interface.interface == Interface::spapr_v2 && interface.usable);
    if (!candidate) continue;
    if (interface.usable) {
      report.choice = interface.interface;
      report.why = interface.interface == Interface::iommufd
                       ? "iommufd: usable, and the only interface that pins memory once and maps in parallel"
                       : fmt::format("{}: usable; others are not: {}", to_string(interface.interface), reasons);
      return;
    }
    reasons += fmt::format("{}{}: {}", reasons.empty() ? "" : "; ", to_string(interface.interface), interface.reason);
  }
  report.why = fmt::format("no kernel interface is usable, only the software IOMMU: {}", reasons);
}

/// A measurement never makes a probe fail: without one the static order stands.
void measure(Kernel& kernel, const ProbeOptions& options, HostReport& report) {
  using Measure = ProbeOptions::Measure;
  if (options.measure == Measure::never) {
    report.not_measured = "measuring is off";
    return;
  }
  if (report.choice == Interface::stage1) {
    report.not_measured = "stage-1 mode makes no kernel calls that could be compared";
    return;
  }
  const bool iommufd_usable = std::any_of(report.interfaces.begin(), report.interfaces.end(),
                                          [](const auto& i) { return i.interface == Interface::iommufd && i.usable; });
  if (!iommufd_usable) {
    report.not_measured = "there is nothing to choose: iommufd is not usable";
    return;
  }
  try {
    const std::uint64_t key = measurement_key(boot_id(), report);
    const std::string path = measurement_path(options.measurement_file);
    if (options.measure != Measure::always) report.measurement = load_measurement(path, key);
    if (!report.measurement && options.measure == Measure::cached) report.not_measured = "nothing is on file";
    if (!report.measurement && options.measure != Measure::cached) {
      report.measurement = measure_interfaces(kernel, report, {}, report.not_measured);
      if (report.measurement) (void)store_measurement(path, *report.measurement, key);
    }
    if (report.measurement) choose_by(*report.measurement, report);
  } catch (...) {
    report.measurement.reset();
    report.not_measured = "no memory to measure";
  }
}

}  // namespace

Result<HostReport> probe_host(Kernel& kernel, const ProbeOptions& options) {
  HostReport report;
  report.kernel = kernel.description();
  auto inventory = kernel.pci_devices();
  if (!inventory) return inventory.error();
  report.groups = group_reports(*inventory);
  report.devices = device_reports(*inventory, report.groups);
  for (const Interface interface :
       {Interface::stage1, Interface::iommufd, Interface::type1_v2, Interface::spapr_v2, Interface::type1_v1,
        Interface::spapr_v1, Interface::compat_v2, Interface::compat_v1}) {
    report.interfaces.push_back(probe_interface(kernel, interface));
    require_device(report.interfaces.back(), report.devices);
    if (interface == Interface::stage1)
      require_nesting(kernel, report.interfaces.back(), report.devices, options.attach_devices || options.ask_nesting);
  }
  report.memlock = kernel.memlock();
  report.parity = parity(report.interfaces);
  choose(report);
  measure(kernel, options, report);
  if (options.attach_devices && report.choice) attach_for_facts(kernel, *report.choice, report.devices);
  return report;
}

}  // namespace iovane::backends
