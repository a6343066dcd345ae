// The way that a walk took from a table's root to a level-1 table, so that the next walk of a neighbour needs only make
// sure that it still is the way.
//
// A guest invalidates page after page of the same few tables. Each time, every entry on the way must be read again, for
// the guest may have changed it; but an entry that reads as it did before means what it meant before. So a remembered
// way costs one load and one compare per level. Every entry is still loaded once per walk and judged as loaded.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "viommu/guest_memory.hpp"
#include "viommu/vtd_walk.hpp"

namespace iovane::viommu {

/// Of one page table. Writer's side: one thread.
class VtdPath {
 public:
  static constexpr std::uint64_t span = (std::uint64_t{1} << 21) - 1;  ///< bytes that a level-1 table covers, less one

  /// The level-1 entry of an address and what the levels above it allow, or null when the way there is not the
  /// remembered one any more.
  const std::uint64_t* find(const GuestMemory::View& view, std::uint64_t iova, Access& inherited) const noexcept {
    if (iova >> span_shift != key_ || view.generation() != generation_) return nullptr;
    const Step* const stop = steps_.data() + depth_;
    for (const Step* step = steps_.data(); step != stop; ++step)
      if (load(step->entry) != step->value) return nullptr;
    inherited = inherited_;
    return leaves_ + (iova >> 12 & 511U);
  }

  /// Walks to an address and remembers the way; null when it does not lead to a level-1 table.
  const std::uint64_t* follow(const GuestMemory::View& view, const VtdPageTable& table, const VtdEntryRules& rules,
                              std::uint64_t iova, Access& inherited) noexcept {
    key_ = nowhere;
    depth_ = 0;
    Access access = Access::read_write;
    std::uint64_t at = table.root;
    for (unsigned level = table.levels; level > 1; --level) {
      const std::uint64_t* entries = view.table(at);
      if (entries == nullptr || depth_ == steps_.size()) return nullptr;
      const std::uint64_t* entry = entries + (iova >> (12 + 9 * (level - 1)) & 511U);
      const std::uint64_t value = load(entry);
      const auto verdict = rules.judge(value, level, access);
      if (verdict.kind != VtdEntryRules::Verdict::Kind::table) return nullptr;
      steps_[depth_++] = {entry, value};
      access = verdict.access;
      at = verdict.address;
    }
    leaves_ = view.table(at);
    if (leaves_ == nullptr) return nullptr;
    key_ = iova >> span_shift;
    generation_ = view.generation();
    inherited = inherited_ = access;
    return leaves_ + (iova >> 12 & 511U);
  }

 private:
  static constexpr unsigned span_shift = 21;
  static constexpr std::uint64_t nowhere = ~std::uint64_t{0};

  static std::uint64_t load(const std::uint64_t* entry) noexcept {
    const std::uint64_t word = GuestMemory::View::load(entry);
    if constexpr (std::endian::native == std::endian::big) return __builtin_bswap64(word);
    return word;
  }

  struct Step {
    const std::uint64_t* entry = nullptr;
    std::uint64_t value = 0;
  };
  std::array<Step, 4> steps_{};  // five levels less the last
  unsigned depth_ = 0;
  Access inherited_ = Access::none;
  const std::uint64_t* leaves_ = nullptr;
  std::uint64_t key_ = nowhere;
  std::uint64_t generation_ = 0;
};

}  // namespace iovane::viommu
