// The allocator in units: everything that the facade (interval_allocator.hpp) offers, without bytes and texts.
//
// Purpose: hand out and take back unit ranges, lock-free.
// Structure: one immutable map of the space (extent_map.hpp) says which run owns which units; one word per slot of a
//   run (run.hpp) says what the interval in it is; per-thread magazines (thread_cache.hpp) hold free slots ready for
//   use. Everything else (shelves, the lookup cache) is a hint that can be wrong and is checked against these.
// Roles: any thread, except where a function says otherwise.
// Progress: allocate, free, claim, find and for_each are lock-free. set_usable takes a mutex against itself only.
// Linearization:
//   allocate   the store or CAS that makes the slot's word live, or the map commit that adds a run with a live slot
//   free       the store or CAS that makes the slot's word not live
//   claim      the CAS free -> live of a slot that equals the range, or the map commit that adds the run
//   find       the load of the slot's word, or of the map's word when no run covers the unit
//   failure    allocate: the map's word of the search after everything idle went back to it
// Multi-word work is ordered so that each step may be the last that a thread takes: a slot leaves a run by its word
//   first (settled), then settle() tells the map, and whoever meets a settled slot that the map still gives to the run
//   finishes it. Stopped in between, a thread holds back those units until somebody wants them, and its own magazines,
//   which are closed and taken when somebody wants them.
// Proven by: tests/model, tests/exhaustive, tests/stress, tests/litmus: interval_allocator_test.cpp in each.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "base/cacheline.hpp"
#include "iova/extent_map.hpp"
#include "iova/length_class.hpp"
#include "iova/metadata_arena.hpp"
#include "iova/run.hpp"
#include "iova/thread_cache.hpp"
#include "iova/thread_slots.hpp"
#include "iova/unit.hpp"

namespace iovane::iova {

struct CoreConfig {
  unsigned granule_log2;
  Direction direction;
  std::uint64_t metadata_limit_bytes;
  bool magazines;
};

enum class Outcome : std::uint8_t {
  done,
  exhausted,         ///< no room
  no_memory,         ///< metadata limit
  too_many_threads,  ///< no cache for this thread
  hole,              ///< the range touches units that are not usable: `where`
  live,              ///< it overlaps a live interval: `where`
  not_live,          ///< nothing live begins there
  partial,           ///< it is part of, or more than, the live interval `where`
  contended,         ///< another thread is in the middle of allocating or freeing this very interval: `where`
};

struct Answer {
  Outcome outcome;
  UnitRange where{};
};

struct AllocateRequest {
  std::uint64_t length;
  unsigned align_log2;
  Unit last_max;
};

struct CoreStats {
  std::uint64_t live_intervals;
  std::uint64_t live_units;
  std::uint64_t idle_units;  ///< owned by runs, not live
  std::uint64_t usable_units;
  std::uint64_t metadata_bytes;
  std::uint64_t metadata_high_water;
  std::optional<UnitRange> span;  ///< from the first to the last unit that a run owns
};

class AllocatorCore final : private Roster {
 public:
  static constexpr std::uint32_t threads_max = 1024;

  /// Control plane. Errors: out_of_memory, invalid_argument.
  static Result<std::unique_ptr<AllocatorCore>> create(const CoreConfig& config);
  ~AllocatorCore();

  std::uint64_t id() const noexcept { return id_; }
  Answer allocate(const AllocateRequest& request) noexcept;
  Answer free(UnitRange range) noexcept;
  Answer claim(UnitRange range) noexcept;
  std::optional<UnitRange> find(Unit unit) noexcept;
  /// The first live interval that ends at or above `unit`.
  std::optional<UnitRange> next_live(Unit unit) noexcept;
  CoreStats stats() noexcept;
  /// Windows ascending, disjoint, not adjacent; at most WindowList::capacity. Appends to `stranded` the live intervals
  /// that are now (partly) outside. Blocks against other calls of itself.
  Answer set_usable(std::span<const UnitRange> windows, std::vector<UnitRange>& stranded);
  /// The windows of the current version.
  std::vector<UnitRange> usable() noexcept;
  /// Gives everything idle back to the map: magazines, free slots, parked claims. Lock-free.
  void reclaim_idle() noexcept;

