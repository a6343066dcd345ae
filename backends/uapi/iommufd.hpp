// iommufd's user interface (/dev/iommu), declared here because build machines' headers are older than the interface.
//
// Facts: Linux Documentation/userspace-api/iommufd.rst and the behaviour of kernels 6.12 to 7.2; sizes and offsets are
// asserted below and compared with the newest kernel headers at hand by tests/unit/uapi_compare.
//
// Conventions of the interface: every structure begins with its own size; fields this kernel does not know must be
// zero (E2BIG), an unknown ioctl is ENOTTY, an unknown flag or type EOPNOTSUPP, an unknown id ENOENT, an object in use
// EBUSY. Reserved fields are zero. Names follow the kernel's without the iommu_ prefix; `size` fills itself in.
#pragma once

#include <linux/ioctl.h>

#include <cstddef>
#include <cstdint>

namespace iovane::backends::uapi::iommufd {

inline constexpr unsigned ioctl_type = 0x3b;
constexpr unsigned long ioctl_number(unsigned number) noexcept { return _IO(ioctl_type, number); }

/// DESTROY: gives an object back; EBUSY while another object uses it.
struct Destroy {
  static constexpr unsigned long request = ioctl_number(0x80);
  std::uint32_t size = sizeof(Destroy);
  std::uint32_t id = 0;
};

/// IOAS_ALLOC: a new, empty I/O address space.
struct IoasAlloc {
  static constexpr unsigned long request = ioctl_number(0x81);
  std::uint32_t size = sizeof(IoasAlloc);
  std::uint32_t flags = 0;
  std::uint32_t out_ioas_id = 0;
};

/// A closed range, as IOAS_IOVA_RANGES and IOAS_ALLOW_IOVAS pass them.
struct IovaRange {
  std::uint64_t start = 0;
  std::uint64_t last = 0;
};

/// IOAS_ALLOW_IOVAS: replaces the list of ranges that later attaches must leave usable.
struct IoasAllowIovas {
  static constexpr unsigned long request = ioctl_number(0x82);
  std::uint32_t size = sizeof(IoasAllowIovas);
  std::uint32_t ioas_id = 0;
  std::uint32_t num_iovas = 0;
  std::uint32_t reserved = 0;
  std::uint64_t allowed_iovas = 0;  ///< address of IovaRange[num_iovas]
};

/// Flags of IOAS_MAP, IOAS_MAP_FILE and IOAS_COPY.
inline constexpr std::uint32_t ioas_map_fixed_iova = 1U << 0;
inline constexpr std::uint32_t ioas_map_writeable = 1U << 1;
inline constexpr std::uint32_t ioas_map_readable = 1U << 2;

/// IOAS_COPY: maps what another IOAS of the same descriptor has mapped, sharing its pins.
struct IoasCopy {
  static constexpr unsigned long request = ioctl_number(0x83);
  std::uint32_t size = sizeof(IoasCopy);
  std::uint32_t flags = 0;
  std::uint32_t dst_ioas_id = 0;
  std::uint32_t src_ioas_id = 0;
  std::uint64_t length = 0;
  std::uint64_t dst_iova = 0;
  std::uint64_t src_iova = 0;
};

/// IOAS_IOVA_RANGES: what can be mapped now; EMSGSIZE with the needed count when the array is too short.
struct IoasIovaRanges {
  static constexpr unsigned long request = ioctl_number(0x84);
  std::uint32_t size = sizeof(IoasIovaRanges);
  std::uint32_t ioas_id = 0;
  std::uint32_t num_iovas = 0;  ///< in: room; out: count
  std::uint32_t reserved = 0;
  std::uint64_t allowed_iovas = 0;  ///< address of IovaRange[num_iovas]
  std::uint64_t out_iova_alignment = 0;
};

/// IOAS_MAP: pins process memory and maps it.
struct IoasMap {
  static constexpr unsigned long request = ioctl_number(0x85);
  std::uint32_t size = sizeof(IoasMap);
  std::uint32_t flags = 0;
  std::uint32_t ioas_id = 0;
  std::uint32_t reserved = 0;
  std::uint64_t user_va = 0;
  std::uint64_t length = 0;
  std::uint64_t iova = 0;  ///< in with ioas_map_fixed_iova, else out
};

/// IOAS_UNMAP: whole mappings only; (0, 2^64-1) is everything.
struct IoasUnmap {
  static constexpr unsigned long request = ioctl_number(0x86);
  std::uint32_t size = sizeof(IoasUnmap);
  std::uint32_t ioas_id = 0;
  std::uint64_t iova = 0;
  std::uint64_t length = 0;  ///< out: bytes removed
};

inline constexpr std::uint32_t option_rlimit_mode = 0;  ///< object 0; 0: pins counted per user, 1: per process
inline constexpr std::uint32_t option_huge_pages = 1;   ///< an IOAS; 0: only granule-sized IOPTEs
inline constexpr std::uint16_t option_op_set = 0;
inline constexpr std::uint16_t option_op_get = 1;

/// OPTION: reads or sets one option.
struct Option {
  static constexpr unsigned long request = ioctl_number(0x87);
  std::uint32_t size = sizeof(Option);
  std::uint32_t option_id = 0;
  std::uint16_t op = 0;
  std::uint16_t reserved = 0;
  std::uint32_t object_id = 0;
  std::uint64_t val64 = 0;
};

inline constexpr std::uint16_t vfio_ioas_get = 0;
inline constexpr std::uint16_t vfio_ioas_set = 1;
inline constexpr std::uint16_t vfio_ioas_clear = 2;

/// VFIO_IOAS: which IOAS the VFIO container calls on this descriptor act on.
struct VfioIoas {
  static constexpr unsigned long request = ioctl_number(0x88);
  std::uint32_t size = sizeof(VfioIoas);
  std::uint32_t ioas_id = 0;
  std::uint16_t op = 0;
  std::uint16_t reserved = 0;
};

inline constexpr std::uint32_t hwpt_alloc_nest_parent = 1U << 0;
inline constexpr std::uint32_t hwpt_alloc_dirty_tracking = 1U << 1;
inline constexpr std::uint32_t hwpt_fault_id_valid = 1U << 2;
inline constexpr std::uint32_t hwpt_alloc_pasid = 1U << 3;

inline constexpr std::uint32_t hwpt_data_none = 0;
inline constexpr std::uint32_t hwpt_data_vtd_s1 = 1;
inline constexpr std::uint32_t hwpt_data_arm_smmuv3 = 2;
inline constexpr std::uint32_t hwpt_data_amd_guest = 3;

/// HWPT_ALLOC: an I/O page table of its own. With pt_id an IOAS it is filled (and so pins) at once, without a device
/// being attached; with pt_id a nesting parent or a vIOMMU it is a first stage described by data_*.
struct HwptAlloc {
  static constexpr unsigned long request = ioctl_number(0x89);
  std::uint32_t size = sizeof(HwptAlloc);
  std::uint32_t flags = 0;
  std::uint32_t dev_id = 0;
  std::uint32_t pt_id = 0;
  std::uint32_t out_hwpt_id = 0;
  std::uint32_t reserved = 0;
  std::uint32_t data_type = 0;
  std::uint32_t data_len = 0;
  std::uint64_t data_uptr = 0;
  std::uint32_t fault_id = 0;
  std::uint32_t reserved2 = 0;
};

inline constexpr std::uint64_t vtd_s1_sre = 1U << 0;   ///< supervisor requests allowed
inline constexpr std::uint64_t vtd_s1_eafe = 1U << 1;  ///< extended access flags
inline constexpr std::uint64_t vtd_s1_wpe = 1U << 2;   ///< write protection for supervisor requests

/// First-stage table of Intel VT-d in scalable mode.
struct HwptVtdS1 {
  std::uint64_t flags = 0;
  std::uint64_t pgtbl_addr = 0;
  std::uint32_t addr_width = 0;
  std::uint32_t reserved = 0;
};

/// First two words of an SMMUv3 stream table entry, little endian.
struct HwptArmSmmuv3 {
  std::uint64_t ste[2] = {};
};

/// The guest's device table entry on AMD.
struct HwptAmdGuest {
  std::uint64_t dte[4] = {};
};

inline constexpr std::uint32_t hw_info_type_none = 0;  ///< in with hw_info_flag_input_type: the driver's default
inline constexpr std::uint32_t hw_info_type_intel_vtd = 1;
inline constexpr std::uint32_t hw_info_type_arm_smmuv3 = 2;
inline constexpr std::uint32_t hw_info_type_tegra241_cmdqv = 3;
inline constexpr std::uint32_t hw_info_type_amd = 4;
inline constexpr std::uint32_t hw_info_flag_input_type = 1U << 0;

inline constexpr std::uint64_t hw_cap_dirty_tracking = 1U << 0;
inline constexpr std::uint64_t hw_cap_pci_pasid_exec = 1U << 1;
inline constexpr std::uint64_t hw_cap_pci_pasid_priv = 1U << 2;
inline constexpr std::uint64_t hw_cap_pci_ats_not_supported = 1U << 3;

/// GET_HW_INFO: what IOMMU a bound device sits behind.
struct HwInfo {
  static constexpr unsigned long request = ioctl_number(0x8a);
  std::uint32_t size = sizeof(HwInfo);
  std::uint32_t flags = 0;
  std::uint32_t dev_id = 0;
  std::uint32_t data_len = 0;  ///< in: room; out: what the kernel has
  std::uint64_t data_uptr = 0;
  std::uint32_t data_type = 0;  ///< in with hw_info_flag_input_type; out always
  std::uint8_t out_max_pasid_log2 = 0;
  std::uint8_t reserved[3] = {};
  std::uint64_t out_capabilities = 0;
};

inline constexpr std::uint32_t hw_info_vtd_errata_772415_spr17 = 1U << 0;  ///< no read-only maps in a nesting parent

struct HwInfoVtd {
  std::uint32_t flags = 0;
  std::uint32_t reserved = 0;
  std::uint64_t cap_reg = 0;
  std::uint64_t ecap_reg = 0;
};

struct HwInfoArmSmmuv3 {
  std::uint32_t flags = 0;
  std::uint32_t reserved = 0;
  std::uint32_t idr[6] = {};
  std::uint32_t iidr = 0;
  std::uint32_t aidr = 0;
};

struct HwInfoTegra241Cmdqv {
  std::uint32_t flags = 0;
  std::uint8_t version = 0;
  std::uint8_t log2vcmdqs = 0;
  std::uint8_t log2vsids = 0;
  std::uint8_t reserved = 0;
};

struct HwInfoAmd {
  std::uint64_t efr = 0;
  std::uint64_t efr2 = 0;
};

inline constexpr std::uint32_t hwpt_dirty_tracking_enable = 1U << 0;

/// HWPT_SET_DIRTY_TRACKING: enabling clears what was recorded.
struct HwptSetDirtyTracking {
  static constexpr unsigned long request = ioctl_number(0x8b);
  std::uint32_t size = sizeof(HwptSetDirtyTracking);
  std::uint32_t flags = 0;
  std::uint32_t hwpt_id = 0;
  std::uint32_t reserved = 0;
};

inline constexpr std::uint32_t hwpt_get_dirty_bitmap_no_clear = 1U << 0;

/// HWPT_GET_DIRTY_BITMAP: ORs one bit per page_size into the u64 words at `data`; bit 0 stands for `iova`.
struct HwptGetDirtyBitmap {
  static constexpr unsigned long request = ioctl_number(0x8c);
  std::uint32_t size = sizeof(HwptGetDirtyBitmap);
  std::uint32_t hwpt_id = 0;
  std::uint32_t flags = 0;
  std::uint32_t reserved = 0;
  std::uint64_t iova = 0;
  std::uint64_t length = 0;
  std::uint64_t page_size = 0;
  std::uint64_t data = 0;
};

inline constexpr std::uint32_t hwpt_invalidate_data_vtd_s1 = 0;
inline constexpr std::uint32_t viommu_invalidate_data_arm_smmuv3 = 1;
inline constexpr std::uint32_t vtd_inv_flags_leaf = 1U << 0;

/// One entry of HWPT_INVALIDATE for VT-d; npages = 2^64-1 with addr 0 is everything.
struct HwptVtdS1Invalidate {
  std::uint64_t addr = 0;
  std::uint64_t npages = 0;
  std::uint32_t flags = 0;
  std::uint32_t reserved = 0;
};

/// One SMMUv3 command, little endian.
struct ViommuArmSmmuv3Invalidate {
  std::uint64_t cmd[2] = {};
};

/// HWPT_INVALIDATE: the only call that takes an array; hwpt_id may also be a vIOMMU.
struct HwptInvalidate {
  static constexpr unsigned long request = ioctl_number(0x8d);
  std::uint32_t size = sizeof(HwptInvalidate);
  std::uint32_t hwpt_id = 0;
  std::uint64_t data_uptr = 0;
  std::uint32_t data_type = 0;
  std::uint32_t entry_len = 0;
  std::uint32_t entry_num = 0;  ///< in: given; out: handled
  std::uint32_t reserved = 0;
};

/// FAULT_QUEUE_ALLOC: a descriptor to read PageFault from and to write PageResponse to.
struct FaultQueueAlloc {
  static constexpr unsigned long request = ioctl_number(0x8e);
  std::uint32_t size = sizeof(FaultQueueAlloc);
  std::uint32_t flags = 0;
  std::uint32_t out_fault_id = 0;
  std::uint32_t out_fault_fd = 0;
};

inline constexpr std::uint32_t pgfault_pasid_valid = 1U << 0;
inline constexpr std::uint32_t pgfault_last_page = 1U << 1;
inline constexpr std::uint32_t pgfault_perm_read = 1U << 0;
inline constexpr std::uint32_t pgfault_perm_write = 1U << 1;
inline constexpr std::uint32_t pgfault_perm_exec = 1U << 2;
inline constexpr std::uint32_t pgfault_perm_priv = 1U << 3;

struct PageFault {
  std::uint32_t flags = 0;
  std::uint32_t dev_id = 0;
  std::uint32_t pasid = 0;
  std::uint32_t grpid = 0;
  std::uint32_t perm = 0;
  std::uint32_t reserved = 0;
  std::uint64_t addr = 0;
  std::uint32_t length = 0;
  std::uint32_t cookie = 0;
};

inline constexpr std::uint32_t page_resp_success = 0;
inline constexpr std::uint32_t page_resp_invalid = 1;

struct PageResponse {
  std::uint32_t cookie = 0;
  std::uint32_t code = 0;
};

/// IOAS_MAP_FILE: maps pages of a memfd, a hugetlbfs file or (newer kernels) a dma-buf; no process address needed.
struct IoasMapFile {
  static constexpr unsigned long request = ioctl_number(0x8f);
  std::uint32_t size = sizeof(IoasMapFile);
  std::uint32_t flags = 0;
  std::uint32_t ioas_id = 0;
  std::int32_t fd = -1;
  std::uint64_t start = 0;
  std::uint64_t length = 0;
  std::uint64_t iova = 0;
};

inline constexpr std::uint32_t viommu_type_default = 0;
inline constexpr std::uint32_t viommu_type_arm_smmuv3 = 1;
inline constexpr std::uint32_t viommu_type_tegra241_cmdqv = 2;

/// VIOMMU_ALLOC: one guest-visible IOMMU on a nesting parent.
struct ViommuAlloc {
  static constexpr unsigned long request = ioctl_number(0x90);
  std::uint32_t size = sizeof(ViommuAlloc);
  std::uint32_t flags = 0;
  std::uint32_t type = 0;
  std::uint32_t dev_id = 0;
  std::uint32_t hwpt_id = 0;
  std::uint32_t out_viommu_id = 0;
  std::uint32_t data_len = 0;
  std::uint32_t reserved = 0;
  std::uint64_t data_uptr = 0;
};

struct ViommuTegra241Cmdqv {
  std::uint64_t out_vintf_mmap_offset = 0;
  std::uint64_t out_vintf_mmap_length = 0;
};

/// VDEVICE_ALLOC: gives a device its number inside a vIOMMU.
struct VdeviceAlloc {
  static constexpr unsigned long request = ioctl_number(0x91);
  std::uint32_t size = sizeof(VdeviceAlloc);
  std::uint32_t viommu_id = 0;
  std::uint32_t dev_id = 0;
  std::uint32_t out_vdevice_id = 0;
  std::uint64_t virt_id = 0;
};

/// IOAS_CHANGE_PROCESS: takes over every IOAS of the descriptor; all mappings must be file mappings.
struct IoasChangeProcess {
  static constexpr unsigned long request = ioctl_number(0x92);
  std::uint32_t size = sizeof(IoasChangeProcess);
  std::uint32_t reserved = 0;
};

inline constexpr std::uint32_t veventq_flag_lost_events = 1U << 0;
inline constexpr std::uint32_t veventq_type_default = 0;
inline constexpr std::uint32_t veventq_type_arm_smmuv3 = 1;
inline constexpr std::uint32_t veventq_type_tegra241_cmdqv = 2;

/// VEVENTQ_ALLOC: a descriptor to read a vIOMMU's events from, each after a VeventHeader.
struct VeventqAlloc {
  static constexpr unsigned long request = ioctl_number(0x93);
  std::uint32_t size = sizeof(VeventqAlloc);
  std::uint32_t flags = 0;
  std::uint32_t viommu_id = 0;
  std::uint32_t type = 0;
  std::uint32_t veventq_depth = 0;
  std::uint32_t out_veventq_id = 0;
  std::uint32_t out_veventq_fd = 0;
  std::uint32_t reserved = 0;
};

struct VeventHeader {
  std::uint32_t flags = 0;
  std::uint32_t sequence = 0;
};

/// One SMMUv3 event record, little endian.
struct VeventArmSmmuv3 {
  std::uint64_t evt[4] = {};
};

struct VeventTegra241Cmdqv {
  std::uint64_t lvcmdq_err_map[2] = {};
};

inline constexpr std::uint32_t hw_queue_type_default = 0;
inline constexpr std::uint32_t hw_queue_type_tegra241_cmdqv = 1;

/// HW_QUEUE_ALLOC: a command queue that hardware reads from guest memory; pins the range in the nesting parent.
struct HwQueueAlloc {
  static constexpr unsigned long request = ioctl_number(0x94);
  std::uint32_t size = sizeof(HwQueueAlloc);
  std::uint32_t flags = 0;
  std::uint32_t viommu_id = 0;
  std::uint32_t type = 0;
  std::uint32_t index = 0;
  std::uint32_t out_hw_queue_id = 0;
  std::uint64_t nesting_parent_iova = 0;
  std::uint64_t length = 0;
};

/// IOAS_NOIOMMU_GET_PA: the physical address behind an IOVA where no IOMMU translates. Not in released headers at the
/// time of writing, and other proposals claim the number: ask for it and take ENOTTY for an answer.
struct IoasNoiommuGetPa {
  static constexpr unsigned long request = ioctl_number(0x95);
  std::uint32_t size = sizeof(IoasNoiommuGetPa);
  std::uint32_t flags = 0;
  std::uint32_t ioas_id = 0;
  std::uint32_t reserved = 0;
  std::uint64_t iova = 0;
  std::uint64_t length = 0;
  std::uint64_t out_phys = 0;
};

static_assert(sizeof(Destroy) == 8 && offsetof(Destroy, id) == 4);
static_assert(sizeof(IoasAlloc) == 12 && offsetof(IoasAlloc, out_ioas_id) == 8);
static_assert(sizeof(IovaRange) == 16 && offsetof(IovaRange, last) == 8);
static_assert(sizeof(IoasAllowIovas) == 24 && offsetof(IoasAllowIovas, num_iovas) == 8 &&
              offsetof(IoasAllowIovas, allowed_iovas) == 16);
static_assert(sizeof(IoasCopy) == 40 && offsetof(IoasCopy, dst_ioas_id) == 8 && offsetof(IoasCopy, src_ioas_id) == 12 &&
              offsetof(IoasCopy, length) == 16 && offsetof(IoasCopy, dst_iova) == 24 &&
              offsetof(IoasCopy, src_iova) == 32);
static_assert(sizeof(IoasIovaRanges) == 32 && offsetof(IoasIovaRanges, num_iovas) == 8 &&
              offsetof(IoasIovaRanges, allowed_iovas) == 16 && offsetof(IoasIovaRanges, out_iova_alignment) == 24);
static_assert(sizeof(IoasMap) == 40 && offsetof(IoasMap, ioas_id) == 8 && offsetof(IoasMap, user_va) == 16 &&
              offsetof(IoasMap, length) == 24 && offsetof(IoasMap, iova) == 32);
static_assert(sizeof(IoasUnmap) == 24 && offsetof(IoasUnmap, iova) == 8 && offsetof(IoasUnmap, length) == 16);
static_assert(sizeof(Option) == 24 && offsetof(Option, op) == 8 && offsetof(Option, object_id) == 12 &&
              offsetof(Option, val64) == 16);
static_assert(sizeof(VfioIoas) == 12 && offsetof(VfioIoas, op) == 8);
static_assert(sizeof(HwptAlloc) == 48 && offsetof(HwptAlloc, pt_id) == 12 && offsetof(HwptAlloc, out_hwpt_id) == 16 &&
              offsetof(HwptAlloc, data_type) == 24 && offsetof(HwptAlloc, data_len) == 28 &&
              offsetof(HwptAlloc, data_uptr) == 32 && offsetof(HwptAlloc, fault_id) == 40);
static_assert(sizeof(HwptVtdS1) == 24 && offsetof(HwptVtdS1, pgtbl_addr) == 8 && offsetof(HwptVtdS1, addr_width) == 16);
static_assert(sizeof(HwptArmSmmuv3) == 16 && sizeof(HwptAmdGuest) == 32);
static_assert(sizeof(HwInfo) == 40 && offsetof(HwInfo, data_len) == 12 && offsetof(HwInfo, data_uptr) == 16 &&
              offsetof(HwInfo, data_type) == 24 && offsetof(HwInfo, out_max_pasid_log2) == 28 &&
              offsetof(HwInfo, out_capabilities) == 32);
static_assert(sizeof(HwInfoVtd) == 24 && offsetof(HwInfoVtd, cap_reg) == 8 && offsetof(HwInfoVtd, ecap_reg) == 16);
static_assert(sizeof(HwInfoArmSmmuv3) == 40 && offsetof(HwInfoArmSmmuv3, idr) == 8 &&
              offsetof(HwInfoArmSmmuv3, iidr) == 32 && offsetof(HwInfoArmSmmuv3, aidr) == 36);
static_assert(sizeof(HwInfoTegra241Cmdqv) == 8 && sizeof(HwInfoAmd) == 16);
static_assert(sizeof(HwptSetDirtyTracking) == 16 && offsetof(HwptSetDirtyTracking, hwpt_id) == 8);
static_assert(sizeof(HwptGetDirtyBitmap) == 48 && offsetof(HwptGetDirtyBitmap, hwpt_id) == 4 &&
              offsetof(HwptGetDirtyBitmap, flags) == 8 && offsetof(HwptGetDirtyBitmap, iova) == 16 &&
              offsetof(HwptGetDirtyBitmap, page_size) == 32 && offsetof(HwptGetDirtyBitmap, data) == 40);
static_assert(sizeof(HwptVtdS1Invalidate) == 24 && sizeof(ViommuArmSmmuv3Invalidate) == 16);
static_assert(sizeof(HwptInvalidate) == 32 && offsetof(HwptInvalidate, data_uptr) == 8 &&
              offsetof(HwptInvalidate, data_type) == 16 && offsetof(HwptInvalidate, entry_num) == 24);
static_assert(sizeof(FaultQueueAlloc) == 16 && offsetof(FaultQueueAlloc, out_fault_fd) == 12);
static_assert(sizeof(PageFault) == 40 && offsetof(PageFault, addr) == 24 && offsetof(PageFault, cookie) == 36);
static_assert(sizeof(PageResponse) == 8);
static_assert(sizeof(IoasMapFile) == 40 && offsetof(IoasMapFile, fd) == 12 && offsetof(IoasMapFile, start) == 16 &&
              offsetof(IoasMapFile, iova) == 32);
static_assert(sizeof(ViommuAlloc) == 40 && offsetof(ViommuAlloc, hwpt_id) == 16 &&
              offsetof(ViommuAlloc, out_viommu_id) == 20 && offsetof(ViommuAlloc, data_uptr) == 32);
static_assert(sizeof(ViommuTegra241Cmdqv) == 16);
static_assert(sizeof(VdeviceAlloc) == 24 && offsetof(VdeviceAlloc, out_vdevice_id) == 12 &&
              offsetof(VdeviceAlloc, virt_id) == 16);
static_assert(sizeof(IoasChangeProcess) == 8);
static_assert(sizeof(VeventqAlloc) == 32 && offsetof(VeventqAlloc, veventq_depth) == 16 &&
              offsetof(VeventqAlloc, out_veventq_fd) == 24);
static_assert(sizeof(VeventHeader) == 8 && sizeof(VeventArmSmmuv3) == 32 && sizeof(VeventTegra241Cmdqv) == 16);
static_assert(sizeof(HwQueueAlloc) == 40 && offsetof(HwQueueAlloc, out_hw_queue_id) == 20 &&
              offsetof(HwQueueAlloc, nesting_parent_iova) == 24);
static_assert(sizeof(IoasNoiommuGetPa) == 40 && offsetof(IoasNoiommuGetPa, out_phys) == 32);

}  // namespace iovane::backends::uapi::iommufd
