// The seam that every way of programming an IOMMU stands behind.
//
// A Backend is an open interface (one /dev/iommu, one VFIO setup); a BackendSpace is one I/O address space in it: an
// IOAS, a VFIO container, a sPAPR window set, or first-stage tables of our own. The engine gives a space whole batches:
// one virtual call per batch, results per operation. Nothing here assumes that a map is a kernel call (in stage-1
// mode it is a store), that the kernel keeps an object per map, or that an operation can be told from its neighbours in
// time: when execute() returns, everything in it is final, invalidations included.
//
// The seam carries facts, not policy: overlap checks against the live index, merging, retries, accounting across
// address spaces and the choice of backend belong to core/engine.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backends/dirty.hpp"
#include "backends/memlock_use.hpp"
#include "backends/page_fault.hpp"
#include "iovane/fault_record.hpp"
#include "iovane/result.hpp"
#include "iovane/types.hpp"

namespace iovane::backends {

class SpaprControl;

/// The kernel interface under a backend.
enum class Interface : std::uint8_t {
  iommufd,    ///< IOAS of /dev/iommu
  type1_v2,   ///< VFIO container, VFIO_TYPE1v2_IOMMU
  type1_v1,   ///< VFIO container, VFIO_TYPE1_IOMMU: unmap by first IOVA
  compat_v2,  ///< type1 v2 calls on /dev/iommu's compatibility interface
  compat_v1,  ///< type1 v1 calls on it: large IOPTEs are off
  spapr_v1,   ///< VFIO container, VFIO_SPAPR_TCE_IOMMU
  spapr_v2,   ///< VFIO container, VFIO_SPAPR_TCE_v2_IOMMU
  stage1,     ///< first-stage tables of our own on a nesting parent
};
std::string_view to_string(Interface interface) noexcept;
/// A VFIO container of the kernel's own: no maps without a device, and none outlives the last one.
constexpr bool is_container(Interface interface) noexcept {
  return interface == Interface::type1_v2 || interface == Interface::type1_v1 || interface == Interface::spapr_v1 ||
         interface == Interface::spapr_v2;
}

/// What a space can do. Queried once, after creation; attaching devices may change numbers, never bits.
enum class Capability : std::uint32_t {
  none = 0,
  explicit_pin = 1U << 0,      ///< register_memory() pins; maps of it pin nothing more
  copy_reuses_pin = 1U << 1,   ///< OpKind::copy is there: a map of registered memory without a second pin
  cut_on_unmap = 1U << 2,      ///< an unmap may remove part of a mapping
  replace_in_place = 1U << 3,  ///< OpKind::replace is atomic for the device
  parallel_map = 1U << 4,      ///< execute() may be called by several threads for disjoint ranges
  span_unmap = 1U << 5,        ///< one unmap may cover many mappings and holes
  choose_window = 1U << 6,     ///< windows can be created and removed
  promise_ranges = 1U << 7,    ///< promise() is enforced by the kernel on later attaches
  file_memory = 1U << 8,       ///< regions can be fd + offset without a process address
  dirty_tracking = 1U << 9,    ///< device writes can be recorded per page
  mmio_memory = 1U << 10,      ///< device BARs (VM_PFNMAP) can be mapped: peer-to-peer
  nesting = 1U << 11,          ///< two stages of translation
  map_is_store = 1U << 12,     ///< no kernel call per map
  unmap_all = 1U << 13,        ///< one call empties the space
};
constexpr Capability operator|(Capability a, Capability b) noexcept {
  return static_cast<Capability>(static_cast<std::uint32_t>(a) | static_cast<std::uint32_t>(b));
}
constexpr bool has(Capability set, Capability bit) noexcept {
  return (static_cast<std::uint32_t>(set) & static_cast<std::uint32_t>(bit)) != 0;
}
std::string_view to_string(Capability bit) noexcept;

/// Facts about one space.
struct SpaceFacts {
  Interface interface = Interface::iommufd;
  Capability capabilities = Capability::none;
  Bytes granule{4096};            ///< smallest unit of IOVA and of memory
  std::uint64_t page_sizes = 0;   ///< bit n: IOPTEs of 2^n bytes are possible; 0 when unknown before an attach
  std::uint64_t entries_max = 0;  ///< live mappings that the kernel accepts; 0: no such limit
  /// An unmap over unmapped granules that are wider than this costs more than a second unmap would.
  Bytes unmap_hole_max{~std::uint64_t{0}};
  bool dirty_reads_whole_mappings = false;  ///< read_dirty() may not begin or stop inside a mapping
};

/// Memory that was registered with a space (or with the backend it belongs to). 0 is "none".
struct RegionId {
  std::uint32_t value = 0;
  constexpr auto operator<=>(const RegionId&) const noexcept = default;
};

/// Memory to be registered: a range of this process, or of a file.
struct MemoryRange {
  void* address = nullptr;  ///< process address; null when `fd` alone describes the memory
  Bytes length{};           ///< multiple of the granule
  int fd = -1;              ///< memfd, hugetlbfs file, dma-buf; -1 for none; borrowed until unregistered
  std::uint64_t fd_offset = 0;
};

enum class OpKind : std::uint8_t {
  map,      ///< make memory reachable at `range`
  copy,     ///< the same for registered memory, through the region's pin
  unmap,    ///< remove every mapping inside `range`; holes are fine
  replace,  ///< `range` is mapped; make it lead to other memory without a gap
};

/// One operation of a batch. Plain data; the memory it names stays the caller's until its unmap completed.
struct BackendOp {
  OpKind kind = OpKind::map;
  Access access = Access::none;  ///< map, copy, replace
  RegionId region{};             ///< where `memory` points: 0 = process address, otherwise offset into the region
  IovaRange range{};
  std::uint64_t memory = 0;  ///< process address or region offset; ignored by unmap
};

/// The verdict on one operation. A failed unmap may have removed part: `bytes` says how much is known to be gone.
struct BackendOpResult {
  Error error{};
  Bytes bytes{};  ///< unmap: what was removed; map: the length
};

/// Which device to attach. Descriptors win over paths, and with them nothing is opened by path.
struct DeviceSource {
  std::string pci_address{};  ///< "0000:00:03.0"; needed for type1 even with descriptors, to name the device
  int cdev_fd = -1;           ///< open VFIO device cdev (iommufd)
  int group_fd = -1;          ///< open VFIO group (type1, sPAPR)
};

/// An attached device. Ids are never reused within a space.
struct DeviceId {
  std::uint32_t value = 0;
  constexpr auto operator<=>(const DeviceId&) const noexcept = default;
};
struct AttachedDevice {
  DeviceId id{};
  std::string name;                 ///< PCI address, or "cdev fd N"
  int device_fd = -1;               ///< for BARs and interrupts; owned by the space, valid until detach
  std::vector<IovaRange> reserved;  ///< what this device's group takes out of the space, as far as the host says
  std::string iommu;                ///< "Intel VT-d", "Arm SMMUv3", ...; empty where the interface does not tell
  bool dirty_tracking = false;      ///< its writes can be recorded per page
};

/// What a space must look like from the start.
struct SpaceOptions {
  bool large_iopte = true;      ///< false forces granule-sized IOPTEs where the kernel allows it (measurement)
  bool dirty_tracking = false;  ///< refuse devices that cannot track
  bool page_faults = false;     ///< devices may wait for pages; refuse those that cannot
  /// OpKind::copy of less maps the memory afresh, where a measurement found that cheaper; it is then pinned (and
  /// counted against memlock) a second time for as long as it is mapped. 0: always copy.
  Bytes copy_from{};
  /// Stage-1 mode: how many bits of IOVA the tables translate (39 or 48; 57 where the hardware can); fewer levels make
  /// walks shorter. 0: 48.
  unsigned address_bits = 0;
};

/// How much the kernel still accepts. Numbers are what the host reports now, not a promise.
struct Headroom {
  std::optional<std::uint64_t> entries;  ///< further live mappings
  std::optional<Bytes> memlock;          ///< further pinned bytes under the limit; nothing when unlimited
  MemlockUse memlock_use{};              ///< the whole account
};

/// One I/O address space. Threads: execute() as Capability::parallel_map says, otherwise one thread at a time; all
/// other calls are control plane, one thread at a time and not concurrent with execute() unless said otherwise.
class BackendSpace {
 public:
  virtual ~BackendSpace() = default;  ///< unmaps, detaches and closes; cannot fail
  BackendSpace() = default;
  BackendSpace(const BackendSpace&) = delete;
  BackendSpace& operator=(const BackendSpace&) = delete;

