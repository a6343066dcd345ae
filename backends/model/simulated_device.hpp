// A PCI device whose DMA goes through the software IOMMU: it moves real bytes of this process, by IOVA.
//
// Roles. Any thread may start transfers; those of one device run one after the other. Attaching and invalidating come
//   from the address space that the device is in.
// A transfer moves at most one os_page at a time under the device's mutex. An invalidation takes the same mutex, but
//   only when the device announced (`may_hold_`) that it may be using or caching a translation: an idle device costs
//   an unmap one load. See domain.hpp for the ordering argument.
// The moved bytes are the caller's: whoever reads memory that a device writes must order that himself, as with real
//   hardware. Memory must stay mapped in the process while it is mapped for a device.
// Proven by tests/unit/model_device_test.cpp, tests/stress/model_stress_test.cpp (under TSan).
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backends/model/domain.hpp"
#include "backends/model/options.hpp"
#include "iovane/types.hpp"

namespace iovane::backends::model {

/// Why a transfer stopped.
enum class FaultReason : std::uint8_t {
  not_attached,      ///< the device is in no address space: everything is blocked
  not_present,       ///< nothing is mapped at the address
  no_permission,     ///< mapped, but not for this access
  outside_aperture,  ///< the IOMMU cannot translate so high an address
  bad_context,       ///< nothing valid says how to translate
  interrupt_range,   ///< the address is taken for an interrupt
};

/// What an IOMMU's fault recording would hold.
struct DmaFault {
  Iova address;
  Access access = Access::none;
  FaultReason reason = FaultReason::not_present;
  const class SimulatedDevice* device = nullptr;
  constexpr bool operator==(const DmaFault&) const noexcept = default;
};

/// A transfer's end: how many bytes were moved, and what stopped it if not all.
struct DmaResult {
  std::size_t bytes = 0;
  std::optional<DmaFault> fault;
  bool ok() const noexcept { return !fault.has_value(); }
};

struct IotlbStatistics {
  std::uint64_t hits = 0;
  std::uint64_t misses = 0;
  std::uint64_t invalidations = 0;  ///< calls that found the device active
};

class SimulatedDevice {
 public:
  SimulatedDevice(DeviceOptions options, const IommuOptions& iommu);
  SimulatedDevice(const SimulatedDevice&) = delete;
  SimulatedDevice& operator=(const SimulatedDevice&) = delete;

  const std::string& address() const noexcept { return options_.address; }
  const DeviceOptions& options() const noexcept { return options_; }
  const IommuOptions& iommu() const noexcept { return iommu_; }

  /// The device reads memory at `from`. Any thread. Stops at the first fault, which is also recorded.
  DmaResult dma_read(Iova from, std::span<std::byte> into) noexcept;
  /// The device writes memory at `to`. Any thread.
  DmaResult dma_write(Iova to, std::span<const std::byte> bytes) noexcept;

  /// Recorded faults, oldest first (the newest `faults_kept`), and forgets them.
  std::vector<DmaFault> take_faults();
  /// All faults ever, the forgotten ones included.
  std::uint64_t fault_count() const noexcept;
  IotlbStatistics iotlb_statistics() const noexcept;

  /// For Domain: where to translate, nullptr for nowhere. Nothing of the old domain is used after it returns.
  void set_domain(Domain* domain) noexcept;
  /// The name under which it asks for pages: its id on the descriptor that it is bound to.
  void set_request_id(std::uint32_t id) noexcept;
  /// The name under which its vIOMMU records its faults; nothing: they are not recorded there.
  void set_virtual_id(std::optional<std::uint64_t> id) noexcept;
  /// `tables`: also the tables of a first stage that it remembers.
  void invalidate(IovaRange range, bool tables = true) noexcept;
  void forget_context() noexcept;

  static constexpr std::size_t faults_kept = 1024;

 private:
  struct CachedTranslation {
    std::uint64_t page = ~std::uint64_t{0};  // IOVA of the os_page; all ones: empty
    std::byte* memory = nullptr;
    Access access = Access::none;
    bool dirty = false;  // the page table knows that this page was written
  };

  /// A level-0 table of a first stage, for 2 MiB of addresses: what a walker's cache holds beside translations.
  struct CachedTable {
    std::uint64_t region = ~std::uint64_t{0};
    const std::byte* table = nullptr;
  };
  static constexpr std::size_t cached_tables = 16;

  static constexpr std::size_t cached_runs = 16;

  bool holds_nothing() const noexcept { return iotlb_live_ == 0 && tables_live_ == 0 && runs_live_ == 0; }
  template <typename Move>
  DmaResult transfer(Iova at, std::size_t bytes, Access access, Move move) noexcept;
  std::optional<FaultReason> translate(std::uint64_t page, Access access, std::byte*& memory) noexcept;
  bool translate_by_run(std::uint64_t page, Access access, std::byte*& memory) noexcept;
  void remember(const CachedRun& run) noexcept;
  void drop_runs(IovaRange range) noexcept;
  void record_event(const DmaFault& fault) const noexcept;
  bool is_interrupt_address(std::uint64_t address) const noexcept;
  void record(const DmaFault& fault) noexcept;

  const DeviceOptions options_;
  const IommuOptions iommu_;
  mutable std::mutex mutex_;  // a transfer's step; everything below
  Domain* domain_ = nullptr;
  std::uint32_t request_id_ = 0;
  std::vector<CachedTranslation> iotlb_;  // direct-mapped by page number
  std::size_t iotlb_live_ = 0;
  std::array<CachedTable, cached_tables> tables_;  // direct-mapped by region
  std::size_t tables_live_ = 0;
  // Leaves of a first stage larger than an os_page, and what contiguous hints vouch for.
  std::array<CachedRun, cached_runs> runs_{};
  std::size_t runs_live_ = 0;
  std::size_t next_run_ = 0;
  FirstStage::Root root_{};  // of a first stage: the context, as it was read
  StageFault stage_fault_ = StageFault::none;
  std::optional<std::uint64_t> virtual_id_;
  std::atomic<bool> may_hold_{false};  // read without the mutex by invalidate()
  std::vector<DmaFault> faults_;       // a ring once full
  std::size_t oldest_fault_ = 0;       // where the full ring begins
  std::uint64_t fault_count_ = 0;
  IotlbStatistics statistics_;
};

}  // namespace iovane::backends::model
