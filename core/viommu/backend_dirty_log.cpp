#include "viommu/backend_dirty_log.hpp"

#include <algorithm>
#include <new>

namespace iovane::viommu {
namespace {

// What one call of the kernel reads or unmaps: at 4 KiB a bitmap of 32 KiB.
constexpr std::uint64_t run_bytes_max = std::uint64_t{1} << 30;

}  // namespace

void BackendDirtyLog::mapped(const IovaRange& range, RegionId region, std::uint64_t offset) noexcept {
  try {
    live_[range.start.value] = {range.last, region, offset};
  } catch (const std::bad_alloc&) {
    all_ = true;
  }
}

// Where the kernel can cut mappings, parts of the outer ones stay.
void BackendDirtyLog::unmapped(const IovaRange& range) noexcept {
  auto at = live_.upper_bound(range.start.value);
  if (at != live_.begin() && std::prev(at)->second.last >= range.start) --at;
  while (at != live_.end() && at->first <= range.last.value) {
    const std::uint64_t start = at->first;
    const Live was = at->second;
    if (start < range.start.value) {
      at->second.last = Iova{range.start.value - 1};
      ++at;
    } else {
      at = live_.erase(at);
    }
    if (was.last > range.last)
      mapped({Iova{range.last.value + 1}, was.last}, was.region, was.offset + (range.last.value + 1 - start));
  }
}

void BackendDirtyLog::forget(RegionId region) noexcept {
  std::erase_if(live_, [&](const auto& entry) { return entry.second.region == region; });
  std::erase_if(gone_, [&](const DirtyMemory& piece) { return piece.region == region; });
  whole_.erase(region);
}

void BackendDirtyLog::start() noexcept {
  gone_.clear();
  whole_.clear();
}

template <typename Visit>
void BackendDirtyLog::each_memory(const IovaRange& range, Visit visit) const {
  auto at = live_.upper_bound(range.start.value);
  if (at != live_.begin() && std::prev(at)->second.last >= range.start) --at;
  for (; at != live_.end() && at->first <= range.last.value; ++at) {
    const std::uint64_t first = std::max(at->first, range.start.value);
    const std::uint64_t last = std::min(at->second.last.value, range.last.value);
    visit(DirtyMemory{at->second.region, at->second.offset + (first - at->first), Bytes{last - first + 1}});
  }
}

template <typename Visit>
void BackendDirtyLog::each_written(const IovaRange& range, std::span<const std::uint64_t> bitmap, Visit visit) const {
  const std::uint64_t pages = range.span() / granule_.value + 1;
  const auto written = [&](std::uint64_t n) { return (bitmap[n / 64] >> (n % 64) & 1U) != 0; };
  for (std::uint64_t i = 0; i < pages;) {
    if (!written(i)) {
      ++i;
      continue;
    }
    const std::uint64_t first = i;
    while (i < pages && written(i)) ++i;
    visit(IovaRange{Iova{range.start.value + first * granule_.value},
                    Iova{range.start.value + (i * granule_.value - 1)}});
  }
}

void BackendDirtyLog::keep(const IovaRange& written) noexcept {
  try {
    each_memory(written, [&](const DirtyMemory& piece) {
      if (whole_.contains(piece.region)) return;
      if (gone_.size() < pieces_max_) {
        gone_.push_back(piece);
        return;
      }
      whole_.insert(piece.region);
      std::erase_if(gone_, [&](const DirtyMemory& kept) { return kept.region == piece.region; });
    });
  } catch (const std::bad_alloc&) {
    all_ = true;
  }
}

std::optional<IovaRange> BackendDirtyLog::mapped_run(const IovaRange& range) noexcept {
  auto at = live_.lower_bound(range.start.value);
  if (at == live_.end() || at->first > range.last.value) return std::nullopt;
  IovaRange run{Iova{at->first}, at->second.last};
  for (++at; at != live_.end() && at->first <= range.last.value; ++at) {
    if (!run.precedes_directly({Iova{at->first}, at->second.last})) break;
    if (at->second.last.value - run.start.value >= run_bytes_max) break;
    run.last = at->second.last;
  }
  return run;
}

void BackendDirtyLog::take(const IovaRange& range, std::span<const std::uint64_t> bitmap) noexcept {
  each_written(range, bitmap, [&](const IovaRange& written) { keep(written); });
}

Result<void> BackendDirtyLog::take(backends::BackendSpace& space, std::span<const Region> regions,
                                   const VisitDirty& visit) {
  for (const Region& region : regions)
    if (all_ || whole_.contains(region.id)) visit({region.id, 0, region.length()});
  for (const DirtyMemory& piece : gone_) visit(piece);
  start();
  Result<void> outcome;
  std::vector<std::uint64_t> bitmap;
  IovaRange rest = IovaRange::everything();
  for (auto run = mapped_run(rest); run; run = mapped_run(rest)) {
    bitmap.assign(backends::bitmap_words(*run, granule_), 0U);
    if (const auto read = space.read_dirty(*run, bitmap); read) {
      each_written(*run, bitmap, [&](const IovaRange& written) { each_memory(written, visit); });
    } else {
      each_memory(*run, visit);
      if (outcome) outcome = read.error();
    }
    if (run->last == rest.last) break;
    rest.start = Iova{run->last.value + 1};
  }
  return outcome;
}

}  // namespace iovane::viommu
