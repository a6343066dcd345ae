#include "backends/model/spapr_memory.hpp"

#include <algorithm>
#include <cerrno>

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
    if (region.start < start + bytes && start < region.start + region.bytes) return -EINVAL;
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
  regions_.push_back({.start = start, .bytes = bytes, .used = 1, .mapped = 0});
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
  regions_.remove_if([region](const Region& r) { return &r == region; });
}

SpaprMemory::Region* SpaprMemory::containing(std::uint64_t address, std::uint64_t bytes) noexcept {
  for (Region& region : regions_)
    if (region.start <= address && address - region.start <= region.bytes - bytes && bytes <= region.bytes)
      return &region;
  return nullptr;
}

bool SpaprMemory::map(std::uint64_t address, std::uint64_t bytes) noexcept {
  const std::lock_guard lock{mutex_};
  Region* const region = containing(address, bytes);
  if (region != nullptr) ++region->mapped;
  return region != nullptr;
}

void SpaprMemory::unmap(std::uint64_t address) noexcept {
  const std::lock_guard lock{mutex_};
  if (Region* const region = containing(address, 1); region != nullptr && region->mapped != 0) --region->mapped;
}

std::uint64_t SpaprMemory::orphan_pages() const noexcept {
  const std::lock_guard lock{mutex_};
  return orphan_pages_;
}

}  // namespace iovane::backends::model
