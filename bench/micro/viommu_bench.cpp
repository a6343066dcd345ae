// Guest events through each vIOMMU front end, per leaf entry changed: walk, compare, stage, complete.
//
// Hosts: one that does nothing (the front end alone), the engine on a backend that does nothing, and the engine on the
// software IOMMU. The baseline in the same run is what VMMs do today: for each leaf, under one lock, look the old
// mapping up in an ordered map, and make one synchronous call. It gets the same walk, decode and events, but reads no
// queue.
#include <benchmark/benchmark.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "support/null_backend.hpp"
#include "viommu/engine_target.hpp"
#include "viommu/papr.hpp"
#include "viommu/recording_target.hpp"
#include "viommu/virtio_iommu.hpp"
#include "viommu/vtd.hpp"

namespace iovane::viommu {
namespace {

constexpr std::uint64_t ram_bytes = 256U << 20;
constexpr std::uint64_t page = 4096;
constexpr std::uint64_t iova_base = 0xf000'0000;
constexpr std::uint16_t device = 0x08;

enum Host : int { idle = 0, engine = 1, model = 2 };

// A guest with its RAM, and a host of either kind. One per thread: guests share nothing.
struct World {
  explicit World(int host) {
    void* mapped =
        ::mmap(nullptr, ram_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ram = static_cast<std::byte*>(mapped);
    static_cast<void>(memory.add({0, {ram_bytes}, ram, -1, 0, false}));
    if (host != idle) {
      EngineConfig software;
      software.backend = "model";
      Engine opened =
          host == model ? *Engine::open(software) : EngineAccess::open(std::make_unique<bench::NullBackend>(), "null");
      AddressSpaceConfig config;
      config.layout = LayoutPolicy::fixed;
      space = std::make_unique<AddressSpace>(*opened.create_address_space(config));
      if (host == model) static_cast<void>(space->attach({.pci_address = "0000:00:03.0"}));
      target = *EngineTarget::create(*space, memory);
    } else {
      target = std::make_unique<IdleTarget>();
    }
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;
  ~World() {
    target.reset();
    ::munmap(ram, ram_bytes);
  }
  void store(std::uint64_t gpa, std::uint64_t value) const {
    __atomic_store_n(reinterpret_cast<std::uint64_t*>(ram + gpa), value, __ATOMIC_RELAXED);
  }
  std::byte* ram;
  GuestMemory memory;
  std::unique_ptr<AddressSpace> space;
  std::unique_ptr<ShadowTarget> target;
};

// A four-level second-level table whose leaf tables lie side by side: leaf `i` is one store.
struct VtdWorld : World {
  static constexpr std::uint64_t leaves = 0x10'0000;  // leaf tables, 64 of them
  static constexpr std::uint64_t queue = 0x1'0000;

  explicit VtdWorld(int host) : World{host} {
    store(0x1000, 0x2001);
    store(0x2000 + device * 16 + 8, 2 | 1 << 8);
    store(0x2000 + device * 16, 0x3001);
    store(0x3000, 0x4003);
    store(0x4000 + (iova_base >> 30) * 8, 0x5003);
    for (std::uint64_t i = 0; i < 64; ++i) store(0x5000 + (iova_base >> 21 & 511) * 8 + i * 8, (leaves + i * page) | 3);
    VtdConfig config;
    config.capabilities.second_levels_mask = 7U << 3;
    config.capabilities.guest_address_width = 48;
    unit = std::make_unique<Vtd>(memory, config, events);
    unit->set_queue(queue);
    unit->set_root_table(0x1000);
    unit->set_translation(true);
    static_cast<void>(unit->add_endpoint(device, std::nullopt, target.get()));
  }
  ~VtdWorld() { static_cast<void>(unit->remove_endpoint(device, std::nullopt)); }
  void leaf(std::uint64_t i, std::uint64_t entry) const { store(leaves + i * 8, entry); }
  void enqueue(std::uint64_t low, std::uint64_t high) {
    store(queue + tail * 16, low);
    store(queue + tail * 16 + 8, high);
    tail = (tail + 1) % 256;
  }
  VtdEvents events;
  std::unique_ptr<Vtd> unit;
  std::uint64_t tail = 0;
};

// What a strict Linux guest does for each I/O: map pages, one invalidation and a wait; unmap them, the same again.
void BM_VtdPages(benchmark::State& state) {
  VtdWorld world{static_cast<int>(state.range(1))};
  const auto pages = static_cast<std::uint64_t>(state.range(0));
  const auto mask = static_cast<std::uint64_t>(std::bit_width(pages) - 1);
  std::uint64_t at = 0;
  for (auto _ : state) {
    for (const std::uint64_t present : {3ULL, 0ULL}) {
      for (std::uint64_t i = 0; i < pages; ++i)
        world.leaf(at + i, present == 0 ? 0 : (0x400'0000 + (at * 7 + i) % 1024 * page) | present);
      world.enqueue(0x32 | 1 << 16, (iova_base + at * page) | mask);
      world.enqueue(0x25 | 7ULL << 32, 0x8000);
      if (world.unit->write_tail(world.tail * 16) != Progress::done) world.unit->finish();
    }
    at = (at + pages) % 16384;
  }
  const auto changed = static_cast<std::int64_t>(2 * pages);
  state.SetItemsProcessed(state.iterations() * changed);
  state.counters["leaves/s"] =
      benchmark::Counter(static_cast<double>(state.iterations() * changed), benchmark::Counter::kIsRate);
}
BENCHMARK(BM_VtdPages)->ArgNames({"pages", "host"})->ArgsProduct({{1, 4, 32, 512}, {idle, engine, model}});

// Scattered leaves, as a guest maps a list of single pages: no run merges, 32 invalidations per notification.
void BM_VtdScattered(benchmark::State& state) {
  VtdWorld world{static_cast<int>(state.range(0))};
  constexpr std::uint64_t batch = 32;
  std::uint64_t at = 0;
  for (auto _ : state) {
    for (const std::uint64_t present : {3ULL, 0ULL}) {
      for (std::uint64_t i = 0; i < batch; ++i) {
        const std::uint64_t slot = (at + i * 37) % 32768;
        world.leaf(slot, present == 0 ? 0 : (0x400'0000 + (i * 991) % 1024 * page) | present);
        world.enqueue(0x32 | 1 << 16, iova_base + slot * page);
        world.enqueue(0x25 | 7ULL << 32, 0x8000);
      }
      if (world.unit->write_tail(world.tail * 16) != Progress::done) world.unit->finish();
    }
    at = (at + 1) % 32768;
  }
  state.SetItemsProcessed(state.iterations() * 2 * static_cast<std::int64_t>(batch));
}
BENCHMARK(BM_VtdScattered)->ArgName("host")->Arg(idle)->Arg(engine)->Arg(model);

// Nothing changed: the price of looking, per entry.
void BM_VtdCompareUnchanged(benchmark::State& state) {
  VtdWorld world{idle};
  for (std::uint64_t i = 0; i < 32768; ++i) world.leaf(i, (0x400'0000 + (i * 7) % 1024 * page) | 3);
  world.unit->execute({VtdDescriptor::Kind::iotlb, VtdDescriptor::Scope::global});
  world.unit->finish();
  for (auto _ : state) {
    world.unit->execute({VtdDescriptor::Kind::iotlb, VtdDescriptor::Scope::global});
    world.unit->finish();
  }
  state.SetItemsProcessed(state.iterations() * 32768);
}
BENCHMARK(BM_VtdCompareUnchanged);

// Guests on threads of their own.
void BM_VtdGuests(benchmark::State& state) {
  VtdWorld world{static_cast<int>(state.range(0))};
  std::uint64_t at = 0;
  for (auto _ : state) {
    for (const std::uint64_t present : {3ULL, 0ULL}) {
      world.leaf(at, present == 0 ? 0 : 0x400'0000 | present);
      world.enqueue(0x32 | 1 << 16, iova_base + at * page);
      world.enqueue(0x25 | 7ULL << 32, 0x8000);
      if (world.unit->write_tail(world.tail * 16) != Progress::done) world.unit->finish();
    }
    at = (at + 1) % 16384;
  }
  state.SetItemsProcessed(state.iterations() * 2);
}
BENCHMARK(BM_VtdGuests)->ArgName("host")->Arg(idle)->Arg(engine)->Threads(1)->Threads(2)->UseRealTime();

// Walks by readers, as emulated devices and fault reports make them, through the guest's own tables, from any number of
// threads at once: four entries each.
void BM_VtdReaders(benchmark::State& state) {
  static VtdWorld world{idle};
  if (state.thread_index() == 0)
    for (std::uint64_t i = 0; i < 32768; ++i) world.leaf(i, (0x400'0000 + (i * 7) % 1024 * page) | 3);
  std::uint64_t at = static_cast<std::uint64_t>(state.thread_index()) * 911;
  for (auto _ : state) {
    benchmark::DoNotOptimize(world.unit->fault_of(device, std::nullopt, iova_base + at * page, false));
    at = (at + 61) % 32768;
  }
  state.SetItemsProcessed(state.iterations() * 4);
}
BENCHMARK(BM_VtdReaders)->Threads(1)->Threads(2)->UseRealTime();

// A guest's notifications while another guest, on a thread of its own, does nothing (storm 0), or invalidates
// everything it has as fast as it can: 32,768 entries and an index at its bound, over and over (storm 1).
void BM_VtdNeighbourOfAStorm(benchmark::State& state) {
  VtdWorld world{idle};
  std::atomic<bool> stop{false};
  std::thread neighbour{[&] {
    if (state.range(0) == 0) return;
    VtdWorld hostile{idle};
    // Every entry of the top table leads back to it: the walk has no end but its bounds.
    for (std::uint64_t i = 0; i < 512; ++i) hostile.store(0x3000 + i * 8, 0x3003);
    // relaxed: only says when to stop.
    while (!stop.load(std::memory_order_relaxed)) {
      for (int i = 0; i < 100; ++i) hostile.enqueue(0x12, 0);
      hostile.unit->write_tail(hostile.tail * 16);
      hostile.unit->finish();
    }
  }};
  std::uint64_t at = 0;
  for (auto _ : state) {
    for (const std::uint64_t present : {3ULL, 0ULL}) {
      world.leaf(at, present == 0 ? 0 : 0x400'0000 | present);
      world.enqueue(0x32 | 1 << 16, iova_base + at * page);
      world.enqueue(0x25 | 7ULL << 32, 0x8000);
      if (world.unit->write_tail(world.tail * 16) != Progress::done) world.unit->finish();
    }
    at = (at + 1) % 16384;
  }
  stop.store(true, std::memory_order_relaxed);
  neighbour.join();
  state.SetItemsProcessed(state.iterations() * 2);
}
BENCHMARK(BM_VtdNeighbourOfAStorm)->ArgName("storm")->Arg(0)->Arg(1)->UseRealTime();

// What one call may cost, however hostile the tables: the longest of a storm's calls, which end with `pending`.
void BM_VtdStormCall(benchmark::State& state) {
  VtdWorld hostile{idle};
  for (std::uint64_t i = 0; i < 512; ++i) hostile.store(0x3000 + i * 8, 0x3003);
  double longest = 0;
  for (auto _ : state) {
    hostile.enqueue(0x12, 0);
    Progress progress = Progress::pending;
    bool first = true;
    while (progress == Progress::pending) {
      const auto begun = std::chrono::steady_clock::now();
      progress = first ? hostile.unit->write_tail(hostile.tail * 16) : hostile.unit->advance();
      first = false;
      longest = std::max(longest, std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count());
    }
  }
  state.counters["longest_call_ns"] = longest * 1e9;
}
BENCHMARK(BM_VtdStormCall);

// The baseline: per leaf one lock, one ordered-map search and change, one virtual synchronous call.
class OneCall {
 public:
  virtual ~OneCall() = default;
  virtual void map(std::uint64_t iova, std::uint64_t gpa, unsigned access) noexcept = 0;
  virtual void unmap(std::uint64_t iova) noexcept = 0;
};
class NoCall final : public OneCall {
 public:
  std::uint64_t calls = 0;
  void map(std::uint64_t, std::uint64_t, unsigned) noexcept override { benchmark::DoNotOptimize(++calls); }
  void unmap(std::uint64_t) noexcept override { benchmark::DoNotOptimize(++calls); }
};

void BM_BaselinePerLeaf(benchmark::State& state) {
  const auto pages = static_cast<std::uint64_t>(state.range(0));
  VtdWorld world{idle};
  NoCall none;
  OneCall* call = &none;
  benchmark::DoNotOptimize(call);
  std::mutex lock;
  std::map<std::uint64_t, std::pair<std::uint64_t, unsigned>> live;
  VtdCapabilities capabilities;
  capabilities.second_levels_mask = 7U << 3;
  capabilities.guest_address_width = 48;
  const VtdPageTable table{VtdPageTable::Stage::second, 4, false, 0x3000};
  std::uint64_t at = 0;
  for (auto _ : state) {
    for (const std::uint64_t present : {3ULL, 0ULL}) {
      for (std::uint64_t i = 0; i < pages; ++i)
        world.leaf(at + i, present == 0 ? 0 : (0x400'0000 + (at * 7 + i) % 1024 * page) | present);
      const auto descriptor = decode_descriptor({0x32 | 1 << 16, iova_base + at * page, 0, 0}, {});
      benchmark::DoNotOptimize(descriptor);
      const auto view = world.memory.view();
      for (std::uint64_t i = 0; i < pages; ++i) {
        const std::uint64_t iova = iova_base + (at + i) * page;
        const std::lock_guard guard{lock};
        const auto found = translate_address(view, table, capabilities, iova, false);
        const auto old = live.find(iova);
        if (found.fault != VtdFault::none) {
          if (old == live.end()) continue;
          live.erase(old);
          call->unmap(iova);
        } else if (old == live.end()) {
          live.emplace(iova, std::pair{found.gpa, static_cast<unsigned>(found.access)});
          call->map(iova, found.gpa, static_cast<unsigned>(found.access));
        }
      }
      view.write_le32(0x8000, 7);
    }
    at = (at + pages) % 16384;
  }
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(2 * pages));
}
BENCHMARK(BM_BaselinePerLeaf)->ArgName("pages")->Arg(1)->Arg(4)->Arg(32)->Arg(512);

// As a driver writes its fields: one store each.
template <typename Word>
void put_le(std::byte* at, Word value) {
  std::memcpy(at, &value, sizeof value);
}

// MAP and UNMAP requests of one page each, `batch` per notification.
void BM_VirtioIommu(benchmark::State& state) {
  World world{static_cast<int>(state.range(1))};
  const auto batch = static_cast<std::size_t>(state.range(0));
  VirtioIommuConfig config;
  config.bypass_at_boot = false;
  config.input_range = {Iova{0}, Iova{0xffff'ffff'ffff}};
  VirtioIommu iommu{world.memory, config};
  iommu.set_features(iommu.features());
  if (auto added = iommu.add_endpoint(1, world.target.get(), {}); !added) state.SkipWithError("no endpoint");
  struct alignas(8) Bytes {
    std::array<std::byte, 36> bytes{};
  };
  std::vector<Bytes> in(batch);
  std::vector<std::array<std::byte, 4>> out(batch);
  const auto head = [](std::uint64_t type, std::uint64_t domain) { return type | domain << 32; };
  std::vector<VirtioIommu::Request> requests(batch);
  std::vector<VirtioIommu::Answer> answers(batch);
  const auto send = [&] {
    if (iommu.handle(requests) != batch) state.SkipWithError("short");
    iommu.finish();
    if (iommu.take_answers(answers) != batch) state.SkipWithError("unanswered");
  };
  put_le(in[0].bytes.data(), head(1, 5)), put_le(in[0].bytes.data() + 8, std::uint64_t{1});
  const VirtioIommu::Request attach{std::span{in[0].bytes}.first(20), out[0], 0};
  static_cast<void>(iommu.handle({&attach, 1}));
  static_cast<void>(iommu.take_answers(answers));
  std::uint64_t at = 0;
  for (auto _ : state) {
    for (std::size_t i = 0; i < batch; ++i) {
      const std::uint64_t iova = iova_base + (at + i) % 16384 * page;
      std::byte* bytes = in[i].bytes.data();
      put_le(bytes, head(3, 5)), put_le(bytes + 8, iova), put_le(bytes + 16, iova + page - 1);
      put_le(bytes + 24, 0x400'0000 + i * 5 % 512 * page), put_le(bytes + 32, std::uint32_t{3});
      requests[i] = {in[i].bytes, out[i], i};
    }
    send();
    for (std::size_t i = 0; i < batch; ++i) {
      put_le(in[i].bytes.data(), head(4, 5)), put_le(in[i].bytes.data() + 24, std::uint64_t{0});
      requests[i] = {std::span{in[i].bytes}.first(28), out[i], i};
    }
    send();
    at = (at + batch) % 16384;
  }
  if (out[0][0] != std::byte{0}) state.SkipWithError("refused");
  state.SetItemsProcessed(state.iterations() * static_cast<std::int64_t>(2 * batch));
  static_cast<void>(iommu.remove_endpoint(1));
}
BENCHMARK(BM_VirtioIommu)->ArgNames({"batch", "host"})->ArgsProduct({{1, 32}, {idle, engine, model}});
BENCHMARK(BM_VirtioIommu)->ArgNames({"batch", "host"})->Args({32, idle})->Threads(2)->UseRealTime();

// H_PUT_TCE pairs, and lists of 512.
void BM_PaprPut(benchmark::State& state) {
  World world{static_cast<int>(state.range(0))};
  PaprTce papr{world.memory, nullptr};
  PhbConfig config;
  static_cast<void>(papr.add_phb(config));
  if (auto added = papr.add_device(0, world.target.get()); !added) state.SkipWithError("no device");
  std::uint64_t at = 0;
  for (auto _ : state) {
    papr.call_and_wait(hcall::put_tce, std::array<std::uint64_t, 4>{config.liobn, at * page, 0x400'0003, 0});
    papr.call_and_wait(hcall::put_tce, std::array<std::uint64_t, 4>{config.liobn, at * page, 0, 0});
    at = (at + 1) % 16384;
  }
  state.SetItemsProcessed(state.iterations() * 2);
  static_cast<void>(papr.remove_device(0, world.target.get()));
}
BENCHMARK(BM_PaprPut)->ArgName("host")->Arg(idle)->Arg(engine)->Arg(model);
BENCHMARK(BM_PaprPut)->ArgName("host")->Arg(idle)->Threads(2)->UseRealTime();

void BM_PaprIndirect(benchmark::State& state) {
  World world{static_cast<int>(state.range(0))};
  PaprTce papr{world.memory, nullptr};
  PhbConfig config;
  static_cast<void>(papr.add_phb(config));
  if (auto added = papr.add_device(0, world.target.get()); !added) state.SkipWithError("no device");
  for (std::uint64_t i = 0; i < 512; ++i)
    world.store(0x1000 + i * 8, __builtin_bswap64((0x400'0000 + i * 3 * page) | 3));
  for (auto _ : state) {
    papr.call_and_wait(hcall::put_tce_indirect, std::array<std::uint64_t, 4>{config.liobn, 0x1000'0000, 0x1000, 512});
    papr.call_and_wait(hcall::stuff_tce, std::array<std::uint64_t, 4>{config.liobn, 0x1000'0000, 0, 512});
  }
  state.SetItemsProcessed(state.iterations() * 1024);
  static_cast<void>(papr.remove_device(0, world.target.get()));
}
BENCHMARK(BM_PaprIndirect)->ArgName("host")->Arg(idle)->Arg(engine)->Arg(model);

}  // namespace
}  // namespace iovane::viommu
