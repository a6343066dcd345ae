#include "engine/direct_batch.hpp"

#include <gtest/gtest.h>
#include <poll.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "support/recording_backend.hpp"

namespace iovane::engine {
namespace {

using namespace std::chrono_literals;
using ::iovane::testing::RecordingBackend;
using ::iovane::testing::RecordingSpace;

constexpr std::uint64_t page = 4096;

Operation map_of(std::uint64_t first, std::uint64_t count = 1, Order order = Order::free) {
  MapRequest request;
  request.memory = {{}, 0x7000'0000, Bytes{count * page}};
  request.placement = Placement::fixed(Iova{first * page});
  request.user_data = first;
  request.order = order;
  return Operation{request};
}
Operation unmap_of(std::uint64_t first, std::uint64_t count = 1) {
  return Operation{UnmapRequest::of(*IovaRange::from_length(Iova{first * page}, Bytes{count * page}), first)};
}

class DirectBatchTest : public ::testing::Test {
 protected:
  DirectBatchTest() {
    engine_ = EngineAccess::open(std::make_unique<RecordingBackend>(backend), "recording");
    AddressSpaceConfig config;
    config.layout = LayoutPolicy::fixed;
    space = *engine_.create_address_space(config);
    core = DirectBatch::join(space);
  }
  bool submit(DirectBatch& batch) {
    completions.assign(operations.size(), {});
    return batch.submit(operations, completions);
  }
  /// Another thread is in a kernel call for the address space until end_work().
  void begin_work() {
    std::atomic<bool> inside{false};
    backend->before_batch = [this, &inside] {
      if (let_go_.load(std::memory_order_acquire)) return;
      inside.store(true, std::memory_order_release);
      while (!let_go_.load(std::memory_order_acquire)) std::this_thread::yield();
    };
    worker_ = std::thread{[this] {
      MapRequest request;
      request.memory = {{}, 0x1000'0000, Bytes{page}};
      request.placement = Placement::fixed(Iova{0x9000 * page});
      EXPECT_TRUE(space.map(request).ok());
    }};
    while (!inside.load(std::memory_order_acquire)) std::this_thread::yield();
  }
  void end_work() {
    let_go_.store(true, std::memory_order_release);
    worker_.join();
  }

  RecordingSpace* backend = nullptr;
  AddressSpace space;
  std::shared_ptr<SpaceCore> core;
  std::vector<Operation> operations;
  std::vector<Completion> completions;

 private:
  Engine engine_;
  std::thread worker_;
  std::atomic<bool> let_go_{false};
};

TEST_F(DirectBatchTest, IsFinalWhenTheAddressSpaceIsIdle) {
  DirectBatch batch{*core};
  operations = {map_of(16, 2), map_of(20), unmap_of(40), unmap_of(16, 2)};
  EXPECT_TRUE(submit(batch));
  EXPECT_TRUE(batch.done());
  EXPECT_EQ(batch.failures(), 1U);
  EXPECT_EQ(completions[0].bytes.value, 2 * page);
  EXPECT_TRUE(completions[1].ok());
  EXPECT_EQ(completions[1].user_data, 20U);
  EXPECT_EQ(completions[2].error.code, Errc::not_found);
  EXPECT_EQ(completions[3].bytes.value, 2 * page);
  EXPECT_TRUE(backend->live.contains(20 * page));
  EXPECT_EQ(backend->live.size(), 1U);
  operations = {unmap_of(20)};
  EXPECT_TRUE(submit(batch)) << "again and again";
  EXPECT_EQ(batch.failures(), 0U);
  EXPECT_TRUE(backend->live.empty());
}

TEST_F(DirectBatchTest, OfNothingIsFinal) {
  DirectBatch batch{*core};
  EXPECT_TRUE(submit(batch));
  EXPECT_EQ(batch.failures(), 0U);
  EXPECT_TRUE(backend->batches.empty());
}

TEST_F(DirectBatchTest, LongerThanThePlannerTakesAtOnceComesWhole) {
  DirectBatch batch{*core};
  for (std::uint64_t i = 0; i < 1000; ++i) operations.push_back(map_of(16 + 2 * i));
  operations.push_back(map_of(16));  // taken
  ASSERT_TRUE(submit(batch));
  EXPECT_EQ(batch.failures(), 1U);
  EXPECT_EQ(completions.back().error.code, Errc::iova_busy);
  EXPECT_EQ(backend->live.size(), 1000U);
  EXPECT_EQ(completions[999].iova.value, (16 + 2 * 999) * page);
}

TEST_F(DirectBatchTest, AChainEndsAtItsFailureAndWithItsBatch) {
  DirectBatch batch{*core};
  operations = {map_of(16), map_of(16, 1, Order::link), map_of(18), map_of(20)};
  ASSERT_TRUE(submit(batch));
  EXPECT_EQ(completions[1].error.code, Errc::iova_busy);
  EXPECT_EQ(completions[2].error.code, Errc::cancelled);
  EXPECT_TRUE(completions[3].ok());
  operations = {map_of(16, 1, Order::link)};
  ASSERT_TRUE(submit(batch));
  operations = {map_of(30)};
  ASSERT_TRUE(submit(batch));
  EXPECT_TRUE(completions[0].ok()) << "a failed link reached into the next batch";
}

TEST_F(DirectBatchTest, LeavesTheWorkToAThreadThatIsAtWork) {
  DirectBatch batch{*core};
  begin_work();
  operations = {map_of(16), map_of(16)};
  EXPECT_FALSE(submit(batch));
  EXPECT_FALSE(batch.done());
  EXPECT_FALSE(batch.wait(1ms));
  end_work();
  EXPECT_TRUE(batch.wait(-1ns));
  EXPECT_TRUE(batch.done());
  EXPECT_EQ(batch.failures(), 1U);
  EXPECT_TRUE(completions[0].ok());
  EXPECT_EQ(space.stats().combined_batches, 1U);
  operations = {unmap_of(16)};
  EXPECT_TRUE(submit(batch)) << "as before, after it had to wait";
}

TEST_F(DirectBatchTest, ItsDescriptorIsReadableOnceABatchEndedElsewhere) {
  DirectBatch batch{*core};
  const int fd = batch.event_fd();
  ASSERT_GE(fd, 0);
  operations = {map_of(16)};
  pollfd poll{fd, POLLIN, 0};
  ASSERT_TRUE(submit(batch));
  EXPECT_EQ(::poll(&poll, 1, 0), 0) << "who submitted knows";
  begin_work();
  operations = {unmap_of(16)};
  ASSERT_FALSE(submit(batch));
  EXPECT_EQ(::poll(&poll, 1, 0), 0);
  end_work();
  EXPECT_EQ(::poll(&poll, 1, 10'000), 1);
  std::uint64_t count = 0;
  EXPECT_EQ(::read(fd, &count, sizeof count), static_cast<ssize_t>(sizeof count));
  EXPECT_TRUE(batch.done());
  EXPECT_EQ(batch.failures(), 0U);
}

TEST_F(DirectBatchTest, ADescriptorThatIsMadeMeanwhileTellsToo) {
  DirectBatch batch{*core};
  begin_work();
  operations = {map_of(16)};
  ASSERT_FALSE(submit(batch));
  std::thread later{[this] {
    std::this_thread::sleep_for(5ms);
    end_work();
  }};
  pollfd poll{batch.event_fd(), POLLIN, 0};
  EXPECT_EQ(::poll(&poll, 1, 10'000), 1);
  EXPECT_TRUE(batch.done());
  later.join();
}

TEST_F(DirectBatchTest, ItsEndWaitsForWhatIsUnderWay) {
  begin_work();
  std::thread later{[this] {
    std::this_thread::sleep_for(5ms);
    end_work();
  }};
  {
    DirectBatch batch{*core};
    operations = {map_of(16)};
    ASSERT_FALSE(submit(batch));
  }
  EXPECT_TRUE(completions[0].ok());
  later.join();
}

TEST_F(DirectBatchTest, OfAClosedAddressSpaceIsRefused) {
  DirectBatch batch{*core};
  space.close();
  operations = {map_of(16), unmap_of(16)};
  ASSERT_TRUE(submit(batch));
  EXPECT_EQ(batch.failures(), 2U);
  for (const Completion& c : completions) EXPECT_EQ(c.error.code, Errc::closed);
}

TEST_F(DirectBatchTest, ThatWaitsWhenTheAddressSpaceClosesIsExecutedOrRefused) {
  DirectBatch batch{*core};
  begin_work();
  std::thread closing{[this] { space.close(); }};
  std::this_thread::sleep_for(2ms);  // it stands before us, mostly
  operations = {map_of(16)};
  ASSERT_FALSE(submit(batch));
  end_work();
  closing.join();
  ASSERT_TRUE(batch.wait(10s));
  EXPECT_TRUE(completions[0].ok() || completions[0].error.code == Errc::closed) << completions[0].error.message();
}

}  // namespace
}  // namespace iovane::engine
