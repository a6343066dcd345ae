// What misses, evictions, population and the monitor cost with real pins (io_uring registered buffers).
#include <benchmark/benchmark.h>
#include <sys/mman.h>

#include <array>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "pinning/map_cache.hpp"
#include "pinning/population.hpp"
#include "pinning/staleness_monitor.hpp"
#include "pinning/uring_provider.hpp"

namespace iovane::pinning {
namespace {

class Memory {
 public:
  Memory(std::size_t bytes, bool huge, bool touch) : bytes_{bytes} {
    constexpr std::size_t border = 1U << 30;
    room_ = mmap(nullptr, bytes + border, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room_ == MAP_FAILED) return;
    at_ = reinterpret_cast<std::byte*>((reinterpret_cast<std::uintptr_t>(room_) + border - 1) & ~(border - 1));
    madvise(at_, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    if (touch) std::memset(at_, 1, bytes);
  }
  ~Memory() {
    if (room_ != MAP_FAILED) munmap(room_, bytes_ + (1U << 30));
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  std::byte* at() const { return at_; }
  explicit operator bool() const { return room_ != MAP_FAILED; }

 private:
  std::size_t bytes_;
  void* room_;
  std::byte* at_ = nullptr;
};

std::unique_ptr<UringProvider> open_provider(benchmark::State& state) {
  auto opened = UringProvider::open();
  if (opened) return *std::move(opened);
  state.SkipWithError(opened.error().message().c_str());
  return nullptr;
}

constexpr std::size_t pages = 4096;  // 16 MiB

// The bound: the caller knows everything in advance and pins it in one call.
void pin_one_bulk_call(benchmark::State& state) {
  auto provider = open_provider(state);
  if (!provider) return;
  const Memory memory{pages * 4096, state.range(0) != 0, true};
  const std::array requests{PinRequest{.range = *MemoryRange::of(memory.at(), Bytes{pages * 4096})}};
  for (auto _ : state) {
    std::array<PinOutcome, 1> outcome;
    provider->pin(requests, outcome);
    state.PauseTiming();
    const std::array undo{UnpinRequest{requests[0].range, Access::read_write, outcome[0].handle}};
    std::array<Error, 1> error;
    provider->unpin(undo, error);
    state.ResumeTiming();
  }
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(pages));
}

// The bound for requests that come one by one: a call for each chunk, and no cache. Argument: chunk in KiB.
void pin_each_chunk_by_a_call(benchmark::State& state) {
  auto provider = open_provider(state);
  if (!provider) return;
  const Memory memory{pages * 4096, false, true};
  const std::size_t chunk = static_cast<std::size_t>(state.range(0)) << 10;
  std::vector<UnpinRequest> undo(pages * 4096 / chunk);
  std::vector<Error> errors(undo.size());
  for (auto _ : state) {
    for (std::size_t c = 0; c < undo.size(); ++c) {
      const std::array requests{PinRequest{.range = *MemoryRange::of(memory.at() + c * chunk, Bytes{chunk})}};
      std::array<PinOutcome, 1> outcome;
      provider->pin(requests, outcome);
      undo[c] = {requests[0].range, Access::read_write, outcome[0].handle};
    }
    state.PauseTiming();
    provider->unpin(undo, errors);
    state.ResumeTiming();
  }
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(pages));
}

// Cold memory, in a cache that has been used before: its own tables are there.
void cold(benchmark::State& state, const MapCacheConfig& config, std::size_t pages_each, bool huge) {
  auto provider = open_provider(state);
  if (!provider) return;
  const Memory memory{pages * 4096, huge, true};
  PinBudget budget;
  auto cache = *MapCache::open(*provider, budget, config);
  const auto all = [&] {
    for (std::size_t p = 0; p < pages; p += pages_each)
      benchmark::DoNotOptimize(
          cache->acquire(*MemoryRange::of(memory.at() + p * 4096, Bytes{pages_each * 4096}), Access::read_write));
  };
  all();
  for (auto _ : state) {
    state.PauseTiming();
    cache->evict(~std::uint64_t{0}, any_node);
    state.ResumeTiming();
    all();
  }
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(pages));
  state.counters["pins"] =
      benchmark::Counter(static_cast<double>(cache->stats().pins), benchmark::Counter::kAvgIterations);
}
void cache_cold_in_one_request(benchmark::State& state) {
  cold(state, {.chunk = Bytes{1U << 16}}, pages, state.range(0) != 0);
}
// Page by page, neighbours one after the other; argument: chunk in KiB.
void cache_cold_adjacent_4k_requests(benchmark::State& state) {
  cold(state, {.chunk = Bytes{static_cast<std::uint64_t>(state.range(0)) << 10}}, 1, false);
}

// Every request misses and evicts: a circle twice as large as the budget. Per request of one chunk of 64 KiB.
void cache_miss_and_evict_64k(benchmark::State& state) {
  auto provider = open_provider(state);
  if (!provider) return;
  const Memory memory{32U << 20, false, true};
  PinBudget budget;
  auto cache = *MapCache::open(
      *provider, budget,
      {.chunk = Bytes{65536}, .bytes_max = Bytes{16U << 20}, .evict_min = static_cast<std::uint32_t>(state.range(0))});
  std::size_t i = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        cache->acquire(*MemoryRange::of(memory.at() + i * 65536, Bytes{4096}), Access::read_write));
    i = (i + 1) % 512;
  }
  state.counters["pins"] = static_cast<double>(cache->stats().pins);
}

