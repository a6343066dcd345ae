// An IOAS: areas of IOVA space, the pages behind them, and the domains that they are filled into.
//
// The rules are those of drivers/iommu/iommufd/io_pagetable.c; each call returns 0 or the kernel's -errno and leaves
// behind what the kernel would. One mutex per IOAS covers a whole call, so calls on different IOASes run in parallel
// and those on one do not (the kernel's would, for distinct ranges: only time differs).
// The object is type-stable: its context reuses it and never frees it while a call could still hold its address; a
// call that lost the race against DESTROY finds another id() under the mutex.
#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "backends/model/accounting.hpp"
#include "backends/model/domain.hpp"
#include "backends/model/host_memory.hpp"
#include "backends/model/interval_index.hpp"
#include "backends/model/pages.hpp"
#include "base/unique_fd.hpp"

namespace iovane::backends::model {

/// Part of some pages, referenced: what IOAS_COPY takes from its source.
struct PagesSlice {
  Pages* pages = nullptr;
  std::uint64_t start_byte = 0;  ///< from pages->base()
  std::uint64_t length = 0;
};

/// Where a map is to go.
struct MapPlace {
  std::uint64_t iova = 0;  ///< fixed: in; otherwise out
  bool fixed = true;
};

class Ioas {
 public:
  Ioas(HostMemory& memory, Accounting& accounting) noexcept : memory_{memory}, accounting_{accounting} {}
  ~Ioas();
  Ioas(const Ioas&) = delete;
  Ioas& operator=(const Ioas&) = delete;

  /// Begins and ends a life under an id. close() unmaps everything; no domain may be left. Returns what the space's
  /// share of the counters is then (see SpaceUsage).
  void open(std::uint32_t id) noexcept;
  SpaceUsage close() noexcept;

  // Data path. `id` is what the caller looked up; -ENOENT when the object has another by now.
  int map_memory(std::uint32_t id, MapPlace& place, std::uint64_t address, std::uint64_t length, Access access,
                 Ledger ledger) noexcept;
  int map_file(std::uint32_t id, MapPlace& place, base::UniqueFd fd, std::uint64_t start, std::uint64_t length,
               Access access, Ledger ledger) noexcept;
  /// IOAS_COPY, first half: references to what lies in [iova, iova + length). Give back with drop_slices().
  int slices(std::uint32_t id, std::uint64_t iova, std::uint64_t length, std::vector<PagesSlice>& out) noexcept;
  /// Second half; takes over the references on success.
  int map_slices(std::uint32_t id, MapPlace& place, std::span<const PagesSlice> slices, std::uint64_t length,
                 Access access) noexcept;
  void drop_slices(std::span<const PagesSlice> slices) noexcept;
  /// Success with 0 bytes when nothing lies in the range: IOAS_UNMAP makes ENOENT of it, the compatibility call does
  /// not.
  int unmap(std::uint32_t id, std::uint64_t iova, std::uint64_t length, std::uint64_t& unmapped) noexcept;
  int unmap_all(std::uint32_t id, std::uint64_t& unmapped) noexcept;

  // Control plane; the context's mutex is held.
  int allow(std::span<const IovaRange> ranges) noexcept;
  std::vector<IovaRange> usable() const;
  std::uint64_t alignment() const noexcept;
  std::uint64_t page_sizes() const noexcept;
  int set_large_pages(bool on) noexcept;
  bool large_pages() const noexcept;
  /// VFIO type1 v1 on the compatibility interface: makes borders before and behind the range, where it may.
  int cut(std::uint64_t iova, std::uint64_t length) noexcept;
  /// Fills (and so pins) everything into a further domain.
  int add_domain(Domain& domain) noexcept;
  void remove_domain(Domain& domain) noexcept;
  /// Takes a device's reserved regions out of the space.
  int reserve(std::span<const ReservedRegion> regions, const void* owner) noexcept;
  void unreserve(const void* owner) noexcept;

  // For edits of a domain from outside (device moves, dirty tracking): the owner's lock of domain.hpp.
  std::mutex& mutex() noexcept { return mutex_; }
  /// True when [iova, last] is mapped without holes. Under mutex().
  bool contiguous(IovaRange range) const noexcept;

  std::size_t area_count() const noexcept;
  SpaceUsage usage() const noexcept;

 private:
  struct Area {
    Pages* pages = nullptr;
    std::uint64_t start_byte = 0;
    Access access = Access::none;
    bool filled = false;
    Area* next_free = nullptr;
  };
  struct Reserved {
    IovaRange range;
    const void* owner;
  };

  using Position = IntervalIndex<Area>::Position;

  /// Also says which area follows, for insert().
  int place(MapPlace& place, std::uint64_t address_hint, std::uint64_t length, Position& next) const noexcept;
  int find_room(std::uint64_t& iova, std::uint64_t address_hint, std::uint64_t length) const noexcept;
  bool next_hole(std::uint64_t from, std::uint64_t last, IovaRange& hole) const noexcept;
  int check(std::uint64_t iova, std::uint64_t length, Position& next) const noexcept;
  int insert(const PagesSlice& slice, std::uint64_t iova, Access access, Position next) noexcept;
  int fill(Area& area, IovaRange range) noexcept;
  int fill_domain(const Area& area, IovaRange range, Domain& domain) const noexcept;
  void unfill(Area& area, IovaRange range) noexcept;
  void remove(Position at) noexcept;
  int map_one(MapPlace& where, Pages* pages, std::uint64_t offset, std::uint64_t length, Access access,
              std::uint64_t hint) noexcept;
  int unmap_range(IovaRange range, std::uint64_t& unmapped) noexcept;
  int split(std::uint64_t last) noexcept;
  int check_alignment(std::uint64_t alignment) const noexcept;
  int recalculate_alignment() noexcept;
  bool reserved_overlaps(IovaRange range) const noexcept;

  Area* new_area() noexcept;
  void free_area(Area* area) noexcept;
  Pages* new_pages() noexcept;
  void drop_pages(Pages* pages) noexcept;

  HostMemory& memory_;
  Accounting& accounting_;
  mutable std::mutex mutex_;
  std::uint32_t id_ = 0;  // 0: not in use
  IntervalIndex<Area> areas_;
  std::vector<Domain*> domains_;
  std::vector<Reserved> reserved_;
  std::vector<IovaRange> allowed_;  // sorted; empty: everything
  std::uint64_t alignment_ = 1;
  bool large_pages_ = true;
  SpaceUsage usage_;
  Area* free_areas_ = nullptr;
  std::vector<Pages*> free_pages_;
};

}  // namespace iovane::backends::model
