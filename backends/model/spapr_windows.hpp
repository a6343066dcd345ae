// TCE tables: windows of bus addresses, one entry per page, exchanged atomically as the kernel does.
//
// Roles. Maps and unmaps of one container run side by side and race as they do in the kernel; windows come and go under
//   the container's mutex, exclusively. Devices walk at any time.
// Entry: the process address of the page with the access in its low bits; 0 is "not there".
// Edges. R.tce: an exchange is acq_rel, so that a walker's acquire (A.tce) sees what the mapper did to the memory
//   before. R.window / A.window: a table's pointer, likewise; a table is freed only after Domain::invalidate(), which
//   waits for walkers that began before.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>

#include "backends/model/page_table.hpp"
#include "iovane/types.hpp"

namespace iovane::backends::model {

class TceTable {
 public:
  /// Null without memory.
  static std::unique_ptr<TceTable> make(IovaRange range, unsigned page_shift, std::uint32_t levels) noexcept;
  TceTable(const TceTable&) = delete;
  TceTable& operator=(const TceTable&) = delete;
  ~TceTable();

  IovaRange range() const noexcept { return range_; }
  unsigned page_shift() const noexcept { return page_shift_; }
  std::uint64_t page() const noexcept { return std::uint64_t{1} << page_shift_; }
  std::uint64_t count() const noexcept { return count_; }
  std::uint32_t levels() const noexcept { return levels_; }
  /// What the kernel charges for it: the hardware's entries and its own list of process addresses.
  std::uint64_t charged_bytes() const noexcept { return 2 * count_ * 8; }

  /// The old entry.
  std::uint64_t exchange(std::uint64_t index, std::uint64_t entry) noexcept {
    return entries_[index].exchange(entry, std::memory_order_acq_rel);  // R.tce - pairs with A.tce in at()
  }
  std::uint64_t at(std::uint64_t index) const noexcept {
    return entries_[index].load(std::memory_order_acquire);  // A.tce - pairs with R.tce in exchange()
  }
  Translation walk(Iova address) const noexcept;

 private:
  TceTable(IovaRange range, unsigned page_shift, std::uint32_t levels, std::atomic<std::uint64_t>* entries) noexcept;
  IovaRange range_;
  unsigned page_shift_;
  std::uint32_t levels_;
  std::uint64_t count_;
  std::atomic<std::uint64_t>* entries_;
};

class TceWindows {
 public:
  static constexpr std::size_t windows_max = 2;

  Translation walk(Iova address) const noexcept;
  /// The table whose window has `address`, or nullptr.
  TceTable* find(std::uint64_t address) const noexcept;
  TceTable* at(std::size_t slot) const noexcept {
    return slots_[slot].load(std::memory_order_acquire);  // A.window - pairs with R.window in set()
  }
  void set(std::size_t slot, TceTable* table) noexcept {
    slots_[slot].store(table, std::memory_order_release);  // R.window - pairs with A.window in at()
  }
  /// Frozen: devices reach nothing.
  void freeze(bool frozen) noexcept {
    frozen_.store(frozen, std::memory_order_relaxed);  // relaxed: invalidate() follows and orders it
  }

 private:
  std::array<std::atomic<TceTable*>, windows_max> slots_{};
  std::atomic<bool> frozen_{false};
};

}  // namespace iovane::backends::model