  virtual const SpaceFacts& facts() const noexcept = 0;

  /// Runs a batch in order of `ops`. results.size() >= ops.size(); result i belongs to op i. One operation's failure
  /// never stops or spoils another. Preconditions (checked by the engine): ranges are granule-aligned and inside
  /// usable ranges; maps overlap nothing live; unmaps cut nothing. Where one is broken the kernel still refuses: an
  /// overlap is iova_busy, a reserved IOVA iova_reserved, a cut would_bisect (iommufd may have removed whole mappings
  /// before the cut by then). An unmap of nothing succeeds with 0 bytes. A map is all or nothing.
  /// Blocks as long as the kernel does. Does not allocate, except stage-1 mode for memory that is not registered.
  virtual void execute(std::span<const BackendOp> ops, std::span<BackendOpResult> results) noexcept = 0;
  /// Removes everything; the result is the number of bytes removed. Succeeds on an empty space.
  virtual Result<Bytes> unmap_all() noexcept = 0;

  /// Prepares memory for many maps: pins it where the interface can (explicit_pin), otherwise only remembers it.
  virtual Result<RegionId> register_memory(const MemoryRange& memory) = 0;
  /// Precondition (checked by the engine, which has the index): no mapping of the region lives. Where the precondition
  /// is broken the kernel keeps such pages pinned until their unmap; nothing dangles.
  virtual Result<void> unregister_memory(RegionId region) = 0;
  /// [start, last] of this process was unmapped, discarded or replaced, or is about to be: what the interface keeps
  /// pinned of it is not what a later map means. Only where pins go by address (sPAPR) is there anything to do: such a
  /// map is refused (busy) until the last mapping and the last region that need the old pages are gone. Any thread, at
  /// any time; neither allocates nor waits for anybody who does.
  virtual void memory_changed(std::uint64_t /*start*/, std::uint64_t /*last*/) noexcept {}

