// KVM's user interface as far as TCE tables need it: capabilities, KVM_CREATE_SPAPR_TCE(_64), and the VFIO device.
//
// Facts: Linux Documentation/virt/kvm/api.rst and virt/kvm/devices/vfio.rst; sizes and offsets are asserted below and
// compared with the newest kernel headers at hand by tests/abi. KVM's numbers carry size and direction, which POWER
// encodes differently: they come from linux/ioctl.h.
#pragma once

#include <linux/ioctl.h>

#include <cstddef>
#include <cstdint>

namespace iovane::backends::uapi::kvm {

inline constexpr unsigned ioctl_type = 0xae;
inline constexpr int api_version = 12;
inline constexpr unsigned long get_api_version = _IO(ioctl_type, 0x00);
inline constexpr unsigned long create_vm = _IO(ioctl_type, 0x01);        ///< argument: machine type; returns a fd
inline constexpr unsigned long check_extension = _IO(ioctl_type, 0x03);  ///< argument: a capability

inline constexpr unsigned long cap_spapr_tce = 63;
inline constexpr unsigned long cap_device_ctrl = 89;
inline constexpr unsigned long cap_spapr_multitce = 94;  ///< H_PUT_TCE_INDIRECT and H_STUFF_TCE in the kernel
inline constexpr unsigned long cap_spapr_tce_64 = 125;
inline constexpr unsigned long cap_spapr_tce_vfio = 142;  ///< tables can be coupled to VFIO groups

/// A 4 KiB-page table at bus address 0; returns its descriptor. EBUSY: the LIOBN has one.
struct CreateSpaprTce {
  std::uint64_t liobn = 0;
  std::uint32_t window_size = 0;
  std::uint32_t pad = 0;
};
inline constexpr unsigned long create_spapr_tce = _IOW(ioctl_type, 0xa8, CreateSpaprTce);

/// The same for any page size and place; `offset` and `size` count pages.
struct CreateSpaprTce64 {
  static constexpr unsigned long request = _IOW(ioctl_type, 0xa8, std::uint64_t[4]);
  std::uint64_t liobn = 0;
  std::uint32_t page_shift = 0;
  std::uint32_t flags = 0;
  std::uint64_t offset = 0;
  std::uint64_t size = 0;
};

/// Makes a device of a kind in a VM; `fd` comes back.
struct CreateDevice {
  static constexpr unsigned long request = _IOWR(ioctl_type, 0xe0, std::uint32_t[3]);
  std::uint32_t type = 0;
  std::uint32_t fd = 0;
  std::uint32_t flags = 0;
};
inline constexpr std::uint32_t device_type_vfio = 4;

struct DeviceAttribute {
  static constexpr unsigned long request = _IOW(ioctl_type, 0xe1, std::uint64_t[3]);
  std::uint32_t flags = 0;
  std::uint32_t group = 0;
  std::uint64_t attr = 0;
  std::uint64_t addr = 0;
};
inline constexpr std::uint32_t vfio_group = 1;          ///< DeviceAttribute::group
inline constexpr std::uint64_t vfio_group_add = 1;      ///< addr: an int, the group's descriptor. EEXIST: is there
inline constexpr std::uint64_t vfio_group_del = 2;      ///< the same; uncouples the group from every table
inline constexpr std::uint64_t vfio_group_set_tce = 3;  ///< addr: a VfioSpaprTce

struct VfioSpaprTce {
  std::int32_t groupfd = -1;
  std::int32_t tablefd = -1;
};

static_assert(sizeof(CreateSpaprTce) == 16 && offsetof(CreateSpaprTce, window_size) == 8);
static_assert(sizeof(CreateSpaprTce64) == 32 && offsetof(CreateSpaprTce64, page_shift) == 8 &&
              offsetof(CreateSpaprTce64, offset) == 16 && offsetof(CreateSpaprTce64, size) == 24);
static_assert(sizeof(CreateDevice) == 12 && offsetof(CreateDevice, fd) == 4);
static_assert(sizeof(DeviceAttribute) == 24 && offsetof(DeviceAttribute, attr) == 8 &&
              offsetof(DeviceAttribute, addr) == 16);
static_assert(sizeof(VfioSpaprTce) == 8 && offsetof(VfioSpaprTce, tablefd) == 4);

}  // namespace iovane::backends::uapi::kvm
