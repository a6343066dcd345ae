// Every setting and every bound, with its default.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "iovane/types.hpp"

namespace iovane {

/// What becomes of a descriptor that a caller passes in.
enum class DescriptorUse : std::uint8_t {
  borrow,     ///< used as it is; the caller keeps it open for as long as iovane uses it
  duplicate,  ///< duplicated (close-on-exec); the caller may close its own at once
};

struct EngineConfig {
  /// "auto", "iommufd", "type1" (v2), "type1-v1", "compat", "compat-v1" (type1's calls on /dev/iommu), or the software
  /// IOMMU: "model", "model:type1", "model:type1-v1", "model:compat", "model:compat-v1".
  std::string backend = "auto";
  /// An open /dev/iommu, or -1. With descriptors given, iovane opens no path: a manager may keep the privileges.
  int iommu_fd = -1;
  /// An open /dev/vfio/vfio, or -1.
  int container_fd = -1;
  DescriptorUse descriptors = DescriptorUse::borrow;
};

/// Who decides IOVAs.
enum class LayoutPolicy : std::uint8_t {
  engine_managed,    ///< the engine chooses; fixed placements are allowed beside
  fixed,             ///< the caller chooses inside `promised` ranges, which every later attach must respect
  host_constrained,  ///< the caller chooses inside the ranges usable at creation plus first attaches; see docs
};

struct AddressSpaceConfig {
  std::string name;  ///< for reports; empty: "space N"
  LayoutPolicy layout = LayoutPolicy::engine_managed;
  std::vector<IovaRange> promised;        ///< LayoutPolicy::fixed: what must stay usable; sorted, disjoint
  std::uint32_t mappings_max = 1U << 20;  ///< live mappings; one more is limit_reached
  std::uint32_t memories_max = 1U << 16;  ///< registered memories
  bool large_iopte = true;                ///< false: granule-sized IOPTEs only (a measurement knob of iommufd)
  bool dirty_tracking = false;
};

struct QueueConfig {
  /// Operations between stage() and poll(): the bound of both rings. Rounded up to a power of two; 1 to 65536.
  std::uint32_t depth = 256;
};

/// A device, by any of the ways a sandboxed caller may hold it.
struct DeviceConfig {
  std::string pci_address;  ///< "0000:00:03.0"; alone: looked up on the host and opened
  int cdev_fd = -1;         ///< open VFIO device cdev, for iommufd
  int group_fd = -1;        ///< open VFIO group, for type1
};

}  // namespace iovane
