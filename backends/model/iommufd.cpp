#include "backends/model/iommufd.hpp"

#include <fcntl.h>

#include <new>
#include <utility>

#include "base/fault_point.hpp"

namespace iovane::backends::model {

namespace uapi_fd = uapi::iommufd;

namespace {

constexpr std::uint32_t map_flags_known =
    uapi_fd::ioas_map_fixed_iova | uapi_fd::ioas_map_writeable | uapi_fd::ioas_map_readable;
constexpr std::uint64_t u64_max = ~std::uint64_t{0};

Access access_of(std::uint32_t flags) noexcept {
  return static_cast<Access>(((flags & uapi_fd::ioas_map_readable) != 0 ? 1U : 0U) |
                             ((flags & uapi_fd::ioas_map_writeable) != 0 ? 2U : 0U));
}

}  // namespace

IommufdFile::~IommufdFile() {
  for (auto& block : blocks_) delete block.load(std::memory_order_relaxed);  // relaxed: nobody else is left
}

long IommufdFile::ioctl(unsigned long request, std::uint64_t argument) noexcept {
  switch (request) {
    case uapi_fd::IoasMap::request: return map(argument);
    case uapi_fd::IoasUnmap::request: return unmap(argument);
    case uapi_fd::IoasCopy::request: return copy(argument);
    case uapi_fd::IoasMapFile::request: return map_file(argument);
    case uapi_fd::Destroy::request: return destroy(argument);
    case uapi_fd::IoasAlloc::request: return ioas_alloc(argument);
    case uapi_fd::IoasAllowIovas::request: return allow_iovas(argument);
    case uapi_fd::IoasIovaRanges::request: return iova_ranges(argument);
    case uapi_fd::Option::request: return option(argument);
    case uapi_fd::VfioIoas::request: return vfio_ioas(argument);
    case uapi_fd::HwptAlloc::request: return hwpt_alloc(argument);
    case uapi_fd::HwInfo::request: return hw_info(argument);
    case uapi_fd::HwptInvalidate::request: return hwpt_invalidate(argument);
    case uapi_fd::ViommuAlloc::request: return viommu_alloc(argument);
    case uapi_fd::VdeviceAlloc::request: return vdevice_alloc(argument);
    case uapi_fd::VeventqAlloc::request: return veventq_alloc(argument);
    case uapi_fd::FaultQueueAlloc::request: return fault_queue_alloc(argument);
    case uapi_fd::HwptSetDirtyTracking::request: return set_dirty_tracking(argument);
    case uapi_fd::HwptGetDirtyBitmap::request: return get_dirty_bitmap(argument);
    default: return compat(request, argument);
  }
}

// The last descriptor and the last bound device are gone.
void IommufdFile::release() noexcept {
  const std::lock_guard lock{mutex_};
  // What uses others goes before them, whatever the ids.
  const auto each = [this](auto&& drop) {
    for (auto it = objects_.begin(); it != objects_.end();) {
      const std::uint32_t id = it->first;
      ++it;
      drop(id);
    }
  };
  each([this](std::uint32_t id) {
    if (Hwpt* const hwpt = find<Hwpt>(id); hwpt != nullptr && hwpt->parent != nullptr) destroy_hwpt(*hwpt);
  });
  each([this](std::uint32_t id) {
    if (Events* const events = find<Events>(id); events != nullptr) destroy_events(*events);
  });
  each([this](std::uint32_t id) {
    if (Viommu* const viommu = find<Viommu>(id); viommu != nullptr) destroy_viommu(*viommu);
  });
  each([this](std::uint32_t id) {
    if (find<Hwpt>(id) != nullptr) destroy_hwpt(*find<Hwpt>(id));
    if (find<Faults>(id) != nullptr) objects_.erase(id);
  });
  while (!objects_.empty()) destroy_ioas(*find<IoasObject>(objects_.begin()->first));
  // relaxed: the file is not reachable any more.
  compat_id_.store(0, std::memory_order_relaxed);
  per_process_.store(false, std::memory_order_relaxed);
}

Ledger IommufdFile::ledger() const noexcept {
  if (host_.accounting.ipc_lock()) return Ledger::none;
  // relaxed: can only be set while no object exists.
  return per_process_.load(std::memory_order_relaxed) ? Ledger::process : Ledger::user;
}

// ---- object table ----

Ioas* IommufdFile::find_ioas(std::uint32_t id) const noexcept {
  if (id >= ids_per_block * id_blocks) return nullptr;
  // A.ioas - pairs with R.ioas in new_ioas() and add(): block and object are complete.
  const IdBlock* block = blocks_[id / ids_per_block].load(std::memory_order_acquire);
  if (block == nullptr) return nullptr;
  IoasObject* object = block->ioas[id % ids_per_block].load(std::memory_order_acquire);
  return object == nullptr ? nullptr : &object->ioas;
}

int IommufdFile::add(std::unique_ptr<Object> object) noexcept {
  std::uint32_t id = 1;
  for (const auto& [used, unused] : objects_) {
    if (used != id) break;
    ++id;
  }
  if (id >= ids_per_block * id_blocks || base::fault_now(base::FaultKind::allocation)) return -ENOMEM;
  try {
    std::atomic<IdBlock*>& block = blocks_[id / ids_per_block];
    // relaxed: made under the mutex only. R.ioas - pairs with A.ioas in find_ioas().
    if (block.load(std::memory_order_relaxed) == nullptr) block.store(new IdBlock, std::memory_order_release);
    object->id = id;
    objects_.emplace(id, std::move(object));
    return static_cast<int>(id);
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

long IommufdFile::new_ioas() noexcept {
  try {
    std::unique_ptr<Object> object;
    if (!spare_ioas_.empty()) {
      object = std::move(spare_ioas_.back());
      spare_ioas_.pop_back();
    } else {
      object = std::make_unique<IoasObject>(host_.memory, host_.accounting);
      spare_ioas_.reserve(spare_ioas_.capacity() + 1);  // so that destroying it cannot fail
    }
    auto* ioas = static_cast<IoasObject*>(object.get());
    const int id = add(std::move(object));
    if (id < 0) return id;
    ioas->ioas.open(ioas->id);
    const auto index = static_cast<std::uint32_t>(id);
    // R.ioas - pairs with A.ioas in find_ioas(). relaxed: blocks are made under the mutex, which is held.
    blocks_[index / ids_per_block]
        .load(std::memory_order_relaxed)
        ->ioas[index % ids_per_block]
        .store(ioas, std::memory_order_release);
    return id;
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

void IommufdFile::destroy_ioas(IoasObject& ioas) noexcept {
  const std::uint32_t id = ioas.id;
  // relaxed: only takes the address away; late callers check the id under the IOAS's mutex.
  blocks_[id / ids_per_block]
      .load(std::memory_order_relaxed)
      ->ioas[id % ids_per_block]
      .store(nullptr, std::memory_order_relaxed);
  settled_ += ioas.ioas.close();
  // relaxed: written under the mutex; readers look the id up again.
  if (compat_id_.load(std::memory_order_relaxed) == id) compat_id_.store(0, std::memory_order_relaxed);
  auto node = objects_.extract(id);
  spare_ioas_.push_back(std::move(node.mapped()));
}

int IommufdFile::destroy_locked(std::uint32_t id) noexcept {
  const auto it = objects_.find(id);
  if (it == objects_.end()) return -ENOENT;
  switch (it->second->kind) {
    case Kind::ioas: {
      auto& ioas = static_cast<IoasObject&>(*it->second);
      if (!ioas.hwpts.empty()) return -EBUSY;
      destroy_ioas(ioas);
      return 0;
    }
    case Kind::hwpt: {
      auto& hwpt = static_cast<Hwpt&>(*it->second);
      if (hwpt.devices > 0 || hwpt.automatic || hwpt.users > 0) return -EBUSY;
      destroy_hwpt(hwpt);
      return 0;
    }
    case Kind::faults: {
      const auto& faults = static_cast<const Faults&>(*it->second);
      // Its descriptor and page tables that use it hold it.
      if (faults.queue->is_open() || faults.queue.use_count() > 1) return -EBUSY;
      objects_.erase(it);
      return 0;
    }
    case Kind::viommu: {
      auto& viommu = static_cast<Viommu&>(*it->second);
      if (viommu.users > 0) return -EBUSY;
      destroy_viommu(viommu);
      return 0;
    }
    case Kind::events: {
      auto& events = static_cast<Events&>(*it->second);
      if (events.queue->is_open()) return -EBUSY;  // its descriptor holds it
      destroy_events(events);
      return 0;
    }
    case Kind::vdevice: destroy_vdevice(static_cast<Vdevice&>(*it->second)); return 0;
    case Kind::device: return -EBUSY;  // held by the VFIO device until that is closed
  }
  return -EINVAL;
}

void IommufdFile::add_usage(SpaceUsage& usage, std::size_t& areas, std::size_t& objects) const {
  const std::lock_guard lock{mutex_};
  usage += settled_;
  objects += objects_.size();
  for (const auto& [id, object] : objects_) {
    if (object->kind != Kind::ioas) continue;
    const auto& ioas = static_cast<const IoasObject&>(*object);
    usage += ioas.ioas.usage();
    areas += ioas.ioas.area_count();
  }
}

// ---- data path ----

long IommufdFile::map(std::uint64_t argument) noexcept {
  IommufdArgument<uapi_fd::IoasMap> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::IoasMap, iova), a); rc != 0) return rc;
  uapi_fd::IoasMap& c = a.command;
  if ((c.flags & ~map_flags_known) != 0 || c.reserved != 0) return -EOPNOTSUPP;
  if (c.iova == u64_max || c.length == u64_max) return -EOVERFLOW;
  const Access access = access_of(c.flags);
  if (access == Access::none) return -EINVAL;
  Ioas* ioas = find_ioas(c.ioas_id);
  if (ioas == nullptr) return -ENOENT;
  MapPlace place{.iova = c.iova, .fixed = (c.flags & uapi_fd::ioas_map_fixed_iova) != 0};
  const int rc = ioas->map_memory(c.ioas_id, place, c.user_va, c.length, access, ledger());
  if (rc != 0) return rc;
  c.iova = place.iova;
  a.respond();
  return 0;
}

long IommufdFile::map_file(std::uint64_t argument) noexcept {
  if (!host_.options.map_file) return -ENOTTY;
  IommufdArgument<uapi_fd::IoasMapFile> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::IoasMapFile, iova), a); rc != 0) return rc;
  uapi_fd::IoasMapFile& c = a.command;
  if ((c.flags & ~map_flags_known) != 0) return -EOPNOTSUPP;
  if (c.iova == u64_max || c.length == u64_max) return -EOVERFLOW;
  const Access access = access_of(c.flags);
  if (access == Access::none) return -EINVAL;
  Ioas* ioas = find_ioas(c.ioas_id);
  if (ioas == nullptr) return -ENOENT;
  base::UniqueFd fd{::fcntl(c.fd, F_DUPFD_CLOEXEC, 0)};
  if (!fd) return -EBADF;
  MapPlace place{.iova = c.iova, .fixed = (c.flags & uapi_fd::ioas_map_fixed_iova) != 0};
  const int rc = ioas->map_file(c.ioas_id, place, std::move(fd), c.start, c.length, access, ledger());
  if (rc != 0) return rc;
  c.iova = place.iova;
  a.respond();
  return 0;
}

