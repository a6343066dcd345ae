// Which unused region goes first when the budget is short.
//
// S3-FIFO (Yang, Zhang, Qiu, Yue, Rashmi: "FIFO queues are all you need for cache eviction", SOSP 2023): new regions
// enter a small queue and leave it for good unless they were used again meanwhile; those that were, and those that
// come back soon after they left (remembered in a ghost table), live in the main queue, which gives used regions
// another round. A scan of memory used once passes through the small queue and cannot push the working set out. A
// hit costs one bit that is already set; no list is touched.
// Where we depart from it: sizes are bytes, not objects; a use is one bit (the slot's accessed mark), not a counter
// up to three, so one re-use promotes; regions that are held or leased are passed over.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "pinning/budget.hpp"
#include "pinning/pin_index.hpp"

namespace iovane::pinning {

/// The queues of one cache, threaded through its region records. Under the cache's lock; never allocates after
/// construction.
class EvictionPolicy {
 public:
  /// `ghosts`: how many evicted regions are remembered; a power of two. 8 bytes each.
  explicit EvictionPolicy(PinIndex& index, std::uint32_t ghosts = 8192);

  /// A region has become live.
  void insert(RegionId id) noexcept;
  /// A region leaves for another reason than eviction.
  void remove(RegionId id) noexcept;
  /// Chooses victims, takes them off the queues and writes them to `out` until about `bytes` are together and there are
  /// `count_min` of them. Returns how many. Passes over regions with a counted hold, and those that are not on `node`
  /// (unless that is any_node). None means that a whole round over all regions found nothing.
  std::size_t select(std::uint64_t bytes, std::size_t count_min, std::uint8_t node, const MemoryRange* keep,
                     std::span<RegionId> out) noexcept;
  /// A victim turned out to be leased: back it goes, as used.
  void put_back(RegionId id) noexcept;

  std::uint64_t small_bytes() const noexcept { return small_.bytes; }
  std::uint64_t main_bytes() const noexcept { return main_.bytes; }
  std::uint32_t count() const noexcept { return small_.count + main_.count; }

 private:
  static constexpr std::uint64_t small_percent = 10;  // of all bytes; the paper's choice

  struct Queue {
    RegionList name = RegionList::none;
    RegionId newest = no_region;
    RegionId oldest = no_region;
    std::uint64_t bytes = 0;
    std::uint32_t count = 0;
  };
  struct Ghost {
    std::uint32_t tag = 0;
    std::uint32_t when = 0;
  };

  void push(Queue& queue, RegionId id) noexcept;
  void unlink(Queue& queue, RegionId id) noexcept;
  Queue& queue_of(RegionId id) noexcept;
  void remember(RegionId id) noexcept;
  bool is_remembered(std::uint64_t start) const noexcept;
  static std::uint64_t hash(std::uint64_t start) noexcept;

  PinIndex& index_;
  Queue small_{.name = RegionList::small};
  Queue main_{.name = RegionList::main};
  std::unique_ptr<Ghost[]> ghosts_;
  std::uint32_t ghost_mask_;
  std::uint32_t ghost_clock_ = 0;
};

}  // namespace iovane::pinning
