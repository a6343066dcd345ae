// MemoryTable: memory registered with one address space, and how many live mappings lean on each.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "backends/backend.hpp"
#include "iovane/mapping_id.hpp"
#include "iovane/result.hpp"
#include "iovane/types.hpp"

namespace iovane::engine {

/// Used by the lane's holder only. A memory whose owner let it go stays registered until its last mapping is gone.
class MemoryTable {
 public:
  struct Entry {
    backends::RegionId region{};
    Bytes length{};
    std::uint32_t generation = 0;
    std::uint32_t mappings = 0;  ///< live or being unmapped
    bool owned = false;          ///< the Memory object lives
    bool used = false;
    bool orphan = false;  ///< in the list of orphans
    std::uint32_t next_orphan = none;
  };
  static constexpr std::uint32_t none = ~std::uint32_t{0};

  /// Reserves room for every entry up to the bound lazily; throws nothing.
  explicit MemoryTable(std::uint32_t entries_max) noexcept : entries_max_{entries_max} {}

  /// Remembers a registered region. limit_reached or out_of_memory leave nothing behind.
  Result<MemoryId> add(backends::RegionId region, Bytes length) noexcept;
  /// The entry's index, or stale_handle.
  Result<std::uint32_t> find(MemoryId memory) const noexcept;
  /// The same without a text: the index, or none.
  std::uint32_t index_of(MemoryId memory) const noexcept {
    const std::uint32_t index = static_cast<std::uint32_t>(memory.value) - 1;  // slot 0 wraps to none
    if (index >= entries_.size()) return none;
    const Entry& entry = entries_[index];
    return entry.used && entry.generation == static_cast<std::uint32_t>(memory.value >> 32) ? index : none;
  }
  Entry& at(std::uint32_t index) noexcept { return entries_[index]; }
  const Entry& at(std::uint32_t index) const noexcept { return entries_[index]; }
  MemoryId id_of(std::uint32_t index) const noexcept {
    return {std::uint64_t{entries_[index].generation} << 32 | (index + 1)};
  }
  void forget(std::uint32_t index) noexcept;
  /// Remembers an entry that nobody has a use for any more, until it is taken.
  void orphan(std::uint32_t index) noexcept {
    if (entries_[index].orphan) return;
    entries_[index].orphan = true;
    entries_[index].next_orphan = std::exchange(orphans_, index);
  }
  bool has_orphans() const noexcept { return orphans_ != none; }
  /// Precondition: has_orphans().
  std::uint32_t take_orphan() noexcept {
    const std::uint32_t index = orphans_;
    orphans_ = entries_[index].next_orphan;
    entries_[index].orphan = false;
    return index;
  }
  /// Entries ever used; at() is valid below.
  std::uint32_t size() const noexcept { return static_cast<std::uint32_t>(entries_.size()); }

 private:
  std::uint32_t entries_max_;
  std::vector<Entry> entries_;
  std::vector<std::uint32_t> free_;
  std::uint32_t orphans_ = none;  // a list through the entries
};

}  // namespace iovane::engine
