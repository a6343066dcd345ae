// /dev/vfio/vfio on POWER: a VFIO container with the sPAPR TCE driver, versions 1 and 2, as
// drivers/vfio/vfio_iommu_spapr_tce.c of Linux 6.12 has it, with the answers that it was seen to give: a map replaces
// what is there, positive numbers that mean failure, unmaps of any subset, a default window that appears with the first
// call that needs it.
//
// Where that kernel would crash (a map or unmap that passes the last page of its window) this one answers
// ENOTRECOVERABLE and changes nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <shared_mutex>
#include <vector>

#include "backends/model/container.hpp"
#include "backends/model/host.hpp"
#include "backends/model/spapr_windows.hpp"
#include "backends/uapi/vfio.hpp"

namespace iovane::backends::model {

class SpaprContainerFile final : public Container {
 public:
  explicit SpaprContainerFile(Host& host) noexcept : host_{host} {}

  long ioctl(unsigned long request, std::uint64_t argument) noexcept override;
  void release() noexcept override {}
  int attach(IommuGroup& group) noexcept override;
  void detach(IommuGroup& group) noexcept override;
  bool has_driver() const noexcept override;
  void add_usage(SpaceUsage& usage, std::size_t& mappings) const noexcept override;
  /// After SpaprMemory::pages_leave(): TCEs lead on to the pages that they led to.
  void pages_left();

 private:
  enum class Driver : std::uint8_t { none, v1, v2 };
  enum class Pe : std::uint8_t { normal = 0, reset = 1, stopped = 2, stopped_dma = 4 };

  const SpaprOptions& platform() const noexcept { return *host_.options.spapr; }
  long check_extension(std::uint64_t extension) const noexcept;
  long set_iommu(std::uint64_t type) noexcept;
  long info(std::uint64_t argument) noexcept;
  long map(std::uint64_t argument) noexcept;
  long unmap(std::uint64_t argument) noexcept;
  long register_memory(std::uint64_t argument) noexcept;
  long unregister_memory(std::uint64_t argument) noexcept;
  long enable() noexcept;
  long disable() noexcept;
  long create(std::uint64_t argument) noexcept;
  long remove(std::uint64_t argument) noexcept;
  long eeh(std::uint64_t argument) noexcept;

  bool enabled() const noexcept;
  int ready_window() noexcept;
  // Under mutex_, exclusively.
  int make_default_window() noexcept;
  int make_window(std::size_t slot, IovaRange range, unsigned page_shift, std::uint32_t levels) noexcept;
  void drop_window(std::size_t slot) noexcept;
  void drop_all() noexcept;
  void set_pe(Pe state) noexcept;
  // Under mutex_, shared.
  int enter(TceTable& table, std::uint64_t index, std::uint64_t address, std::uint64_t access) noexcept;
  void clear(TceTable& table, std::uint64_t first, std::uint64_t count) noexcept;

  Host& host_;
  std::vector<IommuGroup*> groups_;  // under Host::vfio_mutex
  mutable std::shared_mutex mutex_;
  Driver driver_ = Driver::none;
  bool enabled_ = false;          // v1: by ENABLE, which charges; v2: by the first REGISTER
  bool default_pending_ = false;  // v2
  TceWindows windows_;
  std::unique_ptr<Domain> domain_;
  std::vector<SpaprMemory::Region*> registered_;
  SpaceUsage usage_;
  Pe pe_ = Pe::normal;
};

}  // namespace iovane::backends::model
