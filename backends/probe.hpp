// What this host offers: interfaces, devices, limits, and which backend `auto` takes and why.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "backends/backend.hpp"
#include "backends/kernel.hpp"
#include "backends/measure.hpp"

namespace iovane::backends {

/// One kernel interface on this host.
struct InterfaceReport {
  Interface interface = Interface::iommufd;
  bool present = false;                        ///< its device node is there
  bool usable = false;                         ///< it can be opened and a device can be attached through it
  std::string path;                            ///< "/dev/iommu"
  std::string reason;                          ///< why it is not usable; empty when it is
  std::string cure;                            ///< what would change that; empty when nothing is known
  std::string version;                         ///< "API version 0"; "IOAS_MAP_FILE (6.13 or newer)"
  std::vector<std::string> extensions;         ///< what the interface says it can do beyond the basics
  Capability capabilities = Capability::none;  ///< of a space on it; none when it cannot be opened
};

/// One PCI function that VFIO could take.
struct DeviceReport {
  PciDevice pci;
  bool attachable = false;
  std::string reason;  ///< why not; empty when it is
  std::string cure;
  /// Interfaces that the probe attached it through, and what a space with only this device then looked like. Empty when
  /// the probe was told not to attach, or nothing could.
  std::optional<Interface> attached_through;
  std::vector<IovaRange> usable;  ///< without an attach: everything less what sysfs says is reserved
  std::uint64_t page_sizes = 0;   ///< bit n: 2^n bytes; 0 when unknown
  std::uint64_t entries_max = 0;  ///< type1's limit on live mappings; 0 when unknown or without limit
  std::string iommu;              ///< "Intel VT-d", "Arm SMMUv3", ...; empty when unknown
  bool dirty_tracking = false;
};

/// What the IOMMU cannot tell apart. On POWER, a partitionable endpoint: everything behind one of its bridges.
struct GroupReport {
  int number = -1;
  std::vector<std::string> devices;  ///< PCI addresses
  bool viable = false;               ///< every device is with a VFIO driver or with none
};

/// One line of the parity table: a capability, and which interfaces have it.
struct ParityLine {
  Capability capability = Capability::none;
  bool iommufd = false;
  bool type1 = false;
  bool compat = false;
  bool spapr = false;
  bool stage1 = false;
};

struct HostReport {
  std::string kernel;
  std::vector<InterfaceReport> interfaces;  ///< in the order in which `auto` prefers them
  std::vector<GroupReport> groups;
  std::vector<DeviceReport> devices;  ///< in a group or bound to a VFIO driver; others cannot be candidates
  MemlockUse memlock;
  std::vector<ParityLine> parity;          ///< capabilities that at least one interface has
  std::optional<Interface> choice;         ///< nothing: no interface is usable, only the software IOMMU is left
  std::string why;                         ///< one sentence for people
  std::optional<Measurement> measurement;  ///< what `choice` rests on beside the static order, if anything
  std::string not_measured;                ///< why there is none
};

struct ProbeOptions {
  /// Attach one idle device per group, to learn its real ranges and page sizes. Opening a device resets it; devices in
  /// use are never touched (the kernel refuses a second user). Without it nothing but device nodes is opened.
  bool attach_devices = true;
  /// Attach one idle device in stage-1 mode, to learn whether its IOMMU nests: nothing else tells. Implied by
  /// attach_devices. Without it stage-1 mode is never chosen.
  bool ask_nesting = false;
  /// Whether to measure the usable interfaces, see measure.hpp.
  enum class Measure : std::uint8_t {
    never,     ///< the static order decides
    cached,    ///< a measurement that is on file counts; none is made
    when_new,  ///< one is made when there is none on file for this boot, kernel and set of devices
    always,
  };
  Measure measure = Measure::never;
  std::string measurement_file{};  ///< empty: as measurement_path() says
};

/// Control plane; blocks for the system calls it makes. Fails only when the inventory cannot be read: what is missing
/// or forbidden is part of the report.
Result<HostReport> probe_host(Kernel& kernel, const ProbeOptions& options = {});

}  // namespace iovane::backends
