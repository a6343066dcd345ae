// Threads on one software host: maps and unmaps of several threads, devices that move bytes meanwhile, attaches and
// detaches in between. Run under TSan; the invariants are checked at the end and after every unmap.
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <mutex>
#include <random>
#include <shared_mutex>
#include <thread>

#include "backends/model/shared_gate.hpp"
#include "unit/model_support.hpp"

namespace iovane::backends::model {
namespace {

constexpr std::uint64_t k4 = 4096;
constexpr auto duration = std::chrono::milliseconds{1000};

// A device writes all the time while its pages are mapped and unmapped. After an unmap returned, no byte of the page
// changes any more: the owner writes its own values there without a lock, which TSan would report otherwise.
class FinalUnmap : public ::testing::TestWithParam<unsigned> {};

TEST_P(FinalUnmap, NothingMovesAfterAnUnmapReturned) {
  const IommuOptions iommu{.iotlb_entries = GetParam()};
  SimulatedDevice device{{.address = "0000:00:03.0"}, iommu};
  Domain domain{iommu};
  domain.join(device);
  constexpr std::uint64_t pages = 8;
  TestMemory memory{pages * k4};
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> moved{0};
  std::thread dma{[&] {
    const std::vector<std::byte> bytes(256, std::byte{0xdd});
    for (std::uint64_t at = 0; !stop.load(std::memory_order_relaxed); ++at) {  // relaxed: only ends the test
      // relaxed: a count
      if (device.dma_write(Iova{at % pages * k4 + 128}, bytes).ok()) moved.fetch_add(1, std::memory_order_relaxed);
    }
  }};
  const auto until = std::chrono::steady_clock::now() + duration;
  // relaxed: a count
  for (std::uint64_t round = 0; std::chrono::steady_clock::now() < until || moved.load(std::memory_order_relaxed) < 100;
       ++round) {
    const IovaRange page{Iova{round % pages * k4}, Iova{round % pages * k4 + k4 - 1}};
    std::byte* const own = memory.data() + page.start.value;
    ASSERT_EQ(domain.map(page, own, Access::read_write, true), 0);
    if (round % 3 == 0) std::this_thread::yield();
    ASSERT_EQ(domain.unmap(page), static_cast<std::int64_t>(k4));
    std::memset(own, 0, k4);
    for (std::uint64_t i = 0; i < k4; i += 64) ASSERT_EQ(own[i], std::byte{0}) << "written after the unmap returned";
  }
  stop.store(true, std::memory_order_relaxed);  // relaxed: only ends the test
  dma.join();
  EXPECT_GT(device.fault_count(), 0U);
  domain.leave(device);
}

INSTANTIATE_TEST_SUITE_P(IotlbEntries, FinalUnmap, ::testing::Values(0U, 4U, 64U));

// Devices sweep over the whole space; what they hit or miss is not our business, only that no byte moves after an
// unmap returned (its owner then writes the page itself, which TSan would report) and that nothing is lost.
template <typename MapFn, typename UnmapFn>
void storm(ModelKernel& host, unsigned threads, MapFn map, UnmapFn unmap) {
  constexpr std::uint64_t pages_each = 16;
  TestMemory memory{threads * pages_each * k4};
  std::atomic<bool> stop{false};
  std::vector<std::thread> running;
  for (std::size_t d = 0; d < host.device_count(); ++d) {
    running.emplace_back([&, d] {
      std::mt19937_64 random{d};
      std::vector<std::byte> bytes(512, std::byte{0xee});
      while (!stop.load(std::memory_order_relaxed)) {  // relaxed: only ends the test
        const std::uint64_t page = random() % (threads * pages_each);
        if (random() % 2 == 0) {
          // Each device has its own half: two devices that write the same bytes at once would be the test's race.
          static_cast<void>(host.device(d).dma_write(Iova{0x100000 + page * k4 + d * 2048}, bytes));
        } else {
          std::byte b{};
          static_cast<void>(host.device(d).dma_read(Iova{0x100000 + page * k4 + d * 2048 + 1024}, {&b, 1}));
        }
      }
    });
  }
  const auto until = std::chrono::steady_clock::now() + duration;
  for (unsigned t = 0; t < threads; ++t) {
    running.emplace_back([&, t] {
      std::mt19937_64 random{1000 + t};
      while (std::chrono::steady_clock::now() < until) {
        const std::uint64_t first = random() % pages_each;
        const std::uint64_t count = 1 + random() % (pages_each - first);
        const std::uint64_t page = t * pages_each + first;
        std::byte* const at = memory.data() + page * k4;
        ASSERT_EQ(map(0x100000 + page * k4, std::bit_cast<std::uint64_t>(at), count * k4), 0);
        if (random() % 4 == 0) std::this_thread::yield();
        ASSERT_EQ(unmap(0x100000 + page * k4, count * k4), 0);
        std::memset(at, 0, count * k4);
      }
    });
  }
  for (std::size_t i = host.device_count(); i < running.size(); ++i) running[i].join();
  stop.store(true, std::memory_order_relaxed);  // relaxed: only ends the test
  for (std::size_t i = 0; i < host.device_count(); ++i) running[i].join();
}

TEST(ModelConcurrency, MapsAndUnmapsOnOneIoasWhileDevicesRun) {
  auto host = make_host({.memory_check = MemoryCheck::none});
  {
    IommufdUser user{*host};
    const std::uint32_t ioas = user.ioas();
    CdevUser a{*host, 0};
    CdevUser b{*host, 1};
    ASSERT_EQ(a.bind(user.fd), 0);
    ASSERT_EQ(b.bind(user.fd), 0);
    ASSERT_EQ(a.attach(ioas), 0);
    ASSERT_EQ(b.attach(ioas), 0);
    storm(
        *host, 3,
        [&](std::uint64_t iova, std::uint64_t address, std::uint64_t length) {
          fd_api::IoasMap c{.flags = 7, .ioas_id = ioas, .user_va = address, .length = length, .iova = iova};
          return user.call(c);
        },
        [&](std::uint64_t iova, std::uint64_t length) {
          fd_api::IoasUnmap c{.ioas_id = ioas, .iova = iova, .length = length};
          return user.call(c);
        });
    EXPECT_EQ(host->usage().mappings, 0U);
    EXPECT_EQ(host->usage().pinned, Bytes{0});
  }
  EXPECT_EQ(host->usage(), ModelUsage{});
}

TEST(ModelConcurrency, MapsAndUnmapsOnOneContainerWhileDevicesRun) {
  auto host = make_host({.memory_check = MemoryCheck::none});
  {
    Type1User user{*host, vfio_api::type1_v2_iommu};
    storm(
        *host, 3,
        [&](std::uint64_t iova, std::uint64_t address, std::uint64_t length) {
          vfio_api::Type1DmaMap c{.flags = 3, .vaddr = address, .iova = iova, .size = length};
          return host->ioctl(user.fd, c.request, &c);
        },
        [&](std::uint64_t iova, std::uint64_t length) {
          vfio_api::Type1DmaUnmap c{.iova = iova, .size = length};
          return host->ioctl(user.fd, c.request, &c);
        });
  }
  EXPECT_EQ(host->usage(), ModelUsage{});
}

TEST(ModelConcurrency, DevicesMoveBetweenSpacesWhileTheyRunAndSpacesAreEdited) {
  auto host = make_host({.memory_check = MemoryCheck::none});
  {
    IommufdUser user{*host};
    const std::uint32_t spaces[2] = {user.ioas(), user.ioas()};
    CdevUser cdev{*host, 0};
    ASSERT_EQ(cdev.bind(user.fd), 0);
    // The same address leads to the same memory in both spaces: a move without a gap is never noticed.
    TestMemory memory{k4};
    for (const std::uint32_t ioas : spaces) ASSERT_EQ(user.map(ioas, 0x1000, memory.address(), k4), 0);
    ASSERT_EQ(cdev.attach(spaces[0]), 0);
    std::atomic<bool> stop{false};
    std::thread dma{[&] {
      std::vector<std::byte> bytes(64, std::byte{1});
      while (!stop.load(std::memory_order_relaxed)) {  // relaxed: only ends the test
        ASSERT_TRUE(host->device(0).dma_write(Iova{0x1000}, bytes).ok());
      }
    }};
    std::vector<std::thread> editors;
    for (const std::uint32_t ioas : spaces) {
      editors.emplace_back([&, ioas] {
        TestMemory own{k4};
        while (!stop.load(std::memory_order_relaxed)) {  // relaxed: only ends the test
          fd_api::IoasCopy copy{.flags = 7,
                                .dst_ioas_id = ioas,
                                .src_ioas_id = spaces[0],
                                .length = k4,
                                .dst_iova = 0x9000,
                                .src_iova = 0x1000};
          ASSERT_EQ(user.call(copy), 0);
          fd_api::IoasUnmap c{.ioas_id = ioas, .iova = 0x9000, .length = k4};
          ASSERT_EQ(user.call(c), 0);
        }
      });
    }
    const auto until = std::chrono::steady_clock::now() + duration;
    unsigned moves = 0;
    while (std::chrono::steady_clock::now() < until) ASSERT_EQ(cdev.attach(spaces[++moves % 2]), 0);
    stop.store(true, std::memory_order_relaxed);  // relaxed: only ends the test
    dma.join();
    for (auto& editor : editors) editor.join();
    EXPECT_GT(moves, 10U);
    EXPECT_EQ(host->usage().mappings, 2U);
    EXPECT_EQ(host->usage().pinned, Bytes{k4});
  }
  EXPECT_EQ(host->usage(), ModelUsage{});
}

// Plain numbers: TSan, or a sum that is wrong, says when somebody was not alone.
TEST(SharedGateStress, WhoeverIsInsideAloneIsAlone) {
  SharedGate gate;
  std::uint64_t left = 0, right = 0;
  std::atomic<std::uint64_t> looks{0}, changes{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      while (!stop.load(std::memory_order_relaxed)) {  // relaxed: only ends the test
        if (t == 0) {
          const std::lock_guard alone{gate};
          ++left;
          ++right;
          changes.fetch_add(1, std::memory_order_relaxed);  // relaxed: a count
        } else {
          const std::shared_lock together{gate};
          ASSERT_EQ(left, right);
          looks.fetch_add(1, std::memory_order_relaxed);  // relaxed: a count
        }
      }
    });
  }
  // relaxed: a count
  while (looks.load(std::memory_order_relaxed) < 100'000 || changes.load(std::memory_order_relaxed) < 1'000)
    std::this_thread::yield();
  stop.store(true, std::memory_order_relaxed);  // relaxed: join() orders the rest
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(left, changes.load(std::memory_order_relaxed));
}

