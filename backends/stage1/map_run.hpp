// What the maps of a batch have in common, looked up by the first and kept for those that follow.
//
// A map of one page is a store; finding out where its memory lies, whether it may be written, whether the addresses are
// usable and what an entry looks like is ten times that. Neighbours in a batch are mostly pages of one region, with the
// same rights, in one window: then all of it comes down to two comparisons and an addition. Belongs to one execute():
// regions and windows stay as they are meanwhile.
#pragma once

#include <cstdint>

#include "backends/backend.hpp"
#include "backends/stage1/table_format.hpp"

namespace iovane::backends::stage1 {

class MapRun {
 public:
  /// `region` has `region_bytes`, its first page is what `first_leaf` leads to with the rights of `access`.
  void start(RegionId region, Access access, IovaRange window, std::uint64_t region_bytes,
             std::uint64_t first_leaf) noexcept {
    region_ = region;
    access_ = access;
    window_ = window;
    memory_last_ = region_bytes - page_bytes;
    first_leaf_ = first_leaf;
  }

  /// The entry for a map or copy that is one page like those before it; 0 for any other.
  std::uint64_t leaf_for(const BackendOp& op) const noexcept {
    const std::uint64_t start = op.range.start.value;
    const bool one_page =
        op.range.last.value - start == page_bytes - 1 && ((start | op.memory) & (page_bytes - 1)) == 0;
    const bool alike = op.region == region_ && op.access == access_;
    // A region address is a multiple of 4 KiB below the bits of an entry, so the addition stays in its field.
    return one_page && alike && window_.contains(op.range) && op.memory <= memory_last_ ? first_leaf_ + op.memory : 0;
  }

 private:
  RegionId region_{};  // 0: no map yet; then nothing is in the window
  Access access_ = Access::none;
  IovaRange window_{Iova{1}, Iova{0}};
  std::uint64_t memory_last_ = 0;
  std::uint64_t first_leaf_ = 0;
};

}  // namespace iovane::backends::stage1
