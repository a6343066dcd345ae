// Brings a ShadowDomain in step with a guest's VT-d page table: walk, compare, stage the difference.
#pragma once

#include <bit>
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

/// The same for one entry, where the domain has leaves of that size or none at all nearby: the common case, cut short.
/// False: it has not, and nothing was done; sync_entries() knows what to do.
[[gnu::always_inline]] inline bool sync_entry(const GuestMemory::View& view, ShadowDomain& domain,
                                              const VtdEntryRules& rules, std::uint64_t iova,
                                              const std::uint64_t* entry, Access inherited, std::uint32_t tag,
                                              bool& reserved, Error& error) noexcept {
  std::uint64_t* const slot = domain.granule_slot(iova);
  if (slot == nullptr) return false;
  std::uint64_t word = GuestMemory::View::load(entry);
  if constexpr (std::endian::native == std::endian::big) word = __builtin_bswap64(word);
  const std::uint64_t want = rules.leaf_word(word, inherited, reserved);
  const std::uint64_t had = *slot & LeafWord::guest_mask;
  if (want == had) return true;
  const IovaRange range{Iova{iova}, Iova{iova + 4095}};
  if (want == 0) {
    if (domain.unmap_slot(slot, iova, CutRule::cut, tag)) return true;
    if (const auto gone = domain.unmap(view, range, CutRule::cut, tag); !gone) error = gone.error();
  } else if (had == 0) {
    if (domain.map_slot(view, slot, iova, LeafWord::gpa(want), LeafWord::access(want), tag)) return true;
    if (const auto done = domain.map(view, range, LeafWord::gpa(want), LeafWord::access(want), tag); !done)
      error = done.error();
  } else {
    if (const auto done = domain.assign(view, range, LeafWord::gpa(want), LeafWord::access(want), tag); !done)
      error = done.error();
  }
  return true;
}

}  // namespace iovane::viommu