long IommufdFile::copy(std::uint64_t argument) noexcept {
  IommufdArgument<uapi_fd::IoasCopy> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::IoasCopy, src_iova), a); rc != 0) return rc;
  uapi_fd::IoasCopy& c = a.command;
  if ((c.flags & ~map_flags_known) != 0) return -EOPNOTSUPP;
  if (c.length == u64_max || c.src_iova == u64_max || c.dst_iova == u64_max) return -EOVERFLOW;
  const Access access = access_of(c.flags);
  if (access == Access::none) return -EINVAL;
  Ioas* source = find_ioas(c.src_ioas_id);
  if (source == nullptr) return -ENOENT;
  // One area is the common case and needs no heap after the first call of a thread.
  thread_local std::vector<PagesSlice> slices;
  slices.clear();
  int rc = source->slices(c.src_ioas_id, c.src_iova, c.length, slices);
  MapPlace place{.iova = c.dst_iova, .fixed = (c.flags & uapi_fd::ioas_map_fixed_iova) != 0};
  if (rc == 0) {
    Ioas* target = find_ioas(c.dst_ioas_id);
    rc = target == nullptr ? -ENOENT : target->map_slices(c.dst_ioas_id, place, slices, c.length, access);
  }
  if (rc != 0) {
    source->drop_slices(slices);
    return rc;
  }
  c.dst_iova = place.iova;
  a.respond();
  return 0;
}

