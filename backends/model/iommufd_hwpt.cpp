// iommufd's devices and I/O page tables: bind, attach, replace, detach, HWPT_ALLOC, hardware info, dirty tracking.
#include <algorithm>
#include <new>
#include <utility>

#include "backends/model/iommufd.hpp"
#include "base/checked_math.hpp"
#include "base/fault_point.hpp"

namespace iovane::backends::model {

namespace uapi_fd = uapi::iommufd;

// ---- devices ----

long IommufdFile::bind(SimulatedDevice& device, IommuGroup& group) noexcept {
  const std::lock_guard lock{mutex_};
  if (const int rc = group.claim(this); rc != 0) return rc;
  std::unique_ptr<Object> object{new (std::nothrow) BoundDevice{device, group}};
  const int id = object == nullptr ? -ENOMEM : add(std::move(object));
  if (id < 0) group.disclaim();
  return id;
}

void IommufdFile::unbind(std::uint32_t device_id) noexcept {
  const std::lock_guard lock{mutex_};
  BoundDevice& device = *find<BoundDevice>(device_id);
  if (device.hwpt != nullptr) detach_from(device);
  if (device.vdevice != nullptr) destroy_vdevice(*device.vdevice);
  device.group.disclaim();
  objects_.erase(device_id);
}

template <typename Visit>
void IommufdFile::for_attached(const IommuGroup& group, Visit&& visit) noexcept {
  for (const auto& [id, object] : objects_) {
    if (object->kind != Kind::device) continue;
    auto& device = static_cast<BoundDevice&>(*object);
    if (&device.group == &group && device.hwpt != nullptr) visit(device);
  }
}

// A group has one table: that of its first attached device.
IommufdFile::Hwpt* IommufdFile::hwpt_of(const IommuGroup& group) noexcept {
  Hwpt* hwpt = nullptr;
  for_attached(group, [&](BoundDevice& device) { hwpt = device.hwpt; });
  return hwpt;
}

int IommufdFile::attach(std::uint32_t device_id, std::uint32_t& pt_id) noexcept {
  const std::lock_guard lock{mutex_};
  BoundDevice& device = *find<BoundDevice>(device_id);
  int rc = -EINVAL;  // an id of something else
  if (Hwpt* hwpt = find<Hwpt>(pt_id); hwpt != nullptr) {
    rc = change_to(device, *hwpt);
  } else if (IoasObject* ioas = find<IoasObject>(pt_id); ioas != nullptr) {
    rc = attach_to_ioas(device, *ioas);
  } else if (objects_.find(pt_id) == objects_.end()) {
    rc = -ENOENT;
  }
  if (rc == 0) pt_id = device.hwpt->id;
  return rc;
}

void IommufdFile::detach(std::uint32_t device_id) noexcept {
  const std::lock_guard lock{mutex_};
  BoundDevice& device = *find<BoundDevice>(device_id);
  if (device.hwpt != nullptr) detach_from(device);
}

int IommufdFile::change_to(BoundDevice& device, Hwpt& hwpt) noexcept {
  return device.hwpt == nullptr ? attach_to(device, hwpt) : replace(device, hwpt);
}

// An IOAS keeps automatic tables that devices share where their IOMMUs agree; the first that fits is taken.
int IommufdFile::attach_to_ioas(BoundDevice& device, IoasObject& ioas) noexcept {
  for (Hwpt* hwpt : ioas.hwpts) {
    if (!hwpt->automatic) continue;
    const int rc = change_to(device, *hwpt);
    if (rc != -EINVAL) return rc;
  }
  Hwpt* hwpt = new_hwpt(ioas, device);
  if (hwpt == nullptr) return -ENOMEM;
  Hwpt* const previous = device.hwpt;
  int rc = 0;
  if (previous == nullptr) {
    // The device is in first and then sees mappings appear.
    rc = attach_to(device, *hwpt);
    if (rc == 0) {
      rc = ioas.ioas.add_domain(hwpt->domain);
      if (rc != 0) detach_from(device);
    }
    if (rc != 0) {
      objects_.erase(hwpt->id);
      return rc;
    }
    ioas.hwpts.push_back(hwpt);  // room was made in new_hwpt()
  } else {
    // Moved in only when everything is there: no gap.
    rc = ioas.ioas.add_domain(hwpt->domain);
    if (rc != 0) {
      objects_.erase(hwpt->id);
      return rc;
    }
    ioas.hwpts.push_back(hwpt);
    rc = replace(device, *hwpt);
    if (rc != 0) {
      destroy_hwpt(*hwpt);
      return rc;
    }
  }
  hwpt->automatic = true;
  return 0;
}

// A first stage that translates needs to know the device by the guest's name for it.
bool IommufdFile::lacks_vdevice(const BoundDevice& device, const Hwpt& hwpt) noexcept {
  return hwpt.viommu != nullptr && hwpt.domain.first_stage().translates() &&
         (device.vdevice == nullptr || &device.vdevice->viommu != hwpt.viommu);
}

int IommufdFile::attach_to(BoundDevice& device, Hwpt& hwpt) noexcept {
  if (lacks_vdevice(device, hwpt)) return -ENOENT;
  Hwpt* const others = hwpt_of(device.group);
  if (others != nullptr && others != &hwpt) return -EINVAL;
  Ioas& ioas = hwpt.ioas.ioas;
  if (const int rc = ioas.reserve(device.device.options().reserved, &device); rc != 0) return rc;
  if (hwpt.iommu != device.device.options().iommu || (hwpt.dirty_enforced && !device.device.iommu().dirty_tracking)) {
    ioas.unreserve(&device);
    return -EINVAL;
  }
  device.device.set_request_id(device.id);
  if (others == nullptr) {
    try {
      const std::lock_guard owner{ioas.mutex()};
      device.group.join(hwpt.domain);
    } catch (const std::bad_alloc&) {
      ioas.unreserve(&device);
      return -ENOMEM;
    }
  }
  device.hwpt = &hwpt;
  ++hwpt.devices;
  return 0;
}

// Moves the device's whole group: its attached devices share one table.
int IommufdFile::replace(BoundDevice& device, Hwpt& hwpt) noexcept {
  Hwpt& old = *device.hwpt;
  if (&old == &hwpt) return 0;
  if (lacks_vdevice(device, hwpt)) return -ENOENT;
  const bool other_ioas = &old.ioas != &hwpt.ioas;
  Ioas& to = hwpt.ioas.ioas;
  if (hwpt.iommu != device.device.options().iommu || (hwpt.dirty_enforced && !device.device.iommu().dirty_tracking)) {
    return -EINVAL;
  }
  int rc = 0;
  if (other_ioas) {
    for_attached(device.group, [&](BoundDevice& member) {
      if (rc == 0) rc = to.reserve(member.device.options().reserved, &member);
    });
  }
  if (rc == 0) {
    try {
      const std::lock_guard owner{to.mutex()};
      device.group.join(hwpt.domain);
    } catch (const std::bad_alloc&) {
      rc = -ENOMEM;
    }
  }
  if (rc != 0) {
    if (other_ioas) for_attached(device.group, [&](BoundDevice& member) { to.unreserve(&member); });
    return rc;
  }
  {
    const std::lock_guard owner{old.ioas.ioas.mutex()};
    for (SimulatedDevice* moved : device.group.devices) old.domain.forget(*moved);
  }
  if (old.domain.faults() != nullptr && old.domain.faults() != hwpt.domain.faults())
    for_attached(device.group, [&](BoundDevice& member) { old.domain.faults()->drop(member.id); });
  unsigned moved = 0;
  for_attached(device.group, [&](BoundDevice& member) {
    if (other_ioas) old.ioas.ioas.unreserve(&member);
    member.hwpt = &hwpt;
    ++hwpt.devices;
    ++moved;
  });
  old.devices -= moved;
  if (old.devices == 0 && old.automatic) destroy_hwpt(old);
  return 0;
}

void IommufdFile::detach_from(BoundDevice& device) noexcept {
  Hwpt& hwpt = *device.hwpt;
  device.hwpt = nullptr;
  if (hwpt_of(device.group) == nullptr) {
    const std::lock_guard owner{hwpt.ioas.ioas.mutex()};
    device.group.leave(hwpt.domain);
  }
  if (hwpt.domain.faults() != nullptr) hwpt.domain.faults()->drop(device.id);
  hwpt.ioas.ioas.unreserve(&device);
  if (--hwpt.devices == 0 && hwpt.automatic) destroy_hwpt(hwpt);
}

// ---- tables ----

// An object without contents: not yet in its IOAS, but with room made for it there.
IommufdFile::Hwpt* IommufdFile::new_hwpt(IoasObject& ioas, const BoundDevice& device,
                                         std::shared_ptr<FaultQueue> queue) noexcept {
  try {
    ioas.hwpts.reserve(ioas.hwpts.size() + 1);
    auto object = std::make_unique<Hwpt>(ioas, device.device, std::move(queue));
    Hwpt* hwpt = object.get();
    return add(std::move(object)) < 0 ? nullptr : hwpt;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void IommufdFile::destroy_hwpt(Hwpt& hwpt) noexcept {
  if (hwpt.parent != nullptr) {
    --hwpt.parent->users;
    if (hwpt.viommu != nullptr) --hwpt.viommu->users;
    const std::lock_guard owner{hwpt.ioas.ioas.mutex()};  // invalidations of the parent look at its nested domains
    objects_.erase(hwpt.id);
    return;
  }
  hwpt.ioas.ioas.remove_domain(hwpt.domain);
  std::erase(hwpt.ioas.hwpts, &hwpt);
  objects_.erase(hwpt.id);
}

long IommufdFile::hwpt_alloc(std::uint64_t argument) noexcept {
  IommufdArgument<uapi_fd::HwptAlloc> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::HwptAlloc, reserved), a); rc != 0) return rc;
  uapi_fd::HwptAlloc& c = a.command;
  if (c.reserved != 0) return -EOPNOTSUPP;
  if ((c.data_type == uapi_fd::hwpt_data_none) != (c.data_len == 0)) return -EINVAL;
  const std::lock_guard lock{mutex_};
  BoundDevice* device = find<BoundDevice>(c.dev_id);
  if (device == nullptr) return -ENOENT;
  IoasObject* ioas = find<IoasObject>(c.pt_id);
  const bool nests = device->device.iommu().nesting != Nesting::none;
  if (ioas == nullptr) {
    if (find<Viommu>(c.pt_id) == nullptr && find<Hwpt>(c.pt_id) == nullptr) return -EINVAL;
    if (!nests) return find<Hwpt>(c.pt_id) != nullptr && c.data_len == 0 ? -EOPNOTSUPP : -EINVAL;
    const int rc = nested_hwpt_alloc(c, *device);
    if (rc == 0) a.respond();
    return rc;
  }
  constexpr std::uint32_t known =
      uapi_fd::hwpt_alloc_dirty_tracking | uapi_fd::hwpt_fault_id_valid | uapi_fd::hwpt_alloc_nest_parent;
  const bool nest_parent = (c.flags & uapi_fd::hwpt_alloc_nest_parent) != 0;
  if ((c.flags & ~known) != 0 || c.data_len != 0 || (nest_parent && !nests)) return -EOPNOTSUPP;
  std::shared_ptr<FaultQueue> queue;
  if ((c.flags & uapi_fd::hwpt_fault_id_valid) != 0) {
    const Faults* faults = find<Faults>(c.fault_id);
    if (faults == nullptr) return -ENOENT;
    if (!device->device.iommu().page_faults) return -EOPNOTSUPP;
    queue = faults->queue;
  }
  const bool dirty = (c.flags & uapi_fd::hwpt_alloc_dirty_tracking) != 0;
  if (dirty && !device->device.iommu().dirty_tracking) return -EOPNOTSUPP;
  Hwpt* hwpt = new_hwpt(*ioas, *device, std::move(queue));
  if (hwpt == nullptr) return -ENOMEM;
  hwpt->dirty_enforced = dirty;
  hwpt->nest_parent = nest_parent;
  if (const int rc = ioas->ioas.add_domain(hwpt->domain); rc != 0) {
    objects_.erase(hwpt->id);
    return rc;
  }
  ioas->hwpts.push_back(hwpt);  // room was made in new_hwpt()
  c.out_hwpt_id = hwpt->id;
  a.respond();
  return 0;
}

