// An ordered index of disjoint closed ranges, each with a pointer: the areas of an I/O address space.
//
// Runs of up to 32 entries and an ordered directory of the runs. A lookup is two binary searches in arrays. Entries
// stay where they were put; a byte per entry gives their order, so that an insertion moves at most 32 bytes, and a run
// that is full is split (the directory then moves by one). Against a
// balanced tree that is one allocation per 32 entries instead of one each, and no pointer to chase per level.
// One thread at a time; the address space's mutex sees to that.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "iovane/types.hpp"

namespace iovane::backends::model {

template <typename T>
class IntervalIndex {
 public:
  /// Where an entry is. Valid until the next insert or erase.
  struct Position {
    std::size_t run = 0;
    std::uint32_t slot = 0;
  };

  std::size_t size() const noexcept { return size_; }
  bool empty() const noexcept { return size_ == 0; }

  bool valid(Position p) const noexcept { return p.run < runs_.size() && size_ > 0; }
  IovaRange range(Position p) const noexcept {
    const Run& run = *runs_[p.run];
    const std::uint8_t at = run.order[p.slot];
    return {Iova{run.start[at]}, Iova{run.last[at]}};
  }
  T* item(Position p) const noexcept { return runs_[p.run]->item[runs_[p.run]->order[p.slot]]; }
  Position next(Position p) const noexcept {
    if (++p.slot == runs_[p.run]->count) return {p.run + 1, 0};
    return p;
  }
  Position first() const noexcept { return {}; }

  /// The first entry that ends at or after `address`: the only one that can contain it.
  Position at_or_after(Iova address) const noexcept {
    if (runs_.empty()) return {};
    const std::size_t r = run_for(address.value);
    const Run& run = *runs_[r];
    const std::uint32_t after = upper(run, address.value);
    if (after > 0 && run.last[run.order[after - 1]] >= address.value) return {r, after - 1};
    if (after == run.count) return {r + 1, 0};
    return {r, after};
  }
  /// The first entry that overlaps `wanted`, or nullptr.
  T* overlapping(IovaRange wanted) const noexcept {
    const Position p = at_or_after(wanted.start);
    return valid(p) && range(p).start <= wanted.last ? item(p) : nullptr;
  }
  /// The entry that contains `address`, or nullptr.
  T* containing(Iova address) const noexcept { return overlapping({address, address}); }

  /// Precondition: nothing overlaps `range`. False when memory for it is missing; then nothing changed.
  bool insert(IovaRange range, T* item) noexcept { return insert_before(at_or_after(range.start), range, item); }
  /// The same with `next` = at_or_after(range.start), for callers that looked there already.
  bool insert_before(Position next, IovaRange range, T* item) noexcept {
    if (runs_.empty() && !add_run(0)) return false;
    // At the border of two runs, behind the left one: its directory entry stays as it is.
    if (next.slot == 0 && next.run > 0) next = {next.run - 1, runs_[next.run - 1]->count};
    if (runs_[next.run]->count == run_entries) {
      if (!split(next.run, range.start.value)) return false;
      const std::uint32_t left = runs_[next.run]->count;
      if (next.slot > left) next = {next.run + 1, next.slot - left};
    }
    Run& run = *runs_[next.run];
    const auto at = static_cast<std::uint8_t>(std::countr_one(run.used));
    std::memmove(&run.order[next.slot] + 1, &run.order[next.slot], run.count - next.slot);
    run.order[next.slot] = at;
    run.used |= 1U << at;
    run.start[at] = range.start.value;
    run.last[at] = range.last.value;
    run.item[at] = item;
    ++run.count;
    ++size_;
    if (next.slot == 0) starts_[next.run] = range.start.value;
    return true;
  }

  void erase(Position p) noexcept {
    Run& run = *runs_[p.run];
    run.used &= ~(1U << run.order[p.slot]);
    --run.count;
    std::memmove(&run.order[p.slot], &run.order[p.slot] + 1, run.count - p.slot);
    --size_;
    if (run.count == 0) {
      // The last run stays, so that a lone entry coming and going costs nothing.
      if (runs_.size() > 1) remove_run(p.run);
      return;
    }
    if (p.slot == 0) starts_[p.run] = run.start[run.order[0]];
    // Two thin neighbours become one, so that memory follows what is live.
    if (run.count <= run_entries / 4 && !join(p.run) && p.run > 0) static_cast<void>(join(p.run - 1));
  }
  void erase(Iova start) noexcept { erase(at_or_after(start)); }

