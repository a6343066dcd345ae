// What sysfs says about PCI functions, their IOMMU groups and the addresses that those groups reserve.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "backends/kernel.hpp"

namespace iovane::backends {

/// All PCI functions under `sysfs_root`, sorted by address. A host without PCI has none.
Result<std::vector<PciDevice>> read_pci_inventory(const std::string& sysfs_root);

/// The ranges of a group's reserved_regions file that nobody may map, sorted: everything but "direct-relaxable", which
/// the kernel gives up when user space takes the device. Lines that are not "start last type" are skipped.
std::vector<IovaRange> parse_reserved_regions(std::string_view text);

}  // namespace iovane::backends
