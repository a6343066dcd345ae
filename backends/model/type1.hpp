// /dev/vfio/vfio: a VFIO container with the type1 IOMMU driver, versions 1 and 2, over the software IOMMU.
//
// One mutex covers every map and unmap from its first check to the last invalidation, as iommu->lock does in
// drivers/vfio/vfio_iommu_type1.c: calls on one container never overlap.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "backends/model/container.hpp"
#include "backends/model/host.hpp"
#include "backends/model/interval_index.hpp"
#include "backends/uapi/vfio.hpp"

namespace iovane::backends::model {

class ContainerFile final : public Container {
 public:
  explicit ContainerFile(Host& host) noexcept : host_{host} {}
  ~ContainerFile() override;

  long ioctl(unsigned long request, std::uint64_t argument) noexcept override;
  void release() noexcept override;

  // Groups come and go; Host::vfio_mutex is held.
  /// 0, -EPERM (somebody else's DMA), -EINVAL (its reserved regions or aperture cut a live mapping), or what pinning
  /// for a further table says.
  int attach(IommuGroup& group) noexcept override;
  void detach(IommuGroup& group) noexcept override;
  bool has_driver() const noexcept override;

  void add_usage(SpaceUsage& usage, std::size_t& mappings) const noexcept override;

 private:
  enum class Driver : std::uint8_t { none, v1, v2 };
  struct Mapping {
    std::uint64_t address = 0;
    Access access = Access::none;
    bool pinned = false;        // into at least one table
    bool mmio = false;          // device memory: nothing to pin
    bool address_gone = false;  // by UNMAP_DMA with the VADDR flag
    Mapping* next_free = nullptr;
  };
  struct Table {
    std::unique_ptr<Domain> domain;
    std::size_t iommu;
    std::vector<IommuGroup*> groups;
  };

  long set_iommu(std::uint64_t type) noexcept;
  long info(std::uint64_t argument) noexcept;
  long map(std::uint64_t argument) noexcept;
  long unmap(std::uint64_t argument) noexcept;
  long dirty_pages(std::uint64_t argument) noexcept;
  static long check_extension(std::uint64_t extension, bool has_driver) noexcept;

  // Under mutex_.
  int join_tables(IommuGroup& group) noexcept;
  void leave_tables(IommuGroup& group) noexcept;
  int narrow(const IommuGroup& group, std::vector<IovaRange>& ranges) const;
  int pin(Mapping& mapping, IovaRange range) noexcept;
  void unpin(Mapping& mapping, IovaRange range) noexcept;
  int fill(const Mapping& mapping, IovaRange range, Domain& domain) noexcept;
  int map_locked(const uapi::vfio::Type1DmaMap& c) noexcept;
  int unmap_locked(const uapi::vfio::Type1DmaUnmap& c, const uapi::vfio::Bitmap* bitmap, std::uint64_t& bytes) noexcept;
  std::uint64_t invalidate_addresses(IovaRange range) noexcept;
  void remove(IntervalIndex<Mapping>::Position at) noexcept;
  void remove_all() noexcept;
  bool usable(IovaRange range) const noexcept;
  std::uint64_t page_sizes() const noexcept;
  Mapping* new_mapping() noexcept;
  void free_mapping(Mapping* mapping) noexcept;

  Host& host_;
  std::vector<IommuGroup*> groups_;  // under Host::vfio_mutex
  mutable std::mutex mutex_;
  Driver driver_ = Driver::none;
  IntervalIndex<Mapping> mappings_;
  std::vector<Table> tables_;
  std::vector<IovaRange> usable_;  // empty: no group yet, anything goes
  std::uint32_t entries_left_ = 0;
  bool dirty_tracking_ = false;
  SpaceUsage usage_;
  Mapping* free_ = nullptr;
};

}  // namespace iovane::backends::model
