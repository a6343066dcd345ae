// The pin index, its leases and the map cache's hit against their floor and against what others do, in one run.
//
// Arguments: regions; 0: 64 of them reused, 1: uniform over all, 2: uniform over each thread's own share. Regions are
// 4 KiB each, side by side, unless "sparse": then one in every 64 KiB; or "chunks": 64 KiB each, side by side.
#include <benchmark/benchmark.h>

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#if defined(IOVANE_HAVE_UCS)
#include <sys/mman.h>
extern "C" {
#include <ucs/memory/rcache.h>
}
#endif

#include "micro/pin_draw.hpp"
#include "pinning/counting_provider.hpp"
#include "pinning/map_cache.hpp"

namespace iovane::pinning {
namespace {

constexpr std::uint64_t base_key = 0x7f00'0000'0000;
std::uint64_t start_of(std::uint64_t i, std::uint64_t stride) { return base_key + i * stride; }

// One structure at a time, shared by the threads of one benchmark and kept for the next with the same size.
template <typename T>
class Shared {
 public:
  T& of(std::int64_t regions) {
    const std::lock_guard held{lock_};
    if (regions != regions_) {
      value_.reset();
      value_ = std::make_unique<T>(static_cast<std::uint64_t>(regions));
      regions_ = regions;
    }
    return *value_;
  }
  void drop() {
    const std::lock_guard held{lock_};
    value_.reset();
    regions_ = 0;
  }

