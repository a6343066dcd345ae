// Inside Vtd: a guest domain, which is one page table and the devices that use it.
#pragma once

#include <cstdint>
#include <utility>

#include "viommu/vtd.hpp"
#include "viommu/vtd_path.hpp"

namespace iovane::viommu {

struct Vtd::Domain {
  Domain(const DomainConfig& config, const VtdBinding& of, const VtdCapabilities& capabilities)
      : shadow{config}, binding{of}, rules{of.table, capabilities}, inputs{input_ranges(of.table, capabilities)} {}
  ShadowDomain shadow;
  VtdBinding binding;  // kind, domain and table are the key
  VtdEntryRules rules;
  VtdInputRanges inputs;
  VtdPath path;
  std::uint32_t users = 0;
  bool dirty = false;
  bool failed = false;  // emptied; only an invalidation of all of it starts again

  bool is_for(const VtdBinding& b) const noexcept {
    if (b.kind != binding.kind) return false;
    return b.kind == VtdBinding::Kind::pass_through || (b.domain == binding.domain && b.table == binding.table);
  }
};

inline void Vtd::mark_dirty(Domain& domain) noexcept {
  if (std::exchange(domain.dirty, true)) return;
  dirty_.push_back(&domain);
}

}  // namespace iovane::viommu
