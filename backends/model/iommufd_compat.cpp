// The VFIO type1 calls on /dev/iommu: the same IOAS under the old interface's rules, as far as iommufd imitates them.
#include <new>

#include "backends/model/capability_chain.hpp"
#include "backends/model/iommufd.hpp"

namespace iovane::backends::model {

namespace vfio = uapi::vfio;

long IommufdFile::compat(unsigned long request, std::uint64_t argument) noexcept {
  switch (request) {
    case vfio::get_api_version: return vfio::api_version;
    case vfio::check_extension:
      switch (argument) {
        case vfio::type1_iommu:
        case vfio::type1_v2_iommu:
        case vfio::unmap_all: return 1;
        // relaxed: written under the mutex; only its being there counts.
        case vfio::dma_cc_iommu: return compat_id_.load(std::memory_order_relaxed) == 0 ? -ENODEV : 1;
        default: return 0;
      }
    case vfio::set_iommu: return compat_set_iommu(argument);
    case vfio::Type1Info::request: return compat_info(argument);
    case vfio::Type1DmaMap::request: return compat_map(argument);
    case vfio::Type1DmaUnmap::request: return compat_unmap(argument);
    default: return -ENOTTY;
  }
}

long IommufdFile::compat_set_iommu(std::uint64_t type) noexcept {
  if (type != vfio::type1_iommu && type != vfio::type1_v2_iommu) return -EINVAL;
  const std::lock_guard lock{mutex_};
  // relaxed: written under the mutex.
  IoasObject* object = find<IoasObject>(compat_id_.load(std::memory_order_relaxed));
  if (object == nullptr) return -ENODEV;
  // Version 1 unmaps in the middle of mappings; without large leaves every place can be cut.
  return type == vfio::type1_iommu ? object->ioas.set_large_pages(false) : 0;
}

long IommufdFile::compat_map(std::uint64_t argument) noexcept {
  vfio::Type1DmaMap c;
  if (const int rc = read_vfio(argument, sizeof c, c); rc != 0) return rc;
  if ((c.flags & ~(vfio::dma_map_flag_read | vfio::dma_map_flag_write)) != 0) return -EINVAL;
  const std::uint32_t id = compat_id_.load(std::memory_order_relaxed);  // relaxed: the id is checked by the IOAS
  Ioas* ioas = find_ioas(id);
  if (id == 0 || ioas == nullptr) return -ENODEV;
  MapPlace place{.iova = c.iova, .fixed = true};
  return ioas->map_memory(id, place, c.vaddr, c.size, static_cast<Access>(c.flags & 3U), compat_ledger());
}

long IommufdFile::compat_unmap(std::uint64_t argument) noexcept {
  vfio::Type1DmaUnmap c;
  if (const int rc = read_vfio(argument, sizeof c, c); rc != 0) return rc;
  if ((c.flags & ~vfio::dma_unmap_flag_all) != 0) return -EINVAL;
  const std::uint32_t id = compat_id_.load(std::memory_order_relaxed);  // relaxed: the id is checked by the IOAS
  Ioas* ioas = find_ioas(id);
  if (id == 0 || ioas == nullptr) return -ENODEV;
  std::uint64_t unmapped = 0;
  int rc = 0;
  if ((c.flags & vfio::dma_unmap_flag_all) != 0) {
    if (c.iova != 0 || c.size != 0) return -EINVAL;
    rc = ioas->unmap_all(id, unmapped);
  } else {
    if (!ioas->large_pages()) rc = ioas->cut(c.iova, c.size);
    if (rc != 0) return rc;
    rc = ioas->unmap(id, c.iova, c.size, unmapped);
  }
  c.size = unmapped;
  write_vfio(argument, c, sizeof c);  // on failure too
  return rc;
}

long IommufdFile::compat_info(std::uint64_t argument) noexcept {
  vfio::Type1Info info;
  constexpr std::size_t minimum = IOVANE_UP_TO(vfio::Type1Info, iova_pgsizes);
  if (const int rc = read_vfio(argument, minimum, info); rc != 0) return rc;
  const std::size_t room = info.argsz;
  const std::lock_guard lock{mutex_};
  // relaxed: written under the mutex.
  IoasObject* object = find<IoasObject>(compat_id_.load(std::memory_order_relaxed));
  if (object == nullptr) return -ENODEV;
  try {
    CapabilityChain chain;
    // No limit on the number of mappings; all ones because callers compare it with 65535.
    chain.add(vfio::Type1CapDmaAvail{.header = {vfio::type1_cap_dma_avail, 1, 0}, .avail = ~std::uint32_t{0}});
    chain.add_iova_ranges(object->ioas.usable());
    info = {.argsz = static_cast<std::uint32_t>(sizeof info + chain.size()),
            .flags = vfio::type1_info_pgsizes | vfio::type1_info_caps,
            .iova_pgsizes = object->ioas.page_sizes()};
    if (room >= info.argsz) {
      info.cap_offset = sizeof info;
      chain.write(writable_bytes_at(argument) + sizeof info, sizeof info);
    }
    write_vfio(argument, info, std::min(room, sizeof info));
    return 0;
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

}  // namespace iovane::backends::model
