// The iommufd interface: address spaces (IOAS) on one /dev/iommu descriptor, devices by their cdev.
#pragma once

#include <memory>

#include "backends/backend.hpp"
#include "backends/kernel_call.hpp"

namespace iovane::backends {

/// Opens /dev/iommu, or takes a descriptor of it. Several spaces share the descriptor, and registered memory is pinned
/// once for all of them. `kernel` outlives the backend. Blocks for a few system calls.
/// Errors: not_found, permission (with the cure), unsupported when the descriptor is not iommufd's.
Result<std::unique_ptr<Backend>> open_iommufd(Kernel& kernel, const DescriptorSource& source);

}  // namespace iovane::backends
