// VFIO's sPAPR TCE interface, versions 1 and 2: one container per address space, devices by group.
#pragma once

#include <memory>

#include "backends/backend.hpp"
#include "backends/kernel_call.hpp"

namespace iovane::backends {

/// `interface` is spapr_v1 or spapr_v2. Each space opens a container of its own; a descriptor that was handed in makes
/// one space, and a second create_space() says limit_reached. Memory is registered per process: let all spaces of a
/// process come from one backend, which lets them share registrations. `kernel` outlives the backend.
/// Errors: not_found, permission (with the cure), unsupported when the kernel has no sPAPR driver.
Result<std::unique_ptr<Backend>> open_spapr(Kernel& kernel, Interface interface, const DescriptorSource& source);

}  // namespace iovane::backends
