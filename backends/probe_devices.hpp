// The device part of the probe: which functions could be attached, and what an attach teaches about them.
#pragma once

#include <vector>

#include "backends/probe.hpp"

namespace iovane::backends {

std::vector<GroupReport> group_reports(const std::vector<PciDevice>& inventory);
/// Functions that are in a group or with a VFIO driver, with the reason and cure where they cannot be attached.
std::vector<DeviceReport> device_reports(const std::vector<PciDevice>& inventory,
                                         const std::vector<GroupReport>& groups);
/// Attaches one attachable device per group through `interface`, one after the other, and fills in what that tells.
void attach_for_facts(Kernel& kernel, Interface interface, std::vector<DeviceReport>& devices);

}  // namespace iovane::backends