TEST(ModelConcurrency, SpacesComeAndGoWhileCallsWithTheirIdsAreUnderWay) {
  auto host = make_host({.memory_check = MemoryCheck::none});
  {
    IommufdUser user{*host};
    TestMemory memory{k4};
    std::atomic<std::uint32_t> id{user.ioas()};
    std::atomic<bool> stop{false};
    std::vector<std::thread> callers;
    for (int t = 0; t < 2; ++t) {
      callers.emplace_back([&, t] {
        while (!stop.load(std::memory_order_relaxed)) {                   // relaxed: only ends the test
          const std::uint32_t ioas = id.load(std::memory_order_relaxed);  // relaxed: only a number
          fd_api::IoasMap c{.flags = 7,
                            .ioas_id = ioas,
                            .user_va = memory.address(),
                            .length = k4,
                            .iova = 0x1000U + static_cast<std::uint64_t>(t) * k4};
          const long rc = user.call(c);
          ASSERT_TRUE(rc == 0 || rc == -ENOENT || rc == -EEXIST) << rc;
        }
      });
    }
    const auto until = std::chrono::steady_clock::now() + duration;
    while (std::chrono::steady_clock::now() < until) {
      const std::uint32_t old = id.load(std::memory_order_relaxed);  // relaxed: only a number
      id.store(user.ioas(), std::memory_order_relaxed);
      ASSERT_EQ(user.destroy(old), 0);
    }
    stop.store(true, std::memory_order_relaxed);  // relaxed: only ends the test
    for (auto& caller : callers) caller.join();
  }
  EXPECT_EQ(host->usage(), ModelUsage{});
}

}  // namespace
}  // namespace iovane::backends::model
