// VirtioIommu's endpoints, the domains they are in, and guest memory that comes and goes.
#include <algorithm>

#include "base/error_text.hpp"
#include "viommu/virtio_iommu.hpp"
#include "viommu/virtio_iommu_domain.hpp"

namespace iovane::viommu {

VirtioIommu::Endpoint* VirtioIommu::find_endpoint(std::uint32_t id) noexcept {
  const auto place = std::lower_bound(endpoints_.begin(), endpoints_.end(), id,
                                      [](const auto& e, std::uint32_t n) { return e->id < n; });
  return place != endpoints_.end() && (*place)->id == id ? place->get() : nullptr;
}

const VirtioIommu::Endpoint* VirtioIommu::find_endpoint(std::uint32_t id) const noexcept {
  return const_cast<VirtioIommu*>(this)->find_endpoint(id);
}

VirtioIommu::Domain* VirtioIommu::find_domain(std::uint32_t id) noexcept {
  if (last_domain_ != nullptr && last_domain_->id == id) return last_domain_;
  const auto place =
      std::lower_bound(domains_.begin(), domains_.end(), id, [](const auto& d, std::uint32_t n) { return d->id < n; });
  if (place == domains_.end() || (*place)->id != id) return nullptr;
  return last_domain_ = place->get();
}

const ShadowDomain* VirtioIommu::domain(std::uint32_t id) const noexcept {
  const Domain* found = const_cast<VirtioIommu*>(this)->find_domain(id);
  return found == nullptr ? nullptr : &found->shadow;
}

bool VirtioIommu::bypasses_unattached() const noexcept {
  return bypass_config_ || (features_ & virtio::feature_bypass) != 0;
}

void VirtioIommu::fill_identity(Domain& domain) {
  const auto view = memory_.view();
  for (const Region& region : view.regions()) {
    const IovaRange range{Iova{region.gpa}, Iova{region.last}};
    if (domain.shadow.index().is_free(range))
      static_cast<void>(
          domain.shadow.map(view, range, region.gpa, region.read_only ? Access::read : Access::read_write));
  }
  domain.shadow.commit_and_wait();
}

VirtioIommu::Domain& VirtioIommu::bypass_domain() {
  if (bypass_ == nullptr) {
    DomainConfig config = config_.domain;
    config.name = "virtio-iommu bypass";
    config.granule_shift = 12;
    config.address_bits = 64;
    bypass_ = std::make_unique<Domain>(0, config, true);
    fill_identity(*bypass_);
  }
  return *bypass_;
}

VirtioIommu::Domain& VirtioIommu::make_domain(std::uint32_t id, bool bypass) {
  DomainConfig config = config_.domain;
  config.name = fmt::format("virtio-iommu domain {}", id);
  if (bypass) config.granule_shift = 12, config.address_bits = 64;
  auto made = std::make_unique<Domain>(id, config, bypass);
  Domain& domain = *made;
  domains_.insert(
      std::lower_bound(domains_.begin(), domains_.end(), id, [](const auto& d, std::uint32_t n) { return d->id < n; }),
      std::move(made));
  if (bypass) fill_identity(domain);
  return domain;
}

void VirtioIommu::update_reserved(Domain& domain) {
  domain.reserved.clear();
  for (const auto& e : endpoints_)
    if (e->domain == &domain)
      for (const ReservedMemory& r : e->reserved) domain.reserved.push_back(r.range);
}

// Attaches the endpoint's target to the domain, unless another endpoint on the same target did.
Result<void> VirtioIommu::join(Endpoint& endpoint, Domain& domain) {
  if (endpoint.target != nullptr) {
    for (const auto& other : endpoints_)
      if (other.get() != &endpoint && other->target == endpoint.target && other->domain != nullptr &&
          other->domain != &domain)
        return base::fail(Errc::unsupported, Stage::attach, 0,
                          "virtio-iommu: endpoint {} shares its host address space with endpoint {} in another domain",
                          endpoint.id, other->id);
    if (!domain.bypass)
      for (const ReservedMemory& r : endpoint.reserved)
        if (!domain.shadow.index().is_free(r.range))
          return base::fail(Errc::unsupported, Stage::attach, 0,
                            "virtio-iommu: domain {} has mappings in {:#x}..{:#x}, which endpoint {} reserves",
                            domain.id, r.range.start.value, r.range.last.value, endpoint.id);
    if (!domain.shadow.attached(*endpoint.target)) {
      const auto view = memory_.view();
      if (auto joined = domain.shadow.attach(view, *endpoint.target); !joined) return joined;
    }
  }
  endpoint.domain = &domain;
  ++domain.users;
  update_reserved(domain);
  return {};
}

Result<void> VirtioIommu::leave(Endpoint& endpoint) {
  Domain* domain = std::exchange(endpoint.domain, nullptr);
  if (domain == nullptr) return {};
  --domain->users;
  update_reserved(*domain);
  const bool shared = std::any_of(endpoints_.begin(), endpoints_.end(),
                                  [&](const auto& e) { return e->domain == domain && e->target == endpoint.target; });
  Result<void> outcome;
  if (endpoint.target != nullptr && !shared) outcome = domain->shadow.detach(*endpoint.target);
  return outcome;
}

void VirtioIommu::drop_domain_if_unused(Domain* domain) {
  if (domain == nullptr || domain == bypass_.get() || domain->users != 0) return;
  if (last_domain_ == domain) last_domain_ = nullptr;
  std::erase(dirty_, domain);
  std::erase_if(domains_, [&](const auto& d) { return d.get() == domain; });
}

// Where an endpoint is when no domain has it.
Result<void> VirtioIommu::settle(Endpoint& endpoint) {
  const bool bypass = bypasses_unattached();
  if (endpoint.domain != nullptr && endpoint.domain != bypass_.get()) return {};
  if (bypass == (endpoint.domain != nullptr)) return {};
  return bypass ? join(endpoint, bypass_domain()) : leave(endpoint);
}

Result<void> VirtioIommu::add_endpoint(std::uint32_t id, ShadowTarget* target, std::vector<ReservedMemory> reserved) {
  if (find_endpoint(id) != nullptr)
    return base::fail(Errc::busy, Stage::attach, 0, "virtio-iommu: endpoint {} is there already", id);
  if (std::count_if(reserved.begin(), reserved.end(), [](const ReservedMemory& r) { return r.msi; }) > 1)
    return base::fail(Errc::invalid_argument, Stage::attach, 0, "virtio-iommu: endpoint {} has two MSI regions", id);
  finish();
  if (target != nullptr) {  // what the host cannot map is reserved too
    const auto usable = target->usable_ranges();
    if (!usable) return usable.error();
    std::uint64_t at = config_.input_range.start.value;
    bool more = true;
    const auto hole = [&](std::uint64_t first, std::uint64_t last) {
      const IovaRange range{Iova{first}, Iova{last}};
      const bool known = std::any_of(reserved.begin(), reserved.end(),
                                     [&](const ReservedMemory& r) { return r.range.overlaps(range); });
      if (!known) reserved.push_back({range, false});
    };
    for (const IovaRange& range : *usable) {
      if (!more || range.last.value < at) continue;
      if (range.start > config_.input_range.last) break;
      if (range.start.value > at) hole(at, range.start.value - 1);
      more = range.last < config_.input_range.last;
      if (more) at = range.last.value + 1;
    }
    if (more) hole(at, config_.input_range.last.value);
  }
  std::sort(reserved.begin(), reserved.end(),
            [](const ReservedMemory& a, const ReservedMemory& b) { return a.range.start < b.range.start; });
  if (reserved.size() * virtio::property_reserved_memory_bytes > config_.probe_size)
    return base::fail(Errc::limit_reached, Stage::attach, 0,
                      "virtio-iommu: endpoint {} has {} reserved regions, probe_size {} has room for {}", id,
                      reserved.size(), config_.probe_size, config_.probe_size / virtio::property_reserved_memory_bytes);
  auto made = std::make_unique<Endpoint>(Endpoint{id, target, std::move(reserved), nullptr});
  Endpoint& endpoint = *made;
  endpoints_.insert(std::lower_bound(endpoints_.begin(), endpoints_.end(), id,
                                     [](const auto& e, std::uint32_t n) { return e->id < n; }),
                    std::move(made));
  auto settled = settle(endpoint);
  if (!settled) std::erase_if(endpoints_, [&](const auto& e) { return e.get() == &endpoint; });
  return settled;
}

Result<void> VirtioIommu::remove_endpoint(std::uint32_t id) {
  finish();
  Endpoint* endpoint = find_endpoint(id);
  if (endpoint == nullptr)
    return base::fail(Errc::not_found, Stage::detach, 0, "virtio-iommu: endpoint {} is not there", id);
  Domain* domain = endpoint->domain;
  auto outcome = leave(*endpoint);
  std::erase_if(endpoints_, [&](const auto& e) { return e.get() == endpoint; });
  drop_domain_if_unused(domain);
  return outcome;
}

void VirtioIommu::set_features(std::uint64_t negotiated) {
  finish();
  features_ = negotiated & features();
  for (const auto& endpoint : endpoints_) static_cast<void>(settle(*endpoint));
}

Result<void> VirtioIommu::set_bypass(bool bypass) {
  finish();
  bypass_config_ = bypass;
  Result<void> outcome;
  for (const auto& endpoint : endpoints_)
    if (auto settled = settle(*endpoint); !settled) outcome = settled;
  return outcome;
}

Result<void> VirtioIommu::memory_added() noexcept {
  finish();
  const auto view = memory_.view();
  Result<void> outcome;
  const auto refresh = [&](Domain& domain) {
    if (domain.bypass) fill_identity(domain);
    const auto done = domain.shadow.commit_after(domain.shadow.refresh_backing(view));
    if (outcome) outcome = done;
  };
  for (const auto& domain : domains_) refresh(*domain);
  if (bypass_ != nullptr) refresh(*bypass_);
  return outcome;
}

Result<void> VirtioIommu::memory_removing(const Region& region) noexcept {
  finish();
  const auto view = memory_.view();
  Result<void> outcome;
  const auto withdraw = [&](Domain& domain) {
    Result<void> withdrawn;
    if (!domain.bypass) {
      withdrawn = domain.shadow.withdraw_region(region);
    } else if (const auto gone = domain.shadow.unmap(view, {Iova{region.gpa}, Iova{region.last}}, CutRule::cut);
               !gone) {
      withdrawn = gone.error();
    }
    withdrawn = domain.shadow.commit_after(withdrawn);
    if (outcome) outcome = withdrawn;
  };
  for (const auto& domain : domains_) withdraw(*domain);
  if (bypass_ != nullptr) withdraw(*bypass_);
  return outcome;
}

std::optional<std::pair<std::uint64_t, Access>> VirtioIommu::translate(std::uint32_t id,
                                                                       std::uint64_t iova) const noexcept {
  const Endpoint* endpoint = find_endpoint(id);
  if (endpoint == nullptr || endpoint->domain == nullptr) return std::nullopt;
  return endpoint->domain->shadow.translate(iova);
}

std::optional<virtio::FaultReason> VirtioIommu::fault_of(std::uint32_t id, std::uint64_t iova,
                                                         bool write) const noexcept {
  const Endpoint* endpoint = find_endpoint(id);
  if (endpoint == nullptr) return virtio::FaultReason::unknown;
  if (endpoint->domain == nullptr) return virtio::FaultReason::domain;
  const auto found = endpoint->domain->shadow.translate(iova);
  if (found && (write ? may_write(found->second) : may_read(found->second))) return std::nullopt;
  return virtio::FaultReason::mapping;
}

}  // namespace iovane::viommu
