// BackendDirtyLog: for a target without an engine, which guest memory each mapping leads to, and what devices wrote
// through those that are gone.
//
// Kernels tell written pages by their IOVA, and forget them with the mapping. So it is the DirtyHarvest of its address
// space: what an unmap takes away is kept, as guest memory, until it is asked for. One thread at a time, as its target.
//
// Bounded: of mappings that are gone `pieces_max` pieces are kept; beyond that, and when memory for one is missing, the
// region it lies in counts as written, all of it.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <vector>

#include "backends/backend.hpp"
#include "viommu/shadow_target.hpp"

namespace iovane::viommu {

class BackendDirtyLog final : public backends::DirtyHarvest {
 public:
  BackendDirtyLog(Bytes granule, std::size_t pieces_max) : granule_{granule}, pieces_max_{pieces_max} {}

  /// Of a mapping that was made, or of all mappings inside a range that are gone.
  void mapped(const IovaRange& range, RegionId region, std::uint64_t offset) noexcept;
  void unmapped(const IovaRange& range) noexcept;
  /// The region's memory is no guest memory any more: nothing of it will be told.
  void forget(RegionId region) noexcept;
  void start() noexcept;

  /// Hands out what was written, through mappings that are gone and through those that live.
  Result<void> take(backends::BackendSpace& space, std::span<const Region> regions, const VisitDirty& visit);

  std::optional<IovaRange> mapped_run(const IovaRange& range) noexcept override;
  void take(const IovaRange& range, std::span<const std::uint64_t> bitmap) noexcept override;
  void take_all(const IovaRange& range) noexcept override { keep(range); }

 private:
  struct Live {
    Iova last{};
    RegionId region{};
    std::uint64_t offset = 0;
  };
  /// Calls `visit` with the guest memory that the mapped parts of a range lead to.
  template <typename Visit>
  void each_memory(const IovaRange& range, Visit visit) const;
  template <typename Visit>
  void each_written(const IovaRange& range, std::span<const std::uint64_t> bitmap, Visit visit) const;
  void keep(const IovaRange& written) noexcept;

  Bytes granule_;
  std::size_t pieces_max_;
  std::map<std::uint64_t, Live> live_;  // by first IOVA; disjoint
  std::vector<DirtyMemory> gone_;
  std::set<RegionId> whole_;  // of which everything counts as written
  bool all_ = false;          // of every region: there was no memory to say more
};

}  // namespace iovane::viommu