  /// Brings a device in; may narrow usable_ranges(). Undoes itself on failure.
  virtual Result<AttachedDevice> attach(const DeviceSource& source) = 0;
  virtual Result<void> detach(DeviceId device) = 0;

  /// IOVAs that can be mapped now, sorted, disjoint. Changes with every attach and detach.
  virtual Result<std::vector<IovaRange>> usable_ranges() = 0;
  /// Promises that `ranges` stay usable: later attaches that would take from them fail. Unsupported where the kernel
  /// has no such call (the engine then checks by itself).
  virtual Result<void> promise(std::span<const IovaRange> ranges) = 0;
  virtual Headroom headroom() noexcept = 0;
  /// Memory that the space itself has pinned for I/O page tables; counts against memlock.
  virtual Bytes table_memory() const noexcept { return {}; }

  /// Records device writes from now on, in an address space made with SpaceOptions::dirty_tracking; marks of an earlier
  /// time are forgotten. Until stop_dirty_tracking() unmaps hand what they take away to `harvest`, which outlives that;
  /// they may allocate, and cost a kernel call more. Not concurrent with execute().
  virtual Result<void> start_dirty_tracking(DirtyHarvest& harvest);
  virtual Result<void> stop_dirty_tracking();
  /// Adds the pages of `range` that were written since they were last read to `bitmap` (bit n: granule n of the range)
  /// and clears their marks. The range is mapped without holes, and whole mappings where
  /// SpaceFacts::dirty_reads_whole_mappings says so. On failure marks may be lost: count all of the range as written.
  virtual Result<void> read_dirty(const IovaRange& range, std::span<std::uint64_t> bitmap) noexcept;

  /// For poll(2): readable while page faults wait to be read. -1 without SpaceOptions::page_faults or before the first
  /// device. Owned by the space.
  virtual int page_fault_fd() const noexcept { return -1; }
  /// Takes up to out.size() page faults, oldest first; never blocks. Not concurrent with attach and detach.
  virtual Result<std::size_t> read_page_faults(std::span<PageFault> out) noexcept;
  /// Lets the requests of one cookie go: the device tries again, or gives up. not_found when nobody waits for it.
  virtual Result<void> answer_page_fault(std::uint32_t cookie, bool retry) noexcept;

  /// For poll(2): readable while fault records wait to be read. -1 where the interface delivers none, and before the
  /// first device. Owned by the space. Control plane.
  virtual int fault_record_fd() const noexcept { return -1; }
  /// Takes up to out.size() fault records, oldest first; never blocks. What is not read in time is counted as lost.
  virtual Result<std::size_t> read_fault_records(std::span<FaultRecord> out) noexcept;

  /// Windows, error handling and hand-over to KVM (spapr_tce/spapr_control.hpp); null on other interfaces.
  virtual SpaprControl* spapr() noexcept { return nullptr; }
};

/// An open interface.
class Backend {
 public:
  virtual ~Backend() = default;
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  virtual Interface interface() const noexcept = 0;
  /// A new, empty space. The backend outlives it.
  virtual Result<std::unique_ptr<BackendSpace>> create_space(const SpaceOptions& options) = 0;
  /// Moves an attached device between two spaces of this backend without a moment in which it translates through
  /// neither, where the interface can (iommufd); unsupported elsewhere.
  virtual Result<AttachedDevice> move_device(BackendSpace& from, DeviceId device, BackendSpace& to) = 0;
  /// What the device would take out of a space that it is attached to, as far as the host says beforehand: nothing for
  /// a bare descriptor. Control plane; attaches nothing.
  virtual std::vector<IovaRange> reserved_by(const DeviceSource& /*source*/) { return {}; }
};

}  // namespace iovane::backends
