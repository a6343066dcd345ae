// The engine with several threads: as many address spaces as threads, or one for all, on a backend that does nothing.
// Baseline: one mutex and one call per operation, as engine_bench has it for one thread.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "support/null_backend.hpp"

namespace iovane {
namespace {

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t batch = 32;

MapRequest map_at(std::uint64_t index) {
  MapRequest request;
  request.memory = {{}, 0x7000'0000 + index * page, Bytes{page}};
  request.placement = Placement::fixed(Iova{index * page});
  return request;
}

AddressSpace open_space() {
  Engine engine = EngineAccess::open(std::make_unique<bench::NullBackend>(), "null");
  AddressSpaceConfig config;
  config.layout = LayoutPolicy::fixed;
  return *engine.create_address_space(config);
}

// Maps and unmaps a batch of pages that no other thread uses.
void run_batches(benchmark::State& state, AddressSpace& space) {
  Queue queue = *space.open_queue({.depth = 2 * batch});
  std::vector<Completion> out(2 * batch);
  std::uint64_t at = 0x10000 * static_cast<std::uint64_t>(state.thread_index() + 1);
  for (auto _ : state) {
    for (std::uint64_t i = 0; i < batch; ++i) (void)queue.stage(map_at(at + i));
    queue.submit();
    if (queue.wait(out, batch, std::chrono::seconds{10}) != batch) state.SkipWithError("a map did not complete");
    for (std::uint64_t i = 0; i < batch; ++i)
      (void)queue.stage(UnmapRequest::of(IovaRange{Iova{(at + i) * page}, Iova{(at + i + 1) * page - 1}}));
    queue.submit();
    if (queue.wait(out, batch, std::chrono::seconds{10}) != batch) state.SkipWithError("an unmap did not complete");
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(2 * batch) * state.iterations());
}

// What this machine gives a second thread that shares nothing: arithmetic without memory, and walks through memory of
// the thread's own that fits into the first-level cache, as a batch's rings and tables do. No engine scales better.
void BM_FloorArithmetic(benchmark::State& state) {
  std::uint64_t x = static_cast<std::uint64_t>(state.thread_index()) + 1;
  for (auto _ : state) {
    for (std::uint64_t i = 0; i < 2 * batch; ++i) x = x * 6364136223846793005U + 1442695040888963407U;
    benchmark::DoNotOptimize(x);
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(2 * batch) * state.iterations());
}
void BM_FloorOwnMemory(benchmark::State& state) {
  std::vector<std::uint64_t> own(2048, static_cast<std::uint64_t>(state.thread_index()));
  std::uint64_t x = 1;
  for (auto _ : state) {
    for (std::uint64_t i = 0; i < 2 * batch; ++i)
      for (std::uint64_t k = 0; k < 16; ++k)
        own[(x + 64 * k) & 2047] += x = x * 5 + k;  // stores and loads, some dependent
    benchmark::DoNotOptimize(x);
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(2 * batch) * state.iterations());
}

void BM_AddressSpacePerThread(benchmark::State& state) {
  AddressSpace space = open_space();
  run_batches(state, space);
}

AddressSpace shared_space;
void BM_OneAddressSpace(benchmark::State& state) { run_batches(state, shared_space); }

std::mutex baseline_lock;
std::map<std::uint64_t, std::uint64_t> baseline_index;
void BM_BaselineOneMutex(benchmark::State& state) {
  static bench::NullSpace space;
  backends::BackendSpace& backend = space;
  const std::uint64_t first = 0x10000 * static_cast<std::uint64_t>(state.thread_index() + 1);
  std::uint64_t at = 0;
  for (auto _ : state) {
    const IovaRange range{Iova{(first + at) * page}, Iova{(first + at + 1) * page - 1}};
    backends::BackendOpResult result;
    {
      const std::lock_guard held{baseline_lock};
      const backends::BackendOp op{backends::OpKind::map, Access::read_write, {}, range, 0x7000'0000};
      backend.execute({&op, 1}, {&result, 1});
      baseline_index.emplace(range.start.value, page);
    }
    {
      const std::lock_guard held{baseline_lock};
      const backends::BackendOp op{backends::OpKind::unmap, Access::none, {}, range, 0};
      backend.execute({&op, 1}, {&result, 1});
      baseline_index.erase(range.start.value);
    }
    at = (at + 1) % 0x1000;
  }
  state.SetItemsProcessed(2 * state.iterations());
}

const int threads_max = static_cast<int>(std::max(2U, std::thread::hardware_concurrency()));
BENCHMARK(BM_FloorArithmetic)->ThreadRange(1, threads_max)->UseRealTime();
BENCHMARK(BM_FloorOwnMemory)->ThreadRange(1, threads_max)->UseRealTime();
BENCHMARK(BM_AddressSpacePerThread)->ThreadRange(1, threads_max)->UseRealTime();
BENCHMARK(BM_OneAddressSpace)
    ->Setup([](const benchmark::State&) { shared_space = open_space(); })
    ->Teardown([](const benchmark::State&) { shared_space = {}; })
    ->ThreadRange(1, threads_max)
    ->UseRealTime();
BENCHMARK(BM_BaselineOneMutex)->ThreadRange(1, threads_max)->UseRealTime();

}  // namespace
}  // namespace iovane
