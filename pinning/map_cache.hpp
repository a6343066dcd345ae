// The cache of pinned and mapped memory: ask for any range, get a lease; only the first time costs a kernel call.
//
// Purpose: the facade behind AddressSpace::acquire. A hit is a lookup and a lease (PinIndex); a miss pins and maps
//   through the provider, rounded to a chunk so that neighbours hit next time.
// Roles: any thread may acquire, invalidate, evict, collect; the staleness monitor announces and invalidates.
// Progress: hits wait-free. Misses take lock_ for bookkeeping and wait only for a pin of the same memory that is under
//   way, or for a change of the memory that the monitor is working on. No kernel call of the provider under lock_.
// Life of a region: planned (in_flight_) -> charged -> watched -> pinned -> live (index and eviction queue)
//   -> retired (out of the index) -> unpinned -> uncharged -> forgotten; undo in reverse order.
// Invariants: I1 a range is live, in flight, or neither, never two of them, so concurrent misses pin once. I2 a byte
//   is charged from before its pin until after its unpin. I3 a region is unpinned only after it left the index and
//   find_users() saw nobody. I4 an invalidation removes what is live and poisons what is in flight: a pin that it could
//   not see is never published. I5 while changes_pending_ is not 0, hits are off: the monitor has taken an event from
//   the kernel, whose author may run again before the event has been worked off.
// I6 under lock_ nothing is allocated from or returned to malloc: a thread in munmap() of malloc's memory may wait for
//   the monitor, and the monitor waits for this lock.
// Proven by: tests/unit/map_cache_test.cpp, tests/model/map_cache_model_test.cpp, tests/fault/map_cache_fault_test.cpp,
//   tests/stress/map_cache_stress_test.cpp, tests/unit/staleness_monitor_test.cpp.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>

#include "iovane/result.hpp"
#include "iovane/types.hpp"
#include "pinning/budget.hpp"
#include "pinning/eviction.hpp"
#include "pinning/file_windows.hpp"
#include "pinning/pin_index.hpp"
#include "pinning/provider.hpp"
#include "pinning/staleness.hpp"

namespace iovane::pinning {

struct MapCacheConfig {
  /// Misses are rounded to multiples of this where the memory allows: a power of two, from the provider's granule up
  /// to its border. Rounding pins neighbouring memory of the process too.
  Bytes chunk{64 * 1024};
  /// A miss that begins where an earlier one's memory ended goes up to the next multiple of twice what that one took,
  /// up to this: a power of two, chunk or more and at most an eighth of bytes_max. 0: always a chunk. A call of the
  /// kernel costs about as much as pinning a dozen OS pages, so a sequential user with small buffers pays for the call
  /// again in every chunk.
  Bytes chunk_max{0};
  /// This cache's own limit, beside those of the shared budget.
  Bytes bytes_max{ByteLimit::unlimited};
  /// How many regions may exist, retired ones included.
  std::uint32_t regions_max = 1U << 20;
  /// An eviction takes at least so many regions, to share one barrier and one batch of unpins; up to 64.
  std::uint32_t evict_min = 8;
  /// Which NUMA node memory is charged to; asked only when the budget has node limits. Empty: node_of_memory().
  std::function<std::uint8_t(const MemoryRange&)> node_of{};
  /// Told (from collect(), by its caller's thread, without locks) of memory that was changed while a device was using
  /// it: the range stays pinned until its leases end and is served to nobody else.
  std::function<void(const MemoryRange&)> on_stale_use{};
};

/// Counters since open() unless "now" is said.
struct MapCacheStats {
  std::uint64_t misses = 0;  ///< calls that found something missing
  std::uint64_t waits = 0;   ///< of those, how many waited for another thread's pin
  std::uint64_t pins = 0;
  std::uint64_t bytes_pinned = 0;  ///< now, as charged
  std::uint64_t evictions = 0;
  std::uint64_t invalidations = 0;    ///< regions taken out because their memory changed
  std::uint64_t poisoned = 0;         ///< pins thrown away because the memory changed while they were made
  std::uint64_t stale_in_use = 0;     ///< invalidated regions that were seen in use
  std::uint64_t regions_retired = 0;  ///< now: out of the index, waiting for their leases
  std::uint64_t regions_lost = 0;     ///< now: the unpin failed; pinned and charged for good
};

/// The node of the first OS page of `range`, or of the calling CPU when that page is not there yet. 0 on machines with
/// one node. One or two system calls.
std::uint8_t node_of_memory(const MemoryRange& range) noexcept;

class MapCache final : public Evictor, public StalenessListener {
 public:
  /// `provider`, `budget` and `watcher` (may be null: no monitor) are borrowed and outlive the cache.
  static Result<std::unique_ptr<MapCache>> open(PinProvider& provider, PinBudget& budget, MapCacheConfig config,
                                                MemoryWatcher* watcher = nullptr);
  /// Unpins everything. Precondition: no lease and no hold is left; regions that are still in use stay pinned.
  ~MapCache() override;