// The object and, in the same call, a descriptor for it.
long IommufdFile::fault_queue_alloc(std::uint64_t argument) noexcept {
  IommufdArgument<uapi_fd::FaultQueueAlloc> a;
  if (const int rc = a.read(argument, sizeof(uapi_fd::FaultQueueAlloc), a); rc != 0) return rc;
  if (a.command.flags != 0) return -EOPNOTSUPP;
  const std::lock_guard lock{mutex_};
  try {
    auto queue = std::make_shared<FaultQueue>();
    auto* const file = host_.files.make<FaultQueueFile>();
    if (file == nullptr) return -ENOMEM;
    const int id = add(std::make_unique<Faults>(queue));
    if (id < 0) {
      host_.files.discard(file);
      return id;
    }
    file->open(std::move(queue));
    const int fd = host_.files.install(file);
    if (fd < 0) {
      file->release();
      host_.files.discard(file);
      objects_.erase(static_cast<std::uint32_t>(id));
      return fd;
    }
    a.command.out_fault_id = static_cast<std::uint32_t>(id);
    a.command.out_fault_fd = static_cast<std::uint32_t>(fd);
    a.respond();
    return 0;
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

long IommufdFile::hw_info(std::uint64_t argument) noexcept {
  IommufdArgument<uapi_fd::HwInfo> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::HwInfo, reserved), a); rc != 0) return rc;
  uapi_fd::HwInfo& c = a.command;
  if (c.flags != 0 || c.reserved[0] != 0 || c.reserved[1] != 0 || c.reserved[2] != 0) return -EOPNOTSUPP;
  const std::lock_guard lock{mutex_};
  const BoundDevice* device = find<BoundDevice>(c.dev_id);
  if (device == nullptr) return -ENOENT;
  if (c.data_len != 0 && c.data_uptr == 0) return -EFAULT;
  const IommuOptions& iommu = device->device.iommu();
  uapi_fd::HwInfoArmSmmuv3 smmuv3;
  uapi_fd::HwInfoVtd vtd;
  const void* data = nullptr;
  std::uint32_t data_bytes = 0;
  c.data_type = uapi_fd::hw_info_type_none;
  switch (iommu.nesting) {
    case Nesting::none: break;
    case Nesting::smmuv3:
      c.data_type = uapi_fd::hw_info_type_arm_smmuv3;
      smmuv3.idr[0] = 1U << 1 | 1U << 0 | 2U << 2;  // both stages, AArch64
      smmuv3.idr[3] = iommu.range_invalidation ? 1U << 10 : 0;
      smmuv3.idr[5] = 5U | 1U << 4;  // 48 bits out, 4 KiB granule
      data = &smmuv3;
      data_bytes = sizeof smmuv3;
      break;
    case Nesting::vtd:
      c.data_type = uapi_fd::hw_info_type_intel_vtd;
      vtd.cap_reg = std::uint64_t{1} << 56 | std::uint64_t{1} << 60;                            // FL1GP, FL5LP
      vtd.ecap_reg = std::uint64_t{1} << 26 | std::uint64_t{1} << 47 | std::uint64_t{1} << 48;  // NEST, FLTS, SMPWCS
      data = &vtd;
      data_bytes = sizeof vtd;
      break;
    case Nesting::amd: c.data_type = uapi_fd::hw_info_type_amd; break;
  }
  // What the caller offered beyond comes back zeroed.
  if (c.data_len != 0) {
    std::memset(writable_bytes_at(c.data_uptr), 0, c.data_len);
    if (data != nullptr) std::memcpy(writable_bytes_at(c.data_uptr), data, std::min(c.data_len, data_bytes));
  }
  c.data_len = data_bytes;
  c.out_max_pasid_log2 = 0;
  c.out_capabilities = device->device.iommu().dirty_tracking ? uapi_fd::hw_cap_dirty_tracking : 0;
  a.respond();
  return 0;
}

