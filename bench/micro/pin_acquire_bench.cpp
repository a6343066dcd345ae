// AddressSpace::acquire() as its callers meet it, on a backend that does nothing, beside map and unmap per use.
//
// Arguments of the hits: regions; 0: 64 of them reused, 1: uniform over all. Two threads use the same address space.
#include <benchmark/benchmark.h>

#include <memory>
#include <mutex>

#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "micro/pin_draw.hpp"
#include "support/null_backend.hpp"

namespace iovane {
namespace {

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t base_address = 0x7f00'0000'0000;

AddressSpace open_space(const CacheConfig& config) {
  Engine engine = EngineAccess::open(std::make_unique<bench::NullBackend>(), "null");
  AddressSpaceConfig large;
  large.mappings_max = 1U << 21;
  AddressSpace space = *engine.create_address_space(large);
  if (!space.open_cache(config)) std::abort();
  return space;
}

// One filled space, shared by the threads of one benchmark and kept for the next of the same size.
AddressSpace& filled(std::uint64_t regions) {
  static std::mutex lock;
  static AddressSpace space;
  static std::uint64_t has = 0;
  const std::lock_guard held{lock};
  if (has != regions) {
    space = open_space({.chunk = Bytes{page}, .regions_max = 1U << 22});
    for (int use = 0; use < 2; ++use)  // pinned, and marked as used
      for (std::uint64_t i = 0; i < regions; ++i) (void)space.acquire({{}, base_address + i * page, Bytes{1}});
    has = regions;
  }
  return space;
}

void acquire_hit_and_release(benchmark::State& state) {
  const auto regions = static_cast<std::uint64_t>(state.range(0));
  AddressSpace& space = filled(regions);
  bench::Draw draw{state};
  for (auto _ : state) {
    const auto lease = space.acquire({{}, base_address + draw.next() * page + 512, Bytes{1024}});
    bench::use(lease->iova().value);
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
