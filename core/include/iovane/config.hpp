// Every setting and every bound, with its default.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "iovane/types.hpp"

namespace iovane {

/// What becomes of a descriptor that a caller passes in.
enum class DescriptorUse : std::uint8_t {
  borrow,     ///< used as it is; the caller keeps it open for as long as iovane uses it
  duplicate,  ///< duplicated (close-on-exec); the caller may close its own at once
};

/// The engine's own threads: one per NUMA node, started when something first needs them (relaxed unmaps, queues that
/// must not block, address spaces with several queues). They block all signals and are called iovane-w<number>.
struct WorkerConfig {
  bool enabled = true;  ///< false: what needs a worker is refused
  bool pin = true;      ///< run on the CPUs of the node only, where there are several nodes
  /// A second thread per node, iovane-u<number>, which sleeps until the first has ended, as by a seccomp filter, and
  /// then goes on in its place. Without it the callers who wait for the worker do, and nobody does for a caller who
  /// sleeps on an eventfd or a ring.
  bool understudy = true;
  /// How long an idle worker looks for work before it sleeps; 0 for never. A sleeping worker costs its caller a wake of
  /// some 70 microseconds.
  std::chrono::nanoseconds spin{0};
  /// Called first thing on each worker's thread (and its understudy's), with its number: the place for a host's own
  /// seccomp filter or control group. The calls that a worker makes are in docs/ENGINE.md. If it throws, the worker
  /// does nothing, and whoever waits for it does its work.
  std::function<void(unsigned)> on_start{};
};

/// What "auto" rests on beside a static order (iommufd before type1).
enum class AutoMeasure : std::uint8_t {
  never,     ///< the static order alone
  cached,    ///< a measurement on file counts, none is made
  when_new,  ///< a short one is made when none is on file for this boot, kernel and set of devices
  always,
};

/// How much memory the caches of one engine may keep pinned, all of them together. See AddressSpace::open_cache().
struct PinLimits {
  /// 0: nine tenths of what RLIMIT_MEMLOCK leaves this process when the first cache opens.
  Bytes process{};
  std::vector<Bytes> nodes{};  ///< by NUMA node; absent or 0: no limit of its own
};

struct EngineConfig {
  /// "auto", "stage1", "iommufd", "type1" (v2), "type1-v1", "compat", "compat-v1" (type1's calls on /dev/iommu), or the
  /// software IOMMU: "model", "model:type1", "model:type1-v1", "model:compat", "model:compat-v1". The environment
  /// variable IOVANE_BACKEND stands in for "auto".
  std::string backend = "auto";
  /// "auto" may open an idle device on each interface, once per boot, and time some maps and unmaps (40 ms of them, and
  /// whatever the device's reset takes); see docs/LIVE.md. "iommufd" uses a measurement that is on file to choose
  /// between sharing and repeating pins; only `always` makes one for it. IOVANE_MEASURE=never, cached, when-new or
  /// always overrides.
  AutoMeasure measure = AutoMeasure::when_new;
  /// Where the measurement is kept; empty: IOVANE_MEASUREMENT_FILE, or $XDG_CACHE_HOME/iovane/interfaces,
  /// $HOME/.cache/iovane/interfaces, /run/iovane/interfaces.
  std::string measurement_file;
  /// An open /dev/iommu, or -1. With descriptors given, iovane opens no path: a manager may keep the privileges.
  int iommu_fd = -1;
  /// An open /dev/vfio/vfio, or -1.
  int container_fd = -1;
  DescriptorUse descriptors = DescriptorUse::borrow;
  WorkerConfig workers{};
  /// Where to publish the counters of all address spaces for 'iovane top': a path to be created and removed again, or
  /// "auto" for one in /dev/shm. Empty: nowhere. Readable by this user only.
  std::string stats_page{};
  PinLimits pins{};
  /// A userfaultfd from a manager, not shaken hands on (UFFDIO_API), for Staleness::monitored; -1: open one when
  /// needed. Duplicated then.
  int userfault_fd = -1;
};

/// Who decides IOVAs.
enum class LayoutPolicy : std::uint8_t {
  engine_managed,    ///< the engine chooses; fixed placements are allowed beside
  fixed,             ///< the caller chooses inside `promised` ranges, which every later attach must respect
  host_constrained,  ///< the caller chooses inside what AddressSpace::guest_layout() showed, which later attaches
                     ///< respect
};

/// When a device can no longer reach unmapped memory.
enum class UnmapMode : std::uint8_t {
  strict,   ///< when the unmap completes
  relaxed,  ///< a bounded time later; the unmap completes at once. Like Linux's lazy mode, it weakens the protection
            ///< from one's own device for that time, never the host's
};

/// Whichever is reached first makes the deferred unmaps happen.
struct RelaxedBounds {
  std::uint32_t mappings_max = 4096;                                 ///< 1 to 2^20
  Bytes bytes_max{std::uint64_t{256} << 20};                         ///< at least 1
  std::chrono::nanoseconds time_max{std::chrono::milliseconds{10}};  ///< at least 1 ns
};

struct AddressSpaceConfig {
  std::string name;  ///< for reports; empty: "space N"
  LayoutPolicy layout = LayoutPolicy::engine_managed;
  std::vector<IovaRange> promised;        ///< LayoutPolicy::fixed: what must stay usable; sorted, disjoint
  std::uint32_t mappings_max = 1U << 20;  ///< live mappings; one more is limit_reached
  std::uint32_t memories_max = 1U << 16;  ///< registered memories
  bool large_iopte = true;                ///< false: granule-sized IOPTEs only (a measurement knob of iommufd)
  /// Devices' writes can be recorded, see AddressSpace::start_dirty_tracking(). Costs nothing until that is called;
  /// devices whose IOMMU cannot track are refused.
  bool dirty_tracking = false;
  /// Devices may ask for pages that are not mapped and wait, see AddressSpace::page_fault_fd(). Devices that cannot are
  /// refused; iommufd only.
  bool page_faults = false;
  std::uint32_t dirty_runs_max = 1U << 16;  ///< runs of unmapped, written pages kept until they are read
  UnmapMode unmap = UnmapMode::strict;
  RelaxedBounds relaxed{};  ///< UnmapMode::relaxed
};

/// Who executes a batch.
enum class SubmitMode : std::uint8_t {
  combine,      ///< the submitting thread, or whoever is at work in the address space already
  never_block,  ///< a worker, always: submit() costs a hand-over and returns
};

struct QueueConfig {
  /// Operations between stage() and poll(): the bound of both rings. Rounded up to a power of two; 1 to 65536.
  std::uint32_t depth = 256;
  SubmitMode submit = SubmitMode::combine;
  /// Batches that map at least so much are handed to a worker too: pinning takes milliseconds per GiB. 0: none.
  Bytes hand_over{0};
};

/// A device, by any of the ways a sandboxed caller may hold it.
struct DeviceConfig {
  std::string pci_address;  ///< "0000:00:03.0"; alone: looked up on the host and opened
  int cdev_fd = -1;         ///< open VFIO device cdev, for iommufd
  int group_fd = -1;        ///< open VFIO group, for type1
};

/// How a cache learns that memory changed under a pin. What each one guarantees: docs/PINNING.md.
enum class Staleness : std::uint8_t {
  /// Only by AddressSpace::invalidate().
  explicit_only,
  /// Also by userfaultfd: munmap, mmap over it, mremap, madvise and fork, by whatever code. Needs CAP_SYS_PTRACE.
  monitored,
  /// The same without fork; needs vm.unprivileged_userfaultfd, /dev/userfaultfd, or CAP_SYS_PTRACE.
  monitored_except_fork,
};

struct CacheConfig {
  /// Misses are rounded to multiples of this where the memory allows, so that neighbours hit next time: a power of two
  /// from the granule to 1 GiB. Rounding pins, and lets devices reach, neighbouring memory of the process too.
  Bytes chunk{64 * 1024};
  /// A miss that goes on where an earlier one's memory ended goes up to the next border of twice its size, up to this,
  /// for users that walk through much memory in small buffers: a power of two from the chunk to 1 GiB and at most an
  /// eighth of bytes_max. 0: always a chunk.
  Bytes chunk_max{0};
  Bytes bytes_max{~std::uint64_t{0}};    ///< kept pinned by this cache, beside PinLimits
  std::uint32_t regions_max = 1U << 20;  ///< mappings kept
  std::uint32_t evict_min = 8;           ///< an eviction takes at least so many at once, up to 64
  Iova ceiling = iova_max;               ///< the last IOVA that mappings may use (32-bit DMA: 0xffffffff)
  Staleness staleness = Staleness::explicit_only;
};

/// Making memory present before it is registered.
struct PopulateConfig {
  unsigned threads = 0;  ///< caller included; 0: one per CPU
  Bytes os_page{4096};   ///< behind the memory, where it is known: no piece of work is smaller
  /// Called by one thread at a time with the bytes that are present and all bytes. False cancels.
  std::function<bool(Bytes done, Bytes total)> progress{};
};

}  // namespace iovane
