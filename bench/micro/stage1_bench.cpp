// Stage-1 mode on the software IOMMU: map and unmap by batch size, strict and relaxed, one thread and two on one
// address space; beside it the same through iommufd's calls on the same software IOMMU, and the engine on top of both.
// The software IOMMU's calls stand for the kernel's in shape, not in time: what they cost here is not what a kernel
// costs.
#include <benchmark/benchmark.h>
#include <sys/mman.h>

#include <atomic>
#include <vector>

#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "engine/engine_core.hpp"

namespace {

using namespace iovane;
using namespace iovane::backends;

constexpr std::uint64_t page = 4096;
constexpr std::size_t pages = 256;

struct World {
  explicit World(const char* interface) {
    model::ModelOptions options;
    options.memory_check = model::MemoryCheck::none;
    options.iommus.front().nesting = model::Nesting::smmuv3;
    kernel = *model::ModelKernel::create(options);
    backend = *open_backend(*kernel, {.name = interface});
    memory = static_cast<std::byte*>(
        ::mmap(nullptr, 2 * pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0));
  }
  ~World() { ::munmap(memory, 2 * pages * page); }
  std::unique_ptr<BackendSpace> space() {
    auto made = *backend->create_space({});
    (void)made->attach({.pci_address = kernel->device(0).address()}).has_value();
    region = *made->register_memory({.address = memory, .length = Bytes{2 * pages * page}});
    return made;
  }
  std::unique_ptr<model::ModelKernel> kernel;
  std::unique_ptr<Backend> backend;
  std::byte* memory = nullptr;
  RegionId region{};
};

struct Batch {
  std::vector<BackendOp> maps, unmaps;
  std::vector<BackendOpResult> results;
  /// Every second page from `base`, so that no unmaps join.
  Batch(RegionId region, std::uint64_t base, std::uint64_t offset) : maps(pages), unmaps(pages), results(pages) {
    for (std::size_t i = 0; i < pages; ++i) {
      const IovaRange range = *IovaRange::from_length(Iova{base + 2 * i * page}, Bytes{page});
      maps[i] = {.kind = OpKind::copy,
                 .access = Access::read_write,
                 .region = region,
                 .range = range,
                 .memory = offset + i * page};
      unmaps[i] = {.kind = OpKind::unmap, .range = range};
    }
  }
  void run(BackendSpace& space, const std::vector<BackendOp>& ops, std::size_t count) {
    for (std::size_t from = 0; from < pages; from += count) space.execute({&ops[from], count}, {&results[from], count});
  }
};

enum class Part { map, unmap };

void backend_cost(benchmark::State& state, const char* interface, Part part) {
  World world{interface};
  const auto space = world.space();
  Batch batch{world.region, 0x1'0000'0000, 0};
  const auto count = static_cast<std::size_t>(state.range(0));
  for (auto _ : state) {
    if (part == Part::unmap) state.PauseTiming();
    batch.run(*space, batch.maps, count);
    part == Part::unmap ? state.ResumeTiming() : state.PauseTiming();
    batch.run(*space, batch.unmaps, count);
    if (part == Part::map) state.ResumeTiming();
  }
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(pages));
  if (batch.results[0].error) state.SkipWithError("an operation failed");
}
BENCHMARK_CAPTURE(backend_cost, stage1_map, "stage1", Part::map)->Arg(1)->Arg(16)->Arg(64)->Arg(256);
BENCHMARK_CAPTURE(backend_cost, iommufd_map, "iommufd", Part::map)->Arg(1)->Arg(16)->Arg(64)->Arg(256);
BENCHMARK_CAPTURE(backend_cost, stage1_unmap, "stage1", Part::unmap)->Arg(1)->Arg(16)->Arg(64)->Arg(256);
BENCHMARK_CAPTURE(backend_cost, iommufd_unmap, "iommufd", Part::unmap)->Arg(1)->Arg(16)->Arg(64)->Arg(256);

