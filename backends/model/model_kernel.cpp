#include "backends/model/model_kernel.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <charconv>
#include <new>
#include <set>
#include <string_view>

#include "backends/model/iommufd.hpp"
#include "backends/model/spapr.hpp"
#include "backends/model/type1.hpp"
#include "backends/model/vfio_files.hpp"
#include "base/checked_math.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::model {
namespace {

constexpr std::string_view cdev_prefix = "/dev/vfio/devices/vfio";
constexpr std::string_view group_prefix = "/dev/vfio/";

// The number that follows `prefix`, or -1.
int number_after(std::string_view path, std::string_view prefix) noexcept {
  if (!path.starts_with(prefix)) return -1;
  path.remove_prefix(prefix.size());
  int number = -1;
  const auto [end, failure] = std::from_chars(path.data(), path.data() + path.size(), number);
  return failure == std::errc{} && end == path.data() + path.size() && number >= 0 ? number : -1;
}

Error invalid(std::string_view what) noexcept { return make_error(Errc::invalid_argument, Stage::open, what); }

}  // namespace

Result<std::unique_ptr<ModelKernel>> ModelKernel::create(const ModelOptions& options) {
  if (options.iommus.empty()) return invalid("the model needs at least one IOMMU");
  for (const IommuOptions& iommu : options.iommus) {
    if (iommu.address_bits < 30 || iommu.address_bits > 57) return invalid("an IOMMU has 30 to 57 address bits");
    if ((iommu.page_sizes & os_page_bytes) == 0) return invalid("an IOMMU must offer pages of 4 KiB");
  }
  if (options.spapr && options.iommufd) return invalid("iommufd has no sPAPR backend: switch one of them off");
  std::set<std::string> addresses;
  for (const DeviceOptions& device : options.devices) {
    if (device.iommu >= options.iommus.size()) return invalid("a device names an IOMMU that is not in the options");
    if (!device.address.empty() && !addresses.insert(device.address).second) {
      return base::fail(Errc::invalid_argument, Stage::open, 0, "two devices have the address {}", device.address);
    }
    if (device.bar0.value % os_page_bytes != 0) return invalid("a BAR is a multiple of 4 KiB");
    for (const ReservedRegion& region : device.reserved) {
      if (!region.range.well_formed()) return invalid("a reserved region begins behind its last address");
    }
  }
  for (const DeviceOptions& a : options.devices) {
    for (const DeviceOptions& b : options.devices) {
      if (a.group >= 0 && a.group == b.group && a.iommu != b.iommu) {
        return base::fail(Errc::invalid_argument, Stage::open, 0, "group {} has devices of different IOMMUs", a.group);
      }
    }
  }
  return std::unique_ptr<ModelKernel>{new ModelKernel{options}};
}

ModelKernel::ModelKernel(const ModelOptions& options) : host_{options} {}

// Descriptors that the user left open are closed as at the end of a process.
ModelKernel::~ModelKernel() {
  for (std::size_t i = 0; i < host_.options.descriptors_max; ++i) {
    static_cast<void>(host_.files.close(first_descriptor + static_cast<int>(i)));
  }
}

int ModelKernel::open(const char* path, int) noexcept {
  if (const int rc = host_.injection.open_failure(path); rc != 0) return rc;
  const std::string_view name{path};
  File* file = nullptr;
  const std::lock_guard lock{host_.vfio_mutex};
  IommuGroup* opened_group = nullptr;
  if (name == "/dev/iommu" && host_.options.iommufd) {
    file = host_.files.make<IommufdFile>(host_);
  } else if (name == "/dev/vfio/vfio" && host_.options.type1) {
    if (host_.options.spapr) {
      file = host_.files.make<SpaprContainerFile>(host_);
    } else {
      file = host_.files.make<ContainerFile>(host_);
    }
  } else if (const int index = number_after(name, cdev_prefix);
             index >= 0 && host_.options.iommufd && static_cast<std::size_t>(index) < host_.devices.size() &&
             host_.devices[static_cast<std::size_t>(index)]->options().driver == "vfio-pci") {
    auto* cdev = host_.files.make<CdevFile>(host_);
    if (cdev != nullptr) cdev->open(*host_.devices[static_cast<std::size_t>(index)]);
    file = cdev;
  } else if (IommuGroup* group = host_.group(number_after(name, group_prefix));
             group != nullptr && host_.options.type1 &&
             std::any_of(group->devices.begin(), group->devices.end(),
                         [](const SimulatedDevice* d) { return d->options().driver == "vfio-pci"; })) {
    if (group->group_open || group->cdevs_open > 0) return -EBUSY;
    auto* group_file = host_.files.make<GroupFile>(host_);
    if (group_file != nullptr) group_file->open(*group);
    file = group_file;
    opened_group = group;
  } else {
    return -ENOENT;
  }
  if (file == nullptr) return -ENOMEM;
  const int fd = host_.files.install(file);
  if (fd < 0) {
    if (opened_group != nullptr) opened_group->group_open = false;
    host_.files.discard(file);
  }
  return fd;
}

int ModelKernel::close(int fd) noexcept { return host_.files.close(fd); }

int ModelKernel::duplicate(int fd) noexcept { return host_.files.duplicate(fd); }

long ModelKernel::dispatch(int fd, unsigned long request, std::uint64_t argument) noexcept {
  File* file = host_.files.find(fd);
  if (file == nullptr) return -EBADF;
  if (host_.injection.armed()) [[unlikely]] {
    if (const int rc = host_.injection.failure(request); rc != 0) return rc;
    const bool container_call =
        request == uapi::vfio::Type1DmaMap::request || request == uapi::vfio::Type1DmaUnmap::request;
    if (!container_call || dynamic_cast<ContainerFile*>(file) == nullptr) host_.injection.spend(request);
  }
  return file->ioctl(request, argument);
}

