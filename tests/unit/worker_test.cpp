// The worker's thread, and what it does for address spaces.
#include "engine/worker.hpp"

#include <gtest/gtest.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "engine/engine_core.hpp"
#include "engine/lane.hpp"
#include "engine/monotonic.hpp"
#include "iovane/engine.hpp"
#include "support/recording_backend.hpp"

namespace iovane::engine {
namespace {

using namespace std::chrono_literals;
using iovane::literals::operator""_KiB;

class Tick final : public WorkerTask {
 public:
  std::atomic<int> runs{0};
  std::atomic<int> again{0};  // how often it asks to run again
  std::atomic<std::thread::id> ran_on{};

 private:
  std::uint64_t run_on_worker() noexcept override {
    ran_on.store(std::this_thread::get_id(), std::memory_order_relaxed);
    const bool more = again.fetch_sub(1, std::memory_order_relaxed) > 0;
    runs.fetch_add(1, std::memory_order_release);  // what came before is seen by who waits for it
    return more ? monotonic_ns() + 100'000 : never;
  }
};

void wait_for(const std::atomic<int>& value, int at_least) {
  const auto begun = std::chrono::steady_clock::now();
  while (value < at_least) {
    ASSERT_LT(std::chrono::steady_clock::now() - begun, 20s);
    std::this_thread::sleep_for(100us);
  }
}

TEST(Worker, RunsWhatIsPostedOnItsOwnThreadAlsoAfterSleeping) {
  auto worker = *Worker::start({}, nullptr, 0, 0);
  Tick tick;
  for (int i = 1; i <= 3; ++i) {
    worker->post(tick);
    wait_for(tick.runs, i);
    std::this_thread::sleep_for(2ms);  // long enough to fall asleep
  }
  EXPECT_NE(tick.ran_on.load(std::memory_order_relaxed), std::this_thread::get_id());
  worker->forget(tick);
}

TEST(Worker, RunsTimersUntilTheyAreForgotten) {
  auto worker = *Worker::start({}, nullptr, 0, 0);
  Tick few;
  few.again = 5;
  Tick endless;
  endless.again = 1 << 30;
  worker->post(few);
  worker->post(endless);
  wait_for(few.runs, 6);
  wait_for(endless.runs, 10);
  worker->forget(endless);
  const int then = endless.runs;
  std::this_thread::sleep_for(2ms);
  EXPECT_EQ(endless.runs, then);
  EXPECT_EQ(few.runs, 6);
  worker->forget(few);
}

TEST(Worker, EndsWithWhatWasPostedDone) {
  Tick tick;
  {
    auto worker = *Worker::start({.spin = 50us}, nullptr, 0, 0);
    worker->post(tick);
  }
  EXPECT_EQ(tick.runs, 1);
}

TEST(Worker, HasANameAndBlocksEverySignal) {
  std::mutex lock;
  std::set<std::string> names;
  std::atomic<int> looked{0};
  WorkerConfig config;
  config.on_start = [&](unsigned number) {
    EXPECT_EQ(number, 3U);
    std::array<char, 16> name{};
    pthread_getname_np(pthread_self(), name.data(), name.size());
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
    for (const int signal : {SIGINT, SIGTERM, SIGUSR1, SIGCHLD, SIGALRM, SIGPIPE})
      EXPECT_TRUE(sigismember(&blocked, signal));
    const std::lock_guard held{lock};
    names.insert(name.data());
    looked.fetch_add(1, std::memory_order_release);
  };
  auto worker = *Worker::start(config, nullptr, 0, 3);
  wait_for(looked, 2);
  EXPECT_EQ(names, (std::set<std::string>{"iovane-w3", "iovane-u3"}));
  sigset_t ours;
  pthread_sigmask(SIG_SETMASK, nullptr, &ours);
  EXPECT_FALSE(sigismember(&ours, SIGUSR1)) << "the caller's mask is as before";
}

// A thread that ends by system call leaves a sanitizer's books open: AddressSanitizer hangs in a later test,
// ThreadSanitizer does not know that the kernel, which hands a dead thread's mutex on, orders what came before.
#ifdef IOVANE_SANITIZED
#define IOVANE_NEEDS_DEATH() GTEST_SKIP() << "sanitizers do not bear a thread that ends by system call"
#else
#define IOVANE_NEEDS_DEATH() static_cast<void>(0)
#endif

/// Ends the thread that it runs on as a seccomp filter would: without a word.
class Death final : public WorkerTask {
 public:
  std::uint64_t run_on_worker() noexcept override {
    ::syscall(SYS_exit, 0);
    return never;
  }
};

TEST(Worker, WhoeverWaitsStandsInForOneThatDied) {
  IOVANE_NEEDS_DEATH();
  auto worker = *Worker::start({.understudy = false}, nullptr, 0, 0);
  Death death;
  worker->post(death);
  Tick tick;  // perhaps taken together with what kills the worker, perhaps not
  worker->post(tick);
  worker->forget(tick);
  EXPECT_EQ(tick.runs, 1);
  EXPECT_EQ(tick.ran_on.load(std::memory_order_relaxed), std::this_thread::get_id());
  EXPECT_TRUE(worker->is_dead());
  worker->post(tick);
  worker->forget(tick);
  EXPECT_EQ(tick.runs, 2);
}

TEST(Worker, TheUnderstudyGoesOnInThePlaceOfOneThatDied) {
  IOVANE_NEEDS_DEATH();
  auto worker = *Worker::start({}, nullptr, 0, 0);
  ASSERT_TRUE(worker->has_understudy());
  Tick before;
  before.again = 1 << 30;  // a timer
  worker->post(before);
  wait_for(before.runs, 2);
  const auto first = before.ran_on.load(std::memory_order_relaxed);
  Death death;
  worker->post(death);
  wait_for(before.runs, before.runs + 1000);
  EXPECT_NE(before.ran_on.load(std::memory_order_relaxed), first) << "the timer goes on";
  EXPECT_NE(before.ran_on.load(std::memory_order_relaxed), std::this_thread::get_id());
  EXPECT_FALSE(worker->is_dead());
  worker->forget(before);
  std::this_thread::sleep_for(2ms);  // asleep on the ring by now
  Tick later;
  worker->post(later);
  wait_for(later.runs, 1);
  worker->forget(later);
}

TEST(Worker, AnOnStartThatThrowsIsAWorkerThatNeverWas) {
  WorkerConfig config;
  config.on_start = [](unsigned) { throw std::runtime_error{"not here"}; };
  auto worker = *Worker::start(config, nullptr, 0, 0);
  Tick tick;
  worker->post(tick);
  worker->forget(tick);
  EXPECT_EQ(tick.runs, 1);
}

// --- In an address space

class SpaceWithWorker : public ::testing::Test {
 protected:
  void open(WorkerConfig workers = {}) {
    engine_ = EngineAccess::open(std::make_unique<testing::RecordingBackend>(backend_), "recording", workers);
    AddressSpaceConfig config;
    config.layout = LayoutPolicy::fixed;
    config.unmap = UnmapMode::relaxed;
    config.relaxed.time_max = 1ms;
    auto space = engine_.create_address_space(config);
    ASSERT_TRUE(space) << space.error().message();
    space_ = *std::move(space);
  }
  static MapRequest map_at(std::uint64_t page, Bytes length = 4_KiB) {
    MapRequest request;
    request.memory = {{}, 0x7000'0000, length};
    request.placement = Placement::fixed(Iova{page * 4096});
    return request;
  }
  Engine engine_;
  AddressSpace space_;
  testing::RecordingSpace* backend_ = nullptr;
};

TEST_F(SpaceWithWorker, AQueueThatNeverBlocksLeavesItsBatchToTheWorker) {
  open();
  std::thread::id ran_on;
  backend_->before_batch = [&] { ran_on = std::this_thread::get_id(); };
  Queue queue = *space_.open_queue({.submit = SubmitMode::never_block});
  for (std::uint64_t round = 0; round < 50; ++round) {
    for (std::uint64_t i = 0; i < 4; ++i) ASSERT_TRUE(queue.stage(map_at(16 + 4 * round + i)));
    queue.submit();
    std::array<Completion, 4> done;
    ASSERT_EQ(queue.wait(done, 4, 20s), 4U);
    for (const Completion& completion : done) ASSERT_TRUE(completion.ok()) << completion.error.message();
    ASSERT_NE(ran_on, std::this_thread::get_id());
  }
}

TEST_F(SpaceWithWorker, ADyingWorkerLosesNoCompletion) {
  IOVANE_NEEDS_DEATH();
  WorkerConfig workers;
  workers.on_start = [](unsigned) { ::syscall(SYS_exit, 0); };
  open(workers);
  Queue queue = *space_.open_queue({.submit = SubmitMode::never_block});
  std::array<Completion, 4> done;
  for (std::uint64_t i = 0; i < 4; ++i) ASSERT_TRUE(queue.stage(map_at(16 + i)));
  queue.submit();
  ASSERT_EQ(queue.wait(done, 4, 20s), 4U);
  for (const Completion& completion : done) ASSERT_TRUE(completion.ok()) << completion.error.message();
  // It is known to be dead now, and what comes later is not left to it.
  ASSERT_TRUE(queue.stage(UnmapRequest::of(IovaRange::everything())));
  queue.submit();
  ASSERT_EQ(queue.poll(done), 1U);
  EXPECT_TRUE(done[0].ok()) << done[0].error.message();
}

TEST_F(SpaceWithWorker, ADyingWorkerIsNoticedByOneWhoOnlyPolls) {
  IOVANE_NEEDS_DEATH();
  WorkerConfig workers;
  workers.on_start = [](unsigned) { ::syscall(SYS_exit, 0); };
  open(workers);
  Queue queue = *space_.open_queue({.submit = SubmitMode::never_block});
  ASSERT_TRUE(queue.stage(map_at(16)));
  queue.submit();
  std::array<Completion, 1> done;
  const auto begun = std::chrono::steady_clock::now();
  while (queue.poll(done) == 0) ASSERT_LT(std::chrono::steady_clock::now() - begun, 20s);
  EXPECT_TRUE(done[0].ok()) << done[0].error.message();
}

TEST_F(SpaceWithWorker, WhoWaitsForTheLaneOfADeadWorkerGetsIt) {
  IOVANE_NEEDS_DEATH();
  open({.understudy = false});
  const std::thread::id here = std::this_thread::get_id();
  std::atomic<int> batches{0};
  std::atomic<bool> may_die{false};
  backend_->before_batch = [&] {
    if (batches.fetch_add(1, std::memory_order_release) != 0) return;  // pairs with the load below
    EXPECT_NE(std::this_thread::get_id(), here);
    while (!may_die) std::this_thread::yield();
    ::syscall(SYS_exit, 0);
  };
  Queue queue = *space_.open_queue({.submit = SubmitMode::never_block});
  for (std::uint64_t i = 0; i < 4; ++i) ASSERT_TRUE(queue.stage(map_at(16 + i)));
  queue.submit();
  while (batches == 0) std::this_thread::yield();
  std::thread holder{[&] { EXPECT_TRUE(space_.find(Iova{17 * 4096})) << "the batch was executed before"; }};
  std::thread caller{[&] { EXPECT_TRUE(space_.map(map_at(64)).ok()); }};
  std::this_thread::sleep_for(5ms);  // they wait by now; right either way
  may_die = true;
  holder.join();
  caller.join();
  std::array<Completion, 4> done;
  ASSERT_EQ(queue.wait(done, 4, 20s), 4U);
  for (const Completion& completion : done) EXPECT_TRUE(completion.ok()) << completion.error.message();
  EXPECT_EQ(space_.stats().live_mappings, 5U);
}

TEST_F(SpaceWithWorker, ThePromisedTimeHoldsAlsoWhenTheWorkerDiesInAFlush) {
  IOVANE_NEEDS_DEATH();
  open();
  const std::thread::id here = std::this_thread::get_id();
  std::atomic<bool> died{false};
  backend_->before_batch = [&] {
    if (std::this_thread::get_id() == here || died.exchange(true, std::memory_order_relaxed)) return;
    ::syscall(SYS_exit, 0);
  };
  for (std::uint64_t i = 0; i < 4; ++i) {
    ASSERT_TRUE(space_.map(map_at(16)).ok());
    ASSERT_TRUE(space_.unmap(UnmapRequest::of(IovaRange{Iova{16 * 4096}, Iova{17 * 4096 - 1}})).ok());
    const auto begun = std::chrono::steady_clock::now();
    while (space_.stats().stale_mappings != 0) ASSERT_LT(std::chrono::steady_clock::now() - begun, 20s);
  }
  EXPECT_TRUE(died);
  EXPECT_EQ(space_.stats().quarantined_mappings, 0U);
}

/// From here on `call` ends this thread, if its name begins so.
void die_at(long call, std::string_view name_begins) {
  std::array<char, 16> name{};
  pthread_getname_np(pthread_self(), name.data(), name.size());
  if (!std::string_view{name.data()}.starts_with(name_begins)) return;
  std::array<sock_filter, 4> filter{
      sock_filter BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      sock_filter BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(call), 0, 1),
      sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_THREAD),
      sock_filter BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{filter.size(), filter.data()};
  ASSERT_EQ(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
  ASSERT_EQ(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
}

TEST_F(SpaceWithWorker, WhoSleepsOnAnEventfdHearsOfWhatADeadWorkerDid) {
  IOVANE_NEEDS_DEATH();
  WorkerConfig workers;
  workers.on_start = [](unsigned) { die_at(SYS_write, "iovane-w"); };  // it dies with the news on its lips
  open(workers);
  Queue queue = *space_.open_queue({.submit = SubmitMode::never_block});
  pollfd news{.fd = queue.event_fd(), .events = POLLIN, .revents = 0};
  for (std::uint64_t i = 0; i < 3; ++i) {
    ASSERT_TRUE(queue.stage(map_at(16 + i)));
    queue.submit();
    ASSERT_EQ(::poll(&news, 1, 20'000), 1);
    std::uint64_t count = 0;
    ASSERT_EQ(::read(news.fd, &count, sizeof count), static_cast<ssize_t>(sizeof count));
    std::array<Completion, 2> done;
    ASSERT_EQ(queue.poll(done), 1U);
    EXPECT_TRUE(done[0].ok()) << done[0].error.message();
  }
}

TEST_F(SpaceWithWorker, LargePopulationsAreHandedOverAndSmallBatchesAreNot) {
  open();
  std::thread::id ran_on;
  backend_->before_batch = [&] { ran_on = std::this_thread::get_id(); };
  Queue queue = *space_.open_queue({.hand_over = 64_KiB});
  std::array<Completion, 1> done;
  ASSERT_TRUE(queue.stage(map_at(16)));
  queue.submit();
  ASSERT_EQ(queue.wait(done, 1, 20s), 1U);
  EXPECT_EQ(ran_on, std::this_thread::get_id());
  ASSERT_TRUE(queue.stage(map_at(64, 64_KiB)));
  queue.submit();
  ASSERT_EQ(queue.wait(done, 1, 20s), 1U);
  EXPECT_NE(ran_on, std::this_thread::get_id());
}

TEST_F(SpaceWithWorker, AHolderThatServedOthersLongEnoughIsRelieved) {
  open();
  constexpr std::uint64_t batches = 4 * Lane::service_max;
  std::atomic<bool> inside{false};
  std::atomic<bool> go_on{false};
  backend_->before_batch = [&] {
    inside = true;
    while (!go_on) std::this_thread::yield();
  };
  std::vector<Queue> queues;
  for (std::uint64_t i = 0; i < batches; ++i) queues.push_back(*space_.open_queue({.depth = 1}));
  std::thread holder{[&] { (void)space_.map(map_at(8)); }};
  while (!inside) std::this_thread::yield();
  for (std::uint64_t i = 0; i < batches; ++i) {
    ASSERT_TRUE(queues[i].stage(map_at(16 + i)));
    queues[i].submit();  // left with the holder
  }
  go_on = true;
  holder.join();
  std::array<Completion, 1> done;
  for (Queue& queue : queues) {
    ASSERT_EQ(queue.wait(done, 1, 20s), 1U);
    EXPECT_TRUE(done[0].ok()) << done[0].error.message();
  }
  EXPECT_EQ(space_.stats().combined_batches, batches);
  // The worker was called once; that it got the lane shows when it had its turn.
  const auto begun = std::chrono::steady_clock::now();
  while (space_.stats().handed_over == 0) ASSERT_LT(std::chrono::steady_clock::now() - begun, 20s);
}

TEST_F(SpaceWithWorker, WithoutWorkersWhatNeedsOneIsRefusedWithTheReason) {
  engine_ = EngineAccess::open(std::make_unique<testing::RecordingBackend>(backend_), "recording", {.enabled = false});
  AddressSpaceConfig relaxed;
  relaxed.unmap = UnmapMode::relaxed;
  EXPECT_EQ(engine_.create_address_space(relaxed).error().code, Errc::unsupported);
  engine_ = EngineAccess::open(std::make_unique<testing::RecordingBackend>(backend_), "recording", {.enabled = false});
  auto space = engine_.create_address_space({});
  ASSERT_TRUE(space) << space.error().message();
  EXPECT_EQ(space->open_queue({.submit = SubmitMode::never_block}).error().code, Errc::unsupported);
  EXPECT_TRUE(space->open_queue());
  EXPECT_TRUE(space->open_queue()) << "a second queue wants a worker and does without";
}

}  // namespace
}  // namespace iovane::engine
