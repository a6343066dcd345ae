#include "backends/model/vfio_files.hpp"

#include <algorithm>
#include <cerrno>
#include <new>
#include <string>
#include <utility>

#include "backends/model/argument.hpp"

namespace iovane::backends::model {

namespace vfio = uapi::vfio;

namespace {
constexpr unsigned region_shift = 40;  // a region's index in the upper bits of the file offset, as vfio-pci has it
constexpr std::uint32_t region_count = 9;
constexpr std::uint32_t interrupt_kinds = 5;
constexpr std::uint64_t config_space_bytes = 256;
}  // namespace

// ---- every device ----

long VfioDevice::ioctl(unsigned long request, std::uint64_t argument) const noexcept {
  switch (request) {
    case vfio::DeviceInfo::request: {
      vfio::DeviceInfo info;
      constexpr std::size_t minimum = IOVANE_UP_TO(vfio::DeviceInfo, num_irqs);
      if (const int rc = read_vfio(argument, minimum, info); rc != 0) return rc;
      info.flags = vfio::device_flags_pci | vfio::device_flags_reset;
      info.num_regions = region_count;
      info.num_irqs = interrupt_kinds;
      info.cap_offset = 0;
      write_vfio(argument, info, std::min<std::size_t>(info.argsz, sizeof info));
      return 0;
    }
    case vfio::RegionInfo::request: {
      vfio::RegionInfo info;
      if (const int rc = read_vfio(argument, sizeof info, info); rc != 0) return rc;
      if (info.index > vfio::pci_config_region_index) return -EINVAL;
      info.flags = 0;
      info.cap_offset = 0;
      info.size = 0;
      info.offset = std::uint64_t{info.index} << region_shift;
      if (info.index == vfio::pci_config_region_index) {
        info.size = config_space_bytes;
        info.flags = vfio::region_info_flag_read | vfio::region_info_flag_write;
      } else if (info.index == vfio::pci_bar0_region_index && device_->options().bar0.value > 0) {
        info.size = device_->options().bar0.value;
        info.flags = vfio::region_info_flag_read | vfio::region_info_flag_write | vfio::region_info_flag_mmap;
      }
      write_vfio(argument, info, sizeof info);
      return 0;
    }
    case vfio::device_reset: return 0;
    default: return -ENOTTY;
  }
}

void* VfioDevice::mappable(std::uint64_t offset, std::size_t length) const noexcept {
  const std::uint64_t bytes = device_->options().bar0.value;
  if (offset % os_page_bytes != 0 || length == 0 || offset > bytes || length > bytes - offset) return nullptr;
  const auto it =
      std::find_if(host_->devices.begin(), host_->devices.end(), [this](const auto& d) { return d.get() == device_; });
  return host_->bars[static_cast<std::size_t>(it - host_->devices.begin())][offset / os_page_bytes].bytes;
}

// ---- groups ----

void GroupFile::open(IommuGroup& group) noexcept {
  group_ = &group;
  group.group_open = true;
}

long GroupFile::ioctl(unsigned long request, std::uint64_t argument) noexcept {
  const std::lock_guard lock{host_.vfio_mutex};
  switch (request) {
    case vfio::GroupStatus::request: {
      vfio::GroupStatus status;
      if (const int rc = read_vfio(argument, sizeof status, status); rc != 0) return rc;
      const bool has_container = container_ != nullptr || iommufd_ != nullptr;
      status.flags = 0;
      if (has_container) status.flags |= vfio::group_flags_container_set;
      if (has_container || (group_->viable && group_->owner == nullptr)) status.flags |= vfio::group_flags_viable;
      write_vfio(argument, status, sizeof status);
      return 0;
    }
    case vfio::group_set_container: return set_container(argument);
    case vfio::group_unset_container: return unset_container();
    case vfio::group_get_device_fd: return get_device(argument);
    default: return -ENOTTY;
  }
}

long GroupFile::set_container(std::uint64_t argument) noexcept {
  if (argument == 0) return -EFAULT;
  int fd = -1;
  std::memcpy(&fd, bytes_at(argument), sizeof fd);
  File* file = host_.files.find(fd);
  if (file == nullptr) return -EBADF;
  if (container_ != nullptr || iommufd_ != nullptr) return -EINVAL;
  if (auto* container = dynamic_cast<Container*>(file); container != nullptr) {
    if (const int rc = container->attach(*group_); rc != 0) return rc;
    container_ = container;
  } else if (auto* iommufd = dynamic_cast<IommufdFile*>(file); iommufd != nullptr) {
    if (const long id = iommufd->make_compat_ioas(); id < 0) return id;
    iommufd_ = iommufd;
  } else {
    return -EBADFD;
  }
  host_.files.add_reference(file);
  return 0;
}

long GroupFile::unset_container() noexcept {
  if (container_ == nullptr && iommufd_ == nullptr) return -EINVAL;
  if (!devices_.empty()) return -EBUSY;
  leave_container();
  return 0;
}

void GroupFile::leave_container() noexcept {
  if (container_ != nullptr) {
    container_->detach(*group_);
    host_.files.drop_reference(std::exchange(container_, nullptr));
  }
  if (iommufd_ != nullptr) host_.files.drop_reference(std::exchange(iommufd_, nullptr));
}

// The first file of a device on the compatibility interface binds it and attaches it to the compatibility IOAS.
int GroupFile::open_device(SimulatedDevice& device) {
  for (OpenDevice& open : devices_) {
    if (open.device == &device) {
      ++open.files;
      return 0;
    }
  }
  devices_.reserve(devices_.size() + 1);
  std::uint32_t id = 0;
  if (iommufd_ != nullptr) {
    const long bound = iommufd_->bind(device, *group_);
    if (bound < 0) return static_cast<int>(bound);
    id = static_cast<std::uint32_t>(bound);
    const long ioas = iommufd_->compat_ioas();
    auto pt_id = static_cast<std::uint32_t>(ioas);
    const int rc = ioas < 0 ? static_cast<int>(ioas) : iommufd_->attach(id, pt_id);
    if (rc != 0) {
      iommufd_->unbind(id);
      return rc;
    }
  }
  devices_.push_back({&device, 1, id});
  return 0;
}

long GroupFile::get_device(std::uint64_t argument) noexcept {
  if (argument == 0) return -EFAULT;
  try {
    const std::string name{std::bit_cast<const char*>(argument)};
    const auto it = std::find_if(group_->devices.begin(), group_->devices.end(), [&name](const SimulatedDevice* d) {
      return d->address() == name && d->options().driver == "vfio-pci";
    });
    if (it == group_->devices.end()) return -ENODEV;
    if (iommufd_ == nullptr && (container_ == nullptr || !container_->has_driver())) return -EINVAL;
    auto* file = host_.files.make<GroupDeviceFile>(host_);
    if (file == nullptr) return -ENOMEM;
    if (const int rc = open_device(**it); rc != 0) {
      host_.files.discard(file);
      return rc;
    }
    file->open(*this, **it);
    const int fd = host_.files.install(file);
    if (fd < 0) {
      close_device(**it);
      host_.files.discard(file);
      return fd;
    }
    host_.files.add_reference(this);
    return fd;
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

// Host::vfio_mutex is held.
void GroupFile::close_device(SimulatedDevice& device) noexcept {
  const auto open =
      std::find_if(devices_.begin(), devices_.end(), [&device](const OpenDevice& d) { return d.device == &device; });
  if (--open->files > 0) return;
  if (iommufd_ != nullptr) iommufd_->unbind(open->iommufd_id);
  devices_.erase(open);
}

void GroupFile::release() noexcept {
  const std::lock_guard lock{host_.vfio_mutex};
  leave_container();
  group_->group_open = false;
}

void GroupDeviceFile::open(GroupFile& group, SimulatedDevice& device) noexcept {
  group_ = &group;
  device_ = &device;
}

long GroupDeviceFile::ioctl(unsigned long request, std::uint64_t argument) noexcept {
  return VfioDevice{host_, *device_}.ioctl(request, argument);
}

void* GroupDeviceFile::mappable(std::uint64_t offset, std::size_t length) noexcept {
  return VfioDevice{host_, *device_}.mappable(offset, length);
}

void GroupDeviceFile::release() noexcept {
  {
    const std::lock_guard lock{host_.vfio_mutex};
    group_->close_device(*device_);
  }
  host_.files.drop_reference(group_);
}

// ---- cdevs ----

void CdevFile::open(SimulatedDevice& device) noexcept {
  device_ = &device;
  iommufd_ = nullptr;
  id_ = 0;
}

long CdevFile::ioctl(unsigned long request, std::uint64_t argument) noexcept {
  {
    const std::lock_guard lock{host_.vfio_mutex};
    if (request == vfio::DeviceBindIommufd::request) return bind(argument);
    if (iommufd_ == nullptr) return -EINVAL;
    if (request == vfio::DeviceAttachIommufdPt::request) return attach(argument);
    if (request == vfio::DeviceDetachIommufdPt::request) return detach(argument);
  }
  return VfioDevice{host_, *device_}.ioctl(request, argument);
}

long CdevFile::bind(std::uint64_t argument) noexcept {
  vfio::DeviceBindIommufd c;
  if (const int rc = read_vfio(argument, sizeof c, c); rc != 0) return rc;
  if (c.flags != 0 || c.iommufd < 0) return -EINVAL;
  IommuGroup& group = *host_.group_of(device_);
  if (group.group_open) return -EBUSY;
  if (iommufd_ != nullptr) return -EINVAL;
  File* file = host_.files.find(c.iommufd);
  if (file == nullptr) return -EBADF;
  auto* iommufd = dynamic_cast<IommufdFile*>(file);
  if (iommufd == nullptr) return -EBADFD;
  // A cdev may be open several times, but bound once.
  if (host_.bound_cdevs.contains(device_)) return -EINVAL;
  const long id = iommufd->bind(*device_, group);
  if (id < 0) return id;
  host_.bound_cdevs.insert(device_);
  iommufd_ = iommufd;
  id_ = static_cast<std::uint32_t>(id);
  host_.files.add_reference(iommufd);
  ++group.cdevs_open;
  c.out_devid = id_;
  write_vfio(argument, c, sizeof c);
  return 0;
}

long CdevFile::attach(std::uint64_t argument) noexcept {
  vfio::DeviceAttachIommufdPt c;
  if (const int rc = read_vfio(argument, sizeof c, c); rc != 0) return rc;
  if (c.flags != 0) return -EINVAL;
  if (const int rc = iommufd_->attach(id_, c.pt_id); rc != 0) return rc;
  write_vfio(argument, c, sizeof c);
  return 0;
}

long CdevFile::detach(std::uint64_t argument) noexcept {
  vfio::DeviceDetachIommufdPt c;
  if (const int rc = read_vfio(argument, sizeof c, c); rc != 0) return rc;
  if (c.flags != 0) return -EINVAL;
  iommufd_->detach(id_);
  return 0;
}

void* CdevFile::mappable(std::uint64_t offset, std::size_t length) noexcept {
  const std::lock_guard lock{host_.vfio_mutex};
  return iommufd_ == nullptr ? nullptr : VfioDevice{host_, *device_}.mappable(offset, length);
}

void CdevFile::release() noexcept {
  IommufdFile* iommufd = nullptr;
  {
    const std::lock_guard lock{host_.vfio_mutex};
    if (iommufd_ == nullptr) return;
    iommufd_->unbind(id_);
    host_.bound_cdevs.erase(device_);
    --host_.group_of(device_)->cdevs_open;
    iommufd = std::exchange(iommufd_, nullptr);
  }
  host_.files.drop_reference(iommufd);
}

}  // namespace iovane::backends::model
