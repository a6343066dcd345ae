// What a plan will cost of RLIMIT_MEMLOCK, said before the first pin fails.
//
// The kernel has three books for locked memory, and each interface writes into its own:
//   locked    mm->locked_vm, per process (VmLck): mlock, VFIO type1, VFIO sPAPR
//   pinned    mm->pinned_vm, per process (VmPin): iommufd in process mode
//   user      user->locked_vm, per user across processes, shown nowhere: iommufd by default, io_uring
// Each is compared with the process's RLIMIT_MEMLOCK for itself. CAP_IPC_LOCK exempts from all three.
// Sources (Linux 6.12): drivers/vfio/vfio_iommu_type1.c vfio_lock_acct, one charge per container;
// drivers/vfio/vfio_iommu_spapr_tce.c tce_iommu_enable (v1: the whole window), tce_iommu_create_table (v2: the tables)
// and arch/powerpc/mm/book3s64/iommu_api.c (v2: registered memory, once per process);
// arch/powerpc/platforms/powernv/pci-ioda.c pnv_pci_ioda2_get_table_size; drivers/iommu/iommufd/pages.c
// iopt_alloc_pages (once per MAP, COPY is free); io_uring/rsrc.c io_buffer_account_pin (whole huge pages).
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>

#include "iovane/result.hpp"
#include "iovane/types.hpp"
#include "pinning/memlock.hpp"

namespace iovane::pinning {

enum class MemlockBook : std::uint8_t { locked, pinned, user };
std::string_view to_string(MemlockBook book) noexcept;

enum class PinningBackend : std::uint8_t { type1, iommufd, iommufd_process_mode, spapr_v1, spapr_v2, io_uring };
std::string_view to_string(PinningBackend backend) noexcept;

/// A sPAPR DMA window.
struct PlannedWindow {
  Bytes size{};  ///< a power of two
  unsigned page_shift = 16;
  unsigned levels = 1;
};

/// One use of memory: everything `spaces` containers or IOASes of a backend will map, each all of it.
struct PlannedUse {
  PinningBackend backend = PinningBackend::iommufd;
  Bytes memory{};
  /// type1: containers. iommufd: IOASes that MAP the memory themselves; those that only COPY from another cost
  /// nothing. sPAPR: containers, whose windows are below.
  unsigned spaces = 1;
  std::span<const PlannedWindow> windows{};  ///< per container, sPAPR only
  /// How large the OS pages behind it are; io_uring charges a huge page whole when one granule of it is pinned.
  Bytes os_page{4096};
  /// io_uring: how many separate buffers `memory` consists of, each of which may touch huge pages of its own.
  std::uint64_t buffers = 1;
};

/// What one use will be charged.
struct PredictedCharge {
  MemlockBook book = MemlockBook::user;
  std::uint64_t bytes = 0;
};
/// overflow when the sum passes 2^64-1; invalid_argument for a window that is no power of two or has no levels.
Result<PredictedCharge> predict_charge(const PlannedUse& use) noexcept;

struct PreflightReport {
  struct Book {
    std::uint64_t need = 0;  ///< of the plan
    std::uint64_t used = 0;  ///< now; for `user` at least this much (this process's pins; others are not visible)
    bool fits = true;
  };
  std::array<Book, 3> books{};  ///< by MemlockBook
  std::uint64_t limit = 0;
  std::uint64_t hard_limit = 0;
  bool exempt = false;
};

/// Fills the report and says ok, or memlock_exceeded with need, limit, use and what would help. `state` as read by
/// read_memlock_state(). Pure: asks the kernel nothing.
Result<PreflightReport> preflight(std::span<const PlannedUse> uses, const MemlockState& state) noexcept;
/// The report whatever the verdict.
Result<PreflightReport> preflight_report(std::span<const PlannedUse> uses, const MemlockState& state) noexcept;

}  // namespace iovane::pinning
