// A real freeze on the emulated powernv9: the state that the bridge's own error handling would leave.
#pragma once

#include <string>

namespace iovane::test {

/// Marks the partitionable endpoint of the PCI device at `address` as frozen, registers and DMA, in its host bridge;
/// firmware and kernel find it there as after an error. Root. False where the host bridge is no PHB4.
bool freeze_in_phb4(const std::string& address);

}  // namespace iovane::test