std::uint64_t available_bytes() {
  std::ifstream meminfo{"/proc/meminfo"};
  std::string name;
  std::uint64_t kib = 0;
  for (std::string rest; meminfo >> name >> kib; std::getline(meminfo, rest))
    if (name == "MemAvailable:") return kib << 10;
  return 0;
}

// Arguments: MiB, huge pages, threads.
void population(benchmark::State& state) {
  auto provider = open_provider(state);
  if (!provider) return;
  const std::size_t bytes = static_cast<std::size_t>(state.range(0)) << 20;
  if (bytes + (std::size_t{2} << 30) > available_bytes()) {
    state.SkipWithError("not enough free memory on this machine");
    return;
  }
  PinBudget budget;
  for (auto _ : state) {
    state.PauseTiming();
    auto memory = std::make_unique<Memory>(bytes, state.range(1) != 0, false);
    auto cache = *MapCache::open(*provider, budget, {.chunk = Bytes{65536}});
    state.ResumeTiming();
    {
      auto registered = Population::register_memory(
          *cache, *MemoryRange::of(memory->at(), Bytes{bytes}),
          {.threads = static_cast<unsigned>(state.range(2)), .os_page = Bytes{state.range(1) != 0 ? 2U << 20 : 4096U}});
      if (!registered) state.SkipWithError(registered.error().message().c_str());
    }
    state.PauseTiming();
    cache.reset();
    memory.reset();
    state.ResumeTiming();
  }
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(bytes / 4096));
}

// munmap of a pinned 64 KiB block that the monitor watches, and of one that nobody watches; with mmap and touch.
void munmap_64k(benchmark::State& state, bool watched) {
  auto provider = open_provider(state);
  if (!provider) return;
  std::unique_ptr<StalenessMonitor> monitor;
  if (watched) {
    auto opened = StalenessMonitor::open();
    if (!opened) {
      state.SkipWithError(opened.error().message().c_str());
      return;
    }
    monitor = *std::move(opened);
  }
  PinBudget budget;
  auto cache = *MapCache::open(*provider, budget, {.chunk = Bytes{4096}}, monitor.get());
  for (auto _ : state) {
    state.PauseTiming();
    void* block = mmap(nullptr, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    (void)cache->acquire(*MemoryRange::of(block, Bytes{65536}), Access::read_write);
    state.ResumeTiming();
    munmap(block, 65536);
    if (!watched) {
      state.PauseTiming();
      cache->invalidate(*MemoryRange::of(block, Bytes{65536}));
      cache->collect();
      state.ResumeTiming();
    }
  }
}
void munmap_64k_bare(benchmark::State& state) { munmap_64k(state, false); }
void munmap_64k_watched(benchmark::State& state) { munmap_64k(state, true); }

BENCHMARK(pin_one_bulk_call)->Arg(0)->Arg(1)->UseRealTime();
BENCHMARK(pin_each_chunk_by_a_call)->Arg(4)->Arg(64)->Arg(512)->Arg(2048)->UseRealTime();
BENCHMARK(cache_cold_in_one_request)->Arg(0)->Arg(1)->UseRealTime();
BENCHMARK(cache_cold_adjacent_4k_requests)->Arg(4)->Arg(64)->Arg(512)->Arg(2048)->UseRealTime();
BENCHMARK(cache_miss_and_evict_64k)->Arg(1)->Arg(8)->Arg(32)->UseRealTime();
BENCHMARK(munmap_64k_bare)->UseRealTime();
BENCHMARK(munmap_64k_watched)->UseRealTime();
BENCHMARK(population)
    ->ArgsProduct({{64, 1024, 4096, 8192}, {0, 1}, {1, 2}})
    ->UseRealTime()
    ->Iterations(1)
    ->Repetitions(3)
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace iovane::pinning
