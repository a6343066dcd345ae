#include "iova/allocator_core.hpp"

#include <new>

#include "base/asymmetric_barrier.hpp"
#include "base/error_text.hpp"
#include "base/yield_point.hpp"

namespace iovane::iova {
namespace {

constexpr std::uint64_t versions_limit_bytes = std::uint64_t{1} << 22;  // 2^16 ids of 64 bytes
constexpr std::uint64_t unbiased_frees_first = 1024;
constexpr std::uint64_t unbiased_frees_most = std::uint64_t{1} << 22;
constexpr unsigned class_probes_max = 64;

template <typename T>
std::unique_ptr<std::atomic<T>[]> zeroed(std::size_t n) {
  return std::unique_ptr<std::atomic<T>[]> { new (std::nothrow) std::atomic<T>[ n ]() };
}

}  // namespace

AllocatorCore::AllocatorCore(const CoreConfig& config, MetadataArena arena, MetadataArena versions) noexcept
    : arena_{std::move(arena)},
      map_{arena_, std::move(versions), *this, ~std::uint64_t{0} >> config.granule_log2},
      granule_log2_{config.granule_log2},
      direction_{config.direction},
      magazines_{config.magazines} {}

Result<std::unique_ptr<AllocatorCore>> AllocatorCore::create(const CoreConfig& config) {
  base::prepare_asymmetric_barrier();
  auto arena = MetadataArena::create(Bytes{config.metadata_limit_bytes});
  if (!arena) return arena.error();
  auto versions = MetadataArena::create(Bytes{versions_limit_bytes});
  if (!versions) return versions.error();
  std::unique_ptr<AllocatorCore> core{new (std::nothrow)
                                          AllocatorCore{config, std::move(*arena), std::move(*versions)}};
  const auto short_of_memory = [&] {
    return base::fail(Errc::out_of_memory, Stage::open, 0,
                      "no memory for an IOVA allocator's tables within its metadata limit of {} bytes",
                      config.metadata_limit_bytes);
  };
  if (core == nullptr) return short_of_memory();
  core->hints_.reset(new (std::nothrow) HintEntry[std::size_t{1} << HintTable::bits]());
  core->blocks_ = zeroed<ObjectId>(std::size_t{1} << block_bits);
  core->classes_ = zeroed<ObjectId>(class_table_entries);
  core->parked_ = zeroed<std::uint64_t>(parked_entries);
  core->caches_ = zeroed<ThreadCache*>(threads_max);
  if (core->hints_ == nullptr || core->blocks_ == nullptr || core->classes_ == nullptr || core->parked_ == nullptr ||
      core->caches_ == nullptr)
    return short_of_memory();
  Participant founder;
  if (!core->map_.start(founder)) return short_of_memory();
  core->id_ = register_allocator(*core);
  if (core->id_ == 0)
    return base::fail(Errc::limit_reached, Stage::open, 0, "no pthread key is left to notice the exit of threads");
  return core;
}

constinit Magazine no_magazine{};
constinit std::atomic<std::uint64_t> no_slot{SlotWord::of(SlotState::settled).raw};

AllocatorCore::~AllocatorCore() {
  if (id_ != 0) unregister_allocator(id_);
}

ThreadCache* AllocatorCore::enlist() noexcept {
  if (ThreadCache* mine = find_thread_cache(id_)) return mine;
  ThreadCache* fresh = take_cache();
  if (fresh != nullptr && !remember_thread_cache(id_, fresh)) {
    release_cache(*fresh);
    return nullptr;
  }
  return fresh;
}

ThreadCache* AllocatorCore::take_cache() noexcept {
  // R.cache - acquire, pairs with W.cache: the caches below the count exist.
  const std::uint32_t known = cache_count_.load(std::memory_order_acquire);
  for (std::uint32_t i = 0; i < known; ++i) {
    ThreadCache* cache = caches_[i].load(std::memory_order_acquire);
    if (cache == nullptr) continue;  // its maker is between the count and the pointer
    std::uint32_t unowned = 0;
    base::yield_point("cache.own");
    // A.own - acquire, pairs with W.disown: the last owner's private fields are visible.
    if (!cache->owned.compare_exchange_strong(unowned, 1, std::memory_order_acquire, std::memory_order_relaxed))
      continue;
    reopen(*cache);
    return cache;
  }
  const ObjectId id = arena_.allocate(ObjectKind::thread_cache, sizeof(ThreadCache));
  if (id == 0) return nullptr;
  // W.cache - acq_rel: counts places; the pointer itself publishes the cache.
  const std::uint32_t index = cache_count_.fetch_add(1, std::memory_order_acq_rel);
  if (index >= threads_max) {
    // Readers stop at threads_max; the place beyond it stays counted and unused.
    arena_.release(ObjectKind::thread_cache, sizeof(ThreadCache), id);
    cache_count_.store(threads_max, std::memory_order_release);
    return nullptr;
  }
  auto* cache = new (arena_.at<void>(id)) ThreadCache{};
  cache->index = index;
  cache->place_multiplier = place_multiplier(granule_log2_);
  cache->hints = hints_.get();
  cache->unbiased_frees_next = unbiased_frees_first;
  // relaxed: published below.
  for (auto& place : cache->magazines) place.store(&no_magazine, std::memory_order_relaxed);
  // relaxed: published below.
  cache->owned.store(1, std::memory_order_relaxed);
  reopen(*cache);
  // W.cache - release, pairs with R.cache.
  caches_[index].store(cache, std::memory_order_release);
  return cache;
}

// The owner goes on with a new incarnation; whatever carries an older one is anybody's by CAS.
void AllocatorCore::reopen(ThreadCache& me) noexcept {
  ++me.generation;
  // relaxed: a hint that tunes the next period.
  if (me.freed_by_others.exchange(0, std::memory_order_relaxed) != 0) {
    me.unbiased_frees_left = me.unbiased_frees_next;
    if (me.unbiased_frees_next < unbiased_frees_most) me.unbiased_frees_next *= 2;
  }
  me.live_word = SlotWord::of(SlotState::live, me.unbiased_frees_left == 0 ? me.incarnation() : Incarnation{});
  base::yield_point("cache.reopen");
  // W.reopen - seq_cst: every plain store of the older incarnation comes before it, and it takes part in the handshake.
  me.state.store(me.incarnation().raw | ThreadCache::open, std::memory_order_seq_cst);
}

void AllocatorCore::release_cache(ThreadCache& cache) noexcept {
  for (auto& place : cache.magazines) {
    // relaxed: only the owner writes the place.
    Magazine* magazine = place.load(std::memory_order_relaxed);
    if (magazine == &no_magazine) continue;
    if (magazine->incarnation != Incarnation{cache.state.load(std::memory_order_seq_cst)}) revalidate(cache, *magazine);
    flush(cache, *magazine, magazine->count);
  }
  map_.reclaim(cache);
  // The generation ends here: intervals of this thread that are still live become anybody's.
  reopen(cache);
  cache.unbiased_frees_left = 0;
  // W.disown - release, pairs with A.own.
  cache.owned.store(0, std::memory_order_release);
}

void AllocatorCore::for_each_era(void (*see)(void*, std::uint64_t), void* context) const noexcept {
  // R.cache - acquire, pairs with W.cache.
  const std::uint32_t known = std::min(cache_count_.load(std::memory_order_acquire), threads_max);
  for (std::uint32_t i = 0; i < known; ++i) {
    const ThreadCache* cache = caches_[i].load(std::memory_order_acquire);
    // R.era - seq_cst: the handshake's last part, after the heavy barrier.
    if (cache != nullptr) see(context, cache->era.load(std::memory_order_seq_cst));
  }
}

// Teaches free() and find() where an interval's run is.
void AllocatorCore::note_start(Run& run, Unit run_first, std::uint64_t length, unsigned slots, Unit start) noexcept {
  const unsigned fine = floor_log2(length) + granule_log2_;
  const unsigned shift = slots > run_few_slots ? std::min(fine + HintTable::coarse_log2, 63U) : fine;
  HintEntry& entry = hints_[HintTable::index(bytes_of(start), shift)];
  // relaxed: hints; a pair of two runs is found out by the run's own fields.
  entry.first.store(bytes_of(run_first), std::memory_order_relaxed);
  entry.run.store(&run, std::memory_order_relaxed);
  note_block(start, arena_.id_of(&run), length);
}

// The frees of a run's intervals no longer find it by hint, and so not by the fast path.
void AllocatorCore::forget_starts(const Run& run, const RunShape& shape) noexcept {
  const unsigned fine = floor_log2(shape.length) + granule_log2_;
  const bool coarse = shape.slots > run_few_slots;
  const unsigned shift = coarse ? std::min(fine + HintTable::coarse_log2, 63U) : fine;
  // A run of many slots lies in at most three coarse blocks; another has an entry for each of its few slots.
  const std::uint64_t step = coarse ? std::uint64_t{1} << shift : bytes_of(shape.length);
  const std::uint64_t first = bytes_of(shape.first);
  const std::uint64_t last = bytes_of(shape.range().last);
  const auto forget = [&](std::uint64_t start) {
    HintEntry& entry = hints_[HintTable::index(start, shift)];
    // relaxed: hints.
    if (entry.run.load(std::memory_order_relaxed) == &run) entry.run.store(nullptr, std::memory_order_relaxed);
  };
  for (std::uint64_t start = first;; start += step) {
    forget(start);
    if (last - start <= step) break;
  }
  forget(last);
}

ObjectId AllocatorCore::class_of(LengthKey key) noexcept {
  const auto start = static_cast<unsigned>((key.raw * 0x9e3779b97f4a7c15ULL) >> 40);
  ObjectId fresh = 0;
  ObjectId answer = 0;
  for (unsigned probe = 0; probe < class_probes_max && answer == 0; ++probe) {
    const unsigned place = 1 + (start + probe) % (class_table_entries - 1);
    auto& entry = classes_[place];
    // R.class - acquire, pairs with W.class: the class is initialised.
    ObjectId id = entry.load(std::memory_order_acquire);
    if (id == 0) {
      if (fresh == 0) {
        fresh = arena_.allocate(ObjectKind::length_class, sizeof(LengthClass));
        if (fresh == 0) return 0;
        (new (arena_.at<void>(fresh)) LengthClass{})->key = key;
        // relaxed: a statistic; before the class can be found, so that whoever divides by it does not find 0.
        class_count_.fetch_add(1, std::memory_order_relaxed);
      }
      class_at(fresh)->code = place;
      base::yield_point("class.add");
      // W.class - acq_rel, pairs with R.class. Entries never go away, so equal keys meet at the same entry.
      if (entry.compare_exchange_strong(id, fresh, std::memory_order_acq_rel, std::memory_order_acquire)) {
        return fresh;
      }
    }
    if (class_at(id)->key == key) answer = id;
  }
  if (fresh != 0) {
    // relaxed: as above.
    class_count_.fetch_sub(1, std::memory_order_relaxed);
    arena_.release(ObjectKind::length_class, sizeof(LengthClass), fresh);
  }
  return answer;
}

}  // namespace iovane::iova
