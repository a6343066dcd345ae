// AddressSpace: what a set of devices can reach.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "iovane/config.hpp"
#include "iovane/dirty.hpp"
#include "iovane/error_handling.hpp"
#include "iovane/fault_record.hpp"
#include "iovane/memory_lease.hpp"
#include "iovane/page_fault.hpp"
#include "iovane/queue.hpp"
#include "iovane/request.hpp"
#include "iovane/result.hpp"
#include "iovane/stats.hpp"
#include "iovane/types.hpp"
#include "iovane/watch.hpp"
#include "iovane/windows.hpp"

namespace iovane {

namespace engine {
class DirectBatch;
class SpaceCore;
}  // namespace engine
namespace pinning {
class Hold;
}

/// Facts about an address space that do not change while it lives (sizes and limits are as of the last attach).
struct AddressSpaceFacts {
  std::string backend;            ///< as in EngineConfig::backend, never "auto"
  Bytes granule{};                ///< every address and length is a multiple of it
  std::uint64_t page_sizes = 0;   ///< bit n: hardware entries of 2^n bytes; 0 before the first attach
  std::uint64_t entries_max = 0;  ///< live mappings that the kernel accepts; 0: no such limit
  bool replace_is_atomic = false;
  bool unmap_may_cut = false;   ///< the backend could cut mappings; the engine still refuses to by default
  bool register_pins = false;   ///< registered memory is pinned once, and maps of it pin nothing more
  bool dirty_is_exact = false;  ///< dirty tracking tells written pages; false: everything mapped counts as written
};

/// A live mapping as the engine's index knows it.
struct MappingInfo {
  IovaRange range{};
  MemoryPiece memory{};  ///< of a scatter list: the first piece
  Access access = Access::none;
  MappingId mapping{};
  bool quarantined = false;  ///< its unmap failed; the range is out of use for good
};

/// An attached device.
struct DeviceInfo {
  std::uint32_t id = 0;  ///< for detach(); never reused within the address space
  std::string name;
  int device_fd = -1;               ///< VFIO device descriptor; owned by the address space, valid until detach
  std::vector<IovaRange> reserved;  ///< what it takes out of the address space
};

/// Addresses that a guest must be told not to use, for its firmware tables.
struct LayoutHole {
  IovaRange range{};
  std::vector<std::string> devices;  ///< which reserve some of it; empty where the host translates nothing
};

/// What a guest may be told about its I/O addresses.
struct GuestLayout {
  std::vector<IovaRange> usable;  ///< sorted, disjoint
  std::vector<LayoutHole> holes;  ///< everything else
};

/// Something that was said or mapped and that the host no longer keeps.
struct LayoutBreach {
  IovaRange missing{};  ///< what cannot be used any more
  IovaRange needed{};   ///< the live mapping, promise or shown range that needs it
  bool live = false;    ///< `needed` is a live mapping
  std::string text;
};

class AddressSpace;

/// What the end of an address space left behind.
struct CloseReport {
  Bytes unmapped{};                     ///< by the closing; what was stale already is not counted
  std::uint64_t mappings_given_up = 0;  ///< the kernel refused to unmap them; they went, or stay, with its own object
  Bytes bytes_given_up{};
  Error why{};  ///< of the first of them
};

/// Registered memory, unregistered by the destructor; mappings of it that still live keep it registered until they are
/// gone. Move-only.
class Memory {
 public:
  Memory() noexcept = default;
  Memory(Memory&&) noexcept;
  Memory& operator=(Memory&&) noexcept;
  ~Memory();

  MemoryId id() const noexcept { return id_; }
  Bytes length() const noexcept { return length_; }
  /// `length` bytes at `offset`, to be mapped.
  MemoryPiece piece(Bytes offset, Bytes length) const noexcept { return MemoryPiece::within(id_, offset, length); }
  explicit operator bool() const noexcept { return static_cast<bool>(id_); }

