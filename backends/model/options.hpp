// What a software host looks like: its IOMMUs, its devices and its limits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "backends/model/spapr_options.hpp"
#include "iovane/types.hpp"

namespace iovane::backends::model {

/// Kinds of reserved regions, as the kernel's sysfs names them.
enum class ReservedKind : std::uint8_t {
  direct,            ///< identity-mapped for firmware (RMRR): never ours
  direct_relaxable,  ///< the same, but may be given up when the device is assigned: does not narrow anything
  reserved,          ///< not translated
  msi,               ///< interrupts: writes there never reach memory
};
struct ReservedRegion {
  IovaRange range;
  ReservedKind kind = ReservedKind::reserved;
};

/// Whose first stage a unit walks on top of its own tables, if it nests.
enum class Nesting : std::uint8_t { none, smmuv3, vtd, amd };

/// One IOMMU unit. Devices behind different units need different page tables.
struct IommuOptions {
  unsigned address_bits = 48;  ///< 30 to 57; decides the number of levels (3 to 5) and the aperture
  std::uint64_t page_sizes = (1ULL << 12) | (1ULL << 21) | (1ULL << 30);  ///< bit n: leaves of 2^n bytes
  bool dirty_tracking = true;
  bool page_faults = true;      ///< devices can wait for pages (PRI, stall)
  unsigned iotlb_entries = 64;  ///< per device, 4 KiB each; 0: every access walks
  Nesting nesting = Nesting::none;
  bool range_invalidation = true;  ///< SMMUv3: IDR3.RIL
  bool coherent = true;            ///< SMMUv3: the firmware promises it; without, no vIOMMU is given out
};

/// One PCI function, bound to vfio-pci unless `driver` says otherwise.
struct DeviceOptions {
  std::string address{};  ///< "0000:00:03.0"; made up when empty
  int group = -1;         ///< -1: a group of its own
  std::size_t iommu = 0;  ///< index into ModelOptions::iommus
  std::string driver = "vfio-pci";
  int numa_node = -1;
  std::vector<ReservedRegion> reserved{{{Iova{0xfee0'0000}, Iova{0xfeef'ffff}}, ReservedKind::msi}};
  Bytes bar0{64 * 1024};  ///< size of its memory BAR, a power of two; 0: none
};

/// What a map does with the memory it names, beyond entering it.
enum class MemoryCheck : std::uint8_t {
  populate,  ///< faults all of it in with the wanted access, as pinning does; EFAULT is exact. About 1 us per os_page
  mapped,    ///< only that the whole range is mapped at all: one cheap system call, nothing is populated
  none,      ///< trusts the caller: no system call. For benchmarks and replays
};

/// Limits on pinned memory. The default counts and never refuses.
struct MemlockOptions {
  std::optional<Bytes> limit;  ///< RLIMIT_MEMLOCK; nothing: unlimited
  bool ipc_lock = false;       ///< CAP_IPC_LOCK: the limit does not hold, and iommufd does not even count
  /// As the running process has it.
  static MemlockOptions of_this_process() noexcept;
};

struct ModelOptions {
  std::vector<IommuOptions> iommus{IommuOptions{}};
  std::vector<DeviceOptions> devices{DeviceOptions{}, DeviceOptions{}};
  MemoryCheck memory_check = MemoryCheck::populate;
  MemlockOptions memlock{};
  bool sys_resource = true;               ///< CAP_SYS_RESOURCE, which setting the RLIMIT_MODE option needs
  bool iommufd = true;                    ///< false: no /dev/iommu and no device cdevs
  bool type1 = true;                      ///< false: no /dev/vfio/vfio and no groups
  bool viommu = true;                     ///< VIOMMU_ALLOC and its kin: Linux 6.13 and later; ENOTTY before
  bool event_queues = true;               ///< VEVENTQ_ALLOC: Linux 6.15 and later; ENOTTY before
  bool map_file = true;                   ///< IOAS_MAP_FILE is there: Linux 6.13 and later; ENOTTY before
  std::uint32_t dma_entry_limit = 65535;  ///< type1's module parameter
  /// A POWER host: containers have the sPAPR driver instead of type1. Without /dev/iommu: there is no such backend.
  std::optional<SpaprOptions> spapr{};
  std::size_t descriptors_max = 4096;  ///< EMFILE beyond
};

}  // namespace iovane::backends::model
