// What a staleness monitor and a cache owe each other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "iovane/result.hpp"
#include "iovane/types.hpp"
#include "pinning/memory_range.hpp"

namespace iovane::pinning {

/// A cache, as the monitor sees it. Called by the monitor's threads; must not allocate or free with malloc in the first
/// four, nor wait for a thread that may be inside munmap(2), madvise(2), mremap(2) or fork(2).
class StalenessListener {
 public:
  virtual ~StalenessListener() = default;
  /// An event may be about to be taken from the kernel: no hits until changes_end().
  virtual void changes_begin() noexcept = 0;
  /// Everything taken has been invalidated.
  virtual void changes_end() noexcept = 0;
  /// The memory at these addresses is going, gone or moved. Returns how many regions it concerned.
  virtual std::size_t invalidate(const MemoryRange& range) noexcept = 0;
  /// The process forked: pages that it shares with the child may be copied when either writes.
  virtual void forked() noexcept = 0;
  /// Time to drop pins that nobody uses any more. May block in the kernel. Returns the bytes that came free.
  virtual std::uint64_t collect() noexcept = 0;
  /// Whether regions wait for their users, so that collect() should be called again.
  virtual bool has_retired() const noexcept = 0;
};

/// The monitor, as a cache sees it. Any thread.
class MemoryWatcher {
 public:
  virtual ~MemoryWatcher() = default;
  virtual Result<void> add_listener(StalenessListener& listener) noexcept = 0;
  /// When it returns, no call to the listener is running or will come.
  virtual void remove_listener(StalenessListener& listener) noexcept = 0;
  /// Makes the memory present and reports its changes from now on. Before it is pinned, and again for every pin:
  /// whatever was mapped there when it was last watched may have been replaced. Errors: bad_memory (not mapped, or of a
  /// kind that cannot be watched), busy (another monitor watches it).
  virtual Result<void> watch(const MemoryRange& range, Access access) noexcept = 0;
  /// No region covers this range any more.
  virtual void unwatch(const MemoryRange& range) noexcept = 0;
};

}  // namespace iovane::pinning
