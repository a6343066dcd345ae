// A radix page table as an IOMMU walks it: 3 to 5 levels of 512 entries, leaves of 4 KiB, 2 MiB and 1 GiB.
//
// Roles. One writer at a time edits (the address space's mutex sees to that); any number of walkers (simulated
//   devices) translate meanwhile and see either the old or the new entry.
// Entry. Bits 0 and 1: the device may read, write; bit 7: leaf above the lowest level; bit 9: written by a device;
//   bits 12 up: the process address of the memory, or of the next table. 0 is "not present".
// Edges. R.entry: every store of an entry is a release, so that a walker's acquire (A.entry) sees the whole table that
//   a new pointer leads to.
// Reclamation. unmap() unhooks tables that it emptied and keeps them intact until reclaim(), which the owner may call
//   only when no walker can still be inside (Domain::invalidate() waits for that). So unmap, invalidate, reclaim.
// Failure. map() is all or nothing. unmap() fails only when it has to cut a large leaf and has no memory for the
//   smaller ones, and then has changed nothing.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "iovane/types.hpp"

namespace iovane::backends::model {

inline constexpr std::uint64_t os_page_bytes = 4096;
inline constexpr unsigned page_table_levels_max = 5;

/// What a walk found.
struct Translation {
  std::byte* memory = nullptr;   ///< where the address leads; null when nothing is mapped there
  std::uint64_t run_bytes = 0;   ///< bytes from there to the last of the leaf
  std::uint64_t leaf_bytes = 0;  ///< size of the leaf
  Access access = Access::none;
  std::atomic<std::uint64_t>* entry = nullptr;
  std::uint64_t entry_value = 0;
};

/// What a table holds; counted by a walk over all of it.
struct PageTableCensus {
  std::uint64_t tables = 0;
  std::array<std::uint64_t, page_table_levels_max> leaves{};  ///< by level: 4 KiB, 2 MiB, 1 GiB
  std::uint64_t bytes = 0;
};

class PageTable {
 public:
  /// `page_sizes`: bit n set when leaves of 2^n bytes may be used; 12 must be in it.
  PageTable(unsigned levels, std::uint64_t page_sizes) noexcept;
  ~PageTable();
  PageTable(const PageTable&) = delete;
  PageTable& operator=(const PageTable&) = delete;

  /// Addresses that it can translate.
  IovaRange aperture() const noexcept;

  /// Makes `range` lead to `memory`, with the largest leaves that the alignment of both allows (only 4 KiB ones when
  /// `large_leaves` is false). Range and memory are multiples of 4 KiB. Writer.
  /// Returns 0, -ENOMEM, -EEXIST (something is mapped there), -EINVAL (outside the aperture, misaligned).
  [[nodiscard]] int map(IovaRange range, std::byte* memory, Access access, bool large_leaves = true) noexcept;
  /// Clears what is mapped inside `range`, cutting large leaves at its borders; holes are fine. Writer.
  /// Returns the bytes cleared, or -ENOMEM.
  [[nodiscard]] std::int64_t unmap(IovaRange range) noexcept;
  /// Frees what unmap() unhooked. Writer; no walker may still be inside a walk that began before the unmap.
  void reclaim() noexcept;
  bool has_retired() const noexcept { return !retired_.empty(); }

  /// Any thread.
  Translation walk(Iova address) const noexcept;
  /// Records a device write in the entry that a walk returned. False when the entry changed since: walk again.
  static bool mark_dirty(const Translation& translation) noexcept;

  /// Calls `record(range)` for every written leaf that overlaps `range`, clearing its mark if `clear`. Writer.
  template <typename Record>
  void read_dirty(IovaRange range, bool clear, Record&& record) noexcept {
    visit_dirty(root_.get(), levels_ - 1, 0, range, clear, record);
  }

  /// Writer.
  PageTableCensus census() const noexcept;

