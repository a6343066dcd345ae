// Memory pinned once, for every address space of one /dev/iommu.
//
// Registered memory is mapped into a staging IOAS that no device is attached to. An I/O page table allocated for that
// IOAS (HWPT_ALLOC without an attach) makes the kernel pin everything in it; IOAS_COPY then shares those pins with the
// address spaces that devices see. HWPT_ALLOC needs a bound device, so memory that is registered earlier is pinned
// when the first device is bound. Chunks end at 1 GiB borders of the staging IOVA: every chunk is one lock inside the
// kernel, so copies from different chunks run in parallel, and no cut is where an IOPTE could be larger.
//
// The same memory registered twice is one registration with two references. Threads: all calls take the lock.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "backends/backend.hpp"
#include "backends/kernel.hpp"

namespace iovane::backends::iommufd {

/// One registration: where the memory lies in the staging IOAS.
struct StagedMemory {
  MemoryRange memory{};
  IovaRange staged{};
  bool writable = true;
  std::uint32_t references = 0;
};

/// What the staging IOAS is for, beside holding pins.
struct StagingOptions {
  std::uint32_t holder_flags = 0;  ///< of the HWPT that pins: hwpt_alloc_nest_parent makes it one
  std::vector<IovaRange> avoid{};  ///< never used: what devices reserve, where they will be attached to the IOAS
};

class Staging {
 public:
  /// `kernel` and the descriptor outlive it. The staging IOAS is allocated with the first registration.
  Staging(Kernel& kernel, int fd, bool map_file, Bytes granule, StagingOptions options) noexcept
      : kernel_{kernel}, fd_{fd}, map_file_{map_file}, granule_{granule}, options_{std::move(options)} {}
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging();

  /// Takes a reference on the memory's registration and makes it when there is none; pins when a device is bound. The
  /// pointer stays valid until the matching drop().
  Result<const StagedMemory*> acquire(const MemoryRange& memory);
  void drop(const StagedMemory* staged) noexcept;

  /// A device was bound: pins what is registered. Fails with the reason (memlock, memory gone) and changes nothing.
  Result<void> device_bound(std::uint32_t device);
  /// A device is about to be unbound; later registrations use another one for their pin.
  void device_unbound(std::uint32_t device) noexcept;

  std::uint32_t ioas() const noexcept { return ioas_; }

  /// The HWPT that pins, made with `device` when there is none yet.
  Result<std::uint32_t> holder(std::uint32_t device);
  /// Room that register calls leave alone, for map_at(). Any thread.
  Result<IovaRange> reserve(Bytes length);
  void release(IovaRange room) noexcept;
  /// Maps process memory into reserved room, whole or part. 0 or a positive errno. Any thread.
  int map_at(Iova at, std::uint64_t address, Bytes length, bool writable) noexcept;
  int unmap_at(IovaRange range) noexcept { return unmap(range); }

 private:
  Result<void> have_ioas();
  Result<void> hold_pins(std::uint32_t device);
  Result<IovaRange> find_room(const MemoryRange& memory);
  Result<void> ask_usable();
  std::optional<IovaRange> first_fit(std::uint64_t from, Bytes length, std::uint64_t modulus,
                                     std::uint64_t phase) const noexcept;
  Result<void> map_chunks(StagedMemory& staged);
  int map_chunk(const StagedMemory& staged, IovaRange chunk) noexcept;
  int settled(int why, IovaRange chunk) noexcept;
  int unmap(IovaRange range) noexcept;

  Kernel& kernel_;
  int fd_;
  bool map_file_;
  Bytes granule_;
  const StagingOptions options_;
  std::mutex mutex_;          // guards everything below
  std::uint32_t ioas_ = 0;    // 0: not allocated; written once, before the first StagedMemory is handed out
  std::uint32_t holder_ = 0;  // the HWPT that pins; 0 until a device was bound
  std::vector<std::uint32_t> bound_;
  std::list<StagedMemory> registrations_;
  std::map<std::uint64_t, std::uint64_t> used_;  // staged start -> last
  std::vector<IovaRange> usable_;                // of the IOAS, less what is to be avoided; asked for anew by register
  std::uint64_t next_room_ = 0;                  // where reserve() looks first
};

}  // namespace iovane::backends::iommufd
