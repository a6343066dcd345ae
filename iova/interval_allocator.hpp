// Who owns which I/O virtual addresses: the facade of iova/.
//
// Intervals of any length that is a multiple of the granule, from one granule to the whole space, out of several usable
// windows. Every live interval is known exactly: its start and its length; whatever else is handed to free() is refused
// and changes nothing. How it works, and why it may: allocator_core.hpp and docs/IOVA.md.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "iova/extent_tree.hpp"
#include "iova/fast_paths.hpp"
#include "iova/thread_slots.hpp"
#include "iovane/result.hpp"
#include "iovane/types.hpp"

namespace iovane::iova {

class AllocatorCore;

inline constexpr Bytes granule_min{4096};
inline constexpr std::size_t usable_windows_max = 256;

struct IntervalAllocatorConfig {
  /// The smallest unit: a power of two, at least granule_min.
  Bytes granule = granule_min;
  /// What may be handed out, in any order, not overlapping; borrowed during the call. Parts of a granule at their ends
  /// are not used.
  std::span<const IovaRange> windows;
  Direction direction = Direction::top_down;
  /// Bound of the allocator's own memory: address space is reserved at once, memory used as needed. 64 KiB to 4 GiB.
  Bytes metadata_limit = Bytes{std::uint64_t{1} << 30};
  /// Off: every call goes to the shared level. For measurements and for tests.
  bool magazines = true;
};

struct AllocateOptions {
  /// Of the start; a power of two. 0 means the granule.
  Bytes align{};
  /// The last address that the interval may contain: 2^32-1 for a device with 32-bit DMA.
  Iova ceiling = iova_max;
};

struct AllocatorStats {
  std::uint64_t live_intervals = 0;
  Bytes live{};      ///< saturates at 2^64-1 where every address is live
  Bytes idle{};      ///< free, but kept for lengths or ranges that were used before
  Bytes usable{};    ///< in windows; saturates
  Bytes metadata{};  ///< in objects now
  Bytes metadata_high_water{};
  std::optional<IovaRange> span;  ///< from the first to the last address that is live or idle
};

/// Any thread may call anything at any time, but for construction and destruction; calls that may block say so.
class IntervalAllocator {
 public:
  /// Errors: invalid_argument (granule, windows that overlap or hold no whole granule's worth of nothing, limits),
  /// out_of_memory, limit_reached. Blocks; allocates.
  static Result<std::unique_ptr<IntervalAllocator>> create(const IntervalAllocatorConfig& config);
  ~IntervalAllocator();
  IntervalAllocator(const IntervalAllocator&) = delete;
  IntervalAllocator& operator=(const IntervalAllocator&) = delete;

  /// Takes `length` bytes, a multiple of the granule. Lock-free. The direction is a preference: of freed intervals of
  /// the same length the most recently freed is used first. Undo: free() of the returned range.
  /// Errors: invalid_argument, iova_exhausted (fragmentation counts), out_of_memory (metadata limit), limit_reached
  /// (more than 1024 threads at once).
  Result<IovaRange> allocate(Bytes length, AllocateOptions options = {}) noexcept;
  /// One contiguous interval for the parts of a scatter list, each rounded up to the granule: `starts[i]` becomes where
  /// part i begins. The spans have equal sizes. Errors: as allocate(). Undo: free() of the returned range.
  Result<IovaRange> allocate_contiguous(std::span<const Bytes> parts, std::span<Iova> starts,
                                        AllocateOptions options = {}) noexcept;
  /// Gives a live interval back, all of it. Lock-free; any thread, not only the one that allocated it.
  /// Errors, which change nothing: invalid_argument (malformed or not of whole granules), not_found (nothing live
  /// begins there: a double or foreign free), would_bisect (part of a live interval, or more than it; the detail names
  /// it), busy (another thread is in the middle of freeing the same interval).
  Result<void> free(IovaRange range) noexcept;
  /// Takes exactly this range, or nothing. Lock-free. Undo: free().
  /// Errors: invalid_argument, iova_reserved (touches what is not usable; the detail names the part), iova_busy
  /// (overlaps a live interval, or one that another thread is just allocating or freeing; the detail names it),
  /// out_of_memory.
  Result<void> claim(IovaRange range) noexcept;
  /// The live interval that contains the address. Lock-free.
  std::optional<IovaRange> find(Iova address) const noexcept;
  /// Calls `see(IovaRange)` for each live interval, ascending. Each was live at some moment of the call. Lock-free; the
  /// callback may use the allocator.
  template <typename See>
  void for_each(See&& see) const {
    for (std::optional<Iova> from = Iova{0}; from;) {
      const std::optional<IovaRange> found = next_live(*from);
      if (!found) return;
      see(*found);
      from = found->last == iova_max ? std::nullopt : std::optional{Iova{found->last.value + 1}};
    }
  }
  /// The first live interval that ends at or above `from`. Lock-free.
  std::optional<IovaRange> next_live(Iova from) const noexcept;

  /// Replaces the usable windows and answers with the live intervals that are now, at least partly, outside of them.
  /// These stay live and can be freed; what is freed outside is not handed out again. Blocks against itself; allocates.
  /// Errors: invalid_argument, out_of_memory.
  Result<std::vector<IovaRange>> set_usable(std::span<const IovaRange> windows);
  /// The windows in force. Allocates.
  std::vector<IovaRange> usable() const;
  /// Gives everything that is free but kept back to the space. Lock-free; takes as long as there are runs.
  void trim() noexcept;
  /// Exact when nothing runs meanwhile.
  AllocatorStats stats() const noexcept;
  Bytes granule() const noexcept { return {std::uint64_t{1} << granule_log2_}; }

 private:
  IntervalAllocator(std::unique_ptr<AllocatorCore> core, unsigned granule_log2) noexcept;
  /// The start, or nothing_popped and why.
  std::uint64_t allocate_slow(Bytes length, AllocateOptions options, Error& why) noexcept;
  Result<void> free_slow(IovaRange range) noexcept;

  std::unique_ptr<AllocatorCore> core_;
  std::uint64_t id_;
  unsigned granule_log2_;
};

// Both ways answer with a start in a register: a Result that is made on one side of a call goes through memory, and the
// next free would wait for it there.
inline Result<IovaRange> IntervalAllocator::allocate(Bytes length, AllocateOptions options) noexcept {
  const std::uint64_t align = options.align.value;
  const bool plain =
      options.ceiling == iova_max && (align == 0 || ((align & (align - 1)) | (length.value & (align - 1))) == 0);
  const auto quick = id_ % ThreadSlots::quick;
  std::uint64_t start = nothing_popped;
  if (plain && thread_slots.allocator_id[quick] == id_) [[likely]]
    start = pop_fast(*thread_slots.cache[quick], length.value);
  if (start == nothing_popped) [[unlikely]] {
    Error why;
    start = allocate_slow(length, options, why);
    if (start == nothing_popped) return why;
  }
  return IovaRange{Iova{start}, Iova{start + (length.value - 1)}};
}

inline Result<void> IntervalAllocator::free(IovaRange range) noexcept {
  const auto quick = id_ % ThreadSlots::quick;
  if (thread_slots.allocator_id[quick] == id_ &&
      push_fast(*thread_slots.cache[quick], range.start.value, range.last.value)) [[likely]]
    return {};
  return free_slow(range);
}

}  // namespace iovane::iova
