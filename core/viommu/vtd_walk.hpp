// Walks of VT-d page tables in guest memory (specification 4.x, sections 3.6 to 3.8 and 9.8 to 9.10).
//
// The guest may change a table while we walk it, point it at itself, or fill it with ones. So: every entry is loaded
// once and judged as loaded; depth is bounded by the number of levels; width is bounded by the visitor, which may stop
// the walk and resume it later at the address it stopped at.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <optional>

#include "iovane/types.hpp"
#include "viommu/guest_memory.hpp"
#include "viommu/shadow_index.hpp"
#include "viommu/vtd_fault.hpp"
#include "viommu/vtd_tables.hpp"

namespace iovane::viommu {

/// How entries of one page table are read: masks, computed once.
class VtdEntryRules {
 public:
  VtdEntryRules(const VtdPageTable& table, const VtdCapabilities& capabilities) noexcept;

  static constexpr std::uint64_t page_size_bit = 1U << 7;

  /// What one entry says at a level (1: smallest). `inherited`: what the levels above allow.
  struct Verdict {
    enum class Kind : std::uint8_t { hole, table, leaf } kind = Kind::hole;
    VtdFault fault = VtdFault::none;  ///< of a hole: reserved bits or not present
    Access access = Access::none;     ///< with what is inherited; may be none
    std::uint64_t address = 0;
  };
  Verdict judge(std::uint64_t entry, unsigned level, Access inherited) const noexcept;

  /// A level-1 entry as a LeafWord, 0 for a hole. `reserved` is set when a present entry has reserved bits.
  std::uint64_t leaf_word(std::uint64_t entry, Access inherited, bool& reserved) const noexcept {
    std::uint64_t access = 0;
    if (first_) {
      if ((entry & 5) != 5) return 0;  // present, and for user requests
      access = 1 | (entry & 2);
    } else {
      access = entry & 3;
    }
    access &= static_cast<std::uint64_t>(inherited);
    if ((entry & reserved_leaf_) != 0) [[unlikely]] {
      reserved = reserved || (entry & 3) != 0;
      return 0;
    }
    if (access == 0) return 0;
    return (entry & address_mask_) | LeafWord::leaf | access;
  }

  VtdFault not_present() const noexcept;
  VtdFault bad_entry() const noexcept;
  VtdFault entry_access(bool top) const noexcept;
  VtdFault denied(bool write) const noexcept;
  bool first() const noexcept { return first_; }
  bool scalable() const noexcept { return scalable_; }

 private:
  bool first_;
  bool scalable_;
  bool superpage_2m_;
  bool superpage_1g_;
  std::uint64_t address_mask_;   // 51:12 within the host address width
  std::uint64_t reserved_leaf_;  // level 1
  std::uint64_t reserved_any_;   // every level
};

/// The addresses that a table translates: one range, or, first level, the two canonical halves.
struct VtdInputRanges {
  IovaRange low{};
  std::optional<IovaRange> high;
};
VtdInputRanges input_ranges(const VtdPageTable& table, const VtdCapabilities& capabilities) noexcept;

/// One address as a device's request would find it.
struct VtdTranslation {
  VtdFault fault = VtdFault::none;
  std::uint64_t gpa = 0;
  Access access = Access::none;
  std::uint8_t page_shift = 12;
};
VtdTranslation translate_address(const GuestMemory::View& view, const VtdPageTable& table,
                                 const VtdCapabilities& capabilities, std::uint64_t iova, bool write) noexcept;

/// Why a request is refused that no table translates.
VtdFault pass_through_fault(const VtdCapabilities& capabilities, bool scalable, std::uint64_t address) noexcept;

/// Visits what a table says about a range, in address order. Visitor:
///   bool run(iova, const std::uint64_t* entries, count, inherited)  level-1 entries, loaded by the visitor, once each
///   bool superpage(iova, shift, gpa, access)
///   bool hole(range, fault)
/// Each says whether to go on; when one says no, the walk ends and returns the first address not visited.
template <typename Visitor>
class VtdWalk {
 public:
  VtdWalk(const GuestMemory::View& view, const VtdPageTable& table, const VtdEntryRules& rules,
          Visitor& visitor) noexcept
      : view_{view}, table_{table}, rules_{rules}, visitor_{visitor} {}

  /// `range` lies in one of the table's input ranges. Nothing: it was visited to its end.
  std::optional<std::uint64_t> walk(const IovaRange& range) noexcept {
    resume_.reset();
    end_ = range.last.value;
    static_cast<void>(step(table_.root, table_.levels, range.start.value, range.last.value, Access::read_write));
    return resume_;
  }

 private:
  static constexpr unsigned shift(unsigned level) noexcept { return 12 + 9 * (level - 1); }

  // Passes the visitor's answer on, and notes where to go on when it was no.
  bool after(bool go_on, std::uint64_t last) noexcept {
    if (!go_on && last < end_) resume_ = last + 1;
    return go_on;
  }

  bool step(std::uint64_t table, unsigned level, std::uint64_t first, std::uint64_t last, Access inherited) noexcept {
    const std::uint64_t* entries = view_.table(table);
    if (entries == nullptr)
      return after(visitor_.hole({Iova{first}, Iova{last}}, rules_.entry_access(level == table_.levels)), last);
    const unsigned low = shift(level);
    unsigned i = static_cast<unsigned>(first >> low) & 511U;
    const unsigned stop = static_cast<unsigned>(last >> low) & 511U;
    if (level == 1)
      return after(visitor_.run(first & ~std::uint64_t{0xfff}, entries + i, stop - i + 1, inherited), last);
    const std::uint64_t span = (std::uint64_t{1} << low) - 1;
    std::uint64_t start = first & ~span;
    for (; i <= stop; ++i, start += span + 1) {
      std::uint64_t entry = GuestMemory::View::load(entries + i);
      if constexpr (std::endian::native == std::endian::big) entry = __builtin_bswap64(entry);
      const IovaRange here{Iova{std::max(first, start)}, Iova{std::min(last, start + span)}};
      const auto verdict = rules_.judge(entry, level, inherited);
      bool go_on = true;
      switch (verdict.kind) {
        case VtdEntryRules::Verdict::Kind::table:
          if (!step(verdict.address, level - 1, here.start.value, here.last.value, verdict.access)) return false;
          continue;
        case VtdEntryRules::Verdict::Kind::hole: go_on = visitor_.hole(here, verdict.fault); break;
        case VtdEntryRules::Verdict::Kind::leaf:
          go_on = visitor_.superpage(start, low, verdict.address, verdict.access);
          break;
      }
      if (!after(go_on, here.last.value)) return false;
    }
    return true;
  }

  const GuestMemory::View& view_;
  const VtdPageTable& table_;
  const VtdEntryRules& rules_;
  Visitor& visitor_;
  std::uint64_t end_ = 0;
  std::optional<std::uint64_t> resume_;
};

}  // namespace iovane::viommu
