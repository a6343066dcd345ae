#include "backends/model/page_table.hpp"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <new>

#include "base/checked_math.hpp"
#include "base/fault_point.hpp"

namespace iovane::backends::model {
namespace {
constexpr std::size_t spare_tables_max = 16;
}

PageTable::PageTable(unsigned levels, std::uint64_t page_sizes) noexcept
    : levels_{levels}, page_sizes_{page_sizes}, root_{new_table()} {}

PageTable::~PageTable() {
  reclaim();
  if (root_) {
    for (const Entry& entry : root_->entries) {
      // relaxed: no walker is left.
      const std::uint64_t value = entry.load(std::memory_order_relaxed);
      if ((value & present_bits) != 0 && !is_leaf(value, levels_ - 1)) free_subtree(table_at(value), levels_ - 2);
    }
  }
  for (Table* table : spare_) delete table;
}

IovaRange PageTable::aperture() const noexcept { return {Iova{0}, Iova{(std::uint64_t{1} << shift_of(levels_)) - 1}}; }

PageTable::Table* PageTable::table_at(std::uint64_t entry) noexcept {
  return std::bit_cast<Table*>(entry & address_bits);
}
std::byte* PageTable::memory_at(std::uint64_t entry) noexcept {
  return std::bit_cast<std::byte*>(entry & address_bits);
}
std::uint64_t PageTable::entry_for(const Table* table) noexcept {
  return std::bit_cast<std::uint64_t>(table) | readable_bit | writable_bit;
}
std::uint64_t PageTable::entry_for(const std::byte* memory, Access access, unsigned level) noexcept {
  return std::bit_cast<std::uint64_t>(memory) | (may_read(access) ? readable_bit : 0) |
         (may_write(access) ? writable_bit : 0) | (level > 0 ? leaf_bit : 0);
}

PageTable::Table* PageTable::new_table() noexcept {
  // A domain without a root would refuse every map for good, which no kernel's does: the root is not made to fail.
  if (tables_ != 0 && base::fault_now(base::FaultKind::allocation)) return nullptr;
  if (retired_.capacity() < tables_ + 1) {
    try {
      retired_.reserve(2 * (tables_ + 1));
      spare_.reserve(spare_tables_max);
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
  }
  Table* table = nullptr;
  if (!spare_.empty()) {
    table = spare_.back();
    spare_.pop_back();
  } else {
    table = new (std::nothrow) Table;
  }
  if (table != nullptr) ++tables_;
  return table;
}

void PageTable::free_table(Table* table) noexcept {
  --tables_;
  if (spare_.size() == spare_tables_max) {
    delete table;
    return;
  }
  // relaxed: nobody walks a table that was reclaimed; the store that hooks it in again is a release.
  for (Entry& entry : table->entries) entry.store(0, std::memory_order_relaxed);
  spare_.push_back(table);
}

void PageTable::free_subtree(Table* table, unsigned level) noexcept {
  if (level > 0) {
    for (const Entry& entry : table->entries) {
      // relaxed: the subtree is unhooked and nobody is inside.
      const std::uint64_t value = entry.load(std::memory_order_relaxed);
      if ((value & present_bits) != 0 && !is_leaf(value, level)) free_subtree(table_at(value), level - 1);
    }
  }
  free_table(table);
}

void PageTable::retire(Table* table, unsigned level) noexcept {
  recent_region_ = no_region;
  retired_.push_back({table, level});
}

void PageTable::reclaim() noexcept {
  for (const Retired& r : retired_) free_subtree(r.table, r.level);
  retired_.clear();
}

// The table of `level` that holds the entry for `address`, made if need be; nullptr without memory or when a larger
// leaf is in the way (errno-like distinction is the caller's: it looks at what is there).
PageTable::Table* PageTable::descend(std::uint64_t address, unsigned level) noexcept {
  if (level == 0 && region_of(address) == recent_region_) return recent_;
  Table* table = root_.get();
  for (unsigned l = levels_ - 1; l > level; --l) {
    Entry& entry = table->entries[index_of(address, l)];
    // relaxed: only this writer changes pointers.
    const std::uint64_t value = entry.load(std::memory_order_relaxed);
    if ((value & present_bits) == 0) {
      Table* next = new_table();
      if (next == nullptr) return nullptr;
      // R.entry - pairs with A.entry in walk(): the new table's zeroes are visible through its pointer.
      entry.store(entry_for(next), std::memory_order_release);
      table = next;
    } else if (is_leaf(value, l)) {
      return nullptr;
    } else {
      table = table_at(value);
    }
  }
  if (level == 0) {
    recent_ = table;
    recent_region_ = region_of(address);
  }
  return table;
}

unsigned PageTable::level_for(std::uint64_t address, std::uint64_t memory, std::uint64_t remaining) const noexcept {
  if (remaining < bytes_of(1)) return 0;
  for (unsigned level = std::min(levels_ - 1, 2U); level > 0; --level) {
    if ((page_sizes_ & bytes_of(level)) != 0 && remaining >= bytes_of(level) &&
        base::is_aligned(address | memory, bytes_of(level))) {
      return level;
    }
  }
  return 0;
}

int PageTable::map(IovaRange range, std::byte* memory, Access access, bool large_leaves) noexcept {
  const std::uint64_t first_memory = std::bit_cast<std::uint64_t>(memory);
  if (!range.well_formed() || !aperture().contains(range) || access == Access::none ||
      !base::is_aligned(range.start.value | (range.last.value + 1) | first_memory, os_page_bytes)) {
    return -EINVAL;
  }
  if (!root_) return -ENOMEM;
  std::uint64_t address = range.start.value;
  std::uint64_t target = first_memory;
  std::uint64_t remaining = range.span() + 1;
  int failure = 0;
  while (remaining > 0 && failure == 0) {
    const unsigned level = large_leaves ? level_for(address, target, remaining) : 0;
    const std::uint64_t leaf = bytes_of(level);
    Table* table = descend(address, level);
    if (table == nullptr) {
      failure = walk(Iova{address}).memory != nullptr ? -EEXIST : -ENOMEM;
      break;
    }
    // Entries of one table at a time; a larger leaf can become possible only where the next table begins.
    for (std::size_t i = index_of(address, level); i < 512 && remaining >= leaf; ++i) {
      Entry& entry = table->entries[i];
      // relaxed: only this writer hooks entries in.
      const std::uint64_t old = entry.load(std::memory_order_relaxed);
      if ((old & present_bits) != 0) {
        if (is_leaf(old, level) || live_bytes(table_at(old), level - 1) != 0) {
          failure = -EEXIST;
          break;
        }
        retire(table_at(old), level - 1);  // an empty table, left behind by smaller leaves
      }
      // R.entry - pairs with A.entry in walk(): what the mapper did to the memory before is visible to the device.
      entry.store(entry_for(std::bit_cast<std::byte*>(target), access, level), std::memory_order_release);
      address += leaf;
      target += leaf;
      remaining -= leaf;
    }
  }
  if (failure != 0 && address != range.start.value)
    clear(root_.get(), levels_ - 1, 0, {range.start, Iova{address - 1}});
  return failure;
}

// Makes sure that no leaf spans `boundary` (the first address of its right part).
bool PageTable::cut(std::uint64_t boundary) noexcept {
  Table* table = root_.get();
  for (unsigned level = levels_ - 1; level > 0; --level) {
    Entry& entry = table->entries[index_of(boundary, level)];
    // relaxed: only this writer changes pointers and leaves; dirty marks are handled by the exchange below.
    std::uint64_t value = entry.load(std::memory_order_relaxed);
    if ((value & present_bits) == 0) return true;
    if (is_leaf(value, level)) {
      if (base::is_aligned(boundary, bytes_of(level))) return true;
      Table* smaller = new_table();
      if (smaller == nullptr) return false;
      std::uint64_t built = 0;
      do {  // again only when a device wrote and marked the large leaf meanwhile: at most once
        built = value;
        const std::uint64_t rest = (built & ~(address_bits | leaf_bit)) | (level > 1 ? leaf_bit : 0);
        for (std::size_t i = 0; i < 512; ++i) {
          // relaxed: published by the exchange.
          smaller->entries[i].store(((built & address_bits) + i * bytes_of(level - 1)) | rest,
                                    std::memory_order_relaxed);
        }
        // R.entry - pairs with A.entry in walk(); relaxed on failure: the value only says what to build.
      } while (!entry.compare_exchange_strong(value, entry_for(smaller), std::memory_order_release,
                                              std::memory_order_relaxed));
      table = smaller;
    } else {
      table = table_at(value);
    }
  }
  return true;
}

std::uint64_t PageTable::live_bytes(const Table* table, unsigned level) noexcept {
  std::uint64_t bytes = 0;
  for (const Entry& entry : table->entries) {
    // relaxed: the writer's own entries.
    const std::uint64_t value = entry.load(std::memory_order_relaxed);
    if ((value & present_bits) == 0) continue;
    bytes += is_leaf(value, level) ? bytes_of(level) : live_bytes(table_at(value), level - 1);
  }
  return bytes;
}

// Clears what lies in `range` below `table`, whose first address is `base`. Leaves do not cross the range's borders.
std::uint64_t PageTable::clear(Table* table, unsigned level, std::uint64_t base, IovaRange range) noexcept {
  const std::uint64_t unit = bytes_of(level);
  const std::uint64_t table_last = base + (unit * 512 - 1);
  const std::size_t begin = range.start.value > base ? index_of(range.start.value, level) : 0;
  const std::size_t last = range.last.value < table_last ? index_of(range.last.value, level) : 511;
  std::uint64_t bytes = 0;
  for (std::size_t i = begin; i <= last; ++i) {
    Entry& entry = table->entries[i];
    // relaxed: only this writer changes pointers and leaves.
    const std::uint64_t value = entry.load(std::memory_order_relaxed);
    if ((value & present_bits) == 0) continue;
    const IovaRange covered{Iova{base + i * unit}, Iova{base + i * unit + (unit - 1)}};
    if (is_leaf(value, level)) {
      // R.entry - pairs with A.entry in walk(), for uniformity: "not present" publishes nothing.
      entry.store(0, std::memory_order_release);
      bytes += unit;
    } else if (range.contains(covered)) {
      bytes += live_bytes(table_at(value), level - 1);
      entry.store(0, std::memory_order_release);  // R.entry - as above
      retire(table_at(value), level - 1);
    } else {
      bytes += clear(table_at(value), level - 1, covered.start.value, range);
    }
  }
  return bytes;
}

std::int64_t PageTable::unmap(IovaRange range) noexcept {
  const auto inside = range.intersection(aperture());
  if (!inside || !root_) return 0;
  if (region_of(inside->start.value) == recent_region_ && region_of(inside->last.value) == recent_region_) {
    // All of it in one table of small leaves: nothing to cut. Unless it is the whole table, which then goes as well.
    if (inside->span() + 1 < bytes_of(1)) {
      return static_cast<std::int64_t>(clear(recent_, 0, recent_region_ << shift_of(1), *inside));
    }
  }
  if (!cut(inside->start.value)) return -ENOMEM;
  if (inside->last < aperture().last && !cut(inside->last.value + 1)) return -ENOMEM;
  return static_cast<std::int64_t>(clear(root_.get(), levels_ - 1, 0, *inside));
}

Translation PageTable::walk(Iova address) const noexcept {
  if (!root_ || !aperture().contains(address)) return {};
  Table* table = root_.get();
  for (unsigned level = levels_ - 1;; --level) {
    Entry& entry = table->entries[index_of(address.value, level)];
    // A.entry - pairs with R.entry in map(), cut() and descend().
    const std::uint64_t value = entry.load(std::memory_order_acquire);
    if ((value & present_bits) == 0) return {};
    if (!is_leaf(value, level)) {
      table = table_at(value);
      continue;
    }
    const std::uint64_t offset = address.value & (bytes_of(level) - 1);
    return {.memory = memory_at(value) + offset,
            .run_bytes = bytes_of(level) - offset,
            .leaf_bytes = bytes_of(level),
            .access = static_cast<Access>(value & present_bits),
            .entry = &entry,
            .entry_value = value};
  }
}

bool PageTable::mark_dirty(const Translation& translation) noexcept {
  std::uint64_t value = translation.entry_value;
  if ((value & dirty_bit) != 0) return true;
  // relaxed: the mark carries no data. A cleared entry must stay 0, hence the comparison.
  return translation.entry->compare_exchange_strong(value, value | dirty_bit, std::memory_order_relaxed,
                                                    std::memory_order_relaxed) ||
         value == (translation.entry_value | dirty_bit);
}

void PageTable::count(const Table* table, unsigned level, PageTableCensus& census) const noexcept {
  ++census.tables;
  for (const Entry& entry : table->entries) {
    // relaxed: the writer's own entries.
    const std::uint64_t value = entry.load(std::memory_order_relaxed);
    if ((value & present_bits) == 0) continue;
    if (is_leaf(value, level)) {
      ++census.leaves[level];
      census.bytes += bytes_of(level);
    } else {
      count(table_at(value), level - 1, census);
    }
  }
}

PageTableCensus PageTable::census() const noexcept {
  PageTableCensus census;
  if (root_) count(root_.get(), levels_ - 1, census);
  return census;
}

}  // namespace iovane::backends::model
