#include "backends/model/host.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace iovane::backends::model {

std::vector<ReservedRegion> IommuGroup::reserved() const {
  std::vector<ReservedRegion> regions;
  for (const SimulatedDevice* device : devices) {
    for (const ReservedRegion& region : device->options().reserved) {
      const bool known = std::any_of(regions.begin(), regions.end(), [&](const ReservedRegion& r) {
        return r.range == region.range && r.kind == region.kind;
      });
      if (!known) regions.push_back(region);
    }
  }
  std::sort(regions.begin(), regions.end(), [](const auto& a, const auto& b) { return a.range < b.range; });
  return regions;
}

void IommuGroup::join(Domain& domain) {
  for (SimulatedDevice* device : devices) domain.join(*device);
}

void IommuGroup::leave(Domain& domain) noexcept {
  for (SimulatedDevice* device : devices) domain.leave(*device);
}

int IommuGroup::claim(const void* claimant) noexcept {
  if (!viable || (owner != nullptr && owner != claimant)) return -EPERM;
  owner = claimant;
  ++owner_count;
  return 0;
}

void IommuGroup::disclaim() noexcept {
  if (--owner_count == 0) owner = nullptr;
}

Host::Host(ModelOptions o)
    : options{std::move(o)}, accounting{options.memlock}, memory{options.memory_check}, files{options.descriptors_max} {
  int next_group = 0;
  for (const DeviceOptions& d : options.devices) next_group = std::max(next_group, d.group + 1);
  for (std::size_t i = 0; i < options.devices.size(); ++i) {
    DeviceOptions d = options.devices[i];
    if (d.address.empty()) d.address = fmt::format("0000:00:{:02x}.0", i + 3);
    if (d.group < 0) d.group = next_group++;
    const IommuOptions& iommu = options.iommus[std::min(d.iommu, options.iommus.size() - 1)];
    devices.push_back(std::make_unique<SimulatedDevice>(d, iommu));
    bars.push_back(d.bar0.value == 0 ? nullptr : std::make_unique<OsPage[]>(d.bar0.value / os_page_bytes));
    IommuGroup* g = group(d.group);
    if (g == nullptr) {
      groups.push_back(std::make_unique<IommuGroup>());
      g = groups.back().get();
      g->number = d.group;
    }
    g->devices.push_back(devices.back().get());
    g->viable = g->viable && (d.driver.empty() || d.driver == "vfio-pci");
  }
}

IommuGroup* Host::group(int number) noexcept {
  for (const auto& g : groups) {
    if (g->number == number) return g.get();
  }
  return nullptr;
}

IommuGroup* Host::group_of(const SimulatedDevice* device) noexcept { return group(device->options().group); }

SimulatedDevice* Host::device(const std::string& address) noexcept {
  for (const auto& d : devices) {
    if (d->address() == address) return d.get();
  }
  return nullptr;
}

}  // namespace iovane::backends::model