// Map and unmap pairs, strict, batches of 64: each thread in GiBs of its own, one address space.
void shared_space(benchmark::State& state, const char* interface) {
  static World* world;
  static std::unique_ptr<BackendSpace> space;
  if (state.thread_index() == 0) {
    world = new World{interface};
    space = world->space();
  }
  // The threads meet at the loop's start, after thread 0 made the above.
  std::unique_ptr<Batch> batch;
  for (auto _ : state) {
    if (!batch) {
      const auto thread = static_cast<std::uint64_t>(state.thread_index());
      batch = std::make_unique<Batch>(world->region, 0x1'0000'0000 + (thread << 32), thread * pages * page);
    }
    batch->run(*space, batch->maps, 64);
    batch->run(*space, batch->unmaps, 64);
  }
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(pages));
  if (state.thread_index() == 0) {
    space.reset();
    delete world;
  }
}
BENCHMARK_CAPTURE(shared_space, stage1_pairs, "stage1")->Threads(1)->Threads(2)->UseRealTime();
BENCHMARK_CAPTURE(shared_space, iommufd_pairs, "iommufd")->Threads(1)->Threads(2)->UseRealTime();

// The engine's queue on top: batches of 64 maps, then 64 unmaps of every second page. Each thread has a queue and GiBs
// of its own, in one address space.
struct EngineWorld {
  EngineWorld(const char* interface, UnmapMode mode)
      : world{interface}, engine{EngineAccess::open(std::move(world.backend), interface)} {
    AddressSpaceConfig config;
    config.layout = LayoutPolicy::fixed;
    config.unmap = mode;
    space = *engine.create_address_space(config);
    (void)space.attach({.pci_address = world.kernel->device(0).address()}).has_value();
    memory = *space.register_memory({.address = world.memory, .length = Bytes{2 * pages * page}});
  }
  World world;
  Engine engine;
  AddressSpace space;
  Memory memory;
};

void engine_pairs(benchmark::State& state, const char* interface, UnmapMode mode) {
  static std::unique_ptr<EngineWorld> shared;  // goes when the next is made: nobody uses it then
  if (state.thread_index() == 0) shared = std::make_unique<EngineWorld>(interface, mode);
  // The threads meet at the loop's start, after thread 0 made the above.
  Queue queue;
  std::array<Completion, 64> done;
  const auto finish = [&] {
    queue.submit();
    for (std::size_t left = 64; left != 0;) left -= queue.poll({done.data(), left});
  };
  const auto thread = static_cast<std::uint64_t>(state.thread_index());
  const std::uint64_t base = 0x1'0000'0000 + (thread << 32), offset = thread * pages * page;
  bool open = false;
  for (auto _ : state) {
    if (!open) queue = *shared->space.open_queue({.depth = 64});
    open = true;
    for (std::uint64_t i = 0; i < 64; ++i) {
      MapRequest map;
      map.memory = shared->memory.piece(Bytes{offset + i * page}, Bytes{page});
      map.access = Access::read_write;
      map.placement = Placement::fixed(Iova{base + 2 * i * page});
      (void)queue.stage(map);
    }
    finish();
    for (std::uint64_t i = 0; i < 64; ++i)
      (void)queue.stage(UnmapRequest::of(*IovaRange::from_length(Iova{base + 2 * i * page}, Bytes{page})));
    finish();
  }
  if (done[0].error) state.SkipWithError("an operation failed");
  state.SetItemsProcessed(state.iterations() * 64);
}
BENCHMARK_CAPTURE(engine_pairs, stage1_strict, "stage1", UnmapMode::strict)->Threads(1)->Threads(2)->UseRealTime();
BENCHMARK_CAPTURE(engine_pairs, stage1_relaxed, "stage1", UnmapMode::relaxed)->Threads(1)->Threads(2)->UseRealTime();
BENCHMARK_CAPTURE(engine_pairs, iommufd_strict, "iommufd", UnmapMode::strict);
BENCHMARK_CAPTURE(engine_pairs, iommufd_relaxed, "iommufd", UnmapMode::relaxed);

}  // namespace
