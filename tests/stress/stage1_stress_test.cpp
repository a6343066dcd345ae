// Threads map and unmap in the same first-stage tables, tables are collected meanwhile, and a walker with caches reads.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "conformance/memory.hpp"
#include "support/first_stage_walker.hpp"
#include "support/seed.hpp"

namespace iovane::test {
namespace {

constexpr std::uint64_t k4 = 4096, m2 = 2U << 20;

IovaRange at(std::uint64_t iova, std::uint64_t bytes) { return *IovaRange::from_length(Iova{iova}, Bytes{bytes}); }

TEST(Stage1Stress, disjoint_ranges_in_shared_tables_never_disturb_each_other) {
  constexpr unsigned threads = 3;
  constexpr std::uint64_t regions = 24;
  TableWorld world{smmuv3_format(), 4, 1U << 12};
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> pairs{0}, collected{0};
  const std::uint64_t first_seed = seed();
  std::vector<std::thread> workers;
  for (unsigned t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      Random random{first_seed + t};
      while (!stop.load(std::memory_order_relaxed)) {  // relaxed: only ends the loop
        // Thread t owns every page of number t modulo `threads`; all of them lie in the same tables.
        const std::uint64_t region = random.below(regions) * m2;
        const std::uint64_t iova = region + (random.below(512 / threads) * threads + t) * k4;
        const std::uint64_t memory = (1 + random.below(1U << 20)) * k4;
        const MapVerdict verdict = world.map(at(iova, k4), memory);
        if (verdict == MapVerdict::no_tables) continue;
        ASSERT_EQ(verdict, MapVerdict::done);
        ASSERT_EQ(world.walker.translate(iova), memory);
        ASSERT_EQ(world.unmap(at(iova, k4)), k4);
        ASSERT_EQ(world.walker.translate(iova), std::nullopt);
        pairs.fetch_add(1, std::memory_order_relaxed);  // relaxed: a count
      }
    });
  }
  workers.emplace_back([&] {
    while (!stop.load(std::memory_order_relaxed)) {                         // relaxed: only ends the loop
      collected.fetch_add(world.editor.trim(), std::memory_order_relaxed);  // relaxed: a count
      std::this_thread::yield();
    }
  });
  std::this_thread::sleep_for(std::chrono::seconds{2});
  stop.store(true, std::memory_order_relaxed);  // relaxed: join() orders the rest
  for (std::thread& worker : workers) worker.join();
  EXPECT_GT(pairs.load(std::memory_order_relaxed), 100U);
  EXPECT_GT(collected.load(std::memory_order_relaxed), 0U);
  EXPECT_TRUE(world.editor.is_free(at(0, regions * m2)));
  world.editor.trim();
  // Root and two upper tables; whoever helped a collector lost it no page.
  std::printf("%llu pairs, %llu tables collected, %u in use at the end\n",
              static_cast<unsigned long long>(pairs.load(std::memory_order_relaxed)),
              static_cast<unsigned long long>(collected.load(std::memory_order_relaxed)), world.pool.taken());
  EXPECT_EQ(world.pool.taken(), 3U);
}

TEST(Stage1Stress, threads_cut_the_same_block_each_for_its_own_part) {
  TableWorld world{smmuv3_format(), 3};
  for (int round = 0; round < 300; ++round) {
    ASSERT_EQ(world.map(at(0, m2), 8 * m2), MapVerdict::done);
    std::atomic<int> ready{0};
    const auto cut = [&](std::uint64_t from, std::uint64_t bytes) {
      ready.fetch_add(1, std::memory_order_relaxed);  // relaxed: only a start line
      while (ready.load(std::memory_order_relaxed) < 2) {
      }
      EXPECT_EQ(world.unmap(at(from, bytes)), bytes);
    };
    std::thread other{[&] { cut(0, 100 * k4); }};
    cut(200 * k4, 7 * k4);
    other.join();
    EXPECT_EQ(world.walker.translate(150 * k4), 8 * m2 + 150 * k4);
    EXPECT_EQ(world.walker.translate(203 * k4), std::nullopt);
    EXPECT_EQ(world.unmap(at(0, m2)), (512 - 107) * k4);
    world.editor.trim();
  }
}

