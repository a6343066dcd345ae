// EngineTarget's part in live migration: what devices wrote, in terms of guest memory.
//
// The engine tells written pages by their IOVA. Which guest memory an IOVA meant is known in two places: the engine's
// log of mappings that are gone names it, and so does its index for those that live. The log is emptied first: an IOVA
// that the guest uses again must not lend its old marks to its new memory. After that nothing changes under us, since
// no batch of ours is in flight.
#include <algorithm>
#include <array>
#include <vector>

#include "viommu/engine_target.hpp"

namespace iovane::viommu {
namespace {

constexpr std::size_t runs_at_once = 64;
// Pages of one read: 4 KiB of bitmap.
constexpr std::uint64_t pages_at_once = 1U << 15;

bool has_bit(const std::vector<std::uint64_t>& bitmap, std::uint64_t n) noexcept {
  return (bitmap[n / 64] >> (n % 64) & 1U) != 0;
}

}  // namespace

Result<void> EngineTarget::track_dirty(bool on) {
  return on ? space_.start_dirty_tracking() : space_.stop_dirty_tracking();
}

// Where guest memory is that a mapping led to; none when the VMM took that region away since.
std::optional<DirtyMemory> EngineTarget::guest_memory_of(const MemoryPiece& piece) const noexcept {
  for (const Place& place : places_) {
    if (piece.memory != place.memory.id()) continue;  // none where regions are not registered
    if (piece.offset < place.base || piece.offset - place.base >= place.length.value) continue;
    return DirtyMemory{place.region, piece.offset - place.base, piece.length};
  }
  return std::nullopt;
}

void EngineTarget::take_dirty_of_gone(const VisitDirty& visit) const {
  std::array<DirtyRun, runs_at_once> runs;
  for (std::size_t got = runs.size(); got == runs.size();) {
    got = space_.take_unmapped_dirty(runs);
    for (std::size_t i = 0; i < got; ++i) {
      if (runs[i].memory.length.value == 0) {  // nobody knows any more what it led to
        for (const Place& place : places_) visit({place.region, 0, place.length});
      } else if (const auto memory = guest_memory_of(runs[i].memory); memory) {
        visit(*memory);
      }
    }
  }
}

// One mapping, or a part of it that fits a read.
Result<void> EngineTarget::take_dirty_of_live(const MappingInfo& mapping, std::vector<std::uint64_t>& bitmap,
                                              const VisitDirty& visit) const {
  const auto memory = guest_memory_of({mapping.memory.memory, mapping.memory.offset, mapping.range.length()});
  const Bytes page = granule();
  Result<void> outcome;
  for (std::uint64_t done = 0;; done += pages_at_once * page.value) {
    const std::uint64_t left = mapping.range.span() - done;  // bytes to go, less one
    const std::uint64_t pages = std::min(pages_at_once, left / page.value + 1);
    const Iova start{mapping.range.start.value + done};
    std::fill(bitmap.begin(), bitmap.end(), 0U);
    // On an error the bitmap is complete all the same: what could not be read counts as written.
    const auto read = space_.read_dirty({start, Iova{start.value + (pages * page.value - 1)}}, page, bitmap);
    if (!read && outcome) outcome = read.error();
    for (std::uint64_t i = 0; memory && i < pages;) {
      if (!has_bit(bitmap, i)) {
        ++i;
        continue;
      }
      const std::uint64_t first = i;
      while (i < pages && has_bit(bitmap, i)) ++i;
      visit({memory->region, memory->offset + done + first * page.value, Bytes{(i - first) * page.value}});
    }
    if (left < pages_at_once * page.value) return outcome;
  }
}

Result<void> EngineTarget::take_dirty(const VisitDirty& visit) {
  if (in_batch_ != 0)
    return make_error(Errc::busy, Stage::query,
                      "a batch is in flight; poll() until it is done, then read what is dirty");
  if (!space_.dirty_stats().tracking) return make_error(Errc::invalid_argument, Stage::query, "dirty tracking is off");
  take_dirty_of_gone(visit);
  std::vector<MappingInfo> live;
  space_.for_each(IovaRange::everything(), [&](const MappingInfo& mapping) {
    live.push_back(mapping);
    return true;
  });
  std::vector<std::uint64_t> bitmap(pages_at_once / 64);
  Result<void> outcome;
  for (const MappingInfo& mapping : live)
    if (auto taken = take_dirty_of_live(mapping, bitmap, visit); !taken && outcome) outcome = taken;
  return outcome;
}

}  // namespace iovane::viommu
