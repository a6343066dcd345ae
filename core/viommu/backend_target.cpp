#include "viommu/backend_target.hpp"

#include <algorithm>
#include <array>

#include "base/error_text.hpp"

namespace iovane::viommu {

using backends::BackendOp;
using backends::BackendOpResult;
using backends::Capability;
using backends::OpKind;

BackendTarget::~BackendTarget() {
  for (const auto& [ours, theirs] : regions_) (void)space_.unregister_memory(theirs).has_value();
}

bool BackendTarget::replace_is_atomic() const noexcept {
  return has(space_.facts().capabilities, Capability::replace_in_place);
}
bool BackendTarget::unmap_may_cut() const noexcept {
  return has(space_.facts().capabilities, Capability::cut_on_unmap);
}

Result<void> BackendTarget::add_region(const Region& region) {
  const auto made = space_.register_memory(
      {.address = region.address, .length = region.length(), .fd = region.fd, .fd_offset = region.fd_offset});
  if (!made) return made.error();
  regions_[region.id.value] = *made;
  return {};
}

void BackendTarget::remove_region(RegionId region) noexcept {
  const auto at = regions_.find(region.value);
  if (at == regions_.end()) return;
  (void)space_.unregister_memory(at->second).has_value();
  regions_.erase(at);
}

Progress BackendTarget::submit(std::span<const HostOp> ops, std::vector<OpFailure>& failures) noexcept {
  constexpr std::size_t batch_max = 64;
  std::array<BackendOp, batch_max> batch;
  std::array<BackendOpResult, batch_max> results;
  const bool copies = has(space_.facts().capabilities, Capability::copy_reuses_pin);
  for (std::size_t done = 0; done < ops.size();) {
    const std::size_t count = std::min(batch_max, ops.size() - done);
    for (std::size_t i = 0; i < count; ++i) {
      const HostOp& op = ops[done + i];
      batch[i] = {.kind = OpKind::unmap, .range = op.range};
      if (op.kind == HostOp::Kind::unmap) continue;
      const auto region = regions_.find(op.region.value);
      batch[i].kind = op.kind == HostOp::Kind::replace ? OpKind::replace : copies ? OpKind::copy : OpKind::map;
      batch[i].access = op.access;
      batch[i].memory = op.region_offset;
      // A region that is not known is one that the space does not know either, and says so.
      batch[i].region = region == regions_.end() ? backends::RegionId{~0U} : region->second;
    }
    space_.execute({batch.data(), count}, {results.data(), count});
    for (std::size_t i = 0; i < count; ++i)
      if (results[i].error) failures.push_back({static_cast<std::uint32_t>(done + i), results[i].error});
    done += count;
  }
  return Progress::done;
}

}  // namespace iovane::viommu
