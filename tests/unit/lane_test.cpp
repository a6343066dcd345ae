#include "engine/lane.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace iovane::engine {
namespace {

class Job final : public LaneNode {
 public:
  explicit Job(std::function<void()> work) : LaneNode{Kind::work}, work_{std::move(work)} {}

 private:
  base::OneShot* run(bool) noexcept override {
    work_();
    return nullptr;
  }
  std::function<void()> work_;
};

TEST(Lane, RunsWorkOnTheCallingThreadWhenIdle) {
  Lane lane;
  std::thread::id ran_on;
  Job job{[&] { ran_on = std::this_thread::get_id(); }};
  EXPECT_TRUE(lane.enter(job));
  EXPECT_EQ(ran_on, std::this_thread::get_id());
}

TEST(Lane, LeavesWorkWithTheHolderInOrderOfArrival) {
  Lane lane;
  std::vector<int> order;
  Job first{[&] { order.push_back(1); }};
  Job second{[&] { order.push_back(2); }};
  lane.hold();
  std::thread{[&] {
    EXPECT_FALSE(lane.enter(first));
    EXPECT_FALSE(lane.enter(second));
  }}.join();
  EXPECT_TRUE(order.empty());
  lane.leave();
  EXPECT_EQ(order, (std::vector{1, 2}));
}

TEST(Lane, HandsOverToAWaitingHolderAndKeepsTheRestForIt) {
  Lane lane;
  std::vector<int> order;
  Job before{[&] { order.push_back(1); }};
  Job after{[&] { order.push_back(3); }};
  std::atomic<bool> waiting{false};
  lane.hold();
  EXPECT_FALSE(lane.enter(before));
  std::thread holder{[&] {
    waiting.store(true, std::memory_order_release);
    lane.hold();
    order.push_back(2);
    lane.leave();
  }};
  while (!waiting.load(std::memory_order_acquire)) std::this_thread::yield();
  std::this_thread::sleep_for(std::chrono::milliseconds{20});  // lets it queue up; the order below holds either way
  std::thread{[&] { (void)lane.enter(after); }}.join();
  lane.leave();
  holder.join();
  ASSERT_EQ(order.size(), 3U);
  EXPECT_EQ(order.front(), 1);
}

// Every job runs exactly once and never beside another, whoever runs it.
TEST(Lane, ThreadsExcludeEachOtherAndLoseNothing) {
  Lane lane;
  constexpr int threads = 4;
  constexpr int rounds = 5000;
  int inside = 0;  // protected by the lane alone
  std::int64_t total = 0;
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      std::atomic<int> done{0};
      for (int i = 0; i < rounds; ++i) {
        if ((i + t) % 7 == 0) {
          const LaneHold held{lane};
          EXPECT_EQ(++inside, 1);
          ++total;
          --inside;
          continue;
        }
        Job job{[&] {
          EXPECT_EQ(++inside, 1);
          ++total;
          --inside;
          done.store(i + 1, std::memory_order_release);
        }};
        lane.enter(job);
        while (done.load(std::memory_order_acquire) != i + 1) std::this_thread::yield();
      }
    });
  for (auto& thread : pool) thread.join();
  EXPECT_EQ(total, threads * rounds);
}

}  // namespace
}  // namespace iovane::engine
