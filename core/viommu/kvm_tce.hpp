// The seam to TCE tables in KVM: KVM_CREATE_SPAPR_TCE_64 and KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE, and the bookkeeping that
// changes hands with them. What hardware does meanwhile: nothing. Coupling, uncoupling and closing a table leave the
// hardware's entries as they are (seen on Linux 6.12 and 7.2).
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "iovane/result.hpp"
#include "iovane/types.hpp"
#include "viommu/shadow_target.hpp"

namespace iovane::viommu {

/// A guest's window of bus addresses.
struct TceWindow {
  std::uint32_t liobn = 0;
  std::uint32_t page_shift = 12;
  std::uint64_t address = 0;  ///< first bus address
  std::uint64_t entries = 0;

  std::uint64_t page_mask() const noexcept { return (std::uint64_t{1} << page_shift) - 1; }
  IovaRange range() const noexcept { return {Iova{address}, Iova{address + ((entries << page_shift) - 1)}}; }
};

/// A table in KVM. The destructor closes it: hypercalls for its LIOBN come to userspace from then on.
class KvmTceTable {
 public:
  KvmTceTable() = default;
  KvmTceTable(const KvmTceTable&) = delete;
  KvmTceTable& operator=(const KvmTceTable&) = delete;
  virtual ~KvmTceTable() = default;

  /// The entries, shared with the kernel: use relaxed atomic loads and stores of whole words.
  virtual std::span<std::uint64_t> entries() noexcept = 0;
  /// From now on the kernel brings each change of the table to this host address space's hardware table. Errors:
  /// invalid_argument (no hardware window of the same place and size with pages as small), busy.
  virtual Result<void> couple(ShadowTarget& target) noexcept = 0;
};

class KvmTceHost {
 public:
  virtual ~KvmTceHost() = default;
  /// Errors: busy (the LIOBN has a table), out_of_memory.
  virtual Result<std::unique_ptr<KvmTceTable>> create(const TceWindow& window) = 0;
  /// Whether couple() can work at all: a container of VFIO's sPAPR backend, a kernel that knows the call.
  virtual bool can_couple(const ShadowTarget& target) const noexcept = 0;
  /// The mappings that the target has in the range are the kernel's from now on: forget them, leave the hardware alone.
  virtual void hand_to_kernel(ShadowTarget& target, const IovaRange& range) noexcept = 0;
  /// Takes away whatever the kernel brought to the target's hardware table in the range; the target has no mapping of
  /// its own there.
  virtual Result<void> clear(ShadowTarget& target, const IovaRange& range) noexcept = 0;
};

}  // namespace iovane::viommu