// ---- dirty tracking ----

long IommufdFile::set_dirty_tracking(std::uint64_t argument) noexcept {
  IommufdArgument<uapi_fd::HwptSetDirtyTracking> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::HwptSetDirtyTracking, reserved), a); rc != 0) return rc;
  const uapi_fd::HwptSetDirtyTracking& c = a.command;
  if ((c.flags & ~uapi_fd::hwpt_dirty_tracking_enable) != 0) return -EOPNOTSUPP;
  const std::lock_guard lock{mutex_};
  Hwpt* hwpt = find<Hwpt>(c.hwpt_id);
  if (hwpt == nullptr) return -ENOENT;
  if (!hwpt->dirty_enforced) return -EOPNOTSUPP;
  const std::lock_guard owner{hwpt->ioas.ioas.mutex()};
  hwpt->domain.set_dirty_tracking((c.flags & uapi_fd::hwpt_dirty_tracking_enable) != 0);
  return 0;
}

long IommufdFile::get_dirty_bitmap(std::uint64_t argument) noexcept {
  IommufdArgument<uapi_fd::HwptGetDirtyBitmap> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::HwptGetDirtyBitmap, data), a); rc != 0) return rc;
  const uapi_fd::HwptGetDirtyBitmap& c = a.command;
  if ((c.flags & ~uapi_fd::hwpt_get_dirty_bitmap_no_clear) != 0 || c.reserved != 0) return -EOPNOTSUPP;
  const std::lock_guard lock{mutex_};
  Hwpt* hwpt = find<Hwpt>(c.hwpt_id);
  if (hwpt == nullptr) return -ENOENT;
  const auto range = IovaRange::from_length(Iova{c.iova}, Bytes{c.length});
  if (!range) return c.length == 0 ? -EINVAL : -EOVERFLOW;
  const std::uint64_t behind = range->last.value + 1;
  if (c.page_size == 0 || !base::is_power_of_two(c.page_size)) return -EINVAL;
  if (!base::is_aligned(c.iova | behind, os_page_bytes) || !base::is_aligned(c.iova | behind, c.page_size)) {
    return -EINVAL;
  }
  if (!hwpt->dirty_enforced) return -EOPNOTSUPP;
  if (c.data == 0) return -EFAULT;
  Ioas& ioas = hwpt->ioas.ioas;
  const std::lock_guard owner{ioas.mutex()};
  if (!hwpt->domain.dirty_tracking() || !ioas.contiguous(*range)) return -EINVAL;
  hwpt->domain.read_dirty(*range, (c.flags & uapi_fd::hwpt_get_dirty_bitmap_no_clear) == 0, [&](IovaRange leaf) {
    const IovaRange dirty = *leaf.intersection(*range);
    const std::uint64_t first = (dirty.start.value - c.iova) / c.page_size;
    const std::uint64_t last = (dirty.last.value - c.iova) / c.page_size;
    for (std::uint64_t bit = first; bit <= last; ++bit) {
      std::uint64_t word = 0;
      std::byte* const at = writable_bytes_at(c.data) + bit / 64 * sizeof word;
      std::memcpy(&word, at, sizeof word);
      word |= std::uint64_t{1} << (bit % 64);
      std::memcpy(at, &word, sizeof word);
    }
  });
  return 0;
}

}  // namespace iovane::backends::model