long IommufdFile::unmap(std::uint64_t argument) noexcept {
  IommufdArgument<uapi_fd::IoasUnmap> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::IoasUnmap, length), a); rc != 0) return rc;
  uapi_fd::IoasUnmap& c = a.command;
  Ioas* ioas = find_ioas(c.ioas_id);
  if (ioas == nullptr) return -ENOENT;
  std::uint64_t unmapped = 0;
  int rc = 0;
  if (c.iova == 0 && c.length == u64_max) {
    rc = ioas->unmap_all(c.ioas_id, unmapped);
  } else if (c.iova == u64_max || c.length == u64_max) {
    rc = -EOVERFLOW;
  } else {
    rc = ioas->unmap(c.ioas_id, c.iova, c.length, unmapped);
    if (rc == 0 && unmapped == 0) rc = -ENOENT;
  }
  if (rc != 0) return rc;
  c.length = unmapped;
  a.respond();
  return 0;
}

// ---- control plane ----

long IommufdFile::destroy(std::uint64_t argument) noexcept {
  IommufdArgument<uapi_fd::Destroy> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::Destroy, id), a); rc != 0) return rc;
  const std::lock_guard lock{mutex_};
  return destroy_locked(a.command.id);
}

long IommufdFile::ioas_alloc(std::uint64_t argument) noexcept {
  IommufdArgument<uapi_fd::IoasAlloc> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::IoasAlloc, out_ioas_id), a); rc != 0) return rc;
  if (a.command.flags != 0) return -EOPNOTSUPP;
  const std::lock_guard lock{mutex_};
  const long id = new_ioas();
  if (id < 0) return id;
  a.command.out_ioas_id = static_cast<std::uint32_t>(id);
  a.respond();
  return 0;
}

