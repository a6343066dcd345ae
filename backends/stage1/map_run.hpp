// What the maps of a batch have in common, looked up by the first and kept for those that follow.
//
// A map of one page is a store; finding out where its memory lies, whether it may be written and what an entry looks
// like is many times that. Neighbours in a batch are mostly pages of one region with the same rights: then all of it
// comes down to a few comparisons and an addition. Belongs to one execute(): regions stay as they are meanwhile.
#pragma once

#include <cstdint>

#include "backends/backend.hpp"
#include "backends/stage1/table_format.hpp"

namespace iovane::backends::stage1 {

class MapRun {
 public:
  /// `region` has `region_bytes`, its first page is what `first_leaf` leads to with the rights of `access`.
  void start(RegionId region, Access access, std::uint64_t region_bytes, std::uint64_t first_leaf) noexcept {
    region_ = region;
    access_ = access;
    memory_last_ = region_bytes - page_bytes;
    first_leaf_ = first_leaf;
  }

  /// The entry for a map or copy of one page, like those before it; 0 for any other. The caller looks at the addresses.
  std::uint64_t leaf_for(const BackendOp& op) const noexcept {
    // A region's intermediate address is a multiple of 4 KiB within an entry's address: the addition stays there.
    const bool alike = op.region == region_ && op.access == access_;
    return alike && (op.memory & (page_bytes - 1)) == 0 && op.memory <= memory_last_ ? first_leaf_ + op.memory : 0;
  }

 private:
  RegionId region_{~0U};  // no map yet
  Access access_ = Access::none;
  std::uint64_t memory_last_ = 0;
  std::uint64_t first_leaf_ = 0;
};

}  // namespace iovane::backends::stage1
