#include "backends/iommufd/ioas_calls.hpp"

#include <cerrno>

#include "backends/kernel_call.hpp"
#include "backends/kernel_error.hpp"
#include "backends/range_list.hpp"
#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::iommufd {
namespace {

namespace uapi = backends::uapi::iommufd;

// An IOAS has one range per gap between reserved regions; hosts have a handful. Beyond this something is wrong.
constexpr std::uint32_t ranges_max = 1U << 20;

const char* hardware_name(std::uint32_t type) noexcept {
  switch (type) {
    case uapi::hw_info_type_intel_vtd: return "Intel VT-d";
    case uapi::hw_info_type_arm_smmuv3: return "Arm SMMUv3";
    case uapi::hw_info_type_tegra241_cmdqv: return "Arm SMMUv3 (Tegra241)";
    case uapi::hw_info_type_amd: return "AMD-Vi";
    default: return "";
  }
}

}  // namespace

Result<std::uint32_t> ioas_alloc(Kernel& kernel, int fd) noexcept {
  uapi::IoasAlloc alloc;
  if (const int why = call(kernel, fd, alloc); why != 0) return explain_call(Stage::open, "IOAS_ALLOC", why);
  return alloc.out_ioas_id;
}

void destroy(Kernel& kernel, int fd, std::uint32_t object) noexcept {
  uapi::Destroy destroy{.id = object};
  call(kernel, fd, destroy);
}

Result<std::vector<IovaRange>> ioas_ranges(Kernel& kernel, int fd, std::uint32_t ioas) {
  std::vector<uapi::IovaRange> room(16);
  for (int attempt = 0; attempt < 4; ++attempt) {
    uapi::IoasIovaRanges query{.ioas_id = ioas, .num_iovas = static_cast<std::uint32_t>(room.size())};
    query.allowed_iovas = reinterpret_cast<std::uintptr_t>(room.data());
    const int why = call(kernel, fd, query);
    if (why == EMSGSIZE && query.num_iovas > room.size() && query.num_iovas <= ranges_max) {
      room.resize(query.num_iovas);
      continue;
    }
    if (why != 0) return explain_call(Stage::query, "IOAS_IOVA_RANGES", why);
    std::vector<IovaRange> ranges;
    for (std::uint32_t i = 0; i < query.num_iovas && i < room.size(); ++i)
      ranges.push_back({Iova{room[i].start}, Iova{room[i].last}});
    return normalized(std::move(ranges));
  }
  return base::fail(Errc::busy, Stage::query, 0, "IOAS_IOVA_RANGES: the list grew with every question; ask again");
}

Result<void> ioas_allow(Kernel& kernel, int fd, std::uint32_t ioas, std::span<const IovaRange> ranges) {
  std::vector<uapi::IovaRange> list;
  for (const IovaRange& range : ranges) list.push_back({range.start.value, range.last.value});
  uapi::IoasAllowIovas allow{.ioas_id = ioas, .num_iovas = static_cast<std::uint32_t>(list.size())};
  allow.allowed_iovas = reinterpret_cast<std::uintptr_t>(list.data());
  const int why = call(kernel, fd, allow);
  if (why == 0) return {};
  if (why == EADDRINUSE) {
    const auto usable = ioas_ranges(kernel, fd, ioas);
    for (const IovaRange& range : ranges) {
      const auto hole = usable ? first_missing(*usable, range) : std::nullopt;
      if (hole)
        return base::fail(Errc::iova_reserved, Stage::reserve, why,
                          "[{:#x}, {:#x}] cannot be promised: [{:#x}, {:#x}] is reserved by a device that is attached",
                          range.start.value, range.last.value, hole->start.value, hole->last.value);
    }
  }
  if (why == EINVAL)
    return base::fail(Errc::invalid_argument, Stage::reserve, why,
                      "promised ranges must be well formed, longer than one byte, and must not overlap");
  return explain_call(Stage::reserve, "IOAS_ALLOW_IOVAS", why);
}

Result<void> ioas_disable_large_ioptes(Kernel& kernel, int fd, std::uint32_t ioas) noexcept {
  uapi::Option option{.option_id = uapi::option_huge_pages, .op = uapi::option_op_set, .object_id = ioas, .val64 = 0};
  if (const int why = call(kernel, fd, option); why != 0) return explain_call(Stage::open, "OPTION(HUGE_PAGES)", why);
  return {};
}

bool is_mapped(Kernel& kernel, int fd, std::uint32_t ioas, Iova iova) noexcept {
  const auto scratch = ioas_alloc(kernel, fd);
  if (!scratch) return false;
  uapi::IoasCopy copy{.dst_ioas_id = *scratch, .src_ioas_id = ioas, .length = 1, .src_iova = iova.value};
  bool mapped = false;
  // A mapping is readable, writable or both; a copy may not ask for more than the mapping's memory allows.
  for (const std::uint32_t access : {uapi::ioas_map_readable, uapi::ioas_map_writeable}) {
    copy.flags = access | uapi::ioas_map_fixed_iova;
    mapped = mapped || call(kernel, fd, copy) == 0;
    if (mapped) break;
  }
  destroy(kernel, fd, *scratch);
  return mapped;
}

bool cuts_mapping(Kernel& kernel, int fd, std::uint32_t ioas, const IovaRange& range) noexcept {
  return is_mapped(kernel, fd, ioas, range.start) || is_mapped(kernel, fd, ioas, range.last);
}

std::uint64_t ioas_page_sizes(Kernel& kernel, int fd, std::uint32_t ioas) noexcept {
  uapi::VfioIoas before{.op = uapi::vfio_ioas_get};
  const bool had_one = call(kernel, fd, before) == 0;
  uapi::VfioIoas borrow{.ioas_id = ioas, .op = uapi::vfio_ioas_set};
  if (call(kernel, fd, borrow) != 0) return 0;
  backends::uapi::vfio::Type1Info info;
  const bool told = call(kernel, fd, info) == 0;
  uapi::VfioIoas restore{.op = uapi::vfio_ioas_clear};
  if (had_one) {
    restore.op = uapi::vfio_ioas_set;
    restore.ioas_id = before.ioas_id;
  }
  call(kernel, fd, restore);
  return told && (info.flags & backends::uapi::vfio::type1_info_pgsizes) != 0 ? info.iova_pgsizes : 0;
}

bool has_map_file(Kernel& kernel, int fd) noexcept {
  // An IOAS that does not exist: a kernel that knows the call says ENOENT, one that does not says ENOTTY.
  uapi::IoasMapFile map{.flags = uapi::ioas_map_readable, .ioas_id = ~0U};
  const int why = call(kernel, fd, map);
  return why != 0 && why != ENOTTY;
}

Result<HardwareInfo> hardware_info(Kernel& kernel, int fd, std::uint32_t device) noexcept {
  uapi::HwInfo info{.dev_id = device};
  if (const int why = call(kernel, fd, info); why != 0) return explain_call(Stage::query, "GET_HW_INFO", why);
  return HardwareInfo{hardware_name(info.data_type), info.out_capabilities};
}

}  // namespace iovane::backends::iommufd
