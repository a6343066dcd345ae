// Several threads on one address space: queues, synchronous calls and control-plane looks at once. Run under TSan.
#include <gtest/gtest.h>
#include <poll.h>
#include <unistd.h>

#include <atomic>
#include <random>
#include <thread>
#include <vector>

#include "engine/direct_batch.hpp"
#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "support/recording_backend.hpp"
#include "support/seed.hpp"

namespace iovane {
namespace {

TEST(EngineStress, EveryOperationCompletesOnceAndTheEndIsEmpty) {
  const std::uint64_t base_seed = test::seed();
  SCOPED_TRACE(::testing::Message() << "IOVANE_SEED=" << base_seed);
  testing::RecordingSpace* backend = nullptr;
  Engine engine = EngineAccess::open(std::make_unique<testing::RecordingBackend>(backend), "recording");
  backend->before_batch = [backend] { backend->batches.clear(); };
  AddressSpaceConfig config;
  config.layout = LayoutPolicy::fixed;
  auto space = engine.create_address_space(config);
  ASSERT_TRUE(space) << space.error().message();

  constexpr std::uint64_t page = 4096;
  constexpr int rounds = 400;
  std::vector<std::thread> threads;
  std::atomic<std::uint64_t> completed{0};
  for (std::uint64_t t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      std::mt19937_64 random{base_seed + t};
      auto queue = space->open_queue({.depth = 32});
      ASSERT_TRUE(queue);
      const std::uint64_t own = 0x10000 + t * 0x10000;  // each thread has its own pages
      std::uint64_t staged = 0;
      std::vector<Completion> out(32);
      for (int round = 0; round < rounds; ++round) {
        const std::uint64_t count = 1 + random() % 16;
        for (std::uint64_t i = 0; i < count; ++i) {
          MapRequest request;
          request.memory = {{}, 0x7000'0000, Bytes{page}};
          request.placement = Placement::fixed(Iova{(own + 2 * i) * page});
          ASSERT_TRUE(queue->stage(request));
        }
        queue->submit();
        staged += count;
        std::size_t got = queue->wait(out, count, std::chrono::seconds{60});
        ASSERT_EQ(got, count);
        for (std::size_t i = 0; i < got; ++i) ASSERT_TRUE(out[i].ok()) << out[i].error.message();
        completed.fetch_add(got, std::memory_order_relaxed);
        if (random() % 4 == 0) {
          const auto found = space->find(Iova{own * page});
          ASSERT_TRUE(found) << found.error().message();
          (void)space->stats();
        }
        const auto whole = IovaRange::from_length(Iova{own * page}, Bytes{64 * page});
        if (random() % 2 == 0) {
          const Completion gone = space->unmap(UnmapRequest::of(*whole));
          ASSERT_TRUE(gone.ok()) << gone.error.message();
          ASSERT_EQ(gone.bytes.value, count * page);
        } else {
          ASSERT_TRUE(queue->stage(UnmapRequest::of(*whole)));
          queue->submit();
          ASSERT_EQ(queue->wait(out, 1, std::chrono::seconds{60}), 1U);
          ASSERT_EQ(out[0].bytes.value, count * page) << out[0].error.message();
        }
      }
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(space->stats().live_mappings, 0U);
  EXPECT_EQ(space->stats().maps, completed.load(std::memory_order_relaxed));
  EXPECT_TRUE(backend->live.empty());
}

// Direct batches, synchronous calls and a queue, each on its own pages; whoever finds another at work leaves it all to
// that one.
TEST(EngineStress, DirectBatchesOfSeveralThreadsAreExecutedOnceEach) {
  const std::uint64_t base_seed = test::seed();
  SCOPED_TRACE(::testing::Message() << "IOVANE_SEED=" << base_seed);
  testing::RecordingSpace* backend = nullptr;
  Engine engine = EngineAccess::open(std::make_unique<testing::RecordingBackend>(backend), "recording");
  // Plain, as everything that the lane protects: TSan sees it if two batches run at once.
  backend->before_batch = [backend] {
    backend->batches.clear();
    std::this_thread::yield();
  };
  AddressSpaceConfig config;
  config.layout = LayoutPolicy::fixed;
  auto space = engine.create_address_space(config);
  ASSERT_TRUE(space) << space.error().message();

  constexpr std::uint64_t page = 4096;
  std::vector<std::thread> threads;
  std::atomic<std::uint64_t> waited{0};
  std::atomic<std::uint64_t> maps{0};
  for (std::uint64_t t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      test::Random random{base_seed + t};
      const auto core = engine::DirectBatch::join(*space);
      engine::DirectBatch batch{*core};
      pollfd readable{t == 0 ? batch.event_fd() : -1, POLLIN, 0};
      const std::uint64_t own = 0x10000 + t * 0x10000;  // each thread has its own pages
      std::vector<engine::Operation> operations;
      std::vector<Completion> done;
      const auto run = [&] {
        done.assign(operations.size(), {});
        if (batch.submit(operations, done)) return;
        waited.fetch_add(1, std::memory_order_relaxed);
        if (t == 0) {  // sleeps on its descriptor
          do {
            ASSERT_EQ(::poll(&readable, 1, 60'000), 1);
            std::uint64_t count = 0;
            ASSERT_EQ(::read(readable.fd, &count, sizeof count), static_cast<ssize_t>(sizeof count));
          } while (!batch.done());
        } else if (t == 1) {  // or looks again and again
          while (!batch.done()) std::this_thread::yield();
        } else {
          ASSERT_TRUE(batch.wait(std::chrono::seconds{60}));
        }
      };
      for (int round = 0; round < 400; ++round) {
        const std::uint64_t count = random.one_in(20) ? 300 : 1 + random.below(8);
        operations.clear();
        for (std::uint64_t i = 0; i < count; ++i) {
          MapRequest request;
          request.memory = {{}, 0x7000'0000, Bytes{page}};
          request.placement = Placement::fixed(Iova{(own + 2 * i) * page});
          operations.emplace_back(request);
        }
        run();
        for (const Completion& c : done) ASSERT_TRUE(c.ok()) << c.error.message();
        ASSERT_EQ(batch.failures(), 0U);
        maps.fetch_add(count, std::memory_order_relaxed);
        const auto whole = IovaRange::from_length(Iova{own * page}, Bytes{1024 * page});
        if (random.one_in(3)) {
          const Completion gone = space->unmap(UnmapRequest::of(*whole));
          ASSERT_EQ(gone.bytes.value, count * page) << gone.error.message();
        } else {
          operations = {engine::Operation{UnmapRequest::of(*whole)}, engine::Operation{UnmapRequest::of(*whole)}};
          run();
          ASSERT_EQ(done[0].bytes.value, count * page) << done[0].error.message();
          ASSERT_EQ(done[1].error.code, Errc::not_found);
          ASSERT_EQ(batch.failures(), 1U);
        }
      }
    });
  for (auto& thread : threads) thread.join();
  EXPECT_GT(waited.load(std::memory_order_relaxed), 0U) << "nobody ever met another";
  EXPECT_EQ(space->stats().live_mappings, 0U);
  EXPECT_EQ(space->stats().maps, maps.load(std::memory_order_relaxed));
  EXPECT_TRUE(backend->live.empty());
}

}  // namespace
}  // namespace iovane