  /// For the exit of the thread that owns the cache.
  void release_cache(ThreadCache& cache) noexcept;

 private:
  explicit AllocatorCore(const CoreConfig& config, MetadataArena arena, MetadataArena versions) noexcept;

  // allocator_core.cpp
  ThreadCache* my_cache() noexcept {
    const auto slot = id_ % ThreadSlots::quick;
    if (thread_slots.allocator_id[slot] == id_) [[likely]]
      return thread_slots.cache[slot];
    return enlist();
  }
  ThreadCache* enlist() noexcept;
  ThreadCache* take_cache() noexcept;
  void reopen(ThreadCache& me) noexcept;
  void for_each_era(void (*see)(void*, std::uint64_t), void* context) const noexcept override;
  ObjectId class_of(LengthKey key) noexcept;
  LengthClass* class_at(ObjectId id) const noexcept { return arena_.at<LengthClass>(id); }

  // find()'s lookup cache: unit / 64 -> a run that may hold it, and its length's logarithm: [31..26] | [25..0]. Most
  // runs are 64 slots of a power of two and begin at a multiple of both, so the logarithm tells where the slot's word
  // is before the run does, and the two cache misses are one.
  static constexpr unsigned block_bits = 18;
  static constexpr std::size_t block_index(Unit unit) noexcept {
    const std::uint64_t block = unit >> 6;
    return static_cast<std::size_t>((block ^ (block >> 9) ^ (block >> 20)) & ((std::uint64_t{1} << block_bits) - 1));
  }
  static constexpr unsigned block_id_bits = 26;  // as many as MetadataArena has
  static_assert(MetadataArena::limit_bytes_max / MetadataArena::step_bytes <= std::uint64_t{1} << block_id_bits);
  void note_block(Unit unit, ObjectId run, std::uint64_t length) noexcept {
    // relaxed: a hint; the run is checked.
    blocks_[block_index(unit)].store(run | floor_log2(length) << block_id_bits, std::memory_order_relaxed);
  }
  void note_start(Run& run, Unit run_first, std::uint64_t length, unsigned slots, Unit start) noexcept;
  void forget_starts(const Run& run, const RunShape& shape) noexcept;
  std::uint64_t bytes_of(Unit unit) const noexcept { return unit << granule_log2_; }

  // runs.cpp
  struct RunPlan {
    std::uint64_t length;
    unsigned slots;
    unsigned align_log2;
    Unit last_max;
    RunKind kind;
    ObjectId length_class;
    SlotWord first_word;     ///< what the first `first_count` slots in allocation order say
    unsigned first_count;    ///< the others are free
    std::optional<Unit> at;  ///< exactly there; only one of at and the search is used
    unsigned at_slot;        ///< with `at`: the slot that gets first_word
  };
  struct MadeRun {
    Outcome outcome;
    Run* run;  ///< others may empty and reuse it at any time unless a slot of it is the caller's
    Unit first;
  };
  MadeRun make_run(ThreadCache& me, const RunPlan& plan) noexcept;
  Run* prepare_run(const RunPlan& plan) noexcept;
  void discard_run(Run& run) noexcept;
  /// The run that the section's version gives `unit` to, protected by the section.
  Run* locate(MapSection& section, Unit unit) noexcept;
  bool settle(ThreadCache& me, Run& run) noexcept;
  void bury(ThreadCache& me, Run& run) noexcept;
  enum class Eviction { gone, live, contended };
  Eviction evict(ThreadCache& me, Run& run, unsigned index) noexcept;
  bool close_incarnation(ThreadCache& me, Incarnation owner, SlotWordPtr word, bool to_free) noexcept;