  /// A lease on the mapping of `range.start`, reaching at least its granule's last byte and usually all of the range:
  /// length() says how far. A hit takes no lock and no kernel call. A miss pins what is missing of the whole range and
  /// may block for the kernel or for another thread's pin. Any thread.
  /// Errors: invalid_argument, bad_memory, memlock_exceeded (which limit, its size, use and need: all of it in use),
  /// entry_limit, unsupported (the memory cannot be watched), busy (the memory keeps changing), closed (forked child),
  /// and what the provider says.
  [[gnu::always_inline]] Result<Lease> acquire(MemoryRange range, Access access) noexcept {
    if (Lease lease = try_acquire(range, access); lease) [[likely]]
      return lease;
    return acquire_missing(range, access);
  }
  /// The hit alone: empty when any part of the range's first granule is missing. Wait-free.
  [[gnu::always_inline]] Lease try_acquire(MemoryRange range, Access access) noexcept {
    // A.changes - acquire, pairs with R.changes in changes_end(): 0 after an event shows what the event removed (I5).
    if (changes_pending_.load(std::memory_order_acquire) != 0) [[unlikely]]
      return {};
    return index_.acquire(range, access);
  }
  /// try_acquire(), but empty also when this thread's guard words are all in use. What it returns can be detached.
  [[gnu::always_inline]] Lease try_acquire_by_guard(MemoryRange range, Access access) noexcept {
    if (changes_pending_.load(std::memory_order_acquire) != 0) [[unlikely]]  // A.changes - acquire, as above
      return {};
    return index_.acquire_by_guard(range, access);
  }
  /// Leases for the whole range, in order: returns how many. limit_reached when they do not fit into `out`, which is
  /// empty then.
  Result<std::size_t> acquire_all(const MemoryRange& range, Access access, std::span<Lease> out) noexcept;
  /// A counted hold instead: for other threads and long uses.
  Result<Hold> acquire_hold(const MemoryRange& range, Access access) noexcept;

  /// Registers a file; its memory is then asked for by keys: window.start + offset. See FileWindows.
  Result<MemoryRange> add_file(int fd, Bytes length) noexcept;
  /// The same for memory that the provider knows by a name other than 0 (PinRequest::memory).
  Result<MemoryRange> add_named(std::uint64_t memory, Bytes length) noexcept {
    return files_.add_named(memory, length);
  }
  /// Invalidates the window and forgets the file or the name.
  Result<void> remove_file(const MemoryRange& window) noexcept;

  /// The memory changed (or is about to): nothing in this range is served again from what is pinned now. Regions in
  /// use stay pinned until released. Returns how many regions left. Any thread.
  std::size_t invalidate(const MemoryRange& range) noexcept override;
  /// Nothing is served again from what is pinned now, although the memory is what it was.
  void drop_all() noexcept { (void)retire({0, key_last}); }
  /// Unpins retired regions whose leases are gone. Misses, evictions and the monitor's second thread do it too.
  /// Returns the bytes that came free.
  std::uint64_t collect() noexcept override;
  bool has_retired() const noexcept override;
  /// Evictor: unpins unused regions.
  std::uint64_t evict(std::uint64_t bytes, std::uint8_t node) noexcept override;

  void changes_begin() noexcept override;
  void changes_end() noexcept override;
  void forked() noexcept override;

  /// How the provider would be asked for this range: with descriptor and offset where it is a file's.
  PinRequest request_for(const MemoryRange& range, Access access) const noexcept;

  PinIndex& index() noexcept { return index_; }
  PinProvider& provider() noexcept { return provider_; }
  MapCacheStats stats() const noexcept;
  const MapCacheConfig& config() const noexcept { return config_; }

