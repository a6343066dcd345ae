#include "backends/model/spapr_memory.hpp"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <new>
#include <utility>

#include "backends/model/page_table.hpp"

namespace iovane::backends::model {

SpaprMemory::Region* SpaprMemory::find(std::uint64_t start, std::uint64_t bytes) noexcept {
  const std::lock_guard lock{mutex_};
  const auto at = std::find_if(regions_.begin(), regions_.end(),
                               [&](const Region& r) { return r.start == start && r.bytes == bytes; });
  return at == regions_.end() ? nullptr : &*at;
}

long SpaprMemory::acquire(std::uint64_t start, std::uint64_t bytes, HostMemory& host, Accounting& accounting,
                          SpaceUsage& usage, Region*& out) {
  const std::lock_guard lock{mutex_};
  for (Region& region : regions_) {
    if (region.start == start && region.bytes == bytes) {
      ++region.used;
      out = &region;
      return 0;
    }
  }
  if (bytes == 0) return -ENOMEM;
  if (!accounting.pin(Ledger::process, bytes / os_page_bytes, usage)) return -ENOMEM;
  // Page by page, so that what could be pinned before a hole is known: the kernel answers that number.
  std::uint64_t good = 0;
  while (good < bytes && host.check(start + good, os_page_bytes, true) == 0) good += os_page_bytes;
  if (good < bytes) {
    accounting.unpin(Ledger::process, bytes / os_page_bytes, usage);
    return good == 0 ? -EFAULT : static_cast<long>(good / os_page_bytes);
  }
  // The kernel looks for an overlap last, when everything is charged and pinned.
  for (const Region& region : regions_) {
    if (region.start >= start + bytes || start >= region.start + region.bytes) continue;
    accounting.unpin(Ledger::process, bytes / os_page_bytes, usage);
    return -EINVAL;
  }
  regions_.push_back({.start = start, .bytes = bytes, .used = 1, .mapped = 0, .left = {}, .large = {}});
  out = &regions_.back();
  return 0;
}

void SpaprMemory::release(Region* region, Accounting& accounting, SpaceUsage& usage) noexcept {
  const std::lock_guard lock{mutex_};
  if (region->used == 1 && region->mapped != 0) {
    orphan_pages_ += region->bytes / os_page_bytes;
    accounting.unpin(Ledger::process, region->bytes / os_page_bytes, usage);  // it is nobody's in particular now
    return;
  }
  if (--region->used != 0) return;
  accounting.unpin(Ledger::process, region->bytes / os_page_bytes, usage);
  std::erase_if(copies_, [region](const auto& copy) { return copy.second == region; });
  regions_.remove_if([region](const Region& r) { return &r == region; });
}

SpaprMemory::Region* SpaprMemory::containing(std::uint64_t address, std::uint64_t bytes) noexcept {
  for (Region& region : regions_)
    if (region.start <= address && address - region.start <= region.bytes - bytes && bytes <= region.bytes)
      return &region;
  return nullptr;
}

/// Under the mutex.
std::uint64_t SpaprMemory::place_of(Region& region, std::uint64_t address, std::uint64_t bytes) {
  const auto first = region.left.lower_bound(address);
  if (first == region.left.end() || first->first >= address + bytes) return address;
  if (bytes == os_page_bytes) return reinterpret_cast<std::uintptr_t>(first->second.get());
  Region::Copy whole{static_cast<std::byte*>(std::aligned_alloc(bytes, bytes))};
  if (!whole) throw std::bad_alloc{};
  for (std::uint64_t at = 0; at < bytes; at += os_page_bytes) {
    const auto left = region.left.find(address + at);
    const void* const from = left != region.left.end() ? left->second.get() : std::bit_cast<void*>(address + at);
    std::memcpy(whole.get() + at, from, os_page_bytes);
  }
  const auto place = reinterpret_cast<std::uintptr_t>(whole.get());
  copies_[place] = &region;
  region.large.push_back(std::move(whole));
  return place;
}

std::uint64_t SpaprMemory::map(std::uint64_t address, std::uint64_t bytes) {
  const std::lock_guard lock{mutex_};
  Region* const region = containing(address, bytes);
  if (region == nullptr) return 0;
  const std::uint64_t place = place_of(*region, address, bytes);
  ++region->mapped;
  return place;
}

void SpaprMemory::unmap(std::uint64_t place) noexcept {
  const std::lock_guard lock{mutex_};
  const auto copy = copies_.find(place);
  Region* const region = copy != copies_.end() ? copy->second : containing(place, 1);
  if (region != nullptr && region->mapped != 0) --region->mapped;
}

void SpaprMemory::pages_leave(std::uint64_t address, std::uint64_t bytes) {
  const std::lock_guard lock{mutex_};
  for (Region& region : regions_)
    for (std::uint64_t at = std::max(address, region.start);
         at < std::min(address + bytes, region.start + region.bytes); at += os_page_bytes) {
      Region::Copy& copy = region.left[at];
      if (copy) continue;  // it left before
      copy.reset(static_cast<std::byte*>(std::aligned_alloc(os_page_bytes, os_page_bytes)));
      if (!copy) throw std::bad_alloc{};
      std::memcpy(copy.get(), std::bit_cast<void*>(at), os_page_bytes);
      copies_[reinterpret_cast<std::uintptr_t>(copy.get())] = &region;
    }
}

std::uint64_t SpaprMemory::moved(std::uint64_t place, std::uint64_t bytes) {
  const std::lock_guard lock{mutex_};
  if (copies_.contains(place)) return place;
  Region* const region = containing(place, bytes);
  return region != nullptr ? place_of(*region, place, bytes) : place;
}

std::uint64_t SpaprMemory::orphan_pages() const noexcept {
  const std::lock_guard lock{mutex_};
  return orphan_pages_;
}

}  // namespace iovane::backends::model
