// Devices of a stage-1 space: the first one decides the form of the tables; each IOMMU gets a nested page table of it.
#include <algorithm>
#include <cerrno>

#include "backends/iommufd/ioas_calls.hpp"
#include "backends/iommufd/take_over.hpp"
#include "backends/kernel_error.hpp"
#include "backends/range_list.hpp"
#include "backends/stage1/stage1_space.hpp"
#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::stage1 {
namespace {

namespace uapi = backends::uapi::iommufd;

// Enough for 512 GiB of 4 KiB entries; address space only, until it is used.
constexpr std::uint32_t pool_pages = 1U << 18;
// Reserved windows up to this size lead to the same intermediate addresses; larger ones are holes for firmware, not
// something that a device is to reach.
constexpr std::uint64_t pass_through_max = 16U << 20;

}  // namespace

// On failure nothing is left but the pool's room, which the next attempt uses.
Result<void> Stage1Space::open_tables(const NestingUnit& unit) {
  FirstStage first_stage = unit.first_stage;
  if (options_.address_bits != 0) {
    const unsigned levels = (options_.address_bits - 12 + 8) / 9;
    first_stage.levels = std::clamp(levels, first_stage.levels_least, first_stage.levels_most);
  }
  if (!pool_room_) {
    const auto room = shared_.parent().reserve(Bytes{std::uint64_t{pool_pages} * page_bytes});
    if (!room) return room.error();
    pool_room_ = *room;
    table_node_ = unit.numa_node;
    if (const auto opened = pool_.open(*this, room->start.value, pool_pages); !opened) {
      shared_.parent().release(*room);
      pool_room_.reset();
      return pool_.last_errno() != 0 ? no_table_memory(Stage::attach) : opened.error();
    }
  }
  if (asid_ == 0) asid_ = shared_.take_asid();
  if (asid_ == 0)
    return make_error(Errc::limit_reached, Stage::attach, "65535 stage-1 address spaces are open on this descriptor");
  editor_.emplace(first_stage.format, first_stage.levels, pool_, static_cast<TableWalkers&>(*this));
  if (context_page_ == nullptr) context_page_ = pool_.take();
  if (context_page_ == nullptr || !editor_->open()) {
    editor_.reset();
    return pool_.last_errno() != 0 ? no_table_memory(Stage::attach)
                                   : make_error(Errc::out_of_memory, Stage::attach, "no page for a root table");
  }
  if (first_stage.format.architecture == Architecture::smmuv3) {
    const auto words = smmuv3::context_descriptor(editor_->root_address(), 12 + 9 * first_stage.levels, asid_,
                                                  first_stage.output_size);
    // Back to front: the first word says that the rest is valid. R.entry - as every table.
    for (std::size_t i = words.size(); i-- != 0;) context_page_->entries[i].store(words[i], std::memory_order_release);
  }
  first_stage_ = first_stage;
  return {};
}

Result<void> Stage1Space::open_early() {
  const NestingUnit* const unit = shared_.first_unit();
  if (unit == nullptr) return {};
  if (const auto opened = open_tables(*unit); !opened) return opened;
  devices_changed();
  return {};
}

Result<std::uint32_t> Stage1Space::nested_table(const NestedDevice& device) {
  for (const Nested& nested : tables_)
    if (nested.unit == device.unit) return nested.table;
  tables_.reserve(tables_.size() + 1);
  targets_.reserve(targets_.size() + 1);
  uapi::HwptArmSmmuv3 ste;
  uapi::HwptVtdS1 vtd;
  uapi::HwptAlloc alloc{.dev_id = device.bound.object};
  const bool smmu = first_stage_.format.architecture == Architecture::smmuv3;
  if (smmu) {
    const auto words = smmuv3::stream_table_entry(pool_.address_of(context_page_));
    ste.ste[0] = words[0];
    ste.ste[1] = words[1];
    alloc.pt_id = device.unit->viommu;
    alloc.data_type = uapi::hwpt_data_arm_smmuv3;
    alloc.data_len = sizeof ste;
    alloc.data_uptr = reinterpret_cast<std::uintptr_t>(&ste);
  } else {
    vtd = {
        .flags = 0, .pgtbl_addr = editor_->root_address(), .addr_width = 12 + 9 * first_stage_.levels, .reserved = 0};
    alloc.pt_id = device.unit->parent;
    alloc.data_type = uapi::hwpt_data_vtd_s1;
    alloc.data_len = sizeof vtd;
    alloc.data_uptr = reinterpret_cast<std::uintptr_t>(&vtd);
  }
  if (const int why = call(shared_.kernel(), shared_.fd(), alloc); why != 0)
    return explain_call(Stage::attach, "HWPT_ALLOC of a nested page table", why);
  tables_.push_back({device.unit, alloc.out_hwpt_id});
  if (device.unit->events != nullptr && inbox_.open()) {
    inbox_.watch(device.unit->events->pollable(shared_.kernel()));
    hears_faults_ = true;
  }
  targets_.push_back({.object = smmu ? device.unit->viommu : alloc.out_hwpt_id,
                      .architecture = first_stage_.format.architecture,
                      .asid = asid_,
                      .range_invalidation = device.unit->first_stage.range_invalidation});
  return alloc.out_hwpt_id;
}

