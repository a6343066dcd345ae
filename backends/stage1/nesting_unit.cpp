#include "backends/stage1/nesting_unit.hpp"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "backends/iommufd/ioas_calls.hpp"
#include "backends/kernel_error.hpp"
#include "backends/stage1/smmuv3_event.hpp"
#include "backends/uapi/iommufd.hpp"
#include "base/error_text.hpp"

namespace iovane::backends::stage1 {
namespace {

namespace uapi = backends::uapi::iommufd;

Error no_first_stage(const iommufd::BoundDevice& device, std::string_view why) {
  return base::fail(Errc::unsupported, Stage::attach, 0, "{}: stage-1 mode is not possible: {}", device.name, why);
}

Result<FirstStage> vtd_first_stage(const iommufd::BoundDevice& device, const uapi::HwInfoVtd& info) {
  const auto capability = [&](unsigned bit) { return (info.cap_reg >> bit & 1) != 0; };
  const auto extended = [&](unsigned bit) { return (info.ecap_reg >> bit & 1) != 0; };
  if (!extended(26)) return no_first_stage(device, "this VT-d unit does not nest (ECAP.NEST)");
  if (!extended(47)) return no_first_stage(device, "this VT-d unit has no first stage (ECAP.FLTS)");
  if (!extended(48)) return no_first_stage(device, "its page walks are not coherent with caches (ECAP.SMPWCS)");
  if (capability(4)) return no_first_stage(device, "it wants write buffers flushed after every change (CAP.RWBF)");
  FirstStage out{.format = vtd_format()};
  out.levels_least = 4;
  out.levels_most = capability(60) ? 5 : 4;
  out.range_invalidation = true;
  out.invalidate_after_map = capability(7);  // CAP.CM
  return out;
}

}  // namespace

Result<FirstStage> first_stage_of(Kernel& kernel, int fd, const iommufd::BoundDevice& device) {
  union {
    uapi::HwInfoArmSmmuv3 smmuv3;
    uapi::HwInfoVtd vtd;
  } data{};
  uapi::HwInfo info{
      .dev_id = device.object, .data_len = sizeof data, .data_uptr = reinterpret_cast<std::uintptr_t>(&data)};
  const int why = call(kernel, fd, info);
  if (why == ENOTTY) return no_first_stage(device, "this kernel does not describe IOMMUs (GET_HW_INFO, Linux 6.6)");
  if (why != 0) return explain_call(Stage::attach, "GET_HW_INFO", why);
  switch (info.data_type) {
    case uapi::hw_info_type_arm_smmuv3:
    case uapi::hw_info_type_tegra241_cmdqv: {
      const smmuv3::Features features = smmuv3::features_of(data.smmuv3.idr);
      if (!features.usable)
        return no_first_stage(device, "its SMMU has no AArch64 first stage with a 4 KiB granule (IDR0, IDR5)");
      return FirstStage{.format = smmuv3_format(),
                        .levels = 4,
                        .levels_least = 3,
                        .levels_most = 4,
                        .range_invalidation = features.range_invalidation,
                        .invalidate_after_map = false,
                        .output_size = features.output_size};
    }
    case uapi::hw_info_type_intel_vtd: return vtd_first_stage(device, data.vtd);
    case uapi::hw_info_type_amd:
      return no_first_stage(device, "Linux has no call yet that invalidates AMD's guest tables");
    default: return no_first_stage(device, "its IOMMU is of a kind whose first stage is not known here");
  }
}

SharedNesting::SharedNesting(Kernel& kernel, KernelFd fd, bool exclusive, std::vector<IovaRange> avoid)
    : shared_{kernel, std::move(fd), exclusive,
              iommufd::StagingOptions{.holder_flags = uapi::hwpt_alloc_nest_parent, .avoid = std::move(avoid)}} {
  asids_.set(0);  // "none"
}

SharedNesting::~SharedNesting() {
  for (const auto& unit : units_) {
    if (unit->events != nullptr) unit->events->close(kernel(), fd());
    if (unit->viommu != 0) iommufd::destroy(kernel(), fd(), unit->viommu);
    if (unit->own_parent) iommufd::destroy(kernel(), fd(), unit->parent);
  }
}

int SharedNesting::make_viommu(const iommufd::BoundDevice& device, NestingUnit& unit) noexcept {
  uapi::ViommuAlloc alloc{.type = uapi::viommu_type_arm_smmuv3, .dev_id = device.object, .hwpt_id = unit.parent};
  const int why = call(kernel(), fd(), alloc);
  if (why == 0) unit.viommu = alloc.out_viommu_id;
  return why;
}

Result<NestingUnit*> SharedNesting::make_unit(const iommufd::BoundDevice& device, const FirstStage& first_stage) {
  const auto holder = parent().holder(device.object);
  if (!holder) return holder.error();
  NestingUnit unit{
      .parent = *holder, .own_parent = false, .viommu = 0, .first_stage = first_stage, .numa_node = device.numa_node};
  int why = 0;
  if (first_stage.format.architecture == Architecture::smmuv3) {
    why = make_viommu(device, unit);
    if (why == EINVAL && !units_.empty()) {
      // The holder belongs to another IOMMU: a parent of this one's own, over the same intermediate addresses.
      uapi::HwptAlloc alloc{.flags = uapi::hwpt_alloc_nest_parent, .dev_id = device.object, .pt_id = parent().ioas()};
      why = call(kernel(), fd(), alloc);
      if (why == 0) {
        unit.parent = alloc.out_hwpt_id;
        unit.own_parent = true;
        why = make_viommu(device, unit);
        if (why != 0) iommufd::destroy(kernel(), fd(), unit.parent);
      }
    }
  }
  if (why == ENOTTY) return no_first_stage(device, "this kernel has no vIOMMU objects (VIOMMU_ALLOC, Linux 6.13)");
  if (why == EOPNOTSUPP)
    return no_first_stage(device,
                          "the kernel gives out no vIOMMU: it wants the firmware's promise that all DMA is coherent "
                          "(CANWBS) or S2FWB, and CONFIG_ARM_SMMU_V3_IOMMUFD");
  if (why != 0) return explain_call(Stage::attach, "VIOMMU_ALLOC", why);
  units_.push_back(std::make_unique<NestingUnit>(std::move(unit)));
  open_events(*units_.back());
  return units_.back().get();
}

void SharedNesting::prefer_node(void* memory, Bytes length, int numa_node) noexcept {
  if (numa_node < 0) return;
  try {
    std::call_once(topology_once_, [&] { topology_ = base::Topology::load(); });
    for (unsigned node = 0; node < topology_->node_count(); ++node)
      if (topology_->os_number(node) == static_cast<unsigned>(numa_node))
        static_cast<void>(topology_->bind_memory(memory, length, node));  // advice: containers often forbid it
  } catch (...) {                                                         // no memory to look at the machine: no advice
  }
}

// Without a queue everything works, and the kernel logs what the devices do wrong.
void SharedNesting::open_events(NestingUnit& unit) {
  if (unit.viommu == 0) return;
  auto events = std::make_unique<EventQueue>();
  if (events->open(kernel(), fd(), unit.viommu) == 0) unit.events = std::move(events);
}

void SharedNesting::route_faults(DeviceId device, FaultInbox* inbox) {
  const std::lock_guard lock{mutex_};
  if (inbox != nullptr)
    inboxes_[device.value] = inbox;
  else
    inboxes_.erase(device.value);
}

int SharedNesting::collect_faults(bool& any) noexcept {
  const std::lock_guard lock{mutex_};
  int worst = 0;
  for (const auto& unit : units_) {
    if (unit->events == nullptr) continue;
    const int why = unit->events->drain(
        kernel(), any,
        [&](const std::uint64_t(&words)[4]) {
          const auto record = smmuv3::decode_event(words);
          const auto inbox = record ? inboxes_.find(record->device_id) : inboxes_.end();
          if (inbox != inboxes_.end()) inbox->second->put(*record);
        },
        [&](std::uint32_t lost) {
          FaultRecord record;
          record.reason = FaultRecord::Reason::lost;
          record.lost = lost;
          // Nobody knows whose they were: every space is told, once.
          for (auto at = inboxes_.begin(); at != inboxes_.end(); ++at)
            if (std::none_of(inboxes_.begin(), at, [&](const auto& told) { return told.second == at->second; }))
              at->second->put(record);
        });
    if (why != 0) worst = why;
  }
  return worst;
}

// Which IOMMU a device is behind, the kernel says only by accepting or refusing: a vDEVICE goes only into the vIOMMU
// of its own IOMMU.
Result<NestingUnit*> SharedNesting::unit_for(const iommufd::BoundDevice& device) {
  const auto first_stage = first_stage_of(kernel(), fd(), device);
  if (!first_stage) return first_stage.error();
  units_.reserve(units_.size() + 1);
  for (const auto& unit : units_) {
    if (unit->first_stage.format.architecture != first_stage->format.architecture) continue;
    if (unit->viommu == 0) return unit.get();
    uapi::ViommuAlloc ask{.type = uapi::viommu_type_arm_smmuv3, .dev_id = device.object, .hwpt_id = unit->parent};
    if (call(kernel(), fd(), ask) != 0) continue;
    iommufd::destroy(kernel(), fd(), ask.out_viommu_id);
    return unit.get();
  }
  return make_unit(device, *first_stage);
}

Result<NestedDevice> SharedNesting::bind(const DeviceSource& source) {
  auto bound = shared_.bind(source);
  if (!bound) return bound.error();
  NestedDevice device{.bound = std::move(*bound), .unit = nullptr, .vdevice = 0};
  const std::lock_guard lock{mutex_};
  const auto unit = unit_for(device.bound);
  if (!unit) {
    shared_.unbind(device.bound);
    return unit.error();
  }
  device.unit = *unit;
  if (device.unit->viommu != 0) {
    // A device of a vIOMMU has a number there, for its fault records. Ours is its id.
    uapi::VdeviceAlloc alloc{
        .viommu_id = device.unit->viommu, .dev_id = device.bound.object, .virt_id = device.bound.id.value};
    if (const int why = call(kernel(), fd(), alloc); why != 0) {
      shared_.unbind(device.bound);
      if (why == EEXIST || why == EBUSY)
        return base::fail(Errc::busy, Stage::attach, why, "{} is in another stage-1 address space", device.bound.name);
      return explain_call(Stage::attach, "VDEVICE_ALLOC", why);
    }
    device.vdevice = alloc.out_vdevice_id;
  }
  return device;
}

void SharedNesting::unbind(NestedDevice& device) noexcept {
  if (device.vdevice != 0) iommufd::destroy(kernel(), fd(), device.vdevice);
  shared_.unbind(device.bound);
}

const NestingUnit* SharedNesting::first_unit() noexcept {
  const std::lock_guard lock{mutex_};
  return units_.empty() ? nullptr : units_.front().get();
}

std::uint16_t SharedNesting::take_asid() noexcept {
  const std::lock_guard lock{mutex_};
  for (std::size_t asid = 1; asid < asids_.size(); ++asid) {
    if (asids_.test(asid)) continue;
    asids_.set(asid);
    return static_cast<std::uint16_t>(asid);
  }
  return 0;
}

void SharedNesting::give_asid(std::uint16_t asid) noexcept {
  const std::lock_guard lock{mutex_};
  asids_.reset(asid);
}

}  // namespace iovane::backends::stage1
