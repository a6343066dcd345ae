// The records behind region ids.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "pinning/region.hpp"

namespace iovane::pinning {

/// Records by id, in slabs that stay where they are until the table goes. take() and put() by the writer only; at()
/// by anyone who may use the id (a guard, a hold, the writer).
class RegionTable {
 public:
  static constexpr unsigned slab_shift = 16;  // 65,536 records of 40 bytes: 2.5 MiB
  static constexpr std::uint32_t slab_records = 1U << slab_shift;
  static constexpr std::uint32_t slabs_max = 1U << (region_id_bits - slab_shift);
  static constexpr std::uint32_t regions_max = slabs_max * slab_records - 1;

  RegionTable() noexcept = default;
  RegionTable(const RegionTable&) = delete;
  RegionTable& operator=(const RegionTable&) = delete;
  ~RegionTable();

  /// A free id, or no_region when memory or ids ran out.
  RegionId take() noexcept;
  void put(RegionId id) noexcept;

  RegionRecord& at(RegionId id) const noexcept {
    // relaxed: whoever has an id got it after the slab was stored, through R.slot or the writer lock.
    return slabs_[id >> slab_shift].load(std::memory_order_relaxed)[id & (slab_records - 1)];
  }
  std::uint32_t in_use() const noexcept { return in_use_; }
  std::size_t mapped_bytes() const noexcept;

 private:
  std::array<std::atomic<RegionRecord*>, slabs_max> slabs_{};
  std::uint32_t slabs_used_ = 0;
  RegionId never_used_ = 1;  // id 0 is no_region
  RegionId free_ = no_region;
  std::uint32_t in_use_ = 0;
};

}  // namespace iovane::pinning
