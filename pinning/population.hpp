// Registering large memory: made present and pinned in parallel, on the nodes that own it.
#pragma once

#include <cstdint>
#include <functional>
#include <stop_token>
#include <utility>
#include <vector>

#include "iovane/result.hpp"
#include "iovane/types.hpp"
#include "pinning/map_cache.hpp"

namespace iovane::pinning {

/// Memory that stays pinned and mapped until this is dropped: holds on all regions that cover it. Move-only.
class Registration {
 public:
  Registration() noexcept = default;

  MemoryRange range() const noexcept { return range_; }
  /// The regions, in order; they cover the range.
  const std::vector<Hold>& parts() const noexcept { return parts_; }
  explicit operator bool() const noexcept { return !parts_.empty(); }

 private:
  friend class Population;
  MemoryRange range_{};
  std::vector<Hold> parts_;
};

struct PopulationConfig {
  Access access = Access::read_write;
  /// How many threads work, the caller included; 0: one per CPU. More than there are CPUs is no use.
  unsigned threads = 0;
  /// The OS page size behind the memory, where it is known (hugetlbfs, a memfd with huge pages). No piece is smaller.
  Bytes os_page{4096};
  /// Make memory present before pinning it, piece by piece. Without it the pin does so, on one thread where the
  /// provider is serial.
  bool prefault = true;
  /// Called by one thread at a time, after each piece, with the bytes that are present (and pinned) and all bytes.
  /// False cancels.
  std::function<bool(Bytes done, Bytes total)> progress{};
  /// Cancels between pieces.
  std::stop_token stop{};
};

/// Pins memory through a cache, prefaulting in parallel first. Threads are oneTBB's, in arenas bound to NUMA nodes;
/// they block all signals while they work for us.
///
/// A range whose memory policy names a node (mbind, MPOL_BIND or MPOL_PREFERRED) is populated there. Elsewhere the
/// pieces are spread evenly over the nodes, and memory that was not present yet becomes local to its worker's node.
class Population {
 public:
  /// Blocks until all is pinned, or something failed, or it was cancelled. Errors: cancelled, bad_memory,
  /// memlock_exceeded and what the cache says; the first one counts. On an error every hold is dropped again: what had
  /// been pinned is then ordinary unused cache content.
  static Result<Registration> register_memory(MapCache& cache, const MemoryRange& range,
                                              const PopulationConfig& config);
  /// Only makes the memory present, in the same way, for whoever pins it next. `fd` >= 0: of a file from `offset` on,
  /// and `range` says no more than the length. Errors: cancelled, bad_memory, unsupported.
  static Result<void> prefault(const MemoryRange& range, int fd, std::uint64_t offset, Bytes border,
                               const PopulationConfig& config);
};

/// Makes [range] present without pinning: MADV_POPULATE_WRITE (or _READ without the right to write), for a file
/// through a temporary mapping. One thread, blocking. Errors: bad_memory, unsupported (Linux before 5.14).
Result<void> make_present(const MemoryRange& range, Access access, int fd, std::uint64_t offset) noexcept;

}  // namespace iovane::pinning