 private:
  friend class AddressSpace;
  std::shared_ptr<engine::SpaceCore> space_;
  MemoryId id_{};
  Bytes length_{};
};

/// A lease on a live mapping: the destructor unmaps it. Move-only; may be destroyed on any thread. A failed unmap
/// cannot be returned from a destructor; it shows in Stats::quarantined_mappings. Use unmap() to see the error.
class Mapping {
 public:
  Mapping() noexcept = default;
  Mapping(Mapping&&) noexcept;
  Mapping& operator=(Mapping&&) noexcept;
  ~Mapping();

  Iova iova() const noexcept { return range_.start; }
  IovaRange range() const noexcept { return range_; }
  MappingId id() const noexcept { return id_; }
  explicit operator bool() const noexcept { return static_cast<bool>(id_); }

  /// Unmaps now and reports. The lease is empty afterwards, whatever happened.
  Result<Bytes> unmap() noexcept;
  /// Gives the mapping up without unmapping it; it lives on under its id.
  MappingId release() noexcept;

 private:
  friend class AddressSpace;
  std::shared_ptr<engine::SpaceCore> space_;
  MappingId id_{};
  IovaRange range_{};
};

/// Memory to register: a range of this process, or of a file. Borrowed until unregistered.
struct MemoryConfig {
  void* address = nullptr;  ///< null when `fd` alone describes it (needs a backend with file memory)
  Bytes length{};
  int fd = -1;
  std::uint64_t fd_offset = 0;
};

/// One IOAS, one VFIO container, or one set of windows. Any thread, except that attach and detach are control plane:
/// they wait for running batches. Destroying it unmaps everything and detaches its devices; queues, leases and
/// registered memories that outlive it stay safe to use and answer Errc::closed.
class AddressSpace {
 public:
  AddressSpace() noexcept = default;
  AddressSpace(AddressSpace&&) noexcept;
  AddressSpace& operator=(AddressSpace&&) noexcept;
  ~AddressSpace();

  /// What the destructor does, with a report. Waits for the batch that runs; batches that queues submitted before it
  /// are executed, later ones complete with Errc::closed, and none loses a completion. Bounded: one kernel call, or,
  /// where that fails, at most two for every mapping that lives. Closing again reports nothing.
  CloseReport close() noexcept;

  const AddressSpaceFacts& facts() const noexcept;

  /// Brings a device in. May narrow usable_ranges(). Refused (iova_reserved) when that would take away a live mapping,
  /// a promised range, or one that guest_layout() showed: before it is attached where the host says what the device
  /// reserves, else it is taken out again. The detail names the device, the reserved range and what it conflicts with.
  Result<DeviceInfo> attach(const DeviceConfig& device);
  /// The device is gone also where the answer is iova_reserved: then a live mapping or a promise does not hold any
  /// more.
  Result<void> detach(std::uint32_t device_id);
  /// Moves a device to another address space of the same engine, while batches run in both. Where the interface can
  /// (iommufd) the device translates through one or the other at every moment, and its descriptor stays; elsewhere
  /// (type1) it has to leave and come back, which resets it and gives it a new descriptor, and only Gap::accept allows
  /// that. On failure the device is where it was, unless the detail says that it could not go back. Both address spaces
  /// wait for running batches. Errors: as attach()'s, and unsupported with Gap::refuse.
  enum class Gap : std::uint8_t { refuse, accept };
  Result<DeviceInfo> move_device(std::uint32_t device_id, AddressSpace& to, Gap gap = Gap::refuse);

  /// Windows that can be made and removed; unsupported except on sPAPR.
  Result<Windows> windows() const;
  /// Freezing and recovery of devices (EEH); unsupported except on sPAPR, where the platform offers it and a device is
  /// attached.
  Result<ErrorHandling> error_handling() const;

