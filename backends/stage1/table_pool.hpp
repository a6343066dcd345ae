// Pages for first-stage tables: memory of this process that the device's IOMMU reaches at a fixed distance.
//
// Purpose. A table is named by its intermediate address in entries and by its process address in our code. One range of
//   process addresses and one of intermediate addresses, both of the pool's whole size, are reserved at the start, so
//   each follows from the other by an addition; chunks of it are made real (backed, pinned, mapped into the nesting
//   parent) as they are needed.
// Roles. take() and give() from any thread. grow() too: each caller makes a chunk of its own.
// Progress. take() and give() are lock-free while pages are there; growing is a system call, and a thread that is
//   stopped in it keeps only its own chunk.
// State word `free_`: index of the first free page + 1 (0: none) in the low half, a tag that every change increments in
//   the high half. A free page's successor is in its PageState, which is never unmapped: type-stable.
// Linearization: the compare-exchange of `free_`.
// Edges: R.free / A.free order what the giver did with the page (it is all zeroes) before the taker's use.
// ABA: the tag; it wraps after 2^32 changes during one thread's load-to-exchange window.
// Pages come out zeroed: fresh ones from the system, used ones because only empty tables are given back.
// Proven by tests/unit/stage1_table_test.cpp, tests/stress/stage1_stress_test.cpp.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "backends/stage1/table_format.hpp"
#include "base/cacheline.hpp"
#include "iovane/result.hpp"

namespace iovane::backends::stage1 {

/// Makes memory of this process reachable for the walker.
class TableMemory {
 public:
  virtual ~TableMemory() = default;
  /// Maps `bytes` at `memory` to the intermediate `address`, for reading. 0 or a positive errno. Any thread.
  virtual int pin(std::uint64_t address, std::byte* memory, std::uint64_t bytes) noexcept = 0;
};

struct alignas(page_bytes) Table {
  std::array<std::atomic<std::uint64_t>, entries_per_table> entries{};
};
static_assert(sizeof(Table) == page_bytes);

/// What is known about a page beside its contents. Apart from each other: threads that work on neighbouring tables do
/// not meet.
struct alignas(base::cacheline_bytes) PageState {
  /// Of a level-0 table in use: its valid entries, and one for each session inside. 1 while it is free: the share of
  /// whoever takes it next (so that a session which arrives late, finds itself in the wrong table and goes again does
  /// no harm at any time). `dead`: not to be entered; so are tables above level 0, always.
  std::atomic<std::uint32_t> users{0};
  std::atomic<std::uint32_t> next_free{0};
  /// How often the page was given back: tells two lives of it apart in entries that lead nowhere.
  std::atomic<std::uint32_t> generation{0};
  static constexpr std::uint32_t dead = 1U << 31;
  /// With `dead`: its collector is done with it, and the last helper gives it back.
  static constexpr std::uint32_t released = 1U << 30;
};

class TablePool {
 public:
  /// Pages are made real in chunks of this many.
  static constexpr std::uint32_t chunk_pages = 64;

  TablePool() noexcept = default;
  ~TablePool();
  TablePool(const TablePool&) = delete;
  TablePool& operator=(const TablePool&) = delete;

  /// Reserves address space for `pages_max` pages at the intermediate `address`, and makes the first chunk real.
  /// `memory` outlives the pool. Control plane.
  Result<void> open(TableMemory& memory, std::uint64_t address, std::uint32_t pages_max);

  /// An empty table; null when none is free and none can be had. May block in a system call to grow.
  Table* take() noexcept;
  /// The free ones only.
  Table* take_free() noexcept;
  /// Back. Precondition: all entries are 0, and no walker can still know the page.
  void give(Table* table) noexcept;

  std::uint64_t address_of(const Table* table) const noexcept {
    return address_ + static_cast<std::uint64_t>(reinterpret_cast<const std::byte*>(table) - base_);
  }
  Table* at(std::uint64_t address) const noexcept { return reinterpret_cast<Table*>(base_ + (address - address_)); }
  PageState& state(const Table* table) const noexcept {
    return states_[static_cast<std::size_t>(table - reinterpret_cast<const Table*>(base_))];
  }

  /// Memory that is pinned for tables.
  Bytes pinned() const noexcept {
    // relaxed: a number for people.
    return {std::uint64_t{pinned_pages_.load(std::memory_order_relaxed)} * page_bytes};
  }
  std::uint32_t taken() const noexcept { return taken_.load(std::memory_order_relaxed); }  // relaxed: a hint
  int last_errno() const noexcept { return last_errno_.load(std::memory_order_relaxed); }  // relaxed: for error texts
  std::uint32_t pages_max() const noexcept { return pages_max_; }

 private:
  void close() noexcept;
  bool grow() noexcept;
  void push(std::uint32_t first, std::uint32_t last) noexcept;

  std::byte* base_ = nullptr;
  PageState* states_ = nullptr;
  std::uint64_t address_ = 0;
  std::uint32_t pages_max_ = 0;
  TableMemory* memory_ = nullptr;
  alignas(base::cacheline_bytes) std::atomic<std::uint64_t> free_{0};
  std::atomic<std::uint32_t> taken_{0};
  std::atomic<std::uint32_t> claimed_pages_{0};
  std::atomic<std::uint32_t> pinned_pages_{0};
  std::atomic<int> last_errno_{0};
};

}  // namespace iovane::backends::stage1
