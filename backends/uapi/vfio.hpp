// VFIO's user interface (containers, groups, device descriptors, type1 and sPAPR TCE), as far as iovane uses it.
//
// Facts: Linux Documentation/driver-api/vfio.rst and the behaviour of kernels 6.12 to 7.2; sizes and offsets are
// asserted below and compared with the newest kernel headers at hand by tests/unit/uapi_compare.
//
// Conventions: every structure begins with `argsz`, which fills itself in; a caller that passes room for more writes
// the larger number. Several ioctl numbers mean different things on different descriptors.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backends/uapi/iommufd.hpp"

namespace iovane::backends::uapi::vfio {

constexpr unsigned long ioctl_number(unsigned number) noexcept { return iommufd::ioctl_number(100 + number); }

// ---- container ----
inline constexpr int api_version = 0;
inline constexpr unsigned long get_api_version = ioctl_number(0);
inline constexpr unsigned long check_extension = ioctl_number(1);  ///< argument: an IOMMU type or extension below
inline constexpr unsigned long set_iommu = ioctl_number(2);        ///< argument: an IOMMU type; needs a group first

inline constexpr unsigned long type1_iommu = 1;
inline constexpr unsigned long spapr_tce_iommu = 2;
inline constexpr unsigned long type1_v2_iommu = 3;
inline constexpr unsigned long dma_cc_iommu = 4;  ///< extension: DMA is cache coherent
inline constexpr unsigned long eeh = 5;           ///< extension: error handling on POWER
inline constexpr unsigned long spapr_tce_v2_iommu = 7;
inline constexpr unsigned long noiommu_iommu = 8;
inline constexpr unsigned long unmap_all = 9;      ///< extension: unmap_flag_all
inline constexpr unsigned long update_vaddr = 10;  ///< extension: map_flag_vaddr, unmap_flag_vaddr

/// One link of a chain of capabilities after an info structure; `next` counts from the structure's start, 0 is none.
struct InfoCapHeader {
  std::uint16_t id = 0;
  std::uint16_t version = 0;
  std::uint32_t next = 0;
};

// ---- group ----
struct GroupStatus {
  static constexpr unsigned long request = ioctl_number(3);
  std::uint32_t argsz = sizeof(GroupStatus);
  std::uint32_t flags = 0;
};
inline constexpr std::uint32_t group_flags_viable = 1U << 0;  ///< every device of the group is with VFIO or driverless
inline constexpr std::uint32_t group_flags_container_set = 1U << 1;

inline constexpr unsigned long group_set_container = ioctl_number(4);    ///< argument: address of an int descriptor
inline constexpr unsigned long group_unset_container = ioctl_number(5);  ///< no argument
inline constexpr unsigned long group_get_device_fd = ioctl_number(6);    ///< argument: the device's name; returns a fd

// ---- device ----
struct DeviceInfo {
  static constexpr unsigned long request = ioctl_number(7);
  std::uint32_t argsz = sizeof(DeviceInfo);
  std::uint32_t flags = 0;
  std::uint32_t num_regions = 0;
  std::uint32_t num_irqs = 0;
  std::uint32_t cap_offset = 0;
  std::uint32_t pad = 0;
};
inline constexpr std::uint32_t device_flags_reset = 1U << 0;
inline constexpr std::uint32_t device_flags_pci = 1U << 1;
inline constexpr std::uint32_t device_flags_caps = 1U << 7;

struct RegionInfo {
  static constexpr unsigned long request = ioctl_number(8);
  std::uint32_t argsz = sizeof(RegionInfo);
  std::uint32_t flags = 0;
  std::uint32_t index = 0;
  std::uint32_t cap_offset = 0;
  std::uint64_t size = 0;
  std::uint64_t offset = 0;  ///< where the region begins in the device descriptor, for pread, pwrite and mmap
};
inline constexpr std::uint32_t region_info_flag_read = 1U << 0;
inline constexpr std::uint32_t region_info_flag_write = 1U << 1;
inline constexpr std::uint32_t region_info_flag_mmap = 1U << 2;
inline constexpr std::uint32_t region_info_flag_caps = 1U << 3;

inline constexpr std::uint32_t pci_bar0_region_index = 0;
inline constexpr std::uint32_t pci_bar5_region_index = 5;
inline constexpr std::uint32_t pci_rom_region_index = 6;
inline constexpr std::uint32_t pci_config_region_index = 7;

inline constexpr unsigned long device_reset = ioctl_number(11);  ///< no argument

/// DEVICE_FEATURE: a header before the feature's own data.
struct DeviceFeature {
  static constexpr unsigned long request = ioctl_number(17);
  std::uint32_t argsz = sizeof(DeviceFeature);
  std::uint32_t flags = 0;  ///< feature number, with one or two of the bits below
};
inline constexpr std::uint32_t device_feature_get = 1U << 16;
inline constexpr std::uint32_t device_feature_set = 1U << 17;
inline constexpr std::uint32_t device_feature_probe = 1U << 18;
inline constexpr std::uint32_t device_feature_dma_buf = 11;

struct RegionDmaRange {
  std::uint64_t offset = 0;
  std::uint64_t length = 0;
};
/// Feature data: exports parts of a BAR as a dma-buf; RegionDmaRange[nr_ranges] follow.
struct DeviceFeatureDmaBuf {
  std::uint32_t region_index = 0;
  std::uint32_t open_flags = 0;
  std::uint32_t flags = 0;
  std::uint32_t nr_ranges = 0;
};

// ---- device cdev with iommufd ----
/// The oldest form, which every kernel with cdevs takes; newer ones have a token after it.
struct DeviceBindIommufd {
  static constexpr unsigned long request = ioctl_number(18);
  std::uint32_t argsz = sizeof(DeviceBindIommufd);
  std::uint32_t flags = 0;
  std::int32_t iommufd = -1;
  std::uint32_t out_devid = 0;
};
inline constexpr std::uint32_t device_bind_flag_token = 1U << 0;
struct DeviceBindIommufdToken {
  DeviceBindIommufd bind{.argsz = sizeof(DeviceBindIommufdToken), .flags = device_bind_flag_token};
  std::uint64_t token_uuid_ptr = 0;
};

/// Attaches to an IOAS or HWPT; a device that is attached already moves over (replace). `pt_id` comes back as the
/// HWPT that was used.
struct DeviceAttachIommufdPt {
  static constexpr unsigned long request = ioctl_number(19);
  std::uint32_t argsz = sizeof(DeviceAttachIommufdPt);
  std::uint32_t flags = 0;
  std::uint32_t pt_id = 0;
};
struct DeviceAttachIommufdPtPasid {
  DeviceAttachIommufdPt attach{.argsz = sizeof(DeviceAttachIommufdPtPasid), .flags = 1U << 0};
  std::uint32_t pasid = 0;
};
struct DeviceDetachIommufdPt {
  static constexpr unsigned long request = ioctl_number(20);
  std::uint32_t argsz = sizeof(DeviceDetachIommufdPt);
  std::uint32_t flags = 0;
};
struct DeviceDetachIommufdPtPasid {
  DeviceDetachIommufdPt detach{.argsz = sizeof(DeviceDetachIommufdPtPasid), .flags = 1U << 0};
  std::uint32_t pasid = 0;
};
inline constexpr std::uint32_t device_attach_pasid = 1U << 0;
inline constexpr std::uint32_t device_detach_pasid = 1U << 0;

// ---- type1 ----
struct Type1Info {
  static constexpr unsigned long request = ioctl_number(12);
  std::uint32_t argsz = sizeof(Type1Info);  ///< out: what the whole chain needs
  std::uint32_t flags = 0;
  std::uint64_t iova_pgsizes = 0;
  std::uint32_t cap_offset = 0;
  std::uint32_t pad = 0;
};
inline constexpr std::uint32_t type1_info_pgsizes = 1U << 0;
inline constexpr std::uint32_t type1_info_caps = 1U << 1;

inline constexpr std::uint16_t type1_cap_iova_range = 1;
inline constexpr std::uint16_t type1_cap_migration = 2;
inline constexpr std::uint16_t type1_cap_dma_avail = 3;

/// A closed range, whatever the kernel's name for its second field says.
struct Type1IovaRange {
  std::uint64_t start = 0;
  std::uint64_t end = 0;
};
/// Type1IovaRange[nr_iovas] follow.
struct Type1CapIovaRange {
  InfoCapHeader header{};
  std::uint32_t nr_iovas = 0;
  std::uint32_t reserved = 0;
};
struct Type1CapMigration {
  InfoCapHeader header{};
  std::uint32_t flags = 0;
  std::uint64_t pgsize_bitmap = 0;
  std::uint64_t max_dirty_bitmap_size = 0;
};
struct Type1CapDmaAvail {
  InfoCapHeader header{};
  std::uint32_t avail = 0;
};

struct Type1DmaMap {
  static constexpr unsigned long request = ioctl_number(13);
  std::uint32_t argsz = sizeof(Type1DmaMap);
  std::uint32_t flags = 0;
  std::uint64_t vaddr = 0;
  std::uint64_t iova = 0;
  std::uint64_t size = 0;
};
inline constexpr std::uint32_t dma_map_flag_read = 1U << 0;
inline constexpr std::uint32_t dma_map_flag_write = 1U << 1;
inline constexpr std::uint32_t dma_map_flag_vaddr = 1U << 2;

struct Bitmap {
  std::uint64_t pgsize = 0;
  std::uint64_t size = 0;
  std::uint64_t data = 0;  ///< address of u64 words
};

/// With dma_unmap_flag_get_dirty_bitmap a Bitmap follows.
struct Type1DmaUnmap {
  static constexpr unsigned long request = ioctl_number(14);
  std::uint32_t argsz = sizeof(Type1DmaUnmap);
  std::uint32_t flags = 0;
  std::uint64_t iova = 0;
  std::uint64_t size = 0;  ///< out: bytes removed
};
inline constexpr std::uint32_t dma_unmap_flag_get_dirty_bitmap = 1U << 0;
inline constexpr std::uint32_t dma_unmap_flag_all = 1U << 1;
inline constexpr std::uint32_t dma_unmap_flag_vaddr = 1U << 2;

/// With dirty_pages_flag_get_bitmap a DirtyBitmapGet follows.
struct DirtyBitmap {
  static constexpr unsigned long request = ioctl_number(17);
  std::uint32_t argsz = sizeof(DirtyBitmap);
  std::uint32_t flags = 0;
};
inline constexpr std::uint32_t dirty_pages_flag_start = 1U << 0;
inline constexpr std::uint32_t dirty_pages_flag_stop = 1U << 1;
inline constexpr std::uint32_t dirty_pages_flag_get_bitmap = 1U << 2;
struct DirtyBitmapGet {
  std::uint64_t iova = 0;
  std::uint64_t size = 0;
  Bitmap bitmap{};
};

// ---- sPAPR TCE ----
inline constexpr unsigned long spapr_enable = ioctl_number(15);   ///< no argument; charges the default window (v1)
inline constexpr unsigned long spapr_disable = ioctl_number(16);  ///< no argument

struct SpaprDdwInfo {
  std::uint64_t pgsizes = 0;
  std::uint32_t max_dynamic_windows_supported = 0;
  std::uint32_t levels = 0;
};
struct SpaprTceInfo {
  static constexpr unsigned long request = ioctl_number(12);
  std::uint32_t argsz = sizeof(SpaprTceInfo);
  std::uint32_t flags = 0;
  std::uint32_t dma32_window_start = 0;
  std::uint32_t dma32_window_size = 0;
  SpaprDdwInfo ddw{};
};
inline constexpr std::uint32_t spapr_info_ddw = 1U << 0;

struct SpaprRegisterMemory {
  static constexpr unsigned long request = ioctl_number(17);
  static constexpr unsigned long unregister_request = ioctl_number(18);  ///< the same address and size, exactly
  std::uint32_t argsz = sizeof(SpaprRegisterMemory);
  std::uint32_t flags = 0;
  std::uint64_t vaddr = 0;
  std::uint64_t size = 0;
};

struct SpaprTceCreate {
  static constexpr unsigned long request = ioctl_number(19);
  std::uint32_t argsz = sizeof(SpaprTceCreate);
  std::uint32_t flags = 0;
  std::uint32_t page_shift = 0;
  std::uint32_t reserved1 = 0;
  std::uint64_t window_size = 0;
  std::uint32_t levels = 0;
  std::uint32_t reserved2 = 0;
  std::uint64_t start_addr = 0;  ///< out: where the platform put the window
};

struct SpaprTceRemove {
  static constexpr unsigned long request = ioctl_number(20);
  std::uint32_t argsz = sizeof(SpaprTceRemove);
  std::uint32_t flags = 0;
  std::uint64_t start_addr = 0;
};

struct EehPeErr {
  std::uint32_t type = 0;
  std::uint32_t func = 0;
  std::uint64_t addr = 0;
  std::uint64_t mask = 0;
};
struct EehPeOp {
  static constexpr unsigned long request = ioctl_number(21);
  std::uint32_t argsz = sizeof(EehPeOp);
  std::uint32_t flags = 0;
  std::uint32_t op = 0;
  EehPeErr err{};
};
inline constexpr std::uint32_t eeh_pe_disable = 0;
inline constexpr std::uint32_t eeh_pe_enable = 1;
inline constexpr std::uint32_t eeh_pe_unfreeze_io = 2;
inline constexpr std::uint32_t eeh_pe_unfreeze_dma = 3;
inline constexpr std::uint32_t eeh_pe_get_state = 4;  ///< returns one of the states below
inline constexpr std::uint32_t eeh_pe_reset_deactivate = 5;
inline constexpr std::uint32_t eeh_pe_reset_hot = 6;
inline constexpr std::uint32_t eeh_pe_reset_fundamental = 7;
inline constexpr std::uint32_t eeh_pe_configure = 8;
inline constexpr std::uint32_t eeh_pe_inject_err = 9;
inline constexpr int eeh_pe_state_normal = 0;
inline constexpr int eeh_pe_state_reset = 1;
inline constexpr int eeh_pe_state_stopped = 2;
inline constexpr int eeh_pe_state_stopped_dma = 4;
inline constexpr int eeh_pe_state_unavail = 5;

static_assert(sizeof(InfoCapHeader) == 8 && offsetof(InfoCapHeader, next) == 4);
static_assert(sizeof(GroupStatus) == 8 && offsetof(GroupStatus, flags) == 4);
static_assert(sizeof(DeviceInfo) == 24 && offsetof(DeviceInfo, num_regions) == 8 &&
              offsetof(DeviceInfo, cap_offset) == 16);
static_assert(sizeof(RegionInfo) == 32 && offsetof(RegionInfo, index) == 8 && offsetof(RegionInfo, size) == 16 &&
              offsetof(RegionInfo, offset) == 24);
static_assert(sizeof(DeviceFeature) == 8 && sizeof(RegionDmaRange) == 16 && sizeof(DeviceFeatureDmaBuf) == 16);
static_assert(sizeof(DeviceBindIommufd) == 16 && offsetof(DeviceBindIommufd, iommufd) == 8 &&
              offsetof(DeviceBindIommufd, out_devid) == 12);
static_assert(sizeof(DeviceBindIommufdToken) == 24 && offsetof(DeviceBindIommufdToken, token_uuid_ptr) == 16);
static_assert(sizeof(DeviceAttachIommufdPt) == 12 && offsetof(DeviceAttachIommufdPt, pt_id) == 8);
static_assert(sizeof(DeviceAttachIommufdPtPasid) == 16 && offsetof(DeviceAttachIommufdPtPasid, pasid) == 12);
static_assert(sizeof(DeviceDetachIommufdPt) == 8 && sizeof(DeviceDetachIommufdPtPasid) == 12);
static_assert(sizeof(Type1Info) == 24 && offsetof(Type1Info, iova_pgsizes) == 8 &&
              offsetof(Type1Info, cap_offset) == 16);
static_assert(sizeof(Type1IovaRange) == 16 && sizeof(Type1CapIovaRange) == 16 &&
              offsetof(Type1CapIovaRange, nr_iovas) == 8);
static_assert(sizeof(Type1CapMigration) == 32 && offsetof(Type1CapMigration, pgsize_bitmap) == 16 &&
              offsetof(Type1CapMigration, max_dirty_bitmap_size) == 24);
static_assert(sizeof(Type1CapDmaAvail) == 12 && offsetof(Type1CapDmaAvail, avail) == 8);
static_assert(sizeof(Type1DmaMap) == 32 && offsetof(Type1DmaMap, vaddr) == 8 && offsetof(Type1DmaMap, iova) == 16 &&
              offsetof(Type1DmaMap, size) == 24);
static_assert(sizeof(Bitmap) == 24 && offsetof(Bitmap, data) == 16);
static_assert(sizeof(Type1DmaUnmap) == 24 && offsetof(Type1DmaUnmap, iova) == 8 && offsetof(Type1DmaUnmap, size) == 16);
static_assert(sizeof(DirtyBitmap) == 8 && sizeof(DirtyBitmapGet) == 40 && offsetof(DirtyBitmapGet, bitmap) == 16);
static_assert(sizeof(SpaprDdwInfo) == 16 && sizeof(SpaprTceInfo) == 32 && offsetof(SpaprTceInfo, ddw) == 16);
static_assert(sizeof(SpaprRegisterMemory) == 24 && offsetof(SpaprRegisterMemory, vaddr) == 8);
static_assert(sizeof(SpaprTceCreate) == 40 && offsetof(SpaprTceCreate, page_shift) == 8 &&
              offsetof(SpaprTceCreate, window_size) == 16 && offsetof(SpaprTceCreate, levels) == 24 &&
              offsetof(SpaprTceCreate, start_addr) == 32);
static_assert(sizeof(SpaprTceRemove) == 16 && offsetof(SpaprTceRemove, start_addr) == 8);
static_assert(sizeof(EehPeErr) == 24 && sizeof(EehPeOp) == 40 && offsetof(EehPeOp, op) == 8 &&
              offsetof(EehPeOp, err) == 16);

}  // namespace iovane::backends::uapi::vfio