long IommufdFile::allow_iovas(std::uint64_t argument) noexcept {
  IommufdArgument<uapi_fd::IoasAllowIovas> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::IoasAllowIovas, allowed_iovas), a); rc != 0) return rc;
  const uapi_fd::IoasAllowIovas& c = a.command;
  if (c.reserved != 0) return -EOPNOTSUPP;
  const std::lock_guard lock{mutex_};
  IoasObject* object = find<IoasObject>(c.ioas_id);
  if (object == nullptr) return -ENOENT;
  if (c.num_iovas > 0 && c.allowed_iovas == 0) return -EFAULT;
  try {
    std::vector<IovaRange> ranges(c.num_iovas);
    for (std::size_t i = 0; i < ranges.size(); ++i) {
      uapi_fd::IovaRange range;
      std::memcpy(&range, bytes_at(c.allowed_iovas) + i * sizeof range, sizeof range);
      ranges[i] = {Iova{range.start}, Iova{range.last}};
    }
    return object->ioas.allow(ranges);
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

long IommufdFile::iova_ranges(std::uint64_t argument) noexcept {
  IommufdArgument<uapi_fd::IoasIovaRanges> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::IoasIovaRanges, out_iova_alignment), a); rc != 0) return rc;
  uapi_fd::IoasIovaRanges& c = a.command;
  if (c.reserved != 0) return -EOPNOTSUPP;
  const std::lock_guard lock{mutex_};
  IoasObject* object = find<IoasObject>(c.ioas_id);
  if (object == nullptr) return -ENOENT;
  try {
    const std::vector<IovaRange> ranges = object->ioas.usable();
    const std::uint32_t room = c.num_iovas;
    if (room > 0 && !ranges.empty() && c.allowed_iovas == 0) return -EFAULT;
    for (std::size_t i = 0; i < ranges.size() && i < room; ++i) {
      const uapi_fd::IovaRange range{ranges[i].start.value, ranges[i].last.value};
      std::memcpy(writable_bytes_at(c.allowed_iovas) + i * sizeof range, &range, sizeof range);
    }
    c.num_iovas = static_cast<std::uint32_t>(ranges.size());
    c.out_iova_alignment = object->ioas.alignment();
    a.respond();
    return ranges.size() > room ? -EMSGSIZE : 0;
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

long IommufdFile::option(std::uint64_t argument) noexcept {
  IommufdArgument<uapi_fd::Option> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::Option, val64), a); rc != 0) return rc;
  uapi_fd::Option& c = a.command;
  if (c.reserved != 0) return -EOPNOTSUPP;
  const bool set = c.op == uapi_fd::option_op_set;
  if (!set && c.op != uapi_fd::option_op_get) return -EOPNOTSUPP;
  const std::lock_guard lock{mutex_};
  if (c.option_id == uapi_fd::option_rlimit_mode) {
    if (c.object_id != 0) return -EOPNOTSUPP;
    if (set) {
      if (!host_.options.sys_resource) return -EPERM;
      if (!objects_.empty()) return -EBUSY;
      if (c.val64 > 1) return -EINVAL;
      per_process_.store(c.val64 == 1, std::memory_order_relaxed);  // relaxed: no object exists that could be mapped
    } else {
      c.val64 = per_process_.load(std::memory_order_relaxed) ? 1 : 0;  // relaxed: as above
    }
  } else if (c.option_id == uapi_fd::option_huge_pages) {
    IoasObject* object = find<IoasObject>(c.object_id);
    if (object == nullptr) return -ENOENT;
    if (set) {
      if (c.val64 > 1) return -EINVAL;
      if (const int rc = object->ioas.set_large_pages(c.val64 == 1); rc != 0) return rc;
    } else {
      c.val64 = object->ioas.large_pages() ? 1 : 0;
    }
  } else {
    return -EOPNOTSUPP;
  }
  a.respond();
  return 0;
}