  // magazines.cpp
  Magazine* magazine_for(ThreadCache& me, LengthKey key, ObjectId class_id) noexcept;
  void revalidate(ThreadCache& me, Magazine& magazine) noexcept;
  bool refill(ThreadCache& me, Magazine& magazine, Unit last_max) noexcept;
  static void push(Magazine& magazine, const MagazineEntry& entry) noexcept {
    const std::uint32_t n = magazine.size();
    magazine.put(n, entry);
    magazine.resize(n + 1);
  }
  bool take_from_shelf(ThreadCache& me, Magazine& magazine, unsigned want) noexcept;
  void flush(ThreadCache& me, Magazine& magazine, unsigned count) noexcept;
  void forget_handed_out(ThreadCache& me, ObjectId class_id) noexcept;
  static bool put_back_slot(ThreadCache& me, SlotWordPtr word, Incarnation owner) noexcept;
  void put_back(ThreadCache& me, std::span<const MagazineEntry> entries, Incarnation owner) noexcept;
  std::uint64_t note_free_slots(Run& run, std::uint64_t mask) noexcept;
  void note_taken_slots(Run& run, std::uint64_t mask) noexcept;
  LengthClass* give_back(ThreadCache& me, Run& run) noexcept;
  void give_back_more(ThreadCache& me, LengthClass& c) noexcept;
  std::uint64_t always_kept_slots(const LengthClass& c) const noexcept;
  std::uint64_t kept_slots(const LengthClass& c) const noexcept;
  unsigned run_slots_for(const LengthClass& c) const noexcept;
  unsigned capacity_for(const LengthClass& c) const noexcept;

  // allocate.cpp, release.cpp, claim.cpp
  Answer allocate_slow(ThreadCache& me, const AllocateRequest& request) noexcept;
  Answer allocate_irregular(ThreadCache& me, const AllocateRequest& request) noexcept;
  std::optional<Answer> try_allocate(ThreadCache& me, const AllocateRequest& request) noexcept;
  std::optional<Unit> pop(ThreadCache& me, Magazine& magazine) noexcept;
  Run* hinted_run(std::uint64_t start, std::uint64_t length) const noexcept;
  Answer free_slow(ThreadCache& me, UnitRange range) noexcept;
  bool close_unless_mine(ThreadCache& me, Incarnation owner, SlotWordPtr word) noexcept;
  void stow(ThreadCache& me, ObjectId class_id, const MagazineEntry& entry, Incarnation owner) noexcept;
  void park(ThreadCache& me, Run& run) noexcept;
  bool claim_by_hint(ThreadCache& me, UnitRange range) noexcept;
  static bool claimable(const Run& run) noexcept;
  Answer claim_once(ThreadCache& me, UnitRange range, bool& again) noexcept;
  void reclaim_idle(ThreadCache& me) noexcept;
  void convert(ThreadCache& me, UnitRange range, SegmentValue from, SegmentValue to) noexcept;

  static constexpr unsigned class_table_entries = 4096;
  static constexpr unsigned parked_entries = 8192;

  MetadataArena arena_;
  ExtentMap map_;
  std::uint64_t id_ = 0;
  unsigned granule_log2_;
  Direction direction_;
  bool magazines_;
  std::unique_ptr<HintEntry[]> hints_;
  std::unique_ptr<std::atomic<ObjectId>[]> blocks_;
  std::unique_ptr<std::atomic<ObjectId>[]> classes_;      ///< open addressing by key; place 0 stays empty
  std::unique_ptr<std::atomic<std::uint64_t>[]> parked_;  ///< generation << 32 | run
  std::unique_ptr<std::atomic<ThreadCache*>[]> caches_;
  alignas(base::cacheline_bytes) std::atomic<std::uint32_t> cache_count_{0};
  alignas(base::cacheline_bytes) std::atomic<std::uint64_t> run_units_{0};
  std::atomic<std::uint64_t> usable_units_{0};
  std::atomic<std::uint64_t> class_count_{0};
  std::atomic<std::uint64_t> parked_next_{0};
  std::mutex control_;  ///< set_usable against itself
};

}  // namespace iovane::iova
