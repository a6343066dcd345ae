// Devices come, go and move between two address spaces while other threads map, unmap and do DMA in both. Run under
// TSan.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "support/seed.hpp"

namespace iovane {
namespace {

using backends::model::ModelKernel;
using backends::model::ModelOptions;
using backends::model::ModelUsage;

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t common_iova = 0x10'0000;  // mapped in both spaces throughout
constexpr std::uint64_t traffic_iova = 0x4000'0000;

class HotplugStress : public ::testing::TestWithParam<const char*> {};

// What the device finds at common_iova says which space it translates through; "neither" must never be seen.
TEST_P(HotplugStress, TrafficAndMovesAtOnce) {
  const std::uint64_t seed = test::seed();
  SCOPED_TRACE(::testing::Message() << "IOVANE_SEED=" << seed);
  const bool gapless = std::string_view{GetParam()} == "iommufd";
  ModelOptions options;
  options.devices.resize(4);  // 0 and 1 stay, one in each space; 2 and 3 travel
  auto kernel = *ModelKernel::create(options);
  {
    auto backend = backends::open_backend(*kernel, {.name = GetParam(), .descriptor = {}});
    ASSERT_TRUE(backend) << backend.error().message();
    Engine engine = EngineAccess::open(*std::move(backend), "model");
    AddressSpaceConfig config;
    config.layout = LayoutPolicy::fixed;
    config.dirty_tracking = true;
    std::array<AddressSpace, 2> spaces;
    struct alignas(page) Page {
      std::array<std::byte, page> bytes{};
    };
    std::vector<Page> marks(2);
    std::vector<Page> traffic(16);
    for (std::size_t s = 0; s < 2; ++s) {
      auto made = engine.create_address_space(config);
      ASSERT_TRUE(made) << made.error().message();
      spaces[s] = *std::move(made);
      ASSERT_TRUE(spaces[s].attach({.pci_address = kernel->device(s).address()}));
      marks[s].bytes.fill(std::byte{static_cast<unsigned char>(s + 1)});
      MapRequest common;
      common.memory = MemoryPiece::of(marks[s].bytes);
      common.access = Access::read;
      common.placement = Placement::fixed(Iova{common_iova});
      ASSERT_TRUE(spaces[s].map(common).ok());
      ASSERT_TRUE(spaces[s].start_dirty_tracking());
    }

    std::atomic<bool> stop{false}, attached{false};
    std::atomic<std::uint64_t> pairs{0}, sightings{0}, gaps{0};
    std::vector<std::thread> threads;
    // Traffic: one thread per space.
    for (std::size_t s = 0; s < 2; ++s)
      threads.emplace_back([&, s] {
        test::Random random{seed + s};
        auto queue = spaces[s].open_queue({.depth = 64});
        ASSERT_TRUE(queue);
        std::vector<Completion> out(64);
        // relaxed: only ends the loop.
        while (!stop.load(std::memory_order_relaxed)) {
          const std::uint64_t count = 1 + random.below(8);
          for (std::uint64_t i = 0; i < count; ++i) {
            MapRequest request;
            request.memory = MemoryPiece::of(traffic[s * 8 + i].bytes);
            request.placement = Placement::fixed(Iova{traffic_iova + 2 * i * page});
            ASSERT_TRUE(queue->stage(request));
          }
          queue->submit();
          ASSERT_EQ(queue->wait(out, count, std::chrono::seconds{60}), count);
          for (std::uint64_t i = 0; i < count; ++i) ASSERT_TRUE(out[i].ok()) << out[i].error.message();
          // The device that stays must reach the page, whoever comes and goes.
          std::array<std::byte, 8> bytes{};
          const auto wrote = kernel->device(s).dma_write(Iova{traffic_iova}, bytes);
          ASSERT_TRUE(wrote.ok());
          ASSERT_TRUE(queue->stage(UnmapRequest::of(*IovaRange::from_length(Iova{traffic_iova}, Bytes{32 * page}))));
          queue->submit();
          ASSERT_EQ(queue->wait(out, 1, std::chrono::seconds{60}), 1U);
          ASSERT_TRUE(out[0].ok()) << out[0].error.message();
          ASSERT_EQ(out[0].bytes.value, count * page);
          ASSERT_FALSE(kernel->device(s).dma_write(Iova{traffic_iova}, bytes).ok());
          pairs.fetch_add(count, std::memory_order_relaxed);  // relaxed: a count
        }
      });
    // The travelling device 2 looks all the time.
    threads.emplace_back([&] {
      while (!stop.load(std::memory_order_relaxed)) {  // relaxed: only ends the loop
        std::array<std::byte, 4> bytes{};
        // acquire: pairs with the release after its first attach.
        const bool was_attached = attached.load(std::memory_order_acquire);
        const auto read = kernel->device(2).dma_read(Iova{common_iova}, bytes);
        if (!read.ok()) {
          if (was_attached) gaps.fetch_add(1, std::memory_order_relaxed);  // relaxed: a count
          continue;
        }
        sightings.fetch_add(1, std::memory_order_relaxed);  // relaxed: a count
        ASSERT_TRUE(std::all_of(bytes.begin(), bytes.end(), [&](std::byte b) { return b == bytes[0]; }));
        ASSERT_TRUE(bytes[0] == std::byte{1} || bytes[0] == std::byte{2});
      }
    });
    // Another one reads dirty pages.
    threads.emplace_back([&] {
      std::vector<std::uint64_t> bitmap(1);
      std::vector<DirtyRun> runs(8);
      while (!stop.load(std::memory_order_relaxed))  // relaxed: only ends the loop
        for (AddressSpace& space : spaces) {
          const auto read =
              space.read_dirty(*IovaRange::from_length(Iova{traffic_iova}, Bytes{64 * page}), Bytes{page}, bitmap);
          ASSERT_TRUE(read) << read.error().message();
          (void)space.take_unmapped_dirty(runs);
        }
    });

    // This thread moves device 2 to and fro, and plugs device 3 in and out.
    const char* const given = std::getenv("IOVANE_STRESS_MS");
    const auto until =
        std::chrono::steady_clock::now() + std::chrono::milliseconds{given != nullptr ? std::atoi(given) : 1500};
    auto travelling = spaces[0].attach({.pci_address = kernel->device(2).address()});
    ASSERT_TRUE(travelling) << travelling.error().message();
    attached.store(true, std::memory_order_release);  // pairs with the looking thread
    std::size_t at = 0;
    std::uint64_t moves = 0;
    while (std::chrono::steady_clock::now() < until) {
      auto moved = spaces[at].move_device(travelling->id, spaces[1 - at],
                                          gapless ? AddressSpace::Gap::refuse : AddressSpace::Gap::accept);
      ASSERT_TRUE(moved) << moved.error().message();
      travelling = std::move(moved);
      at = 1 - at;
      ++moves;
      const auto plugged = spaces[moves % 2].attach({.pci_address = kernel->device(3).address()});
      ASSERT_TRUE(plugged) << plugged.error().message();
      const auto gone = spaces[moves % 2].detach(plugged->id);
      ASSERT_TRUE(gone) << gone.error().message();
    }
    if (gapless) {
      EXPECT_EQ(gaps.load(std::memory_order_relaxed), 0U) << "a moment in which the device translated through neither";
    }
    stop.store(true, std::memory_order_relaxed);  // relaxed: join() orders the rest
    for (auto& thread : threads) thread.join();
    EXPECT_GT(moves, 2U);
    EXPECT_GT(pairs.load(std::memory_order_relaxed), 0U);
    for (AddressSpace& space : spaces) {
      EXPECT_EQ(space.stats().live_mappings, 1U);
      EXPECT_EQ(space.stats().quarantined_mappings, 0U);
    }
  }
  EXPECT_EQ(kernel->usage(), ModelUsage{});
}

INSTANTIATE_TEST_SUITE_P(Software, HotplugStress, ::testing::Values("iommufd", "type1"),
                         [](const auto& test) { return std::string{test.param}; });

TEST(Hotplug, MovesThatCannotBeAreRefusedAndTheDeviceStays) {
  auto kernel = *ModelKernel::create();
  const auto open = [&](const char* interface) {
    return EngineAccess::open(*backends::open_backend(*kernel, {.name = interface, .descriptor = {}}), interface);
  };
  Engine iommufd = open("iommufd");
  AddressSpaceConfig promising;
  promising.layout = LayoutPolicy::fixed;
  promising.promised = {{Iova{0xfee0'0000}, Iova{0xfee0'ffff}}};  // where the devices have their interrupts
  auto from = iommufd.create_address_space({});
  auto to = iommufd.create_address_space(promising);
  ASSERT_TRUE(from && to);
  const auto device = from->attach({.pci_address = kernel->device(0).address()});
  ASSERT_TRUE(device);
  EXPECT_EQ(from->move_device(device->id, *from).error().code, Errc::invalid_argument);
  EXPECT_EQ(from->move_device(77, *to).error().code, Errc::not_found);
  EXPECT_EQ(from->move_device(device->id, *to).error().code, Errc::iova_reserved);
  EXPECT_TRUE(from->detach(device->id)) << "it is where it was";

  Engine type1 = open("type1");
  auto a = type1.create_address_space({});
  auto b = type1.create_address_space({});
  ASSERT_TRUE(a && b);
  EXPECT_EQ(a->move_device(1, *from).error().code, Errc::invalid_argument) << "of another engine";
  const auto member = a->attach({.pci_address = kernel->device(0).address()});
  ASSERT_TRUE(member);
  EXPECT_EQ(a->move_device(member->id, *b).error().code, Errc::unsupported) << "there is a gap, and nobody accepted it";
  const auto moved = a->move_device(member->id, *b, AddressSpace::Gap::accept);
  ASSERT_TRUE(moved) << moved.error().message();
  EXPECT_TRUE(b->detach(moved->id));
}

}  // namespace
}  // namespace iovane