  /// For poll(2): readable while devices wait for pages. -1 without AddressSpaceConfig::page_faults, and before the
  /// first device. Owned by the address space.
  int page_fault_fd() const noexcept;
  /// Takes up to out.size() page faults, oldest first. Never blocks on devices. Any thread.
  Result<std::size_t> read_page_faults(std::span<PageFaultEvent> out) noexcept;
  /// Lets the requests of `event`'s cookie go on: map the page first, then let the device try again, or let it fail.
  /// Errors: not_found when nobody waits any more (answered, or its device was detached, which answers "fail").
  Result<void> answer_page_fault(const PageFaultEvent& event, PageFaultAnswer answer) noexcept;
  /// Lets the worker take page faults as they come and ask `handler`, on the worker's thread. It may use address spaces
  /// and queues of its own, and must not close this address space. Should the thread die in it, it is asked again. An
  /// empty one ends this: none runs any more when the call returns. Errors: unsupported
  /// (AddressSpaceConfig::page_faults or WorkerConfig::enabled is off), busy (called by a handler).
  Result<void> on_page_fault(PageFaultHandler handler);
  /// Calls `readable` on the worker's thread whenever `fd` is: a device's interrupt, error or request eventfd, for
  /// instance. It takes what made the descriptor readable, and returns false to end the watch. `fd` stays the caller's
  /// and open until the Watch ends. Errors: invalid_argument, unsupported (WorkerConfig::enabled is off).
  Result<Watch> watch(int fd, std::function<bool()> readable);

  /// For poll(2): readable while fault records wait, of transfers that failed. -1 where the backend delivers none (only
  /// stage1 on Arm SMMUv3 does; elsewhere the kernel logs them), and before the first device. Owned by the address
  /// space.
  int fault_record_fd() const noexcept;
  /// Takes up to out.size() fault records, oldest first. Never blocks on devices. Any thread. Bounded: what nobody
  /// reads in time is counted (FaultRecord::Reason::lost). Errors: unsupported.
  Result<std::size_t> read_fault_records(std::span<FaultRecord> out) noexcept;

  /// Records what devices write from now on; needs AddressSpaceConfig::dirty_tracking. Starting again forgets what was
  /// recorded. Waits for running batches; unmaps cost a kernel call more until stop. Errors: unsupported (the
  /// interface, the IOMMU, the config), no_device (type1 needs one first).
  Result<void> start_dirty_tracking();
  /// Stops, and forgets what was not read.
  Result<void> stop_dirty_tracking();
  /// Reads and clears: sets bit n of `bitmap` (least significant first) when a device wrote page n of `range` since the
  /// page was last read, through mappings that live or that were unmapped meanwhile; other bits stay. The result is the
  /// number of bits that were not set before. `page_size`: a power of two, at least the granule, that divides the
  /// range's start and length. Large hardware entries count as written as a whole. Whether pages that nobody wrote are
  /// named too is facts().dirty_is_exact. Any thread; batches run in between, at most a bounded time later. On an error
  /// from the kernel the bitmap is complete all the same: what could not be read counts as written.
  Result<std::uint64_t> read_dirty(const IovaRange& range, Bytes page_size, std::span<std::uint64_t> bitmap);
  /// Takes the oldest runs of written pages whose mappings are gone, with the memory that they led to: for callers who
  /// use an address again before they read. Each page is told once, here or by read_dirty(). Returns how many were
  /// written to `out`.
  std::size_t take_unmapped_dirty(std::span<DirtyRun> out) noexcept;
  DirtyStats dirty_stats() const noexcept;

  /// The layout for the guest's firmware tables. With LayoutPolicy::host_constrained it is made by the first call, from
  /// the devices that are attached then, and does not change from there on. Errors: unsupported where the host knows
  /// nothing before the first device.
  Result<GuestLayout> guest_layout();
  /// Asks the host again what is usable, and answers with what does not hold any more: others may change an IOAS that
  /// is shared. Empty: all is well.
  Result<std::vector<LayoutBreach>> check_layout();
  /// IOVAs that can be mapped, sorted and disjoint: a snapshot.
  Result<std::vector<IovaRange>> usable_ranges() const;

  /// Registers memory for many maps: pinned once where the backend can.
  Result<Memory> register_memory(const MemoryConfig& memory);