long ModelKernel::ioctl(int fd, unsigned long request, void* argument) noexcept {
  return dispatch(fd, request, std::bit_cast<std::uint64_t>(argument));
}

long ModelKernel::ioctl_value(int fd, unsigned long request, unsigned long value) noexcept {
  return dispatch(fd, request, value);
}

long ModelKernel::read(int fd, void* buffer, std::size_t bytes) noexcept {
  File* file = host_.files.find(fd);
  return file == nullptr ? -EBADF : file->read(buffer, bytes);
}

long ModelKernel::write(int fd, const void* buffer, std::size_t bytes) noexcept {
  File* file = host_.files.find(fd);
  return file == nullptr ? -EBADF : file->write(buffer, bytes);
}

int ModelKernel::pollable(int fd) noexcept {
  File* file = host_.files.find(fd);
  return file == nullptr ? -1 : file->pollable();
}

Result<void*> ModelKernel::map_memory(int fd, std::uint64_t offset, std::size_t length, bool) noexcept {
  File* file = host_.files.find(fd);
  void* const memory = file == nullptr ? nullptr : file->mappable(offset, length);
  if (memory == nullptr) {
    return base::fail(Errc::invalid_argument, Stage::map, file == nullptr ? EBADF : EINVAL,
                      "descriptor {} has no {} mappable bytes at offset {:#x}", fd, length, offset);
  }
  try {
    host_.memory.add_mmio(std::bit_cast<std::uint64_t>(memory), length);
  } catch (const std::bad_alloc&) {
    return make_error(Errc::out_of_memory, Stage::map, ENOMEM, "no memory to remember the mapping");
  }
  return memory;
}

void ModelKernel::unmap_memory(void* address, std::size_t) noexcept {
  host_.memory.remove_mmio(std::bit_cast<std::uint64_t>(address));
}

Result<std::vector<PciDevice>> ModelKernel::pci_devices() {
  std::vector<PciDevice> found;
  for (std::size_t i = 0; i < host_.devices.size(); ++i) {
    const DeviceOptions& d = host_.devices[i]->options();
    PciDevice pci;
    pci.address = d.address;
    pci.vendor = 0x1234;  // QEMU's vendor number for devices that are nobody's
    pci.device = 0x5107;
    pci.driver = d.driver;
    pci.group = d.group;
    if (host_.options.iommufd && d.driver == "vfio-pci") pci.cdev = fmt::format("{}{}", cdev_prefix, i);
    pci.numa_node = d.numa_node;
    for (const ReservedRegion& region : host_.group(d.group)->reserved()) pci.reserved.push_back(region.range);
    found.push_back(std::move(pci));
  }
  return found;
}

std::string ModelKernel::description() {
  std::string text = "model";
  for (std::size_t i = 0; i < host_.options.iommus.size(); ++i) {
    const IommuOptions& iommu = host_.options.iommus[i];
    text += fmt::format("{} {}-bit IOMMU", i == 0 ? "," : " and", iommu.address_bits);
  }
  return text + fmt::format(", {} simulated devices", host_.devices.size());
}

MemlockUse ModelKernel::memlock() noexcept {
  SpaceUsage iommufd_pages, container_pages;
  std::size_t areas = 0, objects = 0;
  try {
    host_.files.for_each([&](File& file) {
      if (auto* iommufd = dynamic_cast<IommufdFile*>(&file); iommufd != nullptr) {
        iommufd->add_usage(iommufd_pages, areas, objects);
      } else if (auto* container = dynamic_cast<Container*>(&file); container != nullptr) {
        container->add_usage(container_pages, areas);
      }
    });
  } catch (...) {
    // No memory to look: the limit alone is still worth saying.
  }
  const auto bytes = [](std::int64_t n) { return Bytes{static_cast<std::uint64_t>(n) * os_page_bytes}; };
  const auto orphans = static_cast<std::int64_t>(host_.spapr_memory.orphan_pages());
  return {.limit = host_.options.memlock.limit,
          .hard_limit = host_.options.memlock.limit,
          .locked = bytes(container_pages.process + iommufd_pages.process + orphans),
          .pinned = bytes(iommufd_pages.pinned),
          .exempt = host_.options.memlock.ipc_lock};
}

void ModelKernel::pages_leave(const void* address, std::size_t length) {
  host_.spapr_memory.pages_leave(reinterpret_cast<std::uintptr_t>(address), length);
  host_.files.for_each([](File& file) {
    if (auto* container = dynamic_cast<SpaprContainerFile*>(&file); container != nullptr) container->pages_left();
  });
}

ModelUsage ModelKernel::usage() const {
  SpaceUsage pages;
  ModelUsage usage;
  usage.descriptors = host_.files.open_count();
  host_.files.for_each([&](File& file) {
    if (auto* iommufd = dynamic_cast<IommufdFile*>(&file); iommufd != nullptr) {
      iommufd->add_usage(pages, usage.mappings, usage.objects);
    } else if (auto* container = dynamic_cast<Container*>(&file); container != nullptr) {
      container->add_usage(pages, usage.mappings);
    }
  });
  const auto bytes = [](std::int64_t n) { return Bytes{static_cast<std::uint64_t>(n) * os_page_bytes}; };
  usage.pinned = bytes(pages.pinned);
  usage.charged_user = bytes(pages.user);
  usage.charged_process = bytes(pages.process + static_cast<std::int64_t>(host_.spapr_memory.orphan_pages()));
  return usage;
}

}  // namespace iovane::backends::model
