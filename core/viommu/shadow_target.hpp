// ShadowTarget: one host side of a guest domain, the place where its mappings must exist.
//
// A domain gives a target whole batches and learns what failed. Behind it is the engine (EngineTarget), or, in tests
// and benchmarks, something that records or does nothing.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "iovane/result.hpp"
#include "iovane/types.hpp"
#include "viommu/guest_memory.hpp"

namespace iovane::viommu {

/// One change to the host's mappings. Ranges of a batch apply in order where they overlap.
struct HostOp {
  enum class Kind : std::uint8_t {
    map,      ///< `range` is free; the memory lies in one region
    unmap,    ///< every mapping inside `range`; never cuts one
    replace,  ///< `range` is exactly one mapping, which shall point elsewhere or have other rights
  };
  IovaRange range{};
  std::uint64_t region_offset = 0;  ///< bytes into the region; map and replace
  RegionId region{};
  Kind kind = Kind::map;
  Access access = Access::none;
};

/// What became of one operation that did not succeed.
struct OpFailure {
  std::uint32_t op = 0;  ///< its place in the batch
  Error error{};
};

/// Guest memory that a device wrote.
struct DirtyMemory {
  RegionId region{};
  std::uint64_t offset = 0;  ///< bytes into the region
  Bytes length{};
};

using VisitDirty = std::function<void(const DirtyMemory&)>;

/// Where a batch stands.
enum class Progress : std::uint8_t { done, pending };

class ShadowTarget {
 public:
  ShadowTarget() = default;
  ShadowTarget(const ShadowTarget&) = delete;
  ShadowTarget& operator=(const ShadowTarget&) = delete;
  virtual ~ShadowTarget() = default;

  /// For reports.
  virtual const std::string& name() const noexcept = 0;
  /// Sorted, disjoint: what can be mapped. A snapshot; attaching devices changes it.
  virtual Result<std::vector<IovaRange>> usable_ranges() const = 0;
  /// Every range is a multiple of it.
  virtual Bytes granule() const noexcept = 0;
  /// HostOp::Kind::replace leaves no moment in which the device faults.
  virtual bool replace_is_atomic() const noexcept = 0;
  /// An unmap may cut mappings, so nothing must be unmapped and mapped again for it.
  virtual bool unmap_may_cut() const noexcept = 0;

  /// Control plane: guest memory that maps may name from now on, until removed. Registers (pins) it where that pays.
  virtual Result<void> add_region(const Region& region) = 0;
  virtual void remove_region(RegionId region) noexcept = 0;

  /// Live migration: from now on what devices write is recorded, or not any more. Belongs to the target, not to a
  /// domain: a guest may move its devices between domains meanwhile. Errors: unsupported, which is the default.
  virtual Result<void> track_dirty(bool on);
  /// Hands out, once, what devices wrote since the last call, through mappings that are gone by now too. Pieces may
  /// overlap, and may say more than was written. On error the VMM must take all of the guest's memory for written.
  virtual Result<void> take_dirty(const VisitDirty& visit);

  /// Begins a batch; `ops` stay as they are until it is done. One batch at a time. Failures are appended by whichever
  /// call returns `done`, in any order. Neither call blocks.
  virtual Progress submit(std::span<const HostOp> ops, std::vector<OpFailure>& failures) noexcept = 0;
  virtual Progress poll(std::vector<OpFailure>& failures) noexcept = 0;
  /// Sleeps until poll() is worth calling, or the time is over.
  virtual void wait(std::chrono::nanoseconds timeout) noexcept = 0;
  /// Becomes readable when poll() is worth calling; -1 when there is no such thing.
  virtual int event_fd() noexcept = 0;
};

}  // namespace iovane::viommu
