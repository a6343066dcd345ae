// A VFIO container of the sPAPR TCE kind behind the seam: a set of windows, and the memory that may be mapped in them.
//
// The kernel checks little: a map over a live TCE replaces it, a map that begins in a window and passes its last page
// crashes kernels, an unmap removes any subset. Every check of the contract is therefore made here, against a TceBook
// per window, before the kernel is asked. The kernel's own tables have no lock around maps and unmaps, so several
// threads may call execute() for disjoint ranges.
//
// Version 2 maps registered memory only. Memory that a caller registered is held by its region; a map of other memory
// registers it on the way (and its last unmap unregisters it), which costs two more calls and a lock. Version 1 pins
// page by page in each map, and charges the whole default window to the process while a device is attached.
#pragma once

#include <vector>

#include "backends/backend.hpp"
#include "backends/kernel_call.hpp"
#include "backends/spapr_tce/registered_memory.hpp"
#include "backends/spapr_tce/spapr_control.hpp"
#include "backends/spapr_tce/tce_book.hpp"
#include "backends/type1/vfio_groups.hpp"

namespace iovane::backends::spapr {

/// An unmap call costs about what the kernel's walk over this many empty TCEs does (docs/SPAPR.md has the numbers).
inline constexpr std::uint64_t hole_max = 8;

class SpaprSpace final : public BackendSpace, public SpaprControl {
 public:
  SpaprSpace(Kernel& kernel, KernelFd container, Interface interface, ProcessMemory& process,
             const SpaceOptions& options);
  ~SpaprSpace() override;

  const SpaceFacts& facts() const noexcept override { return facts_; }
  void execute(std::span<const BackendOp> ops, std::span<BackendOpResult> results) noexcept override;
  Result<Bytes> unmap_all() noexcept override;
  Result<RegionId> register_memory(const MemoryRange& memory) override;
  Result<void> unregister_memory(RegionId region) override;
  void memory_changed(std::uint64_t start, std::uint64_t last) noexcept override { memory_.changed({start, last}); }
  Result<AttachedDevice> attach(const DeviceSource& source) override;
  Result<void> detach(DeviceId device) override;
  Result<std::vector<IovaRange>> usable_ranges() override;
  Result<void> promise(std::span<const IovaRange> ranges) override;
  Headroom headroom() noexcept override;
  SpaprControl* spapr() noexcept override { return this; }

  Result<SpaprLimits> limits() override;
  std::vector<SpaprWindow> windows() const override;
  Result<SpaprWindow> create_window(const SpaprWindowRequest& request) override;
  Result<void> remove_window(Iova start) override;
  Bytes hand_to_kernel(IovaRange range) noexcept override;
  Result<void> clear_handed(IovaRange range) noexcept override;
  std::vector<int> group_descriptors() const override { return groups_.descriptors(); }
  SpaprEeh* eeh() noexcept override { return has_eeh_ ? &eeh_ : nullptr; }

 private:
  struct Region {
    std::uint64_t address = 0;
    std::uint64_t length = 0;  ///< 0: unregistered
    std::vector<std::uint32_t> held;
    bool registered = false;  ///< `held` counts: a device is attached
  };
  struct Source {
    std::uint64_t address = 0;
    const std::vector<std::uint32_t>* held = nullptr;  ///< null on version 1
  };

  bool version_1() const noexcept { return facts_.interface == Interface::spapr_v1; }
  bool map_common(const BackendOp& op, BackendOpResult& result) noexcept;
  bool unmap_common(IovaRange range, BackendOpResult& result) noexcept;
  Error unmap_error(int os_errno, IovaRange span, Bytes gone) noexcept;
  BackendOpResult map(const BackendOp& op) noexcept;
  BackendOpResult map_into(TceBook& book, const BackendOp& op, const Source& source) noexcept;
  Error check_map(const TceBook& book, const BackendOp& op, std::uint64_t address) const noexcept;
  Error map_error(int os_errno, const BackendOp& op, std::uint64_t address, const TceBook& book) noexcept;
  Error outside(IovaRange range) const noexcept;
  int unmap_call(IovaRange range) noexcept;
  int map_call(IovaRange range, std::uint64_t address, Access access) noexcept;
  void enter(TceBook& book, TceRun run, const Source& source, Access access) noexcept;
  std::uint64_t leave(TceBook& book, TceRun run) noexcept;
  bool restore(TceBook& book, TceRun run) noexcept;
  BackendOpResult unmap(IovaRange range) noexcept;
  BackendOpResult unmap_in(TceBook& book, IovaRange range) noexcept;
  bool splits_a_tce(const TceBook& book, IovaRange range) const noexcept;
  TceBook* book_of(IovaRange range) noexcept;

  Result<void> connected(const std::string& device);
  Result<void> open_default_window();
  void disconnect() noexcept;
  Result<void> hold_regions();
  Result<void> enter_again() noexcept;
  void add_book(TceBook book);
  void facts_of_windows() noexcept;
  Error attach_error(const Error& error, const std::string& device) const noexcept;

  Kernel& kernel_;
  KernelFd container_;
  SpaceFacts facts_;
  SpaprEeh eeh_;
  bool has_eeh_ = false;
  type1::VfioGroups groups_;
  SpaceMemory memory_;
  std::vector<TceBook> books_;   // sorted by address
  std::vector<Region> regions_;  // index = RegionId - 1
  std::uint64_t os_page_;
};

}  // namespace iovane::backends::spapr
