// Vtd's devices, the domains they are in, and their moves between them.
#include <algorithm>
#include <array>
#include <new>

#include "base/error_text.hpp"
#include "viommu/vtd.hpp"
#include "viommu/vtd_domain.hpp"

namespace iovane::viommu {

Vtd::Endpoint* Vtd::find(std::uint16_t source, std::optional<std::uint32_t> pasid) noexcept {
  for (Endpoint& e : endpoints_)
    if (e.source == source && e.pasid == pasid) return &e;
  return nullptr;
}

const Vtd::Endpoint* Vtd::find(std::uint16_t source, std::optional<std::uint32_t> pasid) const noexcept {
  return const_cast<Vtd*>(this)->find(source, pasid);
}

VtdBinding Vtd::binding_of(const GuestMemory::View& view, const Endpoint& endpoint) const noexcept {
  if (enabled_) return resolve_binding(view, config_.capabilities, rtaddr_, endpoint.source, endpoint.pasid);
  VtdBinding off;  // translation disabled: requests without PASID pass through
  off.kind = endpoint.pasid ? VtdBinding::Kind::blocked : VtdBinding::Kind::pass_through;
  return off;
}

Result<void> Vtd::add_endpoint(std::uint16_t source, std::optional<std::uint32_t> pasid, ShadowTarget* target) {
  if (find(source, pasid) != nullptr)
    return base::fail(Errc::busy, Stage::attach, 0, "VT-d: source {:#x} is there already", source);
  finish();
  endpoints_.push_back({source, pasid, target, {}, nullptr, false});
  const auto view = memory_.view();
  Endpoint& endpoint = endpoints_.back();
  const auto moved = move_endpoint(view, endpoint, binding_of(view, endpoint));
  if (!moved) {
    endpoints_.pop_back();
    drop_unused_domains();
    return moved;
  }
  busy_ = true;
  finish();
  return {};
}

Result<void> Vtd::remove_endpoint(std::uint16_t source, std::optional<std::uint32_t> pasid) {
  finish();
  Endpoint* endpoint = find(source, pasid);
  if (endpoint == nullptr)
    return base::fail(Errc::not_found, Stage::detach, 0, "VT-d: source {:#x} is not there", source);
  Result<void> outcome;
  if (endpoint->domain != nullptr) {
    if (endpoint->target != nullptr) outcome = endpoint->domain->shadow.detach(*endpoint->target);
    --endpoint->domain->users;
  }
  endpoints_.erase(endpoints_.begin() + (endpoint - endpoints_.data()));
  drop_unused_domains();
  return outcome;
}

void Vtd::drop_unused_domains() noexcept {
  named_ = {};
  std::erase_if(domains_, [&](const std::unique_ptr<Domain>& d) {
    if (d->users != 0) return false;
    std::erase(dirty_, d.get());
    std::erase_if(tasks_, [&](const Task& t) { return t.domain == d.get(); });
    return true;
  });
}

// A domain for a table: the one there is, or a new one that already holds what the table says.
Result<Vtd::Domain*> Vtd::domain_for(const GuestMemory::View& view, const VtdBinding& binding) noexcept {
  for (const auto& d : domains_)
    if (d->is_for(binding)) return d.get();
  if (domains_.size() >= config_.domains_max)
    return base::fail(Errc::limit_reached, Stage::attach, 0, "VT-d: the guest uses more than {} page tables",
                      config_.domains_max);
  Domain* made_at = nullptr;
  try {
    made_at = &make_domain(binding);
  } catch (const std::bad_alloc&) {
    return make_error(Errc::out_of_memory, Stage::attach, "VT-d: no memory for another guest domain");
  }
  Domain& made = *made_at;
  if (binding.kind == VtdBinding::Kind::pass_through) {
    for (const Region& region : view.regions()) {
      const auto mapped = made.shadow.map(view, {Iova{region.gpa}, Iova{region.last}}, region.gpa,
                                          region.read_only ? Access::read : Access::read_write);
      if (!mapped) return mapped.error();
    }
    mark_dirty(made);
  } else {
    compare(made, made.inputs.low);
    if (made.inputs.high) compare(made, *made.inputs.high);
  }
  return &made;
}

Vtd::Domain& Vtd::make_domain(const VtdBinding& binding) {
  DomainConfig config = config_.domain;
  config.name = binding.kind == VtdBinding::Kind::pass_through ? "VT-d pass-through"
                                                               : fmt::format("VT-d domain {}", binding.domain);
  config.address_bits =
      binding.kind == VtdBinding::Kind::pass_through || binding.table.stage == VtdPageTable::Stage::first
          ? 64
          : std::min<unsigned>(12 + 9 * binding.table.levels, 57);
  auto made = std::make_unique<Domain>(config, binding, config_.capabilities);
  const auto place = std::upper_bound(domains_.begin(), domains_.end(), binding.domain,
                                      [](std::uint16_t id, const auto& d) { return id < d->binding.domain; });
  named_ = {};
  return **domains_.insert(place, std::move(made));
}

// The endpoint leaves its old table at once: from here on the device sees the new one, or nothing.
Result<void> Vtd::move_endpoint(const GuestMemory::View& view, Endpoint& endpoint, const VtdBinding& binding) noexcept {
  Domain* next = nullptr;
  Result<void> outcome;
  if (binding.kind != VtdBinding::Kind::blocked) {
    auto found = domain_for(view, binding);
    if (found) {
      next = *found;
    } else {
      outcome = found.error();
    }
  }
  endpoint.binding = binding;
  if (next == endpoint.domain && outcome) return {};
  ++stats_.moved_endpoints;
  if (next != nullptr) ++next->users;
  if (endpoint.domain != nullptr) {
    --endpoint.domain->users;
    if (endpoint.target != nullptr)
      if (auto left = endpoint.domain->shadow.detach(*endpoint.target); !left) outcome = left;
  }
  endpoint.domain = next;
  if (next != nullptr && endpoint.target != nullptr) {
    if (!next->shadow.idle()) next->shadow.commit_and_wait();
    if (auto joined = next->shadow.attach(view, *endpoint.target); !joined) {
      outcome = joined;
      --next->users;
      endpoint.domain = nullptr;
    }
  }
  return outcome;
}

void Vtd::move_stale_endpoints(const GuestMemory::View& view) noexcept {
  for (Endpoint& endpoint : endpoints_) {
    if (!std::exchange(endpoint.stale, false)) continue;
    const VtdBinding binding = binding_of(view, endpoint);
    static_cast<void>(budget_.take(1));
    if (binding == endpoint.binding && (endpoint.domain != nullptr || binding.kind == VtdBinding::Kind::blocked))
      continue;
    // What it leaves is unmapped, what it joins is mapped on its host: work that its guest caused.
    const auto leaves = [&] { return endpoint.domain == nullptr ? 0 : endpoint.domain->shadow.index().leaves(); };
    static_cast<void>(budget_.take(leaves()));
    if (auto moved = move_endpoint(view, endpoint, binding); !moved)
      events_.shadow_failed(binding.domain, moved.error());
    static_cast<void>(budget_.take(leaves()));
  }
  any_stale_ = false;
  drop_unused_domains();
}

void Vtd::mark_endpoints(const VtdDescriptor& d) noexcept {
  using Kind = VtdDescriptor::Kind;
  using Scope = VtdDescriptor::Scope;
  constexpr std::array<std::uint16_t, 4> function_bits{0, 4, 6, 7};
  for (Endpoint& e : endpoints_) {
    bool hit = true;
    if (d.kind == Kind::context_cache && d.scope == Scope::device) {
      const auto ignore = static_cast<std::uint16_t>(~function_bits[d.function_mask]);
      hit = (e.source & ignore) == (d.source & ignore);
    } else if (d.scope == Scope::domain || d.scope == Scope::pasid) {
      // Blocked ones may become unblocked: with caching mode a guest names domain 0 for entries that were not present.
      hit = e.binding.kind == VtdBinding::Kind::blocked || e.binding.domain == d.domain;
      if (d.scope == Scope::pasid)
        hit = (hit && e.binding.pasid == d.pasid) || e.binding.kind == VtdBinding::Kind::blocked;
    }
    if (!hit) continue;
    e.stale = true;
    any_stale_ = true;
  }
}

Progress Vtd::memory_added() noexcept {
  finish();
  const auto view = memory_.view();
  for (const auto& owned : domains_) {
    if (owned->binding.kind == VtdBinding::Kind::pass_through) {
      for (const Region& region : view.regions())
        if (owned->shadow.index().is_free({Iova{region.gpa}, Iova{region.last}}))
          static_cast<void>(owned->shadow.map(view, {Iova{region.gpa}, Iova{region.last}}, region.gpa,
                                              region.read_only ? Access::read : Access::read_write));
    }
    if (auto refreshed = owned->shadow.refresh_backing(view); !refreshed)
      events_.shadow_failed(owned->binding.domain, refreshed.error());
    mark_dirty(*owned);
  }
  return begin();
}

Progress Vtd::memory_removing(const Region& region) noexcept {
  finish();
  const auto view = memory_.view();
  for (const auto& owned : domains_) {
    Result<void> withdrawn;
    if (owned->binding.kind == VtdBinding::Kind::pass_through) {
      if (auto gone = owned->shadow.unmap(view, {Iova{region.gpa}, Iova{region.last}}, CutRule::cut); !gone)
        withdrawn = gone.error();
    } else {
      withdrawn = owned->shadow.withdraw_region(region);
    }
    if (!withdrawn) events_.shadow_failed(owned->binding.domain, withdrawn.error());
    mark_dirty(*owned);
  }
  return begin();
}

std::optional<std::pair<std::uint64_t, Access>> Vtd::translate(std::uint16_t source, std::optional<std::uint32_t> pasid,
                                                               std::uint64_t iova) const noexcept {
  const Endpoint* endpoint = find(source, pasid);
  if (endpoint == nullptr || endpoint->domain == nullptr) return std::nullopt;
  return endpoint->domain->shadow.translate(iova);
}

Vtd::FaultReport Vtd::fault_of(std::uint16_t source, std::optional<std::uint32_t> pasid, std::uint64_t iova,
                               bool write) const noexcept {
  const auto view = memory_.view();
  Endpoint endpoint;
  endpoint.source = source;
  endpoint.pasid = pasid;
  const VtdBinding binding = binding_of(view, endpoint);
  VtdFault reason = binding.fault;
  if (binding.kind == VtdBinding::Kind::pass_through && enabled_)
    reason = pass_through_fault(config_.capabilities, (rtaddr_ >> 10 & 3) == 1, iova);
  if (binding.kind == VtdBinding::Kind::paging)
    reason = translate_address(view, binding.table, config_.capabilities, iova, write).fault;
  return {reason, !(binding.faults_disabled && is_qualified(reason))};
}

const ShadowDomain* Vtd::domain_of(std::uint16_t source, std::optional<std::uint32_t> pasid) const noexcept {
  const Endpoint* endpoint = find(source, pasid);
  return endpoint == nullptr || endpoint->domain == nullptr ? nullptr : &endpoint->domain->shadow;
}

}  // namespace iovane::viommu
