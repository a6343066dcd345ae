// Brings a ShadowDomain in step with a guest's VT-d page table: walk, compare, stage the difference.
#pragma once

#include <cstdint>
#include <optional>

#include "viommu/shadow_domain.hpp"
#include "viommu/vtd_walk.hpp"

namespace iovane::viommu {

/// Work a guest action may cause before it has to wait its turn again: entries looked at plus leaves changed.
struct WorkBudget {
  std::uint64_t left = 0;
  bool take(std::uint64_t n) noexcept {
    left = left > n ? left - n : 0;
    return left != 0;
  }
};

struct SyncOutcome {
  std::optional<std::uint64_t> resume;  ///< the budget ran out: go on here
  Error error{};                       ///< the domain could not keep what the table says (limit_reached, out_of_memory)
  std::uint64_t entries = 0;           ///< looked at
  std::uint64_t reserved_entries = 0;  ///< present entries with reserved bits: not shadowed
};

/// Compares `range`, which lies in one of the table's input ranges, and stages what differs under `tag`.
SyncOutcome sync_range(const GuestMemory::View& view, ShadowDomain& domain, const VtdPageTable& table,
                       const VtdEntryRules& rules, IovaRange range, WorkBudget& budget, std::uint32_t tag) noexcept;

/// The same for `count` level-1 entries that begin at `entries`, whose pages begin at `iova`.
SyncOutcome sync_entries(const GuestMemory::View& view, ShadowDomain& domain, const VtdEntryRules& rules,
                         std::uint64_t iova, const std::uint64_t* entries, unsigned count, Access inherited,
                         WorkBudget& budget, std::uint32_t tag) noexcept;

}  // namespace iovane::viommu
