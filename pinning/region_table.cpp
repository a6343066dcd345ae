#include "pinning/region_table.hpp"

#include <new>

#include "pinning/slab_arena.hpp"

namespace iovane::pinning {

RegionTable::~RegionTable() {
  for (std::uint32_t i = 0; i < slabs_used_; ++i)
    unmap(slabs_[i].load(std::memory_order_relaxed), slab_records * sizeof(RegionRecord));  // relaxed: nobody is left
}

RegionId RegionTable::take() noexcept {
  RegionId id = free_;
  if (id != no_region) {
    free_ = at(id).next;
  } else {
    id = never_used_;
    const std::uint32_t slab = id >> slab_shift;
    if (slab >= slabs_max) return no_region;
    if (slab >= slabs_used_) {
      // A small cache pays for the pages of its records only; a large one profits from huge pages.
      const bool huge = slab != 0;
      void* memory = map_zeroed(slab_records * sizeof(RegionRecord), huge ? huge_page_bytes : granule_bytes, huge);
      if (memory == nullptr) return no_region;
      // Zeroes are what a fresh RegionRecord holds; constructing 65,536 of them would make their memory resident.
      // relaxed: see at().
      slabs_[slab].store(static_cast<RegionRecord*>(memory), std::memory_order_relaxed);
      slabs_used_ = slab + 1;
    }
    ++never_used_;
  }
  RegionRecord& record = at(id);
  record.prev = no_region;
  record.next = no_region;
  ++in_use_;
  return id;
}

void RegionTable::put(RegionId id) noexcept {
  RegionRecord& record = at(id);
  record.packed.store(0, std::memory_order_relaxed);  // relaxed: no reader has this id any more
  record.next = free_;
  free_ = id;
  --in_use_;
}

std::size_t RegionTable::mapped_bytes() const noexcept {
  return std::size_t{never_used_} * sizeof(RegionRecord) + sizeof *this;
}

}  // namespace iovane::pinning