long IommufdFile::vfio_ioas(std::uint64_t argument) noexcept {
  IommufdArgument<uapi_fd::VfioIoas> a;
  if (const int rc = a.read(argument, IOVANE_UP_TO(uapi_fd::VfioIoas, reserved), a); rc != 0) return rc;
  uapi_fd::VfioIoas& c = a.command;
  if (c.reserved != 0) return -EOPNOTSUPP;
  const std::lock_guard lock{mutex_};
  // relaxed in all three: written under the mutex; readers look the id up.
  switch (c.op) {
    case uapi_fd::vfio_ioas_get:
      c.ioas_id = compat_id_.load(std::memory_order_relaxed);
      if (c.ioas_id == 0) return -ENODEV;
      a.respond();
      return 0;
    case uapi_fd::vfio_ioas_set:
      if (find<IoasObject>(c.ioas_id) == nullptr) return -ENOENT;
      compat_id_.store(c.ioas_id, std::memory_order_relaxed);
      return 0;
    case uapi_fd::vfio_ioas_clear: compat_id_.store(0, std::memory_order_relaxed); return 0;
    default: return -EOPNOTSUPP;
  }
}

long IommufdFile::compat_ioas() const noexcept {
  const std::uint32_t known = compat_id_.load(std::memory_order_relaxed);  // relaxed: readers look the id up
  return known != 0 ? static_cast<long>(known) : -ENODEV;
}

long IommufdFile::make_compat_ioas() noexcept {
  const std::lock_guard lock{mutex_};
  // relaxed: written under the mutex.
  const std::uint32_t known = compat_id_.load(std::memory_order_relaxed);
  if (known != 0) return known;
  const long id = new_ioas();
  if (id > 0) compat_id_.store(static_cast<std::uint32_t>(id), std::memory_order_relaxed);
  return id;
}

}  // namespace iovane::backends::model