 private:
  std::mutex lock_;
  std::unique_ptr<T> value_;
  std::int64_t regions_ = 0;
};

template <std::uint64_t stride, std::uint64_t bytes = granule_bytes>
struct FilledIndex {
  explicit FilledIndex(std::uint64_t regions) {
    if (!index.open()) std::abort();
    for (std::uint64_t i = 0; i < regions; ++i)
      if (!index.insert({start_of(i, stride), start_of(i, stride) + bytes - 1}, Access::read_write, {i << 16, i}))
        std::abort();
    // The first lease on a region leaves a mark for the eviction policy; the rows are about those after it.
    for (std::uint64_t i = 0; i < regions; ++i)
      (void)index.acquire({start_of(i, stride), start_of(i, stride)}, Access::read);
  }
  PinIndex index;
};

struct FilledCache {
  explicit FilledCache(std::uint64_t regions) {
    cache = *MapCache::open(provider, budget, {.chunk = Bytes{granule_bytes}, .regions_max = 1U << 22});
    for (int use = 0; use < 2; ++use)  // pinned, and marked as used
      for (std::uint64_t i = 0; i < regions; ++i)
        (void)cache->acquire({start_of(i, granule_bytes), start_of(i, granule_bytes)}, Access::read_write);
  }
  CountingProvider provider{{.find_double_pins = false}};
  PinBudget budget;
  std::unique_ptr<MapCache> cache;
};

// The floor: two levels, no lease, no erase, one region size.
struct TwoLevelTable {
  explicit TwoLevelTable(std::uint64_t regions) : top(1U << 13) {
    for (std::uint64_t i = 0; i < regions; ++i) {
      const std::uint64_t page = i;
      auto& leaf = top[page >> 9];
      if (!leaf) leaf = std::make_unique<std::array<std::uint64_t, 512>>();
      (*leaf)[page & 511] = i + 1;
    }
  }
  std::uint64_t find(std::uint64_t key) const {
    const std::uint64_t page = (key - base_key) >> 12;
    return (*top[page >> 9])[page & 511];
  }
  std::vector<std::unique_ptr<std::array<std::uint64_t, 512>>> top;
};

// What is usually written first: an ordered map, a count and a mutex.
struct LockedMap {
  struct Entry {
    std::uint64_t last;
    std::uint64_t address;
    std::uint64_t count;
  };
  explicit LockedMap(std::uint64_t regions) {
    for (std::uint64_t i = 0; i < regions; ++i)
      map.emplace_hint(map.end(), start_of(i, granule_bytes),
                       Entry{start_of(i, granule_bytes) + granule_bytes - 1, i << 12, 0});
  }
  Entry* get(std::uint64_t key) {
    const std::lock_guard held{lock};
    auto it = map.upper_bound(key);
    if (it == map.begin()) return nullptr;
    --it;
    if (it->second.last < key) return nullptr;
    ++it->second.count;
    return &it->second;
  }
  void put(Entry* entry) {
    const std::lock_guard held{lock};
    --entry->count;
  }
  std::mutex lock;
  std::map<std::uint64_t, Entry> map;
};

Shared<FilledIndex<granule_bytes>> dense_index;
Shared<FilledIndex<65536>> sparse_index;
Shared<FilledIndex<65536, 65536>> chunk_index;
Shared<FilledCache> filled_cache;
Shared<TwoLevelTable> two_level;
Shared<LockedMap> locked_map;

void drop_others(const void* keep) {
  if (keep != &dense_index) dense_index.drop();
  if (keep != &sparse_index) sparse_index.drop();
  if (keep != &chunk_index) chunk_index.drop();
  if (keep != &filled_cache) filled_cache.drop();
  if (keep != &two_level) two_level.drop();
  if (keep != &locked_map) locked_map.drop();
}

template <typename S>
auto& shared_for(benchmark::State& state, S& shared) {
  if (state.thread_index() == 0) drop_others(&shared);
  return shared.of(state.range(0));
}

template <typename F>
void run(benchmark::State& state, F&& one) {
  bench::Draw draw{state};
  for (auto _ : state) bench::use(one(draw.next()));
  state.SetItemsProcessed(state.iterations());
}
// A kilobyte in the middle of a region of 4 KiB.
MemoryRange asked(std::uint64_t i, std::uint64_t stride = granule_bytes) {
  return {start_of(i, stride) + 512, start_of(i, stride) + 1535};
}
template <typename S>
void run_translate(benchmark::State& state, S& shared, std::uint64_t stride) {
  auto& index = shared_for(state, shared).index;
  run(state, [&](std::uint64_t i) { return index.translate(start_of(i, stride) + 512)->address; });
  if (state.thread_index() == 0)
    state.counters["bytes_per_region"] =
        static_cast<double>(index.memory_bytes()) / static_cast<double>(state.range(0));
}

void harness(benchmark::State& state) {
  run(state, [](std::uint64_t i) { return start_of(i, granule_bytes) + 512; });
}
void floor_two_level_lookup(benchmark::State& state) {
  const auto& table = shared_for(state, two_level);
  run(state, [&](std::uint64_t i) { return table.find(start_of(i, granule_bytes) + 512); });
}
void index_translate(benchmark::State& state) { run_translate(state, dense_index, granule_bytes); }
void index_translate_sparse(benchmark::State& state) { run_translate(state, sparse_index, 65536); }
void index_translate_chunks(benchmark::State& state) { run_translate(state, chunk_index, 65536); }
void index_lease_and_drop(benchmark::State& state) {
  auto& index = shared_for(state, dense_index).index;
  run(state, [&](std::uint64_t i) { return index.acquire(asked(i), Access::read).address(); });
}
void index_hold_and_drop(benchmark::State& state) {
  auto& index = shared_for(state, dense_index).index;
  run(state, [&](std::uint64_t i) { return index.acquire(asked(i), Access::read).hold().address(); });
}
void cache_hit_and_drop(benchmark::State& state) {
  auto& cache = *shared_for(state, filled_cache).cache;
  run(state, [&](std::uint64_t i) { return cache.acquire(asked(i), Access::read)->address(); });
}
void cache_try_hit_and_drop(benchmark::State& state) {
  auto& cache = *shared_for(state, filled_cache).cache;
  run(state, [&](std::uint64_t i) { return cache.try_acquire(asked(i), Access::read).address(); });
}
void peer_ordered_map_and_mutex(benchmark::State& state) {
  auto& map = shared_for(state, locked_map);
  run(state, [&](std::uint64_t i) {
    auto* entry = map.get(start_of(i, granule_bytes) + 512);
    const std::uint64_t address = entry->address;
    map.put(entry);
    return address;
  });
}

#if defined(IOVANE_HAVE_UCS)
// UCX's registration cache (libucs, ucs/memory/rcache.h) over memory that is really mapped, with a registration that
// does nothing. One region per 4 KiB, so that it keeps them apart: they are asked for one by one with alternating
// rights.
struct UcxCache {
  explicit UcxCache(std::uint64_t regions) {
    static const ucs_rcache_ops_t ops{
        [](void*, ucs_rcache_t*, void*, ucs_rcache_region_t*, std::uint16_t) { return UCS_OK; },
        [](void*, ucs_rcache_t*, ucs_rcache_region_t*) {},
        [](void*, ucs_rcache_t*, ucs_rcache_region_t*, char* text, std::size_t size) {
          if (size != 0) *text = 0;
        }};
    ucs_rcache_params_t params{};
    params.region_struct_size = sizeof(ucs_rcache_region_t);
    params.alignment = UCS_RCACHE_MIN_ALIGNMENT;
    params.max_alignment = granule_bytes;
    params.ops = &ops;
    params.flags = UCS_RCACHE_FLAG_NO_PFN_CHECK;
    params.max_regions = ~0UL;
    params.max_size = ~std::size_t{0};
    params.max_unreleased = ~std::size_t{0};
    if (ucs_rcache_create(&params, "iovane-bench", nullptr, &cache) != UCS_OK) return;
    memory_bytes = regions * 2 * granule_bytes;  // every other page, or neighbours would be merged
    memory = static_cast<std::byte*>(
        mmap(nullptr, memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (std::uint64_t i = 0; i < regions; ++i) {
      ucs_rcache_region_t* region = nullptr;
      if (ucs_rcache_get(cache, at(i), granule_bytes, PROT_READ | PROT_WRITE, nullptr, &region) == UCS_OK)
        ucs_rcache_region_put(cache, region);
    }
  }
  ~UcxCache() {
    if (cache != nullptr) ucs_rcache_destroy(cache);
    if (memory != nullptr) munmap(memory, memory_bytes);
  }
  UcxCache(const UcxCache&) = delete;
  UcxCache& operator=(const UcxCache&) = delete;
  std::byte* at(std::uint64_t i) const { return memory + i * 2 * granule_bytes; }
  ucs_rcache_t* cache = nullptr;
  std::byte* memory = nullptr;
  std::size_t memory_bytes = 0;
};
Shared<UcxCache> ucx_cache;

void peer_ucx_rcache_get_and_put(benchmark::State& state) {
  if (state.thread_index() == 0) drop_others(nullptr);
  auto& ucx = ucx_cache.of(state.range(0));
  if (ucx.cache == nullptr) {
    state.SkipWithError("ucs_rcache_create failed");
    return;
  }
  run(state, [&](std::uint64_t i) {
    ucs_rcache_region_t* region = nullptr;
    ucs_rcache_get(ucx.cache, ucx.at(i), 1024, PROT_READ, nullptr, &region);
    const auto seen = reinterpret_cast<std::uint64_t>(region);
    ucs_rcache_region_put(ucx.cache, region);
    return seen;
  });
}
#endif

// Argument 1: bytes between regions of 4 KiB.
void index_insert(benchmark::State& state) {
  drop_others(nullptr);
  const auto regions = static_cast<std::uint64_t>(state.range(0));
  const auto stride = static_cast<std::uint64_t>(state.range(1));
  double bytes = 0;
  for (auto _ : state) {
    state.PauseTiming();
    auto index = std::make_unique<PinIndex>();
    if (!index->open()) std::abort();
    state.ResumeTiming();
    for (std::uint64_t i = 0; i < regions; ++i)
      benchmark::DoNotOptimize(index->insert({start_of(i, stride), start_of(i, stride) + granule_bytes - 1},
                                             Access::read_write, {i << 12, i}));
    state.PauseTiming();
    bytes = static_cast<double>(index->memory_bytes()) / static_cast<double>(regions);
    index.reset();
    state.ResumeTiming();
  }
  state.counters["bytes_per_region"] = bytes;
  state.SetItemsProcessed(state.iterations() * state.range(0));
}

// A region's whole life in a warm index: insert, erase, one barrier for 64, forget.
void index_insert_erase_in_batches_of_64(benchmark::State& state) {
  drop_others(nullptr);
  PinIndex index;
  if (!index.open()) std::abort();
  std::array<RegionId, 64> ids{};
  std::array<bool, 64> used{};
  for (auto _ : state) {
    for (std::uint64_t i = 0; i < ids.size(); ++i)
      ids[i] = *index.insert({start_of(i, 65536), start_of(i, 65536) + 65535}, Access::read_write, {i << 16, i});
    for (const RegionId id : ids) index.erase(id);
    index.find_users(ids, used);
    for (const RegionId id : ids) index.forget(id);
  }
  state.SetItemsProcessed(state.iterations() * 64);
}

void barrier_heavy(benchmark::State& state) {
  base::prepare_asymmetric_barrier();
  for (auto _ : state) base::heavy_barrier();
}

void all_sizes(benchmark::internal::Benchmark* b) { b->ArgsProduct({{100, 10'000, 1'000'000}, {0, 1}})->UseRealTime(); }
void two_threads(benchmark::internal::Benchmark* b) {
  b->Args({100, 0})->Args({1, 0})->Args({10'000, 1})->Args({10'000, 2})->Args({1'000'000, 1})->Args({1'000'000, 2});
  b->Threads(2)->UseRealTime();
}

BENCHMARK(harness)->Args({100, 0})->Args({1'000'000, 1})->UseRealTime();
BENCHMARK(harness)->Args({100, 0})->Threads(2)->UseRealTime();
BENCHMARK(floor_two_level_lookup)->Apply(all_sizes);
BENCHMARK(floor_two_level_lookup)->Apply(two_threads);
BENCHMARK(index_translate)->Apply(all_sizes);
BENCHMARK(index_translate)->Apply(two_threads);
BENCHMARK(index_lease_and_drop)->Apply(all_sizes);
BENCHMARK(index_lease_and_drop)->Apply(two_threads);
BENCHMARK(index_hold_and_drop)->Apply(all_sizes);
BENCHMARK(index_hold_and_drop)->Apply(two_threads);
BENCHMARK(index_translate_sparse)->Args({1'000'000, 0})->Args({1'000'000, 1})->UseRealTime();
BENCHMARK(index_translate_chunks)->Args({1'000'000, 0})->Args({1'000'000, 1})->UseRealTime();
BENCHMARK(cache_try_hit_and_drop)->Apply(all_sizes);
BENCHMARK(cache_try_hit_and_drop)->Apply(two_threads);
BENCHMARK(cache_hit_and_drop)->Apply(all_sizes);
BENCHMARK(cache_hit_and_drop)->Apply(two_threads);
BENCHMARK(peer_ordered_map_and_mutex)->Apply(all_sizes);
BENCHMARK(peer_ordered_map_and_mutex)->Apply(two_threads);
#if defined(IOVANE_HAVE_UCS)
BENCHMARK(peer_ucx_rcache_get_and_put)->Apply(all_sizes);
BENCHMARK(peer_ucx_rcache_get_and_put)->Apply(two_threads);
#else
void peer_ucx_rcache_get_and_put(benchmark::State& state) {
  for (auto _ : state) {
  }
  state.SkipWithError("built without libucs (package libucx-dev)");
}
BENCHMARK(peer_ucx_rcache_get_and_put);
#endif
// libfabric's cache (ofi_mr_cache) is not exported by the library, and the providers that need no hardware register
// without it, so there is nothing to call.
void peer_libfabric_mr_cache(benchmark::State& state) {
  for (auto _ : state) {
  }
  state.SkipWithError("libfabric exports no entry to its MR cache, and no provider without hardware uses it");
}
BENCHMARK(peer_libfabric_mr_cache);
BENCHMARK(index_insert)->ArgsProduct({{10'000, 1'000'000}, {4096, 65536}})->Unit(benchmark::kMicrosecond);
BENCHMARK(index_insert_erase_in_batches_of_64);
BENCHMARK(barrier_heavy);

}  // namespace
}  // namespace iovane::pinning
