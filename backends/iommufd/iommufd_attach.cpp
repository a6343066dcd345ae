// Devices of an IOAS: attach, detach, and the move between two spaces of one descriptor.
#include <algorithm>
#include <cerrno>

#include "backends/iommufd/ioas_calls.hpp"
#include "backends/iommufd/iommufd_space.hpp"
#include "backends/iommufd/take_over.hpp"
#include "backends/kernel_error.hpp"
#include "backends/range_list.hpp"
#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::iommufd {
namespace {

namespace uapi = backends::uapi::iommufd;

std::string list_ranges(const std::vector<IovaRange>& ranges) {
  std::string text;
  for (const IovaRange& range : ranges)
    text += fmt::format("{}[{:#x}, {:#x}]", text.empty() ? "" : ", ", range.start.value, range.last.value);
  return text.empty() ? "ranges that the host does not list" : text;
}

Error attach_error(int os_errno, const BoundDevice& device) {
  switch (os_errno) {
    case EADDRINUSE:
      return base::fail(
          Errc::iova_reserved, Stage::attach, os_errno,
          "{} cannot be attached: it reserves {}, and something there is mapped or promised; or its IOMMU "
          "reaches fewer addresses than are in use",
          device.name, list_ranges(device.reserved));
    case ENOMEM:
      return base::fail(Errc::out_of_memory, Stage::attach, os_errno,
                        "{} cannot be attached: no memory to pin and map what the space holds; look at RLIMIT_MEMLOCK",
                        device.name);
    case EFAULT:
      return base::fail(Errc::bad_memory, Stage::attach, os_errno,
                        "{} cannot be attached: part of the memory that the space maps is no longer there",
                        device.name);
    case EINVAL:
      return base::fail(Errc::unsupported, Stage::attach, os_errno,
                        "{} cannot be attached: its IOMMU is not compatible with this space", device.name);
    default: return explain_call(Stage::attach, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", os_errno);
  }
}

}  // namespace

int IommufdSpace::attach_page_table(const BoundDevice& device, std::uint32_t object) noexcept {
  backends::uapi::vfio::DeviceAttachIommufdPt attach{.pt_id = object};
  return call(shared_.kernel(), device.fd.get(), attach);
}

Result<void> IommufdSpace::connect(const BoundDevice& device) {
  if (options_.dirty_tracking || options_.page_faults) return connect_own_table(device);
  const int why = attach_page_table(device, ioas_);
  if (why == 0) return {};
  return attach_error(why, device);
}

Result<void> IommufdSpace::connect_own_table(const BoundDevice& device) {
  if (options_.dirty_tracking && (device.hardware.capabilities & uapi::hw_cap_dirty_tracking) == 0)
    return base::fail(Errc::unsupported, Stage::attach, 0,
                      "{} cannot be attached: its IOMMU does not track dirty pages, and this space promises to",
                      device.name);
  own_tables_.reserve(own_tables_.size() + 1);
  for (const std::uint32_t table : own_tables_)
    if (attach_page_table(device, table) == 0) return {};
  uapi::HwptAlloc alloc{
      .flags = options_.dirty_tracking ? uapi::hwpt_alloc_dirty_tracking : 0, .dev_id = device.object, .pt_id = ioas_};
  if (options_.page_faults) {
    if (const auto opened = open_fault_queue(); !opened) return opened;
    alloc.flags |= uapi::hwpt_fault_id_valid;
    alloc.fault_id = fault_queue_;
  }
  if (const int why = call(shared_.kernel(), shared_.fd(), alloc); why != 0) return table_error(why, device);
  // Tracking is on before the device can write through the table.
  int why = harvest_ != nullptr ? set_tracking(alloc.out_hwpt_id, true) : 0;
  if (why == 0) why = attach_page_table(device, alloc.out_hwpt_id);
  if (why != 0) {
    destroy(shared_.kernel(), shared_.fd(), alloc.out_hwpt_id);
    return table_error(why, device);
  }
  own_tables_.push_back(alloc.out_hwpt_id);
  return {};
}

Error IommufdSpace::table_error(int os_errno, const BoundDevice& device) const noexcept {
  const bool refused = os_errno == EOPNOTSUPP || os_errno == EINVAL || os_errno == ENODEV;
  if (!options_.page_faults || !refused) return attach_error(os_errno, device);
  return base::fail(
      Errc::unsupported, Stage::attach, os_errno,
      "{} cannot be attached: this space delivers I/O page faults, and the device, its IOMMU or this kernel "
      "cannot (it needs PRI or stall, and Linux 6.13 for tables that do not nest)",
      device.name);
}

AttachedDevice IommufdSpace::describe(const BoundDevice& device) const {
  return {.id = device.id,
          .name = device.name,
          .device_fd = device.fd.get(),
          .reserved = device.reserved,
          .iommu = device.hardware.name,
          .dirty_tracking = (device.hardware.capabilities & uapi::hw_cap_dirty_tracking) != 0};
}

void IommufdSpace::devices_changed() noexcept {
  if (shared_.exclusive()) facts_.page_sizes = ioas_page_sizes(shared_.kernel(), shared_.fd(), ioas_);
}

Result<AttachedDevice> IommufdSpace::attach(const DeviceSource& source) {
  devices_.reserve(devices_.size() + 1);  // nothing may fail after the kernel has attached it
  const auto before = usable_ranges();
  auto device = shared_.bind(source);
  if (!device) return device.error();
  try {
    if (const auto connected = connect(*device); !connected) {
      shared_.unbind(*device);
      return connected.error();
    }
    if (const auto after = usable_ranges(); device->reserved.empty() && before && after)
      device->reserved = without(*before, *after);
    AttachedDevice described = describe(*device);
    devices_.push_back(std::move(*device));
    devices_changed();
    return described;
  } catch (...) {
    shared_.unbind(*device);  // and closing its descriptor detaches it
    throw;
  }
}

Result<void> IommufdSpace::detach(DeviceId device) {
  const auto at = std::find_if(devices_.begin(), devices_.end(), [&](const BoundDevice& d) { return d.id == device; });
  if (at == devices_.end())
    return base::fail(Errc::not_found, Stage::detach, 0, "device {} is not attached to this space", device.value);
  backends::uapi::vfio::DeviceDetachIommufdPt detach;
  const int why = call(shared_.kernel(), at->fd.get(), detach);
  if (why != 0) return explain_call(Stage::detach, "VFIO_DEVICE_DETACH_IOMMUFD_PT", why);
  shared_.unbind(*at);
  devices_.erase(at);
  devices_changed();
  return {};
}

Result<AttachedDevice> IommufdSpace::take_over(IommufdSpace& from, DeviceId device) {
  const auto moved = iommufd::take_over(
      from.devices_, devices_, device, [](const BoundDevice& d) -> const BoundDevice& { return d; },
      [&](const BoundDevice& d) { return connect(d); });
  if (!moved) return moved.error();
  if (&from != this) {
    devices_changed();
    from.devices_changed();
  }
  return describe(**moved);
}

}  // namespace iovane::backends::iommufd
