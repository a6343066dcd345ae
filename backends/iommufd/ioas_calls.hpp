// iommufd's control-plane calls, one function each, for the iommufd backend, the compatibility interface and the probe.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backends/kernel.hpp"

namespace iovane::backends::iommufd {

Result<std::uint32_t> ioas_alloc(Kernel& kernel, int fd) noexcept;
/// Objects go quietly: a failure here has no cure, and the descriptor's close takes what is left.
void destroy(Kernel& kernel, int fd, std::uint32_t object) noexcept;

/// What can be mapped in an IOAS now, sorted and disjoint, as the kernel lists it.
Result<std::vector<IovaRange>> ioas_ranges(Kernel& kernel, int fd, std::uint32_t ioas);
/// IOAS_ALLOW_IOVAS. iova_reserved when a device that is attached already takes from them.
Result<void> ioas_allow(Kernel& kernel, int fd, std::uint32_t ioas, std::span<const IovaRange> ranges);
/// Granule-sized IOPTEs only (OPTION_HUGE_PAGES = 0); the IOAS must be empty.
Result<void> ioas_disable_large_ioptes(Kernel& kernel, int fd, std::uint32_t ioas) noexcept;

/// True when something is mapped at `iova`. Asks by copying one byte into a scratch IOAS that no device sees: nothing
/// is pinned, nothing changes. For explaining failures; an unanswered question is "no".
bool is_mapped(Kernel& kernel, int fd, std::uint32_t ioas, Iova iova) noexcept;
/// True when an unmap of `range` would cut a mapping at its borders, judged by is_mapped() after the kernel said ENOENT
/// (which means a cut, or nothing there: whole mappings inside the range would have gone without error).
bool cuts_mapping(Kernel& kernel, int fd, std::uint32_t ioas, const IovaRange& range) noexcept;

/// Bit n: IOPTEs of 2^n bytes are possible in every domain of the IOAS. 0 when the kernel does not tell. Borrows the
/// descriptor's compatibility IOAS for a moment, so it is only for descriptors that nobody else uses.
std::uint64_t ioas_page_sizes(Kernel& kernel, int fd, std::uint32_t ioas) noexcept;

/// True when the kernel knows IOAS_MAP_FILE (Linux 6.13).
bool has_map_file(Kernel& kernel, int fd) noexcept;

/// What GET_HW_INFO says about a bound device.
struct HardwareInfo {
  const char* name = "";           ///< "Intel VT-d", "Arm SMMUv3", ...; empty for an unknown type
  std::uint64_t capabilities = 0;  ///< uapi::iommufd::hw_cap_*
};
Result<HardwareInfo> hardware_info(Kernel& kernel, int fd, std::uint32_t device) noexcept;

}  // namespace iovane::backends::iommufd
