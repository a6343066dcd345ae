// TCE tables inside KVM: the kernel answers a guest's H_PUT_TCE, H_PUT_TCE_INDIRECT and H_STUFF_TCE without an exit,
// and brings each change to the hardware tables of the VFIO groups that a table was coupled to.
//
// Rules of the interface (Linux 6.12 and 7.2): a group is coupled to a table by its descriptor, after it was added to
// the VM's VFIO device; the hardware window must be there, at the table's very place, of its very size, with pages no
// larger than the table's. There is no call that uncouples: closing the table does, or taking the group out of the VFIO
// device. Neither touches the hardware's entries. Guest memory must be registered with every coupled container
// (BackendSpace::register_memory), or its hypercalls fail in the kernel.
//
// Several containers may be behind one table, and one container's groups behind several tables (one per window): groups
// are added to the VFIO device with the first table that needs them and taken out with the last.
// Order of life: windows, memory, table, couple; undo in exact reverse.
// Threads: one at a time; table entries by any thread.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "backends/backend.hpp"
#include "backends/kernel_call.hpp"
#include "backends/spapr_tce/spapr_control.hpp"

namespace iovane::backends {

struct KvmTableShape {
  std::uint32_t liobn = 0;
  std::uint32_t page_shift = 12;
  std::uint64_t address = 0;  ///< first bus address, a multiple of the page
  std::uint64_t entries = 0;
};

class KvmTce;

/// A table in KVM. The destructor closes it, which uncouples everything: hypercalls for its LIOBN exit to userspace
/// from then on, and the hardware's entries stay.
class KvmTable {
 public:
  ~KvmTable();
  KvmTable(const KvmTable&) = delete;
  KvmTable& operator=(const KvmTable&) = delete;

  const KvmTableShape& shape() const noexcept { return shape_; }
  /// The entries as the guest wrote them, shared with the kernel: use relaxed atomic accesses of whole words. Storing
  /// here changes what H_GET_TCE reads, not the hardware.
  std::span<std::uint64_t> entries() noexcept { return entries_; }
  /// From now on each change goes to the hardware tables of all groups of this sPAPR space; again for groups that
  /// joined it since. On failure nothing of this call is left. Errors: unsupported (no sPAPR space, no such
  /// capability), invalid_argument (no window of that place and size with pages as small), busy.
  Result<void> couple(BackendSpace& space);
  std::size_t coupled_groups() const noexcept { return groups_.size(); }

 private:
  friend class KvmTce;
  KvmTable(KvmTce& owner, const KvmTableShape& shape, KernelFd fd, std::span<std::uint64_t> entries) noexcept;
  KvmTce& owner_;
  KvmTableShape shape_;
  KernelFd fd_;
  std::span<std::uint64_t> entries_;
  std::vector<int> groups_;
};

/// The TCE side of one VM.
class KvmTce {
 public:
  /// `vm`: the VM's descriptor, borrowed or duplicated; `vfio_device`: its KVM VFIO device when the VMM has made one
  /// (there can be only one), -1: made with the first coupling. `kernel` outlives it.
  /// Errors: unsupported (the kernel has no TCE tables: not POWER, or no such KVM), invalid_argument.
  static Result<std::unique_ptr<KvmTce>> open(Kernel& kernel, const DescriptorSource& vm, int vfio_device = -1);
  KvmTce(const KvmTce&) = delete;
  KvmTce& operator=(const KvmTce&) = delete;
  ~KvmTce() = default;  ///< all tables are gone

  bool any_window() const noexcept { return any_window_; }            ///< page sizes and places, not only 4 KiB at 0
  bool lists_in_kernel() const noexcept { return lists_in_kernel_; }  ///< INDIRECT and STUFF
  bool can_couple() const noexcept { return can_couple_; }

  /// Errors: busy (the LIOBN has a table), invalid_argument, unsupported, out_of_memory, memlock_exceeded.
  Result<std::unique_ptr<KvmTable>> create_table(const KvmTableShape& shape);

 private:
  friend class KvmTable;
  KvmTce(Kernel& kernel, KernelFd vm) noexcept : kernel_{kernel}, vm_{std::move(vm)} {}
  Result<void> need_device();
  int set_attribute(std::uint64_t attribute, void* argument) noexcept;
  Result<void> add_group(int group);
  void drop_group(int group) noexcept;

  Kernel& kernel_;
  KernelFd vm_;
  KernelFd device_;
  bool any_window_ = false;
  bool lists_in_kernel_ = false;
  bool can_couple_ = false;
  struct Member {
    unsigned users = 0;
    bool ours = false;  ///< we added it; the VMM may have before
  };
  std::map<int, Member> groups_;
};

}  // namespace iovane::backends
