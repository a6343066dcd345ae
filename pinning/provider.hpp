// The seam to whatever pins memory: an address space that maps it, io_uring's buffer table, a counter in tests.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "iovane/result.hpp"
#include "iovane/types.hpp"
#include "pinning/memory_range.hpp"
#include "pinning/region.hpp"

namespace iovane::pinning {

/// What a provider can do; constant while it lives.
struct ProviderTraits {
  std::string_view name;
  /// Pins start at multiples of this and are multiples of it. A power of two, at least granule_bytes.
  Bytes granule{granule_bytes};
  /// No pin crosses a multiple of this (a power of two): the longest single pin. iommufd: 1 GiB, so that copies from
  /// different chunks do not share a lock; io_uring: 1 GiB, its own limit.
  Bytes border{std::uint64_t{1} << 30};
  /// How many pins it can hold at once.
  std::uint32_t pins_max = 0xffff'ffff;
  /// pin() calls for different ranges make progress in parallel (type1 holds one mutex: false there).
  bool parallel = true;
  /// Memory given as `fd` and offset can be pinned without mapping it into this process by the caller.
  bool files = false;
};

/// One range to pin. For memory of this process `fd` is -1, `memory` 0, and range.start its address; for a file, `fd`
/// and `offset` say where range.start lies; for memory that the provider knows by a name, `memory` and `offset` do.
struct PinRequest {
  MemoryRange range;
  Access access = Access::read_write;
  int fd = -1;
  std::uint64_t offset = 0;
  std::uint64_t memory = 0;
};

struct PinOutcome {
  PinHandle handle;
  Error error;  ///< ok when the handle counts
};

struct UnpinRequest {
  MemoryRange range;
  Access access = Access::read_write;
  PinHandle handle;
};

/// Pins memory and makes it reachable; the two are one step here, for with iommufd and type1 the mapping is the pin.
///
/// Each call carries a batch, and each element has its own verdict: one that fails leaves no trace and does not touch
/// its neighbours. Calls come from any thread, several at a time, never under a lock of the cache, and may block for as
/// long as the kernel takes. They must not wait for a thread that may be waiting for the staleness monitor.
class PinProvider {
 public:
  virtual ~PinProvider() = default;

  virtual const ProviderTraits& traits() const noexcept = 0;

  /// outcomes.size() == requests.size(). Ranges are granular, disjoint, and cross no border. Errors: bad_memory
  /// (not mapped, or not allowed), memlock_exceeded (with limit, use, need), entry_limit, whatever the kernel said.
  virtual void pin(std::span<const PinRequest> requests, std::span<PinOutcome> outcomes) noexcept = 0;

  /// Undoes pins, in one batch where the backend can. When it returns ok for an element, no device reaches that memory
  /// through its handle any more and the pin is gone; otherwise the range stays as it is, for good.
  virtual void unpin(std::span<const UnpinRequest> requests, std::span<Error> outcomes) noexcept = 0;

  /// Memory of this process was unmapped, discarded or replaced. Providers whose pins go by address answer busy to pins
  /// of it until what they pinned there before is unpinned; for others there is nothing to do. From any thread,
  /// the monitor's too: must not allocate, nor wait for a thread that may be allocating.
  virtual void memory_changed(const MemoryRange& /*range*/) noexcept {}

  /// What the kernel will charge against memlock for such a pin. A pure function of the request.
  virtual Bytes memlock_charge(const PinRequest& request) const noexcept { return request.range.length(); }
};

}  // namespace iovane::pinning
