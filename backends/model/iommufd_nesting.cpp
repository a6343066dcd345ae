// iommufd's objects for two stages: vIOMMU, vDEVICE, nested page tables and their invalidation.
//
// The rules are those of drivers/iommu/iommufd/viommu.c and hw_pagetable.c, and of the drivers below them
// (arm-smmu-v3-iommufd.c, intel/nested.c): what they refuse is refused here with the same errno.
#include <new>
#include <utility>

#include "backends/model/iommufd.hpp"
#include "base/fault_point.hpp"

namespace iovane::backends::model {

namespace uapi_fd = uapi::iommufd;

namespace {

// The bits of a stream table entry that user space may say, Linux's STRTAB_STE_*_NESTING_ALLOWED.
constexpr std::uint64_t ste_allowed_0 = 1 | 7U << 1 | 3U << 4 | 0x000f'ffff'ffff'ffc0 | std::uint64_t{31} << 59;
constexpr std::uint64_t ste_allowed_1 = 3U | 3U << 2 | 3U << 4 | 3U << 6 | 1U << 27 | 3U << 28;
constexpr std::uint64_t ste_translate = 5, ste_bypass = 4, ste_abort = 0;

}  // namespace

int IommufdFile::nested_hwpt_alloc(uapi_fd::HwptAlloc& c, BoundDevice& device) noexcept {
  Viommu* const viommu = find<Viommu>(c.pt_id);
  Hwpt* const parent = viommu != nullptr ? &viommu->parent : find<Hwpt>(c.pt_id);
  if (!parent->nest_parent) return -EINVAL;
  if ((c.flags & ~uapi_fd::hwpt_fault_id_valid) != 0 || c.data_len == 0) return -EOPNOTSUPP;
  if (c.data_uptr == 0) return -EFAULT;
  FirstStage first_stage;
  const Nesting nesting = device.device.iommu().nesting;
  if (viommu != nullptr && nesting == Nesting::smmuv3) {
    if (c.data_type != uapi_fd::hwpt_data_arm_smmuv3) return -EINVAL;
    uapi_fd::HwptArmSmmuv3 data;
    if (c.data_len < sizeof data) return -EINVAL;
    std::memcpy(&data, bytes_at(c.data_uptr), sizeof data);
    if ((data.ste[0] & 1) == 0) data = {};  // not valid: aborts, whatever else it says
    if ((data.ste[0] & ~ste_allowed_0) != 0 || (data.ste[1] & ~ste_allowed_1) != 0) return -EIO;
    const std::uint64_t config = data.ste[0] >> 1 & 7;
    if (config != ste_translate && config != ste_bypass && config != ste_abort) return -EIO;
    // Translation requests of the device (EATS) are all or nothing.
    if ((data.ste[1] >> 28 & 3) > 1) return -EIO;
    first_stage = FirstStage::smmuv3(data.ste[0], data.ste[1]);
  } else if (viommu == nullptr && nesting == Nesting::vtd) {
    if (c.data_type != uapi_fd::hwpt_data_vtd_s1) return -EOPNOTSUPP;
    uapi_fd::HwptVtdS1 data;
    if (c.data_len < sizeof data) return -EINVAL;
    std::memcpy(&data, bytes_at(c.data_uptr), sizeof data);
    if ((data.addr_width != 48 && data.addr_width != 57) || (data.pgtbl_addr & (os_page_bytes - 1)) != 0)
      return -EINVAL;
    first_stage = FirstStage::x86(data.pgtbl_addr, data.addr_width == 57 ? 5 : 4);
  } else {
    return -EOPNOTSUPP;
  }
  try {
    std::unique_ptr<Hwpt> object;
    {
      const std::lock_guard owner{parent->ioas.ioas.mutex()};
      object = std::make_unique<Hwpt>(*parent, viommu, device.device, first_stage,
                                      viommu != nullptr ? viommu->events : nullptr);
    }
    const int id = add(std::move(object));
    if (id < 0) return id;
    ++parent->users;
    if (viommu != nullptr) ++viommu->users;
    c.out_hwpt_id = static_cast<std::uint32_t>(id);
    return 0;
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

long IommufdFile::viommu_alloc(std::uint64_t argument) noexcept {
  if (!host_.options.viommu) return -ENOTTY;
  IommufdArgument<uapi_fd::ViommuAlloc> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::ViommuAlloc, out_viommu_id), a); rc != 0) return rc;
  uapi_fd::ViommuAlloc& c = a.command;
  if (c.flags != 0 || c.type == uapi_fd::viommu_type_default) return -EOPNOTSUPP;
  const std::lock_guard lock{mutex_};
  BoundDevice* const device = find<BoundDevice>(c.dev_id);
  if (device == nullptr) return -ENOENT;
  const IommuOptions& iommu = device->device.iommu();
  if (iommu.nesting != Nesting::smmuv3 || c.type != uapi_fd::viommu_type_arm_smmuv3 || !iommu.coherent)
    return -EOPNOTSUPP;
  Hwpt* const parent = find<Hwpt>(c.hwpt_id);
  if (parent == nullptr) return -ENOENT;
  if (!parent->nest_parent || parent->iommu != device->device.options().iommu) return -EINVAL;
  std::unique_ptr<Object> object;
  try {
    object = std::make_unique<Viommu>(*parent, parent->iommu);
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
  const int id = add(std::move(object));
  if (id < 0) return id;
  ++parent->users;
  c.out_viommu_id = static_cast<std::uint32_t>(id);
  a.respond();
  return 0;
}

void IommufdFile::destroy_viommu(Viommu& viommu) noexcept {
  --viommu.parent.users;
  objects_.erase(viommu.id);
}

long IommufdFile::vdevice_alloc(std::uint64_t argument) noexcept {
  if (!host_.options.viommu) return -ENOTTY;
  IommufdArgument<uapi_fd::VdeviceAlloc> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::VdeviceAlloc, virt_id), a); rc != 0) return rc;
  uapi_fd::VdeviceAlloc& c = a.command;
  const std::lock_guard lock{mutex_};
  Viommu* const viommu = find<Viommu>(c.viommu_id);
  BoundDevice* const device = find<BoundDevice>(c.dev_id);
  if (viommu == nullptr || device == nullptr) return -ENOENT;
  if (device->device.options().iommu != viommu->iommu || c.virt_id > 0xffff'ffff) return -EINVAL;
  if (device->vdevice != nullptr) return -EEXIST;
  for (const auto& [id, object] : objects_) {
    if (object->kind != Kind::vdevice) continue;
    const auto& other = static_cast<const Vdevice&>(*object);
    if (&other.viommu == viommu && other.virtual_id == c.virt_id) return -EEXIST;
  }
  std::unique_ptr<Vdevice> object{new (std::nothrow) Vdevice{*viommu, *device, c.virt_id}};
  Vdevice* const vdevice = object.get();
  const int id = vdevice == nullptr ? -ENOMEM : add(std::move(object));
  if (id < 0) return id;
  ++viommu->users;
  device->vdevice = vdevice;
  device->device.set_virtual_id(c.virt_id);
  c.out_vdevice_id = static_cast<std::uint32_t>(id);
  a.respond();
  return 0;
}

