// What VFIO_IOMMU_GET_INFO tells about a type1 container.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "backends/kernel.hpp"

namespace iovane::backends::type1 {

struct ContainerInfo {
  std::uint64_t page_sizes = 0;                  ///< bit n: pages of 2^n bytes; 0 when not told
  std::optional<std::vector<IovaRange>> usable;  ///< sorted; nothing before Linux 5.4
  std::optional<std::uint64_t> entries_left;     ///< nothing before Linux 5.10
  std::uint64_t dirty_page_sizes = 0;  ///< 0: no dirty tracking (before Linux 5.8, or compatibility interface)
};

/// Asks for the structure and its chain of capabilities, and checks every link of it. Errors: no_device while the
/// container has no IOMMU.
Result<ContainerInfo> query_container(Kernel& kernel, int container);

}  // namespace iovane::backends::type1
