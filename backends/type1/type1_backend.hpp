// VFIO's type1 interface: one container per address space, devices by group. Also on iommufd's compatibility interface.
#pragma once

#include <memory>

#include "backends/backend.hpp"
#include "backends/kernel_call.hpp"

namespace iovane::backends {

/// `interface` is type1_v2, type1_v1 (on /dev/vfio/vfio), compat_v2 or compat_v1 (on /dev/iommu). Each space opens a
/// container of its own; a descriptor that was handed in makes one space, and a second create_space() says
/// limit_reached. `kernel` outlives the backend. A type1 container only accepts maps while a device is attached.
/// Errors: not_found, permission (with the cure), unsupported when the kernel lacks the extension.
Result<std::unique_ptr<Backend>> open_type1(Kernel& kernel, Interface interface, const DescriptorSource& source);

}  // namespace iovane::backends