void IommufdFile::destroy_vdevice(Vdevice& vdevice) noexcept {
  vdevice.device.vdevice = nullptr;
  vdevice.device.device.set_virtual_id(std::nullopt);
  --vdevice.viommu.users;
  objects_.erase(vdevice.id);
}

// The queue and, in the same call, a descriptor for it.
long IommufdFile::veventq_alloc(std::uint64_t argument) noexcept {
  if (!host_.options.viommu || !host_.options.event_queues) return -ENOTTY;
  IommufdArgument<uapi_fd::VeventqAlloc> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::VeventqAlloc, reserved), a); rc != 0) return rc;
  uapi_fd::VeventqAlloc& c = a.command;
  if (c.flags != 0 || c.reserved != 0 || c.type == uapi_fd::veventq_type_default) return -EOPNOTSUPP;
  if (c.veventq_depth == 0 || c.veventq_depth > 1U << 19) return -EINVAL;
  const std::lock_guard lock{mutex_};
  Viommu* const viommu = find<Viommu>(c.viommu_id);
  if (viommu == nullptr) return -ENOENT;
  for (const auto& [id, object] : objects_)
    if (object->kind == Kind::events && &static_cast<const Events&>(*object).viommu == viommu) return -EEXIST;
  try {
    auto queue = std::make_shared<EventQueue>(c.veventq_depth);
    auto* const file = host_.files.make<EventQueueFile>();
    if (file == nullptr) return -ENOMEM;
    const int id = add(std::make_unique<Events>(*viommu, queue));
    if (id < 0) {
      host_.files.discard(file);
      return id;
    }
    file->open(queue);
    const int fd = host_.files.install(file);
    if (fd < 0) {
      file->release();
      host_.files.discard(file);
      objects_.erase(static_cast<std::uint32_t>(id));
      return fd;
    }
    ++viommu->users;
    viommu->events->connect(std::move(queue));
    c.out_veventq_id = static_cast<std::uint32_t>(id);
    c.out_veventq_fd = static_cast<std::uint32_t>(fd);
    a.respond();
    return 0;
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

void IommufdFile::destroy_events(Events& events) noexcept {
  events.viommu.events->connect(nullptr);
  --events.viommu.users;
  objects_.erase(events.id);
}

// One command of the SMMUv3's queue, as hardware that tags its caches by ASID carries it out.
int IommufdFile::invalidate_smmuv3(const Viommu& viommu, const uapi_fd::ViommuArmSmmuv3Invalidate& entry) noexcept {
  const std::uint64_t operation = entry.cmd[0] & 0xff;
  bool any_asid = operation == 0x10 || operation == 0x30;
  const auto asid = static_cast<std::uint16_t>(entry.cmd[0] >> 48);
  IovaRange range = IovaRange::everything();
  bool tables = true;
  switch (operation) {
    case 0x05:    // CFGI_CD
    case 0x06:    // CFGI_CD_ALL
    case 0x40: {  // ATC_INV; devices here have no translation cache of their own
      for (const auto& [id, object] : objects_) {
        if (object->kind != Kind::vdevice) continue;
        const auto& vdevice = static_cast<const Vdevice&>(*object);
        if (&vdevice.viommu != &viommu || vdevice.virtual_id != entry.cmd[0] >> 32) continue;
        if (operation != 0x40) vdevice.device.device.forget_context();
        return 0;
      }
      return -EIO;
    }
    case 0x10:  // NH_ALL
    case 0x11:  // NH_ASID
    case 0x30:  // NSNH_ALL
      break;
    case 0x13:  // NH_VAA
      any_asid = true;
      [[fallthrough]];
    case 0x12: {  // NH_VA
      const std::uint64_t start = entry.cmd[1] & ~std::uint64_t{0xfff};
      const std::uint64_t granule = entry.cmd[1] >> 10 & 3;
      const std::uint64_t number = entry.cmd[0] >> 12 & 31, scale = entry.cmd[0] >> 20 & 31;
      const std::uint64_t level = entry.cmd[1] >> 8 & 3;
      const bool ranged = granule != 0;
      // A range of granules other than the tables', or the reserved encoding, does nothing that one may rely on.
      if (ranged && (granule != 1 || (number == 0 && scale == 0 && level == 0))) return 0;
      const std::uint64_t pages = ranged ? (number + 1) << scale : 1;
      range = {Iova{start}, Iova{start + (pages * os_page_bytes - 1)}};
      tables = (entry.cmd[1] & 1) == 0;
      break;
    }
    default: return -EIO;
  }
  for (const auto& [id, object] : objects_) {
    if (object->kind != Kind::hwpt) continue;
    auto& hwpt = static_cast<Hwpt&>(*object);
    if (hwpt.parent == nullptr || hwpt.viommu == nullptr || &hwpt.viommu->parent != &viommu.parent) continue;
    if (any_asid || hwpt.domain.asid() == asid) hwpt.domain.invalidate(range, tables);
  }
  return 0;
}

int IommufdFile::invalidate_vtd(Hwpt& hwpt, const uapi_fd::HwptVtdS1Invalidate& entry) noexcept {
  if ((entry.flags & ~uapi_fd::vtd_inv_flags_leaf) != 0 || entry.reserved != 0) return -EOPNOTSUPP;
  const bool everything = entry.npages == ~std::uint64_t{0};
  if ((entry.addr & (os_page_bytes - 1)) != 0 || (everything && entry.addr != 0)) return -EINVAL;
  const IovaRange range = everything
                              ? IovaRange::everything()
                              : IovaRange{Iova{entry.addr}, Iova{entry.addr + (entry.npages * os_page_bytes - 1)}};
  hwpt.domain.invalidate(range, (entry.flags & uapi_fd::vtd_inv_flags_leaf) == 0);
  return 0;
}

long IommufdFile::hwpt_invalidate(std::uint64_t argument) noexcept {
  IommufdArgument<uapi_fd::HwptInvalidate> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::HwptInvalidate, reserved), a); rc != 0) return rc;
  uapi_fd::HwptInvalidate& c = a.command;
  if (c.reserved != 0) return -EOPNOTSUPP;
  if (c.entry_num != 0 && (c.data_uptr == 0 || c.entry_len == 0)) return -EINVAL;
  const std::shared_lock lock{mutex_};  // nothing comes or goes meanwhile
  Viommu* const viommu = find<Viommu>(c.hwpt_id);
  Hwpt* const hwpt = find<Hwpt>(c.hwpt_id);
  const bool vtd = hwpt != nullptr && hwpt->parent != nullptr && hwpt->viommu == nullptr;
  if (viommu == nullptr && !vtd) return hwpt == nullptr ? -ENOENT : -EINVAL;
  const std::uint32_t type = vtd ? uapi_fd::hwpt_invalidate_data_vtd_s1 : uapi_fd::viommu_invalidate_data_arm_smmuv3;
  const std::size_t bytes = vtd ? sizeof(uapi_fd::HwptVtdS1Invalidate) : sizeof(uapi_fd::ViommuArmSmmuv3Invalidate);
  if (c.data_type != type || (c.entry_num != 0 && c.entry_len < bytes)) return -EINVAL;
  int rc = 0;
  std::uint32_t handled = 0;
  for (; handled < c.entry_num && rc == 0; handled += rc == 0 ? 1 : 0) {
    const std::byte* const at = bytes_at(c.data_uptr) + std::size_t{handled} * c.entry_len;
    if (vtd) {
      uapi_fd::HwptVtdS1Invalidate entry;
      std::memcpy(&entry, at, sizeof entry);
      rc = invalidate_vtd(*hwpt, entry);
    } else {
      uapi_fd::ViommuArmSmmuv3Invalidate entry;
      std::memcpy(&entry, at, sizeof entry);
      rc = invalidate_smmuv3(*viommu, entry);
    }
  }
  c.entry_num = handled;
  a.respond();
  return rc;
}

}  // namespace iovane::backends::model
