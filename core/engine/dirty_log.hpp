// DirtyLog: the marks of mappings that are gone, until somebody reads them.
//
// Bounded: at most `runs_max` runs. What does not fit, or finds no memory, widens one range in which everything counts
// as written: a page too many is copied once more, a page too few is lost.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "backends/dirty.hpp"
#include "engine/space_state.hpp"
#include "iovane/dirty.hpp"

namespace iovane::engine {

/// Where a reader collects pages: bit n stands for page n of `range`.
struct DirtyBitmap {
  IovaRange range;
  std::uint64_t page_bytes;
  std::span<std::uint64_t> words;
  std::uint64_t fresh = 0;  ///< bits that were not set before

  /// Sets the bits of every page that overlaps `written`.
  void mark(const IovaRange& written) noexcept;
};

/// Used by the lane's holder only.
class DirtyLog final : public backends::DirtyHarvest {
 public:
  DirtyLog(SpaceState& space, std::uint32_t runs_max) noexcept : space_{space}, runs_max_{runs_max} {}

  std::optional<IovaRange> mapped_run(const IovaRange& range) noexcept override;
  void take(const IovaRange& range, std::span<const std::uint64_t> bitmap) noexcept override;
  void take_all(const IovaRange& range) noexcept override;

  /// Moves what overlaps the bitmap's range into it; the rest of a run stays.
  void read(DirtyBitmap& bitmap) noexcept;
  /// Moves runs out, oldest first.
  std::size_t take_runs(std::span<DirtyRun> out) noexcept;
  void clear() noexcept;
  DirtyStats snapshot() const noexcept {
    DirtyStats now = stats;
    now.runs_kept = runs_.size() + (spilled_ ? 1 : 0);
    return now;
  }

  DirtyStats stats;

 private:
  void add(IovaRange range) noexcept;
  void append(const DirtyRun& run) noexcept;
  void spill(const IovaRange& range) noexcept;

  SpaceState& space_;
  const std::uint32_t runs_max_;
  std::vector<DirtyRun> runs_;
  std::optional<IovaRange> spilled_;  // everything in it counts as written
};

/// Calls `visit(first, count)` for every run of set bits among the first `bits`.
template <typename Visit>
void for_each_set_run(std::span<const std::uint64_t> words, std::uint64_t bits, Visit&& visit) noexcept {
  std::uint64_t first = 0;
  bool inside = false;
  for (std::uint64_t bit = 0; bit < bits;) {
    const std::uint64_t word = words[bit / 64];
    // Whole words that continue what is going on are passed at once.
    if (bit % 64 == 0 && bits - bit >= 64 && word == (inside ? ~std::uint64_t{0} : 0)) {
      bit += 64;
      continue;
    }
    const bool set = (word >> (bit % 64) & 1U) != 0;
    if (set != inside) {
      if (inside) visit(first, bit - first);
      first = bit;
      inside = set;
    }
    ++bit;
  }
  if (inside) visit(first, bits - first);
}

}  // namespace iovane::engine
