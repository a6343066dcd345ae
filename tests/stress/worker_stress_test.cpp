// Workers, relaxed flushes, hand-over and destruction at once. Run under TSan.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "engine/engine_core.hpp"
#include "engine/worker.hpp"
#include "iovane/engine.hpp"
#include "support/recording_backend.hpp"
#include "support/seed.hpp"

namespace iovane {
namespace {

using namespace std::chrono_literals;
constexpr std::uint64_t page = 4096;

class Job final : public engine::WorkerTask {
 public:
  std::atomic<std::uint64_t> posted{0};  // raised before a post
  std::uint64_t seen = 0;                // the worker's, read after forget()

 private:
  std::uint64_t run_on_worker() noexcept override {
    seen = posted.load(std::memory_order_relaxed);  // relaxed: the post orders it
    return never;
  }
};

TEST(WorkerStress, EveryPostIsFollowedByARunThatSeesIt) {
  auto worker = *engine::Worker::start({}, nullptr, 0, 0);
  std::vector<std::unique_ptr<Job>> jobs;
  for (int i = 0; i < 3; ++i) jobs.push_back(std::make_unique<Job>());
  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      test::Random random{test::seed() + t};
      for (int i = 0; i < 3000; ++i) {
        Job& job = *jobs[random.below(jobs.size())];
        job.posted.fetch_add(1, std::memory_order_relaxed);
        worker->post(job);
        if (random.one_in(500)) std::this_thread::sleep_for(1ms);  // let it fall asleep
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (auto& job : jobs) {
    worker->forget(*job);
    EXPECT_EQ(job->seen, job->posted.load(std::memory_order_relaxed));
  }
}

TEST(WorkerStress, RelaxedSpacesComeAndGoUnderTraffic) {
  for (std::uint64_t round = 0; round < 8; ++round) {
    testing::RecordingSpace* backend = nullptr;
    Engine engine = EngineAccess::open(std::make_unique<testing::RecordingBackend>(backend), "recording");
    backend->before_batch = [backend] { backend->batches.clear(); };
    AddressSpaceConfig config;
    config.layout = LayoutPolicy::fixed;
    config.unmap = UnmapMode::relaxed;
    config.relaxed = {.mappings_max = 64, .time_max = 200us};
    AddressSpace space = *engine.create_address_space(config);
    std::atomic<std::uint64_t> done_count{0};
    std::vector<std::thread> threads;
    for (std::uint64_t t = 0; t < 3; ++t)
      threads.emplace_back([&, t] {
        test::Random random{test::seed() + 10 * round + t};
        QueueConfig queue_config{.depth = 32};
        if (t == 0) queue_config.submit = SubmitMode::never_block;
        auto queue = space.open_queue(queue_config);
        ASSERT_TRUE(queue) << queue.error().message();
        std::array<Completion, 32> out;
        for (int i = 0; i < 200; ++i) {
          const std::uint64_t own = 0x1000 * (t + 1) + random.below(16);
          MapRequest request;
          request.memory = {{}, 0x7000'0000 + random.below(2) * page, Bytes{page}};
          request.placement = Placement::fixed(Iova{own * page});
          ASSERT_TRUE(queue->stage(request));
          ASSERT_TRUE(queue->stage_fence(0));
          ASSERT_TRUE(queue->stage(UnmapRequest::of(IovaRange{Iova{own * page}, Iova{(own + 1) * page - 1}})));
          queue->submit();
          ASSERT_EQ(queue->wait(out, 3, 60s), 3U);
          for (int n = 0; n < 3; ++n) ASSERT_TRUE(out[n].ok()) << out[n].error.message();
          done_count.fetch_add(3, std::memory_order_relaxed);
          if (random.one_in(50)) {
            ASSERT_TRUE(space.flush());
          }
          if (random.one_in(50)) (void)space.stats();
        }
      });
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(done_count.load(std::memory_order_relaxed), 3U * 200U * 3U);
    space = {};  // perhaps with something stale, while the worker's timer runs
  }
}

}  // namespace
}  // namespace iovane