TEST(Stage1Stress, threads_take_the_same_hinted_group_apart) {
  TableWorld world{smmuv3_format(), 3};
  for (const std::uint64_t unit : {k4, m2}) {
    for (int round = 0; round < (unit == k4 ? 300 : 40); ++round) {
      ASSERT_EQ(world.map(at(64 * m2, 16 * unit), 192 * m2), MapVerdict::done);
      ASSERT_EQ(world.walker.translate(64 * m2), 192 * m2);
      std::atomic<int> ready{0};
      const auto take = [&](std::uint64_t from, std::uint64_t count) {
        ready.fetch_add(1, std::memory_order_relaxed);  // relaxed: only a start line
        while (ready.load(std::memory_order_relaxed) < 3) {
        }
        EXPECT_EQ(world.unmap(at(64 * m2 + from * unit, count * unit)), count * unit);
        EXPECT_EQ(world.walker.translate(64 * m2 + from * unit), std::nullopt);
      };
      std::thread first{[&] { take(0, 5); }}, second{[&] { take(12, 4); }};
      take(7, 1);
      first.join();
      second.join();
      for (std::uint64_t i = 0; i < 16; ++i) {
        const bool gone = i < 5 || i == 7 || i >= 12;
        EXPECT_EQ(world.walker.translate(64 * m2 + i * unit), gone ? std::nullopt : std::optional{192 * m2 + i * unit});
      }
      EXPECT_EQ(world.unmap(at(64 * m2, 16 * unit)), 6 * unit);
    }
    world.editor.trim();
  }
}

// The whole way, on the software IOMMU: threads map and unmap in one address space, a device writes wherever it can all
// the while, and another device comes and goes. What was unmapped is written by its owner without a lock: TSan, or a
// byte that changed, says when the device was still there.
TEST(Stage1Stress, what_was_unmapped_is_its_owners_alone) {
  using namespace backends;
  model::ModelOptions options;
  options.iommus.front().nesting = model::Nesting::smmuv3;
  auto kernel = *model::ModelKernel::create(options);
  {
    auto backend = *open_backend(*kernel, {.name = "stage1"});
    auto space = *backend->create_space({});
    ASSERT_TRUE(space->attach({.pci_address = kernel->device(0).address()}));
    constexpr std::uint64_t pages = 8, iova = 0x1000'0000;
    constexpr unsigned threads = 2;
    const Memory memory{threads * pages};
    const RegionId region = *space->register_memory({.address = memory.data(), .length = memory.length()});
    std::atomic<bool> stop{false};
    std::atomic<std::uint64_t> moved{0}, rounds{0};
    std::vector<std::thread> workers;
    workers.emplace_back([&] {
      const std::vector<std::byte> bytes(256, std::byte{0xdd});
      for (std::uint64_t at = 0; !stop.load(std::memory_order_relaxed); ++at)  // relaxed: only ends the test
        if (kernel->device(0).dma_write(Iova{iova + at % (threads * pages) * k4 + 128}, bytes).ok())
          moved.fetch_add(1, std::memory_order_relaxed);  // relaxed: a count
    });
    for (unsigned t = 0; t < threads; ++t) {
      workers.emplace_back([&, t] {
        std::array<BackendOp, pages> maps, unmaps;
        std::array<BackendOpResult, pages> results;
        for (std::uint64_t i = 0; i < pages; ++i) {  // every second page of the same table
          const std::uint64_t page = i * threads + t;
          maps[i] = {.kind = OpKind::copy,
                     .access = Access::read_write,
                     .region = region,
                     .range = at(iova + page * k4, k4),
                     .memory = page * k4};
          unmaps[i] = {.kind = OpKind::unmap, .range = maps[i].range};
        }
        while (!stop.load(std::memory_order_relaxed)) {  // relaxed: only ends the test
          space->execute(maps, results);
          for (const BackendOpResult& result : results) ASSERT_TRUE(result.error.ok()) << result.error.message();
          std::this_thread::yield();
          space->execute(unmaps, results);
          for (std::uint64_t i = 0; i < pages; ++i) {
            ASSERT_EQ(results[i].bytes, Bytes{k4});
            const auto own = memory.page(i * threads + t);
            std::memset(own.data(), static_cast<int>(t), own.size());
            for (std::size_t b = 0; b < own.size(); b += 64)
              ASSERT_EQ(own[b], static_cast<std::byte>(t)) << "written after the unmap completed";
          }
          rounds.fetch_add(1, std::memory_order_relaxed);  // relaxed: a count
        }
      });
    }
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds{2};
    // relaxed: counts
    while (std::chrono::steady_clock::now() < until || moved.load(std::memory_order_relaxed) < 100 ||
           rounds.load(std::memory_order_relaxed) < 100) {
      auto other = *backend->create_space({});
      const auto second = other->attach({.pci_address = kernel->device(1).address()});
      ASSERT_TRUE(second) << second.error().message();
      ASSERT_TRUE(other->detach(second->id));
    }
    stop.store(true, std::memory_order_relaxed);  // relaxed: join() orders the rest
    for (std::thread& worker : workers) worker.join();
  }
  EXPECT_EQ(kernel->usage(), model::ModelUsage{});
}

}  // namespace
}  // namespace iovane::test