 private:
  using Entry = std::atomic<std::uint64_t>;
  struct alignas(4096) Table {
    std::array<Entry, 512> entries{};
  };

  static constexpr std::uint64_t no_region = ~std::uint64_t{0};
  static constexpr std::uint64_t region_of(std::uint64_t address) noexcept { return address >> shift_of(1); }

  static constexpr std::uint64_t readable_bit = 1U << 0;
  static constexpr std::uint64_t writable_bit = 1U << 1;
  static constexpr std::uint64_t leaf_bit = 1U << 7;
  static constexpr std::uint64_t dirty_bit = 1U << 9;
  static constexpr std::uint64_t present_bits = readable_bit | writable_bit;
  static constexpr std::uint64_t address_bits = ~std::uint64_t{0xfff};

  static constexpr unsigned shift_of(unsigned level) noexcept { return 12 + 9 * level; }
  static constexpr std::uint64_t bytes_of(unsigned level) noexcept { return std::uint64_t{1} << shift_of(level); }
  static constexpr std::size_t index_of(std::uint64_t address, unsigned level) noexcept {
    return (address >> shift_of(level)) & 511;
  }
  static bool is_leaf(std::uint64_t entry, unsigned level) noexcept { return level == 0 || (entry & leaf_bit) != 0; }
  static Table* table_at(std::uint64_t entry) noexcept;
  static std::byte* memory_at(std::uint64_t entry) noexcept;
  static std::uint64_t entry_for(const Table* table) noexcept;
  static std::uint64_t entry_for(const std::byte* memory, Access access, unsigned level) noexcept;

  Table* new_table() noexcept;
  void free_table(Table* table) noexcept;
  void free_subtree(Table* table, unsigned level) noexcept;
  void retire(Table* table, unsigned level) noexcept;
  Table* descend(std::uint64_t address, unsigned level) noexcept;
  unsigned level_for(std::uint64_t address, std::uint64_t memory, std::uint64_t remaining) const noexcept;
  bool cut(std::uint64_t boundary) noexcept;
  std::uint64_t clear(Table* table, unsigned level, std::uint64_t base, IovaRange range) noexcept;
  static std::uint64_t live_bytes(const Table* table, unsigned level) noexcept;
  void count(const Table* table, unsigned level, PageTableCensus& census) const noexcept;

  template <typename Record>
  void visit_dirty(Table* table, unsigned level, std::uint64_t base, IovaRange range, bool clear,
                   Record& record) noexcept {
    for (std::size_t i = 0; i < 512; ++i) {
      const IovaRange covered{Iova{base + i * bytes_of(level)}, Iova{base + i * bytes_of(level) + bytes_of(level) - 1}};
      if (!covered.overlaps(range)) continue;
      // relaxed: the writer's own view of entries that only it and dirty marks change.
      const std::uint64_t entry = table->entries[i].load(std::memory_order_relaxed);
      if ((entry & present_bits) == 0) continue;
      if (!is_leaf(entry, level)) {
        visit_dirty(table_at(entry), level - 1, covered.start.value, range, clear, record);
      } else if ((entry & dirty_bit) != 0) {
        record(covered);
        // relaxed: the mark carries no data; devices may set it again at once.
        if (clear) table->entries[i].fetch_and(~dirty_bit, std::memory_order_relaxed);
      }
    }
  }

  const unsigned levels_;
  const std::uint64_t page_sizes_;
  struct Retired {
    Table* table;
    unsigned level;
  };
  std::vector<Retired> retired_;  // capacity is kept at or above the number of tables, so that retiring cannot fail
  // The lowest-level table that was last used, and which 2 MiB it is for: neighbours need no walk.
  Table* recent_ = nullptr;
  std::uint64_t recent_region_ = no_region;
  std::vector<Table*> spare_;  // zeroed, for the next new_table()
  std::size_t tables_ = 0;
  std::unique_ptr<Table> root_;  // last: making it uses the members above
};

}  // namespace iovane::backends::model
