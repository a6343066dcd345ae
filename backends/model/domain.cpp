#include "backends/model/domain.hpp"

#include <algorithm>
#include <utility>

#include "backends/model/event_queue.hpp"
#include "backends/model/simulated_device.hpp"

namespace iovane::backends::model {
namespace {
unsigned levels_for(unsigned address_bits) noexcept {
  return std::clamp((address_bits - 12 + 8) / 9, 3U, page_table_levels_max);
}
}  // namespace

Domain::Domain(const IommuOptions& iommu, std::shared_ptr<FaultQueue> faults) noexcept
    : iommu_{iommu}, faults_{std::move(faults)}, table_{levels_for(iommu.address_bits), iommu.page_sizes} {}

Domain::Domain(const IommuOptions& iommu, const TceWindows& windows) noexcept : Domain(iommu) { windows_ = &windows; }

Domain::Domain(const IommuOptions& iommu, Domain& parent, const FirstStage& first_stage,
               std::shared_ptr<EventPort> events)
    : iommu_{iommu},
      table_{levels_for(iommu.address_bits), iommu.page_sizes},
      parent_{&parent},
      first_stage_{first_stage},
      events_{std::move(events)} {
  parent.nested_.push_back(this);
}

Domain::~Domain() {
  if (parent_ != nullptr) std::erase(parent_->nested_, this);
}

IovaRange Domain::aperture() const noexcept {
  if (windows_ != nullptr || parent_ != nullptr) return IovaRange::everything();  // the walk says
  return {Iova{0}, Iova{(std::uint64_t{1} << iommu_.address_bits) - 1}};
}

std::int64_t Domain::unmap(IovaRange range) noexcept {
  const std::int64_t bytes = table_.unmap(range);
  if (bytes >= 0) invalidate(range);
  return bytes;
}

void Domain::invalidate(IovaRange range, bool tables) noexcept {
  base::full_barrier();  // pairs with enter_walk(): the announcement is visible below, or the edit is to the walk
  for (SimulatedDevice* device : devices_) device->invalidate(range, tables);
  // Their addresses are not this domain's: everything goes, as hardware that tags by VMID does it.
  for (Domain* nested : nested_) nested->invalidate(IovaRange::everything());
  if (table_.has_retired()) table_.reclaim();
}

void Domain::set_dirty_tracking(bool on) noexcept {
  if (on) table_.read_dirty(IovaRange::everything(), true, [](IovaRange) {});
  dirty_tracking_.store(on, std::memory_order_relaxed);  // relaxed: see dirty_tracking()
  invalidate(IovaRange::everything());
}

void Domain::join(SimulatedDevice& device) {
  devices_.push_back(&device);
  device.set_domain(this);
}

void Domain::leave(SimulatedDevice& device) noexcept {
  device.set_domain(nullptr);
  forget(device);
}

void Domain::forget(SimulatedDevice& device) noexcept { std::erase(devices_, &device); }

}  // namespace iovane::backends::model