 private:
  static constexpr std::size_t pieces_max = 32;      // per call of the provider
  static constexpr std::size_t in_flight_max = 128;  // pieces being pinned
  static constexpr unsigned attempts_max = 16;       // without progress
  static constexpr unsigned refusals_max = 4;        // of watched memory by the provider

  static constexpr std::size_t streams_max = 16;

  /// A sequential user: where its next miss would begin, and how far the last one could have gone.
  struct Stream {
    std::uint64_t next = 0;
    std::uint64_t bytes = 0;
  };
  struct InFlight {
    MemoryRange range{};
    bool used = false;
    bool poisoned = false;
  };
  struct PinBatch;

  MapCache(PinProvider& provider, PinBudget& budget, MapCacheConfig config, MemoryWatcher* watcher);

  Result<Lease> acquire_missing(MemoryRange range, Access access) noexcept;
  Result<void> ensure(const MemoryRange& wanted, Access access) noexcept;
  // map_cache_miss.cpp
  enum class PlanVerdict : std::uint8_t { covered, planned, wait };
  PlanVerdict plan(PinBatch& batch) noexcept;
  MemoryRange with_margin(PinBatch& batch) const noexcept;
  void note_stream(const MemoryRange& area, std::uint64_t step) noexcept;
  void supersede_weaker(PinBatch& batch) noexcept;
  bool is_in_flight(const MemoryRange& range) const noexcept;
  void add_gap(PinBatch& batch, MemoryRange gap) noexcept;
  Result<void> fill_in(PinBatch& batch) noexcept;
  Result<void> charge(PinBatch& batch) noexcept;
  Result<void> watch(PinBatch& batch) noexcept;
  void publish(PinBatch& batch) noexcept;
  void abandon(PinBatch& batch) noexcept;
  std::optional<BudgetRefusal> try_charge(std::uint8_t node, std::uint64_t bytes) noexcept;
  void uncharge(std::uint8_t node, std::uint64_t bytes) noexcept;
  bool make_room(std::uint64_t bytes, std::uint8_t node, BudgetRefusal::Limit which, const MemoryRange& keep,
                 std::uint64_t unpins_seen) noexcept;
  bool settle(std::uint64_t unpins_seen) noexcept;
  bool await_unpins(std::uint64_t unpins_seen) noexcept;
  bool await_walkers() noexcept;
  Error refusal_text(const BudgetRefusal& refusal) const noexcept;
  // map_cache_retire.cpp
  std::uint64_t evict_beside(std::uint64_t bytes, std::uint8_t node, const MemoryRange* keep) noexcept;
  std::size_t retire(const MemoryRange& range) noexcept;
  void retire_locked(RegionId id) noexcept;
  void push_retired(RegionId id, RegionList list) noexcept;
  RegionId pop_retired() noexcept;
  void unwatch_locked(const MemoryRange& range) noexcept;
  std::uint64_t unpin(std::span<const RegionId> ids) noexcept;

  PinProvider& provider_;
  PinBudget& budget_;
  MapCacheConfig config_;
  MemoryWatcher* watcher_;
  PinIndex index_;
  std::atomic<std::uint32_t> changes_pending_{0};

  mutable std::mutex lock_;
  /// A pin under way ended, or the monitor worked off its events. On the heap: a forked child must not destroy a
  /// condition that threads it does not have are waiting for (pthread_cond_destroy would wait for them).
  std::unique_ptr<std::condition_variable> changed_ = std::make_unique<std::condition_variable>();
  EvictionPolicy policy_;
  ByteLimit space_;
  std::array<InFlight, in_flight_max> in_flight_{};
  std::size_t in_flight_count_ = 0;  // places of it in use
  /// Single misses in the first half, in the second half those that were gone on with, so that random misses do not
  /// push those out. Each half is a ring.
  std::array<Stream, streams_max> streams_{};
  std::array<std::size_t, 2> stream_oldest_{};
  RegionId retired_newest_ = no_region;
  RegionId retired_oldest_ = no_region;
  bool waits_for_walk_ = false;         // as of the last collect(): some region is only held back by a lookup under way
  std::uint32_t unpins_under_way_ = 0;  // regions on no list, not yet uncharged: somebody is unpinning them
  /// Batches of unpins that have ended. Written under lock_; read without, to notice that room came free meanwhile.
  std::atomic<std::uint64_t> unpins_ended_{0};
  MapCacheStats stats_;
  FileWindows files_;
};

}  // namespace iovane::pinning
