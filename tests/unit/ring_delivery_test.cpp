// Completions announced in the caller's own io_uring.
#include <gtest/gtest.h>
#include <liburing.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <thread>
#include <vector>

#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "support/recording_backend.hpp"

namespace iovane {
namespace {

using namespace std::chrono_literals;
using iovane::literals::operator""_KiB;
constexpr std::uint64_t mark = 0xabcd'0000'1234;

class RingDelivery : public ::testing::Test {
 protected:
  void SetUp() override {
    if (io_uring_queue_init(8, &ring_, 0) != 0) GTEST_SKIP() << "this process may not have an io_uring";
    open_ = true;
    engine_ = EngineAccess::open(std::make_unique<testing::RecordingBackend>(backend_), "recording");
    AddressSpaceConfig config;
    config.layout = LayoutPolicy::fixed;
    space_ = *engine_.create_address_space(config);
  }
  void TearDown() override {
    if (open_) io_uring_queue_exit(&ring_);
  }
  void submit_maps(Queue& queue, std::uint64_t first, std::uint64_t count) {
    for (std::uint64_t i = 0; i < count; ++i) {
      MapRequest request;
      request.memory = {{}, 0x7000'0000, 4_KiB};
      request.placement = Placement::fixed(Iova{(first + i) * 4096});
      ASSERT_TRUE(queue.stage(request));
    }
    queue.submit();
  }
  // Entries in the caller's ring: how many completions they announce.
  int announced(int entries) {
    int sum = 0;
    for (int i = 0; i < entries; ++i) {
      io_uring_cqe* cqe = nullptr;
      __kernel_timespec limit{20, 0};
      if (io_uring_wait_cqe_timeout(&ring_, &cqe, &limit) != 0) return -1;
      EXPECT_EQ(cqe->user_data, mark);
      sum += cqe->res;
      io_uring_cqe_seen(&ring_, cqe);
    }
    return sum;
  }

  io_uring ring_{};
  bool open_ = false;
  Engine engine_;
  AddressSpace space_;
  testing::RecordingSpace* backend_ = nullptr;
};

TEST_F(RingDelivery, OneEntryPerBatchWithTheNumberOfCompletions) {
  Queue queue = *space_.open_queue();
  const auto set = queue.deliver_to_ring(ring_.ring_fd, mark);
  ASSERT_TRUE(set) << set.error().message();
  EXPECT_EQ(io_uring_cq_ready(&ring_), 0U) << "trying it leaves nothing";
  submit_maps(queue, 16, 5);
  EXPECT_EQ(announced(1), 5);
  std::array<Completion, 8> done;
  EXPECT_EQ(queue.poll(done), 5U);
}

TEST_F(RingDelivery, AnnouncesWhatIsUnreadAlready) {
  Queue queue = *space_.open_queue();
  submit_maps(queue, 16, 3);
  ASSERT_TRUE(queue.deliver_to_ring(ring_.ring_fd, mark));
  EXPECT_EQ(announced(1), 3);
}

TEST_F(RingDelivery, ComesFromWhicheverThreadExecutesTheBatch) {
  Queue queue = *space_.open_queue({.submit = SubmitMode::never_block});
  ASSERT_TRUE(queue.deliver_to_ring(ring_.ring_fd, mark));
  for (std::uint64_t round = 0; round < 20; ++round) {
    submit_maps(queue, 16 + 2 * round, 2);
    ASSERT_EQ(announced(1), 2);
    std::array<Completion, 2> done;
    ASSERT_EQ(queue.poll(done), 2U) << "announced after they can be taken";
  }
}

TEST_F(RingDelivery, AFullRingLosesNothing) {
  Queue queue = *space_.open_queue({.depth = 256});
  ASSERT_TRUE(queue.deliver_to_ring(ring_.ring_fd, mark));
  constexpr int batches = 64;  // the ring's completion queue has 16 places
  for (std::uint64_t i = 0; i < batches; ++i) submit_maps(queue, 16 + i, 1);
  EXPECT_EQ(announced(batches), batches);
  std::vector<Completion> done(batches);
  EXPECT_EQ(queue.poll(done), static_cast<std::size_t>(batches));
}

TEST_F(RingDelivery, CanBeEnded) {
  Queue queue = *space_.open_queue();
  ASSERT_TRUE(queue.deliver_to_ring(ring_.ring_fd, mark));
  ASSERT_TRUE(queue.deliver_to_ring(-1, 0));
  submit_maps(queue, 16, 1);
  EXPECT_EQ(io_uring_cq_ready(&ring_), 0U);
}

TEST_F(RingDelivery, RefusesWhatIsNoRing) {
  Queue queue = *space_.open_queue();
  const int other = ::eventfd(0, EFD_CLOEXEC);
  const auto set = queue.deliver_to_ring(other, mark);
  ::close(other);
  ASSERT_FALSE(set);
  EXPECT_EQ(set.error().code, Errc::invalid_argument) << set.error().message();
}

}  // namespace
}  // namespace iovane
