// The pin index, its leases and the map cache's hit against their floor and against what others do, in one run.
//
// Arguments: regions; 0: 64 of them reused, 1: uniform over all. Regions are 4 KiB each, side by side, unless "sparse":
// then one in every 64 KiB. Keys are drawn before the clock starts; reading them costs what the row "harness" says.
// Threads: 2 threads use the same regions (pattern 0 and 1) or each its own half (pattern 2).
#include <benchmark/benchmark.h>

#include <algorithm>
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

#include "pinning/counting_provider.hpp"
#include "pinning/map_cache.hpp"

namespace iovane::pinning {
namespace {

constexpr std::uint64_t base_key = 0x7f00'0000'0000;
constexpr std::size_t draws = 1U << 16;  // a circle of keys

std::uint64_t start_of(std::uint64_t i, std::uint64_t stride) { return base_key + i * stride; }

// splitmix64, as in tests/support/seed.hpp.
std::uint64_t mix(std::uint64_t z) {
  z += 0x9e37'79b9'7f4a'7c15U;
  z = (z ^ (z >> 30)) * 0xbf58'476d'1ce4'e5b9U;
  z = (z ^ (z >> 27)) * 0x94d0'49bb'1331'11ebU;
  return z ^ (z >> 31);
}

std::vector<std::uint64_t> keys_for(const benchmark::State& state, std::uint64_t stride = granule_bytes) {
  const auto regions = static_cast<std::uint64_t>(state.range(0));
  const auto pattern = state.range(1);
  const auto thread = static_cast<std::uint64_t>(state.thread_index());
  std::uint64_t first = 0;
  std::uint64_t count = regions;
  if (pattern == 0) count = std::min<std::uint64_t>(64, regions);
  if (pattern == 2) {
    count = regions / static_cast<std::uint64_t>(state.threads());
    first = thread * count;
  }
  std::vector<std::uint64_t> keys(draws);
  for (std::size_t i = 0; i < draws; ++i) keys[i] = start_of(first + mix(i + thread * draws) % count, stride) + 512;
  return keys;
}

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

template <std::uint64_t stride>
struct FilledIndex {
  explicit FilledIndex(std::uint64_t regions) {
    if (!index.open()) std::abort();
    for (std::uint64_t i = 0; i < regions; ++i)
      if (!index.insert({start_of(i, stride), start_of(i, stride) + granule_bytes - 1}, Access::read_write,
                        {i << 12, i}))
        std::abort();
  }
  PinIndex index;
};

struct FilledCache {
  explicit FilledCache(std::uint64_t regions) {
    cache = *MapCache::open(provider, budget, {.chunk = Bytes{granule_bytes}, .regions_max = 1U << 22});
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
Shared<FilledCache> filled_cache;
Shared<TwoLevelTable> two_level;
Shared<LockedMap> locked_map;

void drop_others(const void* keep) {
  if (keep != &dense_index) dense_index.drop();
  if (keep != &sparse_index) sparse_index.drop();
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
void run(benchmark::State& state, const std::vector<std::uint64_t>& keys, F&& one) {
  std::size_t i = 0;
  for (auto _ : state) {
    one(keys[i]);
    i = (i + 1) & (draws - 1);
  }
  state.SetItemsProcessed(state.iterations());
}

void harness(benchmark::State& state) {
  const auto keys = keys_for(state);
  run(state, keys, [](std::uint64_t key) { benchmark::DoNotOptimize(key); });
}
void floor_two_level_lookup(benchmark::State& state) {
  const auto& table = shared_for(state, two_level);
  run(state, keys_for(state), [&](std::uint64_t key) { benchmark::DoNotOptimize(table.find(key)); });
}
void index_translate(benchmark::State& state) {
  auto& index = shared_for(state, dense_index).index;
  run(state, keys_for(state), [&](std::uint64_t key) { benchmark::DoNotOptimize(index.translate(key)->address); });
}
void index_translate_sparse(benchmark::State& state) {
  auto& index = shared_for(state, sparse_index).index;
  run(state, keys_for(state, 65536),
      [&](std::uint64_t key) { benchmark::DoNotOptimize(index.translate(key)->address); });
  if (state.thread_index() == 0)
    state.counters["bytes_per_region"] =
        static_cast<double>(index.memory_bytes()) / static_cast<double>(state.range(0));
}
void index_lease_and_drop(benchmark::State& state) {
  auto& index = shared_for(state, dense_index).index;
  run(state, keys_for(state), [&](std::uint64_t key) {
    const Lease lease = index.acquire({key, key + 1023}, Access::read);
    benchmark::DoNotOptimize(lease.address());
  });
}
void index_hold_and_drop(benchmark::State& state) {
  auto& index = shared_for(state, dense_index).index;
  run(state, keys_for(state), [&](std::uint64_t key) {
    const Hold hold = index.acquire({key, key + 1023}, Access::read).hold();
    benchmark::DoNotOptimize(hold.address());
  });
}
void cache_hit_and_drop(benchmark::State& state) {
  auto& cache = *shared_for(state, filled_cache).cache;
  run(state, keys_for(state), [&](std::uint64_t key) {
    const auto lease = cache.acquire({key, key + 1023}, Access::read);
    benchmark::DoNotOptimize(lease->address());
  });
}
void cache_try_hit_and_drop(benchmark::State& state) {
  auto& cache = *shared_for(state, filled_cache).cache;
  run(state, keys_for(state), [&](std::uint64_t key) {
    const Lease lease = cache.try_acquire({key, key + 1023}, Access::read);
    benchmark::DoNotOptimize(lease.address());
  });
}
void peer_ordered_map_and_mutex(benchmark::State& state) {
  auto& map = shared_for(state, locked_map);
  run(state, keys_for(state), [&](std::uint64_t key) {
    auto* entry = map.get(key);
    benchmark::DoNotOptimize(entry->address);
    map.put(entry);
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
  run(state, keys_for(state), [&](std::uint64_t key) {
    ucs_rcache_region_t* region = nullptr;
    ucs_rcache_get(ucx.cache, ucx.at((key - base_key) >> 12), 1024, PROT_READ, nullptr, &region);
    benchmark::DoNotOptimize(region);
    ucs_rcache_region_put(ucx.cache, region);
  });
}
#endif

void index_insert(benchmark::State& state) {
  drop_others(nullptr);
  const auto regions = static_cast<std::uint64_t>(state.range(0));
  double bytes = 0;
  for (auto _ : state) {
    state.PauseTiming();
    auto index = std::make_unique<PinIndex>();
    if (!index->open()) std::abort();
    state.ResumeTiming();
    for (std::uint64_t i = 0; i < regions; ++i)
      benchmark::DoNotOptimize(
          index->insert({start_of(i, granule_bytes), start_of(i, granule_bytes) + granule_bytes - 1},
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

void all_sizes(benchmark::internal::Benchmark* b) {
  for (const std::int64_t regions : {100, 10'000, 1'000'000})
    for (const std::int64_t pattern : {0, 1}) b->Args({regions, pattern});
  b->UseRealTime();
}
void two_threads(benchmark::internal::Benchmark* b) {
  b->Args({100, 0})->Args({1, 0})->Args({10'000, 1})->Args({10'000, 2})->Args({1'000'000, 1});
  b->Threads(2)->UseRealTime();
}

BENCHMARK(harness)->Args({100, 0})->Args({1'000'000, 1});
BENCHMARK(floor_two_level_lookup)->Apply(all_sizes);
BENCHMARK(floor_two_level_lookup)->Apply(two_threads);
BENCHMARK(index_translate)->Apply(all_sizes);
BENCHMARK(index_translate)->Apply(two_threads);
BENCHMARK(index_lease_and_drop)->Apply(all_sizes);
BENCHMARK(index_lease_and_drop)->Apply(two_threads);
BENCHMARK(index_hold_and_drop)->Apply(all_sizes);
BENCHMARK(index_hold_and_drop)->Apply(two_threads);
BENCHMARK(index_translate_sparse)->Args({1'000'000, 0})->Args({1'000'000, 1})->UseRealTime();
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
BENCHMARK(index_insert)->Arg(10'000)->Arg(1'000'000)->Unit(benchmark::kMicrosecond);
BENCHMARK(index_insert_erase_in_batches_of_64);
BENCHMARK(barrier_heavy);

}  // namespace
}  // namespace iovane::pinning
