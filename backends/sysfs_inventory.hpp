// What sysfs says about PCI functions, their IOMMU groups and the addresses that those groups reserve.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "backends/kernel.hpp"

namespace iovane::backends {

/// All PCI functions under `sysfs_root`, sorted by address. A host without PCI has none.
Result<std::vector<PciDevice>> read_pci_inventory(const std::string& sysfs_root);

/// What the device's group takes out of a space, as far as the kernel's inventory says. Empty for a device that it does
/// not list, and without an address.
std::vector<IovaRange> reserved_of(Kernel& kernel, const std::string& pci_address);

/// The ranges of a group's reserved_regions file that nobody may map, sorted: everything but "direct-relaxable", which
/// the kernel gives up when user space takes the device. Lines that are not "start last type" are skipped.
std::vector<IovaRange> parse_reserved_regions(std::string_view text);

}  // namespace iovane::backends
