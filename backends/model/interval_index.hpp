// An ordered index of disjoint closed ranges, each with a pointer: the areas of an I/O address space.
//
// Sorted runs of up to 64 entries and an ordered directory of the runs. A lookup is two binary searches in arrays; an
// insertion moves at most 64 entries, and a run that is full is split (the directory then moves by one). Against a
// balanced tree that is one allocation per 64 entries instead of one each, and no pointer to chase per level.
// One thread at a time; the address space's mutex sees to that.
#pragma once

#include <algorithm>
#include <array>
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

  bool valid(Position p) const noexcept { return p.run < runs_.size(); }
  IovaRange range(Position p) const noexcept {
    const Run& run = *runs_[p.run];
    return {Iova{run.start[p.slot]}, Iova{run.last[p.slot]}};
  }
  T* item(Position p) const noexcept { return runs_[p.run]->item[p.slot]; }
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
    if (after > 0 && run.last[after - 1] >= address.value) return {r, after - 1};
    if (after == run.count) return {r + 1, 0};
    return {r, after};
  }
  /// The first entry that overlaps `wanted`, or nullptr.
  T* overlapping(IovaRange wanted) const noexcept {
    const Position p = at_or_after(wanted.start);
    return valid(p) && runs_[p.run]->start[p.slot] <= wanted.last.value ? item(p) : nullptr;
  }
  /// The entry that contains `address`, or nullptr.
  T* containing(Iova address) const noexcept { return overlapping({address, address}); }

  /// Precondition: nothing overlaps `range`. False when memory for it is missing; then nothing changed.
  bool insert(IovaRange range, T* item) noexcept {
    if (runs_.empty() && !add_run(0)) return false;
    std::size_t r = run_for(range.start.value);
    if (runs_[r]->count == run_entries) {
      if (!split(r, range.start.value)) return false;
      r = run_for(range.start.value);
    }
    Run& run = *runs_[r];
    const std::uint32_t slot = upper(run, range.start.value);
    shift(run, slot, slot + 1, run.count - slot);
    run.start[slot] = range.start.value;
    run.last[slot] = range.last.value;
    run.item[slot] = item;
    ++run.count;
    ++size_;
    if (slot == 0) starts_[r] = range.start.value;
    return true;
  }

  void erase(Position p) noexcept {
    Run& run = *runs_[p.run];
    shift(run, p.slot + 1, p.slot, run.count - p.slot - 1);
    --run.count;
    --size_;
    if (run.count == 0) {
      remove_run(p.run);
      return;
    }
    if (p.slot == 0) starts_[p.run] = run.start[0];
    // Two thin neighbours become one, so that memory follows what is live.
    if (!join(p.run) && p.run > 0) static_cast<void>(join(p.run - 1));
  }
  void erase(Iova start) noexcept { erase(at_or_after(start)); }

  /// Heap bytes it holds.
  std::size_t memory_bytes() const noexcept {
    return (runs_.size() + (spare_ ? 1 : 0)) * sizeof(Run) + runs_.capacity() * sizeof(void*) +
           starts_.capacity() * sizeof(std::uint64_t);
  }

 private:
  static constexpr std::uint32_t run_entries = 64;
  struct Run {
    std::uint32_t count = 0;
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
      base = run.start[base + half - 1] <= address ? base + half : base;
      count -= half;
    }
    return base + (count == 1 && run.start[base] <= address ? 1U : 0U);
  }
  static void shift(Run& run, std::uint32_t from, std::uint32_t to, std::uint32_t count) noexcept {
    if (count == 0) return;
    std::memmove(&run.start[to], &run.start[from], count * sizeof(run.start[0]));
    std::memmove(&run.last[to], &run.last[from], count * sizeof(run.last[0]));
    std::memmove(&run.item[to], &run.item[from], count * sizeof(run.item[0]));
  }
  bool add_run(std::size_t at) noexcept {
    std::unique_ptr<Run> run = spare_ ? std::move(spare_) : std::unique_ptr<Run>{new (std::nothrow) Run};
    if (!run) return false;
    run->count = 0;
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
    Run& run = *runs_[r];
    const Run& other = *runs_[r + 1];
    std::copy_n(other.start.begin(), other.count, run.start.begin() + run.count);
    std::copy_n(other.last.begin(), other.count, run.last.begin() + run.count);
    std::copy_n(other.item.begin(), other.count, run.item.begin() + run.count);
    run.count += other.count;
    remove_run(r + 1);
    return true;
  }
  bool split(std::size_t r, std::uint64_t address) noexcept {
    if (!add_run(r + 1)) return false;
    Run& left = *runs_[r];
    Run& right = *runs_[r + 1];
    // Appending behind everything is the common growth: the full run then stays full.
    const bool append = r + 2 == runs_.size() && address > left.start[run_entries - 1];
    const std::uint32_t keep = append ? run_entries - 1 : run_entries / 2;
    right.count = run_entries - keep;
    std::copy_n(left.start.begin() + keep, right.count, right.start.begin());
    std::copy_n(left.last.begin() + keep, right.count, right.last.begin());
    std::copy_n(left.item.begin() + keep, right.count, right.item.begin());
    left.count = keep;
    starts_[r + 1] = right.start[0];
    return true;
  }

  std::vector<std::unique_ptr<Run>> runs_;
  std::vector<std::uint64_t> starts_;  // of each run's first entry
  std::unique_ptr<Run> spare_;         // the last run that emptied, so that a lone entry coming and going is free
  std::size_t size_ = 0;
};

}  // namespace iovane::backends::model
