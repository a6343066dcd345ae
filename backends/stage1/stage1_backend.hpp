// Stage-1 mode: first-stage page tables of our own, nested on the kernel's second stage (docs/STAGE1.md).
#pragma once

#include <memory>
#include <string>

#include "backends/backend.hpp"
#include "backends/kernel_call.hpp"

namespace iovane::backends {

/// Opens /dev/iommu, or takes a descriptor of it, for address spaces in stage-1 mode. Whether the IOMMU can nest shows
/// when the first device is attached. `kernel` outlives the backend. Blocks for a few system calls.
/// Errors: as open_iommufd(); unsupported where this system's pages are not 4 KiB.
Result<std::unique_ptr<Backend>> open_stage1(Kernel& kernel, const DescriptorSource& source);

}  // namespace iovane::backends
