// What a migrating guest's virtio-iommu device is, as bytes.
#include <utility>

#include "base/error_text.hpp"
#include "viommu/domain_snapshot.hpp"
#include "viommu/state_bytes.hpp"
#include "viommu/virtio_iommu.hpp"
#include "viommu/virtio_iommu_domain.hpp"

namespace iovane::viommu {
namespace {

// Layout after magic and version: u64 features, u32 bypass, u32 domains, each {u32 id, u32 bypass, u64 length, its
// snapshot}, u32 endpoints, each {u32 id, u32 attached, u32 domain}.
Error bad(std::string_view what) {
  return base::fail(Errc::bad_format, Stage::validate, 0, "virtio-iommu state: {}", what);
}

}  // namespace

Result<std::vector<std::byte>> VirtioIommu::save_state() {
  finish();
  StateWriter out{virtio_iommu_state_magic, state_version};
  out.put(features_);
  out.put(std::uint32_t{bypass_config_ ? 1U : 0U});
  out.put(static_cast<std::uint32_t>(domains_.size()));
  for (const auto& domain : domains_) {
    out.put(domain->id);
    out.put(std::uint32_t{domain->bypass ? 1U : 0U});
    if (domain->bypass) {  // it is made of the memory that is there
      out.put_bytes({});
      continue;
    }
    const auto snapshot = save_domain(domain->shadow);
    if (!snapshot) return snapshot.error();
    out.put_bytes(*snapshot);
  }
  out.put(static_cast<std::uint32_t>(endpoints_.size()));
  for (const auto& endpoint : endpoints_) {
    const bool attached = endpoint->domain != nullptr && endpoint->domain != bypass_.get();
    out.put(endpoint->id);
    out.put(std::uint32_t{attached ? 1U : 0U});
    out.put(attached ? endpoint->domain->id : 0U);
  }
  return out.finish();
}

Result<void> VirtioIommu::restore_state(std::span<const std::byte> bytes) {
  auto in = StateReader::open(bytes, virtio_iommu_state_magic, state_version);
  if (!in) return bad("not one, damaged, or of a version this program does not know");
  if (auto cleared = reset(); !cleared) return cleared;
  auto outcome = restore_from(*in);
  if (!outcome) static_cast<void>(reset());
  stats_.domains = domains_.size();
  return outcome;
}

Result<void> VirtioIommu::restore_from(StateReader& in) {
  const auto negotiated = in.take<std::uint64_t>();
  const auto bypass = in.take<std::uint32_t>();
  const auto domains = in.take<std::uint32_t>();
  if (!in.ok() || (negotiated & ~features()) != 0 || bypass > 1 || domains > config_.domains_max)
    return bad("features, bypass or the number of domains are not this device's");
  set_features(negotiated);
  if (auto set = set_bypass(bypass != 0); !set) return set;
  for (std::uint32_t i = 0; i < domains; ++i) {
    const auto id = in.take<std::uint32_t>();
    const auto bypasses = in.take<std::uint32_t>();
    const auto snapshot = in.take_bytes();
    const bool ascending = domains_.empty() || domains_.back()->id < id;
    if (!in.ok() || bypasses > 1 || !ascending || id < config_.domain_first || id > config_.domain_last)
      return bad("a domain that this device cannot have");
    Domain& domain = make_domain(id, bypasses != 0);
    if (bypasses != 0) continue;
    const auto view = memory_.view();
    if (auto restored = restore_domain(snapshot, view, domain.shadow); !restored) return restored;
  }
  const auto endpoints = in.take<std::uint32_t>();
  if (endpoints != endpoints_.size()) return bad("it has other endpoints than this device");
  std::vector<std::pair<Endpoint*, Domain*>> attachments;  // those that share a host move together
  for (const auto& endpoint : endpoints_) {
    const auto id = in.take<std::uint32_t>();
    const auto attached = in.take<std::uint32_t>();
    Domain* domain = find_domain(in.take<std::uint32_t>());
    if (!in.ok() || id != endpoint->id || attached > 1) return bad("it has other endpoints than this device");
    if (attached == 0) continue;
    if (domain == nullptr) return bad("an endpoint in a domain that is not there");
    attachments.emplace_back(endpoint.get(), domain);
  }
  if (!in.ended()) return bad("it goes on after its end");
  for (const auto& [endpoint, domain] : attachments)
    if (auto left = leave(*endpoint); !left) return left;
  for (const auto& [endpoint, domain] : attachments)
    if (auto joined = join(*endpoint, *domain); !joined) return joined;
  for (const auto& domain : domains_)
    if (domain->users == 0) return bad("a domain without endpoints");
  return {};
}

}  // namespace iovane::viommu
