// The software host: devices, groups, limits and open files, shared by every interface that it imitates.
//
// Lock order: Host::vfio_mutex, then an iommufd context, then a space (IOAS or container), then pages, then a device.
#pragma once

#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "backends/model/accounting.hpp"
#include "backends/model/file.hpp"
#include "backends/model/host_memory.hpp"
#include "backends/model/injection.hpp"
#include "backends/model/options.hpp"
#include "backends/model/simulated_device.hpp"
#include "backends/model/spapr_memory.hpp"

namespace iovane::backends::model {

/// Devices that cannot be told apart by the IOMMU. All under Host::vfio_mutex.
struct IommuGroup {
  int number = 0;
  std::vector<SimulatedDevice*> devices;
  bool viable = true;           ///< no device is with a host driver
  const void* owner = nullptr;  ///< whose DMA it is: an iommufd context or a container's group; null: the host's
  unsigned owner_count = 0;
  bool group_open = false;  ///< /dev/vfio/N is open
  unsigned cdevs_open = 0;  ///< devices bound through their cdevs

  const IommuOptions& iommu() const noexcept { return devices.front()->iommu(); }
  /// The union of its devices' regions.
  std::vector<ReservedRegion> reserved() const;
  /// Makes all devices translate through `domain`, or through nothing. The domain's owner lock is held.
  void join(Domain& domain);
  void leave(Domain& domain) noexcept;
  /// 0, or -EPERM when somebody else owns the group's DMA.
  int claim(const void* claimant) noexcept;
  void disclaim() noexcept;
};

struct Host {
  explicit Host(ModelOptions o);

  IommuGroup* group(int number) noexcept;
  IommuGroup* group_of(const SimulatedDevice* device) noexcept;
  SimulatedDevice* device(const std::string& address) noexcept;

  const ModelOptions options;
  Accounting accounting;
  HostMemory memory;
  SpaprMemory spapr_memory;
  Injection injection;
  std::vector<std::unique_ptr<SimulatedDevice>> devices;
  struct alignas(os_page_bytes) OsPage {
    std::byte bytes[os_page_bytes];
  };
  std::vector<std::unique_ptr<OsPage[]>> bars;  // BAR 0 of each device; null when it has none
  std::vector<std::unique_ptr<IommuGroup>> groups;
  std::mutex vfio_mutex;
  std::set<const SimulatedDevice*> bound_cdevs;  // under vfio_mutex
  DescriptorTable files;
};

}  // namespace iovane::backends::model
