// AddressSpace::acquire() as its callers meet it, on a backend that does nothing, beside map and unmap per use.
//
// Arguments of the hits: regions; 0: 64 of them reused, 1: uniform over all. Two threads use the same address space.
#include <benchmark/benchmark.h>

#include <memory>
#include <mutex>
#include <vector>

#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "support/null_backend.hpp"

namespace iovane {
namespace {

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t base_address = 0x7f00'0000'0000;
constexpr std::size_t draws = 1U << 16;

AddressSpace open_space(const CacheConfig& config) {
  Engine engine = EngineAccess::open(std::make_unique<bench::NullBackend>(), "null");
  AddressSpaceConfig large;
  large.mappings_max = 1U << 21;
  AddressSpace space = *engine.create_address_space(large);
  if (!space.open_cache(config)) std::abort();
  return space;
}

// splitmix64, as in tests/support/seed.hpp.
std::uint64_t mix(std::uint64_t z) {
  z += 0x9e37'79b9'7f4a'7c15U;
  z = (z ^ (z >> 30)) * 0xbf58'476d'1ce4'e5b9U;
  z = (z ^ (z >> 27)) * 0x94d0'49bb'1331'11ebU;
  return z ^ (z >> 31);
}

// One filled space, shared by the threads of one benchmark and kept for the next of the same size.
AddressSpace& filled(std::uint64_t regions) {
  static std::mutex lock;
  static AddressSpace space;
  static std::uint64_t has = 0;
  const std::lock_guard held{lock};
  if (has != regions) {
    space = open_space({.chunk = Bytes{page}, .regions_max = 1U << 22});
    for (std::uint64_t i = 0; i < regions; ++i) (void)space.acquire({{}, base_address + i * page, Bytes{1}});
    has = regions;
  }
  return space;
}

void acquire_hit_and_release(benchmark::State& state) {
  const auto regions = static_cast<std::uint64_t>(state.range(0));
  AddressSpace& space = filled(regions);
  const std::uint64_t reused = state.range(1) == 0 ? std::min<std::uint64_t>(64, regions) : regions;
  std::vector<std::uint64_t> addresses(draws);
  const auto thread = static_cast<std::uint64_t>(state.thread_index());
  for (std::size_t i = 0; i < draws; ++i) addresses[i] = base_address + mix(i + thread * draws) % reused * page + 512;
  std::size_t i = 0;
  for (auto _ : state) {
    const auto lease = space.acquire({{}, addresses[i], Bytes{1024}});
    benchmark::DoNotOptimize(lease->iova());
    i = (i + 1) & (draws - 1);
  }
  state.SetItemsProcessed(state.iterations());
}

// What a caller without a cache does per buffer, on the same backend: no kernel call is in it, so this is the engine's
// part alone.
void baseline_map_and_unmap(benchmark::State& state) {
  AddressSpace space = open_space({});
  MapRequest map;
  map.memory = {{}, base_address, Bytes{page}};
  for (auto _ : state) {
    const Completion done = space.map(map);
    benchmark::DoNotOptimize(space.unmap(UnmapRequest::of(done.mapping)));
  }
  state.SetItemsProcessed(state.iterations());
}

// A circle twice as large as the budget: every request misses, pins a chunk of 64 KiB and evicts one.
void acquire_miss_and_evict(benchmark::State& state) {
  AddressSpace space = open_space({.chunk = Bytes{65536}, .bytes_max = Bytes{16U << 20}});
  std::uint64_t i = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(space.acquire({{}, base_address + i * 65536, Bytes{page}}));
    i = (i + 1) % 512;
  }
  state.SetItemsProcessed(state.iterations());
}

BENCHMARK(acquire_hit_and_release)->ArgsProduct({{100, 10'000, 1'000'000}, {0, 1}})->UseRealTime();
BENCHMARK(acquire_hit_and_release)->Args({100, 0})->Args({10'000, 1})->Threads(2)->UseRealTime();
BENCHMARK(baseline_map_and_unmap);
BENCHMARK(acquire_miss_and_evict);

}  // namespace
}  // namespace iovane
