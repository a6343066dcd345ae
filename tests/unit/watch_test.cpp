// Descriptors that the worker waits for beside its own: on its io_uring, and where the process may have none.
#include "iovane/watch.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "base/unique_fd.hpp"
#include "engine/engine_core.hpp"
#include "engine/worker.hpp"
#include "iovane/engine.hpp"
#include "support/recording_backend.hpp"

namespace iovane {
namespace {

using namespace std::chrono_literals;

struct Event {
  base::UniqueFd fd{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  std::atomic<std::uint64_t> heard{0};

  void ring(std::uint64_t count = 1) { EXPECT_EQ(::write(fd.get(), &count, sizeof count), ssize_t{sizeof count}); }
  bool take() {
    std::uint64_t count = 0;
    EXPECT_EQ(::read(fd.get(), &count, sizeof count), ssize_t{sizeof count}) << "called while nothing was there";
    heard.fetch_add(count, std::memory_order_release);  // pairs with the acquire in wait()
    return true;
  }
  bool wait(std::uint64_t count) const {
    const auto begun = std::chrono::steady_clock::now();
    while (heard.load(std::memory_order_acquire) < count) {
      if (std::chrono::steady_clock::now() - begun > 20s) return false;
      std::this_thread::yield();
    }
    return true;
  }
};

class Watches : public ::testing::Test {
 protected:
  void open(WorkerConfig workers = {}) {
    engine_ = EngineAccess::open(std::make_unique<testing::RecordingBackend>(backend_), "recording", workers);
    space_ = *engine_.create_address_space({});
  }
  Engine engine_;
  AddressSpace space_;
  testing::RecordingSpace* backend_ = nullptr;
};

TEST_F(Watches, CallAHandlerForEveryEventAsleepOrAwake) {
  for (const auto spin : {0us, 200us}) {
    open({.spin = spin});
    Event event;
    const Watch watch = *space_.watch(event.fd.get(), [&] { return event.take(); });
    for (std::uint64_t i = 1; i <= 50; ++i) {
      event.ring();
      ASSERT_TRUE(event.wait(i));
      if (i % 10 == 0) std::this_thread::sleep_for(2ms);
    }
  }
}

TEST_F(Watches, ManyStandBesideQueuesAndEachOther) {
  open();
  constexpr std::size_t many = 150;  // more than the ring has places
  std::vector<Event> events(many);
  std::vector<Watch> watches;
  for (Event& event : events) watches.push_back(*space_.watch(event.fd.get(), [&] { return event.take(); }));
  Queue queue = *space_.open_queue({.submit = SubmitMode::never_block});
  for (std::uint64_t round = 1; round <= 5; ++round) {
    for (Event& event : events) event.ring();
    MapRequest map;
    map.memory = {{}, 0x7000'0000, Bytes{4096}};
    ASSERT_TRUE(queue.stage(map));
    std::array<Completion, 1> done;
    queue.submit();
    ASSERT_EQ(queue.wait(done, 1, 20s), 1U);
    for (const Event& event : events) ASSERT_TRUE(event.wait(round));
  }
}

TEST_F(Watches, EndWithTheirObjectAndLetTheDescriptorGo) {
  ::signal(SIGPIPE, SIG_IGN);
  open();
  for (int round = 0; round < 50; ++round) {
    std::array<int, 2> ends{};
    ASSERT_EQ(::pipe2(ends.data(), O_CLOEXEC | O_NONBLOCK), 0);
    base::UniqueFd reader{ends[0]};
    const base::UniqueFd writer{ends[1]};
    std::atomic<int> calls{0};
    {
      const Watch watch = *space_.watch(reader.get(), [&] {
        calls.fetch_add(1, std::memory_order_relaxed);
        return true;
      });
      if (round % 2 == 0) std::this_thread::sleep_for(200us);
    }
    EXPECT_EQ(calls, 0);
    reader.reset();
    // With the last reader gone a write fails: nobody holds the file any more.
    char byte = 0;
    EXPECT_EQ(::write(writer.get(), &byte, 1), -1) << "the worker still holds the descriptor";
    EXPECT_EQ(errno, EPIPE);
  }
}

TEST_F(Watches, EndByTheHandlersWordOrItsException) {
  open();
  for (const bool throws : {false, true}) {
    Event event;
    std::atomic<int> calls{0};
    const Watch watch = *space_.watch(event.fd.get(), [&]() -> bool {
      const int call = calls.fetch_add(1, std::memory_order_relaxed) + 1;
      if (call == 2 && throws) throw std::runtime_error{"enough"};
      return call < 2;
    });
    event.ring();  // stays readable
    const auto begun = std::chrono::steady_clock::now();
    while (calls < 2) ASSERT_LT(std::chrono::steady_clock::now() - begun, 20s);
    std::this_thread::sleep_for(5ms);
    EXPECT_EQ(calls, 2);
  }
}

TEST_F(Watches, RefuseWhatCannotBeWatched) {
  open();
  EXPECT_EQ(space_.watch(-1, [] { return true; }).error().code, Errc::invalid_argument);
  EXPECT_EQ(space_.watch(1000, [] { return true; }).error().code, Errc::invalid_argument);
  Event event;
  EXPECT_EQ(space_.watch(event.fd.get(), {}).error().code, Errc::invalid_argument);
  open({.enabled = false});
  EXPECT_EQ(space_.watch(event.fd.get(), [] { return true; }).error().code, Errc::unsupported);
}

TEST_F(Watches, OutliveTheirAddressSpace) {
  open();
  Event event;
  const Watch watch = *space_.watch(event.fd.get(), [&] { return event.take(); });
  space_ = AddressSpace{};
  engine_ = Engine{};
  event.ring(3);
  EXPECT_TRUE(event.wait(3));
}

#ifndef IOVANE_SANITIZED
TEST_F(Watches, GoOnWhenTheWorkerDies) {
  open();
  Event event;
  std::atomic<bool> died{false};
  const Watch watch = *space_.watch(event.fd.get(), [&] {
    if (!died.exchange(true, std::memory_order_relaxed)) ::syscall(SYS_exit, 0);
    return event.take();
  });
  for (std::uint64_t i = 1; i <= 5; ++i) {
    event.ring();
    ASSERT_TRUE(event.wait(i));
    std::this_thread::sleep_for(1ms);
  }
}
#endif

void forbid_io_uring() {
  std::array<sock_filter, 4> filter{
      sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
      sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{filter.size(), filter.data()};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
    _exit(3);
}

[[noreturn]] void watch_without_io_uring() {
  forbid_io_uring();
  auto worker = engine::Worker::start({}, nullptr, 0, 0);
  if (!worker || (*worker)->uses_io_uring()) _exit(2);
  testing::RecordingSpace* backend = nullptr;
  Engine engine = EngineAccess::open(std::make_unique<testing::RecordingBackend>(backend), "recording", {});
  AddressSpace space = *engine.create_address_space({});
  Event event;
  Event other;
  const Watch watch = *space.watch(event.fd.get(), [&] { return event.take(); });
  const Watch second = *space.watch(other.fd.get(), [&] { return other.take(); });
  for (std::uint64_t i = 1; i <= 20; ++i) {
    event.ring();
    other.ring();
    if (!event.wait(i) || !other.wait(i)) _exit(1);
    if (i % 5 == 0) std::this_thread::sleep_for(1ms);
  }
  _exit(0);
}

TEST(WatchesDeathTest, WorkWithoutIoUring) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers make system calls of their own";
#endif
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(watch_without_io_uring(), ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace iovane
