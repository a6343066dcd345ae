// Making unmaps final: one array of invalidation commands per batch and IOMMU.
//
// A batch collects what its unmaps cleared, joining neighbours. How it is invalidated is chosen by cost: each span is a
// command (without range invalidation: a command per page), and when that would be more than commands_max, the whole
// address space is one. A command costs the IOMMU about as much as the refill of one translation; one for everything
// makes every live translation be refilled. Measured numbers: docs/STAGE1.md.
#pragma once

#include <cstdint>
#include <span>

#include "backends/kernel.hpp"
#include "backends/stage1/smmuv3.hpp"
#include "backends/stage1/table_format.hpp"
#include "iovane/types.hpp"

namespace iovane::backends::stage1 {

/// What a batch cleared and has not yet invalidated.
class PendingRanges {
 public:
  static constexpr std::size_t spans_max = 256;

  bool empty() const noexcept { return count_ == 0; }
  void add(IovaRange range) noexcept {
    if (count_ != 0 && !everything_) {
      IovaRange& back = room_.spans[count_ - 1];
      if (back.precedes_directly(range)) {
        back.last = range.last;
        bounds_.last = bounds_.last < range.last ? range.last : bounds_.last;
        return;
      }
    }
    if (count_ == 0) {
      bounds_ = range;
    } else {
      if (range.start < bounds_.start) bounds_.start = range.start;
      if (bounds_.last < range.last) bounds_.last = range.last;
    }
    if (count_ == spans_max) {
      everything_ = true;  // bounds_ stay true
      return;
    }
    room_.spans[count_++] = range;
  }
  bool touches(IovaRange range) const noexcept {
    if (count_ == 0 || !bounds_.overlaps(range)) return false;
    if (everything_) return true;
    for (const IovaRange& span : spans())
      if (span.overlaps(range)) return true;
    return false;
  }
  bool everything() const noexcept { return everything_; }
  std::span<const IovaRange> spans() const noexcept { return {room_.spans, count_}; }
  void clear() noexcept {
    count_ = 0;
    everything_ = false;
  }

 private:
  std::size_t count_ = 0;
  bool everything_ = false;
  IovaRange bounds_{};
  union Room {  // not initialised: a batch of one operation would pay for all of it
    Room() noexcept {}
    IovaRange spans[spans_max];
  };
  Room room_;
};

/// Where commands for one address space go: a vIOMMU, or (VT-d) its nested page table.
struct InvalidationTarget {
  std::uint32_t object = 0;
  Architecture architecture = Architecture::smmuv3;
  std::uint16_t asid = 0;
  bool range_invalidation = false;
};

inline constexpr std::size_t commands_max = 64;

/// No device behind `target` uses what it knew of `spans` any more when this returns true; all of the address space
/// when `everything` (or when that is cheaper). `leaf`: only leaves were changed. Any thread; one system call, more
/// when the kernel stops half-way.
bool invalidate(Kernel& kernel, int fd, const InvalidationTarget& target, std::span<const IovaRange> spans,
                bool everything, bool leaf) noexcept;

}  // namespace iovane::backends::stage1