Result<void> Stage1Space::check_reserved(const NestedDevice& device) {
  for (const IovaRange& hole : device.bound.reserved) {
    if (std::find(passed_.begin(), passed_.end(), hole) != passed_.end()) continue;
    const auto inside = hole.intersection({Iova{0}, last_address(first_stage_.levels)});
    if (!inside) continue;
    if (!editor_->is_free(*inside))
      return base::fail(Errc::iova_reserved, Stage::attach, EADDRINUSE,
                        "{} cannot be attached: it reserves [{:#x}, {:#x}], and something there is mapped",
                        device.bound.name, hole.start.value, hole.last.value);
  }
  return {};
}

// A reserved window is where the kernel has put something into the parent for the device, its interrupt doorbell above
// all: the device must find it at the same address.
void Stage1Space::pass_through(const IovaRange& window) noexcept {
  if (std::find(passed_.begin(), passed_.end(), window) != passed_.end()) return;
  if (window.span() >= pass_through_max || window.last > last_address(first_stage_.levels)) return;
  if (((window.start.value | (window.last.value + 1)) & (page_bytes - 1)) != 0) return;
  TableEditor::Session session{*editor_};
  std::uint64_t written = 0;
  // Without tables for it the device works but for its interrupts; the next attach tries again.
  if (editor_->map(session, window, window.start.value, Access::read_write, 0, false, written) == MapVerdict::done)
    passed_.push_back(window);  // room was made by attach()
}

Result<void> Stage1Space::connect(const NestedDevice& device) {
  if (!editor_) {
    if (const auto opened = open_tables(*device.unit); !opened) return opened;
  } else if (first_stage_.format.architecture != device.unit->first_stage.format.architecture ||
             first_stage_.levels > device.unit->first_stage.levels_most) {
    return base::fail(Errc::unsupported, Stage::attach, EINVAL,
                      "{} cannot be attached: the first-stage tables of this address space are {}'s with {} levels, "
                      "and its IOMMU cannot walk them",
                      device.bound.name, to_string(first_stage_.format.architecture), first_stage_.levels);
  }
  if (const auto free = check_reserved(device); !free) return free;
  const auto table = nested_table(device);
  if (!table) return table.error();
  passed_.reserve(passed_.size() + device.bound.reserved.size());
  for (const IovaRange& window : device.bound.reserved) pass_through(window);
  backends::uapi::vfio::DeviceAttachIommufdPt attach{.pt_id = *table};
  const int why = call(shared_.kernel(), device.bound.fd.get(), attach);
  if (why == 0) return {};
  if (why == EADDRINUSE)
    return base::fail(Errc::iova_reserved, Stage::attach, why,
                      "{} cannot be attached: it reserves intermediate addresses that are in use; open the backend "
                      "after the device has appeared",
                      device.bound.name);
  if (why == EINVAL || why == EBUSY)
    return base::fail(Errc::busy, Stage::attach, why,
                      "{} cannot be attached: its group is in use elsewhere, or its IOMMU refuses the table",
                      device.bound.name);
  return explain_call(Stage::attach, "VFIO_DEVICE_ATTACH_IOMMUFD_PT of a nested page table", why);
}

AttachedDevice Stage1Space::describe(const NestedDevice& device) const {
  return {.id = device.bound.id,
          .name = device.bound.name,
          .device_fd = device.bound.fd.get(),
          .reserved = device.bound.reserved,
          .iommu = device.bound.hardware.name,
          .dirty_tracking = false};
}

void Stage1Space::devices_changed() {
  std::vector<IovaRange> holes = passed_;
  for (const NestedDevice& device : devices_)
    holes.insert(holes.end(), device.bound.reserved.begin(), device.bound.reserved.end());
  usable_ = whole_granules(without({{Iova{0}, last_address(first_stage_.levels)}}, holes), facts_.granule);
  facts_.page_sizes = page_bytes | (options_.large_iopte ? bytes_of(1) | bytes_of(2) : 0);
}

Result<AttachedDevice> Stage1Space::attach(const DeviceSource& source) {
  devices_.reserve(devices_.size() + 1);  // nothing may fail after the kernel has attached it
  auto device = shared_.bind(source);
  if (!device) return device.error();
  if (const auto connected = connect(*device); !connected) {
    shared_.unbind(*device);
    return connected.error();
  }
  shared_.route_faults(device->bound.id, &inbox_);
  devices_.push_back(std::move(*device));
  devices_changed();
  return describe(devices_.back());
}

Result<void> Stage1Space::detach(DeviceId device) {
  const auto at =
      std::find_if(devices_.begin(), devices_.end(), [&](const NestedDevice& d) { return d.bound.id == device; });
  if (at == devices_.end())
    return base::fail(Errc::not_found, Stage::detach, 0, "device {} is not attached to this space", device.value);
  backends::uapi::vfio::DeviceDetachIommufdPt detach;
  const int why = call(shared_.kernel(), at->bound.fd.get(), detach);
  if (why != 0) return explain_call(Stage::detach, "VFIO_DEVICE_DETACH_IOMMUFD_PT", why);
  shared_.route_faults(device, nullptr);
  shared_.unbind(*at);
  devices_.erase(at);
  devices_changed();
  return {};
}

Result<AttachedDevice> Stage1Space::take_over(Stage1Space& from, DeviceId device) {
  const auto moved = iommufd::take_over(
      from.devices_, devices_, device, [](const NestedDevice& d) -> const iommufd::BoundDevice& { return d.bound; },
      [&](const NestedDevice& d) { return connect(d); });
  if (!moved) return moved.error();
  if (&from != this) {
    shared_.route_faults(device, &inbox_);
    devices_changed();
    from.devices_changed();
  }
  return describe(**moved);
}

}  // namespace iovane::backends::stage1