  /// The same after making the memory present, in parallel and on the nodes that own it, so that the kernel's pin finds
  /// it there. Asks check_memlock() before. Blocks; errors: cancelled, bad_memory, unsupported beside those above.
  Result<Memory> register_memory(const MemoryConfig& memory, const PopulateConfig& populate);
  /// Whether pinning `planned` bytes more fits below RLIMIT_MEMLOCK as this backend charges it. ok, or memlock_exceeded
  /// with need, limit, current use and what to change. Says nothing about what others pin meanwhile.
  Result<void> check_memlock(Bytes planned) const;

  /// Opens the cache behind acquire(); once. Errors: busy (it is open), invalid_argument, and with Staleness::monitored
  /// permission or unsupported, which say what would allow it.
  Result<void> open_cache(const CacheConfig& config = {});
  /// A lease on an IOVA for this memory: of this process, or a piece of registered memory (which on iommufd needs no
  /// further pin). Memory that was acquired before, or lies beside such memory, needs no kernel call and no lock; the
  /// rest is pinned and mapped in chunks, once, however many threads ask. Any alignment. Released mappings stay until
  /// the budget needs their room. length() of the lease says how far it reaches: at least to the end of the granule.
  /// Any thread. Errors: closed (no cache is open), invalid_argument, bad_memory, memlock_exceeded (everything is in
  /// use; with limit, use and need), entry_limit, iova_exhausted, busy (the memory keeps changing), stale_handle.
  Result<MemoryLease> acquire(const MemoryPiece& memory, Access access = Access::read_write) noexcept;
  /// A lease that any thread may release, for long uses; costs two atomic operations more.
  Result<MemoryLease> acquire_portable(const MemoryPiece& memory, Access access = Access::read_write) noexcept;
  /// Leases for all of the memory, in order; returns how many. limit_reached when they do not fit into `out`.
  Result<std::size_t> acquire_all(const MemoryPiece& memory, Access access, std::span<MemoryLease> out) noexcept;
  /// To be called before memory is unmapped, discarded or given other contents behind the kernel's back: what is cached
  /// of it is never handed out again and is unmapped, at once where nobody uses it, else when it is released. Returns
  /// how many mappings left. Any thread.
  std::size_t invalidate(const MemoryPiece& memory) noexcept;
  /// Unmaps cached mappings that nobody uses until about so many bytes came free; returns how many did.
  Bytes evict(Bytes bytes) noexcept;
  CacheStats cache_stats() const noexcept;

  Result<Queue> open_queue(const QueueConfig& config = {});

  /// One operation, waited for, on the same path as the queues'.
  Completion map(const MapRequest& request) noexcept;
  Completion unmap(const UnmapRequest& request) noexcept;
  Completion replace(const ReplaceRequest& request) noexcept;
  /// A map whose lease unmaps it.
  Result<Mapping> map_lease(const MapRequest& request) noexcept;
  /// Makes a lease of a mapping, for instance one from a completion; stale_handle when it is gone.
  Result<Mapping> adopt(MappingId mapping) noexcept;
  /// Removes everything; the number of bytes removed.
  Result<Bytes> unmap_all() noexcept;
  /// Relaxed mode: makes every deferred unmap happen now; the bytes that devices can no longer reach. Zero in strict
  /// mode. What the kernel fails to unmap is quarantined and not in the number.
  Result<Bytes> flush() noexcept;

  /// The mapping that covers an address; not_found when none does.
  Result<MappingInfo> find(Iova iova) const noexcept;
  /// Calls `visit` for every mapping that overlaps `range`, in address order, until it returns false. Batches wait
  /// meanwhile: do not submit from inside.
  void for_each(IovaRange range, const std::function<bool(const MappingInfo&)>& visit) const;
  Stats stats() const noexcept;

 private:
  friend class Engine;
  friend class engine::DirectBatch;
  explicit AddressSpace(std::shared_ptr<engine::SpaceCore> core) noexcept;
  Result<MemoryLease> acquire_slowly(const MemoryPiece& memory, Access access) noexcept;
  Result<MemoryLease> counted(pinning::Hold&& hold) noexcept;
  std::shared_ptr<engine::SpaceCore> core_;
};

}  // namespace iovane
