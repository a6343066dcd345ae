// The engine alone: stage + submit + poll per operation on a backend that does nothing, for several batch sizes, beside
// what a careful caller would write without it: a mutex, an ordered map, and one virtual call per operation.
#include <benchmark/benchmark.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "support/null_backend.hpp"

namespace iovane {
namespace {

constexpr std::uint64_t page = 4096;

AddressSpace open_space(LayoutPolicy layout, UnmapMode unmap = UnmapMode::strict) {
  Engine engine = EngineAccess::open(std::make_unique<bench::NullBackend>(), "null");
  AddressSpaceConfig config;
  config.layout = layout;
  config.unmap = unmap;
  return *engine.create_address_space(config);
}

MapRequest map_at(std::uint64_t index) {
  MapRequest request;
  request.memory = {{}, 0x7000'0000 + index * page, Bytes{page}};
  request.placement = Placement::fixed(Iova{index * page});
  return request;
}

void take_all(Queue& queue, std::vector<Completion>& out, benchmark::State& state) {
  for (std::size_t left = queue.outstanding(); left != 0;) {
    const std::size_t got = queue.poll(out);
    for (std::size_t i = 0; i < got; ++i)
      if (!out[i].ok()) state.SkipWithError(out[i].error.message().c_str());
    left -= got;
  }
}

// Per iteration a batch of maps, then a batch of their unmaps; of other pages each time when `fresh`.
void run_batches(benchmark::State& state, AddressSpace& space, std::uint64_t batch, bool fresh) {
  Queue queue = *space.open_queue({.depth = 256});
  std::vector<Completion> out(256);
  std::uint64_t at = 0x10000;
  for (auto _ : state) {
    for (std::uint64_t i = 0; i < batch; ++i) (void)queue.stage(map_at(at + i));
    queue.submit();
    take_all(queue, out, state);
    for (std::uint64_t i = 0; i < batch; ++i)
      (void)queue.stage(UnmapRequest::of(IovaRange{Iova{(at + i) * page}, Iova{(at + i + 1) * page - 1}}));
    queue.submit();
    take_all(queue, out, state);
    if (fresh) at = 0x10000 + (at + batch) % 0x10000;
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(2 * batch) * state.iterations());
}

// A batch of maps, then a batch of unmaps, `live` other mappings around. Reported per operation.
void BM_EngineBatch(benchmark::State& state) {
  const auto live = static_cast<std::uint64_t>(state.range(1));
  AddressSpace space = open_space(LayoutPolicy::fixed);
  for (std::uint64_t i = 0; i < live; ++i)
    if (!space.map(map_at(0x100'0000 + 2 * i)).ok()) state.SkipWithError("cannot fill the space");
  run_batches(state, space, static_cast<std::uint64_t>(state.range(0)), true);
}
BENCHMARK(BM_EngineBatch)->ArgNames({"batch", "live"})->ArgsProduct({{1, 8, 32, 128}, {0, 10'000}});

// The same on the software IOMMU, which writes page tables: what a pair costs with a backend that works.
void BM_EngineOnModel(benchmark::State& state) {
  backends::model::ModelOptions options;
  options.memory_check = backends::model::MemoryCheck::none;  // the addresses lead nowhere, and nobody follows them
  auto kernel = *backends::model::ModelKernel::create(options);
  auto backend =
      *backends::open_backend(*kernel, {.name = state.range(1) != 0 ? "type1" : "iommufd", .descriptor = {}});
  {
    Engine engine = EngineAccess::open(std::move(backend), "model");
    AddressSpaceConfig config;
    config.layout = LayoutPolicy::fixed;
    AddressSpace space = *engine.create_address_space(config);
    if (!space.attach({.pci_address = kernel->device(0).address()})) state.SkipWithError("cannot attach");
    run_batches(state, space, static_cast<std::uint64_t>(state.range(0)), true);
  }
}
BENCHMARK(BM_EngineOnModel)->ArgNames({"batch", "type1"})->ArgsProduct({{1, 8, 32, 128}, {0, 1}});

// Baseline: the backend alone on the software IOMMU, a call per operation.
void BM_BaselineModelCalls(benchmark::State& state) {
  backends::model::ModelOptions options;
  options.memory_check = backends::model::MemoryCheck::none;
  auto kernel = *backends::model::ModelKernel::create(options);
  auto backend =
      *backends::open_backend(*kernel, {.name = state.range(0) != 0 ? "type1" : "iommufd", .descriptor = {}});
  auto space = *backend->create_space({});
  if (!space->attach({.pci_address = kernel->device(0).address()})) state.SkipWithError("cannot attach");
  std::uint64_t at = 0x10000;
  for (auto _ : state) {
    const IovaRange range{Iova{at * page}, Iova{(at + 1) * page - 1}};
    const backends::BackendOp map{backends::OpKind::map, Access::read_write, {}, range, 0x7000'0000 + at * page};
    const backends::BackendOp unmap{backends::OpKind::unmap, Access::none, {}, range, 0};
    backends::BackendOpResult result;
    space->execute({&map, 1}, {&result, 1});
    if (result.error) state.SkipWithError(result.error.message().c_str());
    space->execute({&unmap, 1}, {&result, 1});
    at = 0x10000 + (at + 1) % 0x10000;
  }
  state.SetItemsProcessed(2 * state.iterations());
}
BENCHMARK(BM_BaselineModelCalls)->ArgName("type1")->Arg(0)->Arg(1);

// The same in relaxed mode: `fresh` pages, so that flushes really unmap, or the same ones, which are revived.
void BM_EngineRelaxed(benchmark::State& state) {
  AddressSpace space = open_space(LayoutPolicy::fixed, UnmapMode::relaxed);
  run_batches(state, space, static_cast<std::uint64_t>(state.range(0)), state.range(1) != 0);
}
BENCHMARK(BM_EngineRelaxed)->ArgNames({"batch", "fresh"})->ArgsProduct({{1, 32}, {0, 1}});

// The same through the synchronous calls.
void BM_EngineSynchronous(benchmark::State& state) {
  AddressSpace space = open_space(LayoutPolicy::fixed);
  for (auto _ : state) {
    const Completion mapped = space.map(map_at(0x10000));
    const Completion gone = space.unmap(UnmapRequest::of(mapped.mapping));
    if (!gone.ok()) state.SkipWithError(gone.error.message().c_str());
  }
  state.SetItemsProcessed(2 * state.iterations());
}
BENCHMARK(BM_EngineSynchronous);

// The engine chooses the IOVA.
void BM_EngineBatchAnywhere(benchmark::State& state) {
  const auto batch = static_cast<std::uint64_t>(state.range(0));
  AddressSpace space = open_space(LayoutPolicy::engine_managed);
  Queue queue = *space.open_queue({.depth = 256});
  std::vector<Completion> out(256);
  std::vector<MappingId> mappings(batch);
  MapRequest request = map_at(1);
  request.placement = Placement::anywhere();
  for (auto _ : state) {
    for (std::uint64_t i = 0; i < batch; ++i) (void)queue.stage(request);
    queue.submit();
    if (queue.poll(out) != batch) state.SkipWithError("short");
    for (std::uint64_t i = 0; i < batch; ++i) mappings[i] = out[i].mapping;
    for (std::uint64_t i = 0; i < batch; ++i) (void)queue.stage(UnmapRequest::of(mappings[i]));
    queue.submit();
    take_all(queue, out, state);
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(2 * batch) * state.iterations());
}
BENCHMARK(BM_EngineBatchAnywhere)->ArgName("batch")->Arg(1)->Arg(32);

// Baseline: what today's callers do, one call per operation under one lock with an ordered map of what is live.
void BM_BaselineMutexAndMap(benchmark::State& state) {
  const auto live = static_cast<std::uint64_t>(state.range(0));
  auto space = std::make_unique<bench::NullSpace>();
  std::mutex lock;
  std::map<std::uint64_t, std::uint64_t> index;
  for (std::uint64_t i = 0; i < live; ++i) index.emplace((0x100'0000 + 2 * i) * page, page);
  backends::BackendSpace& backend = *space;
  std::uint64_t at = 0x10000;
  for (auto _ : state) {
    const IovaRange range{Iova{at * page}, Iova{(at + 1) * page - 1}};
    backends::BackendOpResult result;
    {
      const std::lock_guard held{lock};
      const auto next = index.lower_bound(range.start.value);
      if (next != index.end() && next->first <= range.last.value) state.SkipWithError("overlap");
      const backends::BackendOp op{backends::OpKind::map, Access::read_write, {}, range, 0x7000'0000 + at * page};
      backend.execute({&op, 1}, {&result, 1});
      index.emplace_hint(next, range.start.value, page);
    }
    {
      const std::lock_guard held{lock};
      const backends::BackendOp op{backends::OpKind::unmap, Access::none, {}, range, 0};
      backend.execute({&op, 1}, {&result, 1});
      index.erase(range.start.value);
    }
    at = 0x10000 + (at + 1) % 0x10000;
  }
  state.SetItemsProcessed(2 * state.iterations());
}
BENCHMARK(BM_BaselineMutexAndMap)->ArgName("live")->Arg(0)->Arg(10'000);

}  // namespace
}  // namespace iovane