  /// Heap bytes it holds.
  std::size_t memory_bytes() const noexcept {
    return (runs_.size() + (spare_ ? 1 : 0)) * sizeof(Run) + runs_.capacity() * sizeof(void*) +
           starts_.capacity() * sizeof(std::uint64_t);
  }

 private:
  static constexpr std::uint32_t run_entries = 32;
  struct Run {
    std::uint32_t count = 0;
    std::uint32_t used = 0;                           // bit n: entry n is taken
    std::array<std::uint8_t, run_entries + 1> order;  // of the entries; one more for the moves
    std::array<std::uint64_t, run_entries> start;
    std::array<std::uint64_t, run_entries> last;
    std::array<T*, run_entries> item;
  };

  // The last run that starts at or before `address`; the first one when all start behind it.
  std::size_t run_for(std::uint64_t address) const noexcept {
    const auto after = std::upper_bound(starts_.begin() + 1, starts_.end(), address);
    return static_cast<std::size_t>(after - starts_.begin()) - 1;
  }
  // How many entries start at or before `address`: a binary search whose steps are conditional moves.
  static std::uint32_t upper(const Run& run, std::uint64_t address) noexcept {
    std::uint32_t base = 0;
    std::uint32_t count = run.count;
    while (count > 1) {
      const std::uint32_t half = count / 2;
      base = run.start[run.order[base + half - 1]] <= address ? base + half : base;
      count -= half;
    }
    return base + (count == 1 && run.start[run.order[base]] <= address ? 1U : 0U);
  }
  // Copies entries [from, from + count) of one run, in order, behind those of another, which has room.
  static void append(Run& to, const Run& from_run, std::uint32_t from, std::uint32_t count) noexcept {
    for (std::uint32_t i = 0; i < count; ++i) {
      const std::uint8_t old = from_run.order[from + i];
      const auto at = static_cast<std::uint8_t>(std::countr_one(to.used));
      to.used |= 1U << at;
      to.order[to.count++] = at;
      to.start[at] = from_run.start[old];
      to.last[at] = from_run.last[old];
      to.item[at] = from_run.item[old];
    }
  }
  bool add_run(std::size_t at) noexcept {
    std::unique_ptr<Run> run = spare_ ? std::move(spare_) : std::unique_ptr<Run>{new (std::nothrow) Run};
    if (!run) return false;
    run->count = 0;
    run->used = 0;
    try {
      runs_.reserve(runs_.size() + 1 > runs_.capacity() ? runs_.size() * 2 + 4 : 0);
      starts_.reserve(starts_.size() + 1 > starts_.capacity() ? starts_.size() * 2 + 4 : 0);
    } catch (const std::bad_alloc&) {
      return false;
    }
    runs_.insert(runs_.begin() + static_cast<std::ptrdiff_t>(at), std::move(run));
    starts_.insert(starts_.begin() + static_cast<std::ptrdiff_t>(at), 0);
    return true;
  }
  void remove_run(std::size_t at) noexcept {
    spare_ = std::move(runs_[at]);
    runs_.erase(runs_.begin() + static_cast<std::ptrdiff_t>(at));
    starts_.erase(starts_.begin() + static_cast<std::ptrdiff_t>(at));
  }
  // Moves the next run into run `r` when the two fill half of one at most: it will not have to split again soon.
  bool join(std::size_t r) noexcept {
    if (r + 1 == runs_.size() || runs_[r]->count + runs_[r + 1]->count > run_entries / 2) return false;
    append(*runs_[r], *runs_[r + 1], 0, runs_[r + 1]->count);
    remove_run(r + 1);
    return true;
  }
  bool split(std::size_t r, std::uint64_t address) noexcept {
    if (!add_run(r + 1)) return false;
    Run& left = *runs_[r];
    Run& right = *runs_[r + 1];
    // Appending behind everything is the common growth: the full run then stays full.
    const bool growing = r + 2 == runs_.size() && address > left.start[left.order[run_entries - 1]];
    const std::uint32_t keep = growing ? run_entries - 1 : run_entries / 2;
    append(right, left, keep, run_entries - keep);
    while (left.count > keep) left.used &= ~(1U << left.order[--left.count]);
    starts_[r + 1] = right.start[right.order[0]];
    return true;
  }

  std::vector<std::unique_ptr<Run>> runs_;
  std::vector<std::uint64_t> starts_;  // of each run's first entry
  std::unique_ptr<Run> spare_;         // the run that emptied last
  std::size_t size_ = 0;
};

}  // namespace iovane::backends::model
