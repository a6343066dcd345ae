#include "pinning/population.hpp"

#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/mman.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <thread>

#include "pinning/counting_provider.hpp"
#include "pinning/population_plan.hpp"
#include "pinning/staleness_monitor.hpp"
#include "pinning/uring_provider.hpp"

#if defined(__SANITIZE_THREAD__)
#define IOVANE_UNDER_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define IOVANE_UNDER_TSAN 1
#endif
#endif

namespace iovane::pinning {
namespace {

using namespace iovane::literals;

std::size_t resident_pages(const std::byte* p, std::size_t pages) {
  std::vector<unsigned char> map(pages);
  EXPECT_EQ(mincore(const_cast<std::byte*>(p), pages * 4096, map.data()), 0);
  return static_cast<std::size_t>(std::count_if(map.begin(), map.end(), [](unsigned char c) { return (c & 1U) != 0; }));
}

TEST(PopulationPlan, NeverCutsInsideAHugePageOrItsBlock) {
  for (const Bytes os_page : {4_KiB, 2_MiB, 1_GiB})
    for (const unsigned workers : {1U, 2U, 7U, 64U})
      for (const std::uint64_t offset : {std::uint64_t{0}, std::uint64_t{4096}, std::uint64_t{3} << 20})
        for (const Bytes length : {4_KiB, 3_MiB, 700_MiB, 8_GiB, 3_TiB}) {
          const MemoryRange range{0x7f00'0000'0000 + offset, 0x7f00'0000'0000 + offset + length.value - 1};
          const auto pieces = cut_for_population(range, os_page, 1_GiB, workers);
          std::uint64_t next = range.start;
          for (const auto& piece : pieces) {
            ASSERT_EQ(piece.start, next);
            next = piece.last + 1;
            if (piece.start != range.start) {
              ASSERT_EQ(piece.start % os_page.value, 0U);
              ASSERT_EQ(piece.start % (2U << 20), 0U);
            }
            ASSERT_EQ(piece.start >> 30, piece.last >> 30) << "no piece crosses the border";
          }
          ASSERT_EQ(next, range.last + 1);
        }
}

TEST(PopulationPlan, LargeMemoryIsCutAtGibibytesAndSmallMemoryFeedsEveryWorker) {
  EXPECT_EQ(population_unit(512_GiB, 4_KiB, 1_GiB, 16), (1_GiB).value);
  EXPECT_EQ(population_unit(1_GiB, 4_KiB, 1_GiB, 2), (128_MiB).value);
  EXPECT_EQ(population_unit(4_GiB, 1_GiB, 1_GiB, 8), (1_GiB).value);
}

class PopulationTest : public testing::Test {
 protected:
  void SetUp() override {
#ifdef IOVANE_UNDER_TSAN
    GTEST_SKIP() << "the oneTBB library is not instrumented: TSan does not see how it hands tasks over";
#endif
    auto opened = MapCache::open(provider, budget, {.chunk = 64_KiB});
    ASSERT_TRUE(opened);
    cache = *std::move(opened);
    memory = static_cast<std::byte*>(
        mmap(nullptr, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    ASSERT_NE(memory, MAP_FAILED);
  }
  void TearDown() override {
    if (memory != nullptr) munmap(memory, pages * 4096);
  }
  MemoryRange range() const { return *MemoryRange::of(memory, Bytes{pages * 4096}); }

  static constexpr std::size_t pages = 16 * 1024;  // 64 MiB
  CountingProvider provider;
  PinBudget budget;
  std::unique_ptr<MapCache> cache;
  std::byte* memory = nullptr;
};

TEST_F(PopulationTest, EverythingIsPresentPinnedAndReported) {
  std::uint64_t last_done = 0;
  std::atomic<int> inside{0};
  auto registered =
      Population::register_memory(*cache, range(), {.threads = 4, .progress = [&](Bytes done, Bytes total) {
                                                      EXPECT_EQ(inside.fetch_add(1, std::memory_order_relaxed), 0);
                                                      EXPECT_GT(done.value, last_done);
                                                      EXPECT_EQ(total.value, pages * 4096);
                                                      last_done = done.value;
                                                      inside.fetch_sub(1, std::memory_order_relaxed);
                                                      return true;
                                                    }});
  ASSERT_TRUE(registered) << registered.error().message();
  EXPECT_EQ(last_done, pages * 4096);
  EXPECT_EQ(resident_pages(memory, pages), pages);
  EXPECT_EQ(provider.counts().double_pins, 0U);
  std::uint64_t next = range().start;
  for (const Hold& part : registered->parts()) {
    EXPECT_TRUE(provider.is_pinned({next, next + part.length().value - 1}, part.address()));
    next += part.length().value;
  }
  EXPECT_EQ(next, range().last + 1);
  EXPECT_EQ(cache->evict(~std::uint64_t{0}, any_node) % 65536, 0U) << "only margins may go";
  EXPECT_TRUE(cache->try_acquire(range(), Access::read_write));
}

TEST_F(PopulationTest, CancellationByCallbackAndByToken) {
  const auto by_callback =
      Population::register_memory(*cache, range(), {.threads = 2, .progress = [](Bytes, Bytes) { return false; }});
  ASSERT_FALSE(by_callback);
  EXPECT_EQ(by_callback.error().code, Errc::cancelled);
  EXPECT_LT(resident_pages(memory, pages), pages);
  std::stop_source source;
  source.request_stop();
  const auto by_token = Population::register_memory(*cache, range(), {.threads = 2, .stop = source.get_token()});
  ASSERT_FALSE(by_token);
  EXPECT_EQ(by_token.error().code, Errc::cancelled);
  cache->evict(~std::uint64_t{0}, any_node);
  EXPECT_EQ(provider.counts().bytes_pinned, 0U) << "no hold may be left";
}

TEST_F(PopulationTest, AFailureStopsAndHoldsNothing) {
  provider.set_hole({range().start + (33U << 20), range().start + (34U << 20) - 1});
  const auto failed = Population::register_memory(*cache, range(), {.threads = 2});
  ASSERT_FALSE(failed);
  EXPECT_EQ(failed.error().code, Errc::bad_memory);
  cache->evict(~std::uint64_t{0}, any_node);
  EXPECT_EQ(provider.counts().bytes_pinned, 0U);
  munmap(memory + (40U << 20), 1U << 20);
  provider.set_hole({1, 0});
  EXPECT_EQ(Population::register_memory(*cache, range(), {.threads = 2}).error().code, Errc::bad_memory);
}

// How many of TBB's workers have a signal blocked that no task of theirs blocked. The caller takes part and waits for
// one.
int workers_with_blocked_signals() {
  tbb::task_arena arena{2};
  std::atomic<int> arrived{0};
  std::atomic<int> blocked{0};
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds{10};
  arena.execute([&] {
    tbb::parallel_for(
        0, 2,
        [&](int) {
          sigset_t mask;
          pthread_sigmask(SIG_SETMASK, nullptr, &mask);
          if (sigismember(&mask, SIGUSR1) == 1) blocked.fetch_add(1, std::memory_order_relaxed);
          // Both bodies must be running at once, so that one of them is a worker's.
          arrived.fetch_add(1, std::memory_order_relaxed);
          while (arrived.load(std::memory_order_relaxed) < 2 && std::chrono::steady_clock::now() < deadline)
            std::this_thread::yield();
        },
        tbb::simple_partitioner{});
  });
  EXPECT_EQ(arrived.load(std::memory_order_relaxed), 2);
  return blocked.load(std::memory_order_relaxed);
}

TEST_F(PopulationTest, WorkersBlockSignalsInOurTasksOnly) {
  const auto caller = std::this_thread::get_id();
  std::atomic<int> wrong{0};
  for (int round = 0; round < 20; ++round) {
    const auto registered =
        Population::register_memory(*cache, range(), {.threads = 2, .progress = [&](Bytes, Bytes) {
                                                        sigset_t mask;
                                                        pthread_sigmask(SIG_SETMASK, nullptr, &mask);
                                                        const bool blocked = sigismember(&mask, SIGUSR1) == 1;
                                                        if (blocked != (std::this_thread::get_id() != caller))
                                                          wrong.fetch_add(1, std::memory_order_relaxed);
                                                        return true;
                                                      }});
    ASSERT_TRUE(registered) << registered.error().message();
    ASSERT_EQ(workers_with_blocked_signals(), 0) << "in round " << round;
  }
  EXPECT_EQ(wrong.load(std::memory_order_relaxed), 0);
}

TEST_F(PopulationTest, ASerialProviderIsAskedInOrder) {
  CountingProvider serial{{.traits = {.name = "serial", .parallel = false}}};
  auto opened = MapCache::open(serial, budget, {.chunk = 64_KiB});
  std::uint64_t previous = 0;
  serial.set_pin_hook([&](const PinRequest& r) {
    EXPECT_GT(r.range.start, previous);
    previous = r.range.start;
  });
  EXPECT_TRUE(Population::register_memory(**opened, range(), {.threads = 4}));
  EXPECT_EQ(resident_pages(memory, pages), pages);
}

TEST_F(PopulationTest, RealPinsOfMemoryAndOfAFile) {
  auto uring = UringProvider::open({.buffers = 1024});
  if (!uring) GTEST_SKIP() << uring.error().message();
  auto opened = MapCache::open(**uring, budget, {.chunk = 64_KiB});
  ASSERT_TRUE(opened);
  {
    const auto registered = Population::register_memory(**opened, range(), {.threads = 2});
    ASSERT_TRUE(registered) << registered.error().message();
  }
  const int fd = memfd_create("iovane-test", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(fd, 32 << 20), 0);
  const auto window = (*opened)->add_file(fd, 32_MiB);
  ASSERT_TRUE(window);
  {
    const auto registered = Population::register_memory(**opened, *window, {.threads = 2});
    ASSERT_TRUE(registered) << registered.error().message();
    EXPECT_FALSE((*opened)->stats().bytes_pinned < (32U << 20));
  }
  EXPECT_TRUE((*opened)->remove_file(*window));
  close(fd);
}

}  // namespace
}  // namespace iovane::pinning
