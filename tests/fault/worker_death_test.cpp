// A worker that dies in the nth kernel call of a mixed workload, before the call or after it took effect, for every n:
// another thread goes on. No completion is lost, and afterwards index, pins and kernel agree and all is usable.
#include <gtest/gtest.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <optional>
#include <string_view>
#include <thread>
#include <vector>

#include "backends/kernel_decorators.hpp"
#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "base/unique_fd.hpp"
#include "engine/direct_batch.hpp"
#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "support/workload_memory.hpp"

namespace iovane {
namespace {

using namespace std::chrono_literals;
using backends::model::ModelKernel;
using backends::model::ModelUsage;

bool on_thread(char kind) {
  std::array<char, 16> name{};
  pthread_getname_np(pthread_self(), name.data(), name.size());
  return std::string_view{name.data()}.starts_with(std::string{"iovane-"} + kind);
}

/// Ends a worker's thread in its nth call, as a seccomp filter would: without a word.
class DeadlyKernel final : public backends::KernelDecorator {
 public:
  enum class When { before_call, after_call };
  DeadlyKernel(backends::Kernel& inner, std::uint64_t nth, When when, bool understudy_too)
      : KernelDecorator{inner}, left_{nth}, when_{when}, understudy_too_{understudy_too} {}

  long ioctl(int fd, unsigned long request, void* argument) noexcept override {
    const bool counts = on_thread('w') || (understudy_too_ && on_thread('u'));
    if (!counts || left_ == 0 || --left_ != 0) return inner().ioctl(fd, request, argument);
    // relaxed: nothing is read through it.
    if (!fired.load(std::memory_order_relaxed) && understudy_too_) left_ = 2;  // and the understudy in its second call
    if (when_ == When::after_call) (void)inner().ioctl(fd, request, argument);
    fired.store(true, std::memory_order_relaxed);
    ::syscall(SYS_exit, 0);
    return -EIO;
  }
  std::atomic<bool> fired{false};

 private:
  std::uint64_t left_;
  const When when_;
  const bool understudy_too_;
};

struct Sweep {
  const char* name;
  const char* interface;
  UnmapMode unmap;
  bool understudy;
  bool understudy_dies_too;
};

/// Lets the worker's first call wait, so that others find it at work.
class GatedKernel final : public backends::KernelDecorator {
 public:
  using KernelDecorator::KernelDecorator;
  long ioctl(int fd, unsigned long request, void* argument) noexcept override {
    if (on_thread('w') && closed.load(std::memory_order_acquire)) {
      reached.store(true, std::memory_order_release);
      while (closed.load(std::memory_order_acquire)) std::this_thread::yield();
    }
    return inner().ioctl(fd, request, argument);
  }
  std::atomic<bool> closed{true};
  std::atomic<bool> reached{false};
};

class WorkerDeath : public ::testing::TestWithParam<Sweep>, protected test::WorkloadMemory {
 protected:
  void open(backends::Kernel& kernel) {
    engine_ = EngineAccess::open(*backends::open_backend(kernel, {.name = GetParam().interface}), "model",
                                 {.understudy = GetParam().understudy});
    AddressSpaceConfig config;
    config.unmap = GetParam().unmap;
    config.relaxed.mappings_max = 3;
    config.relaxed.time_max = 1h;
    space_ = *engine_.create_address_space(config);
    ASSERT_TRUE(space_.attach({.pci_address = kernel_->device(0).address()}));
    registered_ = *space_.register_memory({pages_ + 16 * page, Bytes{8 * page}, -1, 0});
    queue_ = *space_.open_queue({.depth = 16, .submit = SubmitMode::never_block});
  }

  /// Every completion of what was staged, as the operations were numbered.
  void submit_and_wait() {
    const std::size_t count = queue_.outstanding();
    queue_.submit();
    std::array<Completion, 16> done;
    ASSERT_EQ(queue_.wait(done, count, 20s), count) << "completions were lost";
    for (std::size_t i = 0; i < count; ++i) {
      EXPECT_EQ(done[i].user_data, i);
      if (done[i].ok()) continue;
      ++refused_;
      // One operation may be given up; others may depend on it.
      EXPECT_TRUE(done[i].error.code == Errc::io_error || refused_ > 1) << done[i].error.message();
    }
  }
  template <typename Request>
  void stage(Request r) {
    r.user_data = queue_.outstanding();
    EXPECT_TRUE(queue_.stage(r));
  }

  void workload() {
    const std::array pieces{memory(6), memory(8), memory(7)};
    MapRequest scattered = request(6, memory(6));
    scattered.pieces = pieces;
    stage(request(0, memory(0)));
    stage(request(1, memory(1, 3)));
    stage(scattered);
    stage(request(10, memory(9)));
    stage(request(12, registered_.piece(Bytes{0}, Bytes{2 * page})));
    submit_and_wait();
    stage(UnmapRequest::of(at(0)));
    stage(UnmapRequest::of(at(10, 4)));  // two mappings and a hole
    stage(request(0, memory(11)));       // waits for the first
    MapRequest linked = request(20, memory(12));
    linked.order = Order::link;
    stage(linked);
    stage(request(21, memory(13)));
    stage(ReplaceRequest{at(1, 3), memory(2, 3), Access::read_write, 0, Order::free});
    submit_and_wait();
    for (std::uint64_t p = 30; p < 34; ++p) stage(request(p, memory(p - 20)));
    MapRequest anywhere;
    anywhere.memory = memory(4, 2);
    anywhere.placement = Placement::anywhere({}, Iova{0xffff'ffff});
    stage(anywhere);
    submit_and_wait();
    registered_ = Memory{};  // unregistered with its last mapping
    stage(UnmapRequest::of(at(30)));
    stage(UnmapRequest::of(at(32)));
    stage(UnmapRequest::of(at(33)));
    stage(request(32, memory(14)));
    stage(UnmapRequest::of(at(6, 3)));
    submit_and_wait();
    (void)space_.flush();
  }

  void index_and_kernel_agree() {
    expect_agreement(space_, kernel_->device(0));
    EXPECT_EQ(space_.stats().quarantined_mappings, 0U);
  }

  void all_is_usable_again() {
    EXPECT_TRUE(space_.unmap_all());
    EXPECT_EQ(kernel_->usage().pinned.value, 0U) << "pins leaked";
    expect_usable(space_, kernel_->device(0));
    index_and_kernel_agree();
  }

  /// Plays once for each of the worker's kernel calls, fewer than `most`, in which it dies: before the call and after
  /// it.
  template <typename Play>
  void each_death(std::uint64_t most, Play&& play) {
    for (const auto when : {DeadlyKernel::When::before_call, DeadlyKernel::When::after_call}) {
      std::uint64_t n = 0;
      for (bool fired = true; fired;) {
        ++n;
        ASSERT_LT(n, most) << "the sweep does not end";
        SCOPED_TRACE(::testing::Message() << "call " << n << (when == DeadlyKernel::When::after_call ? ", done" : ""));
        kernel_ = *ModelKernel::create();
        DeadlyKernel deadly{*kernel_, n, when, GetParam().understudy_dies_too};
        play(deadly);
        if (HasFatalFailure()) return;
        fired = deadly.fired.load(std::memory_order_relaxed);  // relaxed: see DeadlyKernel
        index_and_kernel_agree();
        all_is_usable_again();
        queue_ = Queue{};
        space_ = AddressSpace{};
        engine_ = Engine{};
        EXPECT_EQ(kernel_->usage(), ModelUsage{}) << "something was left behind";
        if (HasFailure()) return;
      }
      EXPECT_GT(n, 5U) << "the sweep reached hardly anything";
      std::printf("%s: %llu deaths\n", GetParam().name, static_cast<unsigned long long>(n - 1));
    }
  }

  std::unique_ptr<ModelKernel> kernel_;
  std::optional<GatedKernel> gated_;  // outlives the engine on it
  Engine engine_;
  AddressSpace space_;
  Memory registered_;
  Queue queue_;
  unsigned refused_ = 0;
};

TEST_P(WorkerDeath, InAnyKernelCallLosesNothing) {
#ifdef IOVANE_SANITIZED
  GTEST_SKIP() << "sanitizers do not bear a thread that ends by system call";
#endif
  each_death(500, [&](DeadlyKernel& deadly) {
    refused_ = 0;
    open(deadly);
    workload();
    EXPECT_TRUE(deadly.fired.load(std::memory_order_relaxed) || refused_ == 0);  // relaxed: see DeadlyKernel
  });
}

// The batch of another thread waits for the worker's lane, or is what the worker is executing.
TEST_P(WorkerDeath, TakesNoDirectBatchAlong) {
#ifdef IOVANE_SANITIZED
  GTEST_SKIP() << "sanitizers do not bear a thread that ends by system call";
#endif
  each_death(100, [&](DeadlyKernel& deadly) {
    GatedKernel& gated = gated_.emplace(deadly);
    open(gated);
    auto core = engine::DirectBatch::join(space_);
    std::array<Completion, 300> done;
    std::vector<engine::Operation> operations;
    for (std::uint64_t p = 8; p < 20; ++p) operations.emplace_back(request(p, memory(p)));
    operations.emplace_back(UnmapRequest::of(at(8, 4)));
    operations.emplace_back();                                   // a fence
    while (operations.size() != 300) operations.emplace_back();  // into a second slice
    operations.back() = engine::Operation{request(30, memory(30))};
    {
      engine::DirectBatch batch{*core};
      stage(request(0, memory(0)));
      queue_.submit();
      while (!gated.reached.load(std::memory_order_acquire)) std::this_thread::yield();
      ASSERT_FALSE(batch.submit(operations, done));
      gated.closed.store(false, std::memory_order_release);
      ASSERT_TRUE(batch.wait(20s)) << "the batch was lost";
      std::size_t failures = 0;
      for (const Completion& c : done) failures += c.ok() ? 0 : 1;
      EXPECT_EQ(batch.failures(), failures);
      EXPECT_LE(failures, 2U) << "one may be given up, and what was to unmap it";
    }
    std::array<Completion, 1> first;
    ASSERT_EQ(queue_.wait(first, 1, 20s), 1U);
    core.reset();
    registered_ = Memory{};
  });
}

/// A handler works in an address space that has no worker of its own, or one of another node, and its thread ends
/// there.
TEST(WorkerDeathElsewhere, InALaneOfAnotherAddressSpaceLosesNothing) {
#ifdef IOVANE_SANITIZED
  GTEST_SKIP() << "sanitizers do not bear a thread that ends by system call";
#endif
  struct Memory : test::WorkloadMemory {
    using WorkloadMemory::at;
    using WorkloadMemory::expect_agreement;
    using WorkloadMemory::expect_usable;
    using WorkloadMemory::memory;
    using WorkloadMemory::request;
  } world;
  for (const bool understudy : {true, false}) {
    for (const auto when : {DeadlyKernel::When::before_call, DeadlyKernel::When::after_call}) {
      for (std::uint64_t n = 1; n <= 3; ++n) {
        SCOPED_TRACE(::testing::Message() << "call " << n << (when == DeadlyKernel::When::after_call ? ", done" : "")
                                          << (understudy ? "" : ", alone"));
        auto kernel = *ModelKernel::create();
        DeadlyKernel deadly{*kernel, n, when, false};
        Engine engine = EngineAccess::open(*backends::open_backend(deadly, {.name = "iommufd"}), "model",
                                           {.understudy = understudy});
        AddressSpaceConfig config;
        config.layout = LayoutPolicy::fixed;
        AddressSpace watched = *engine.create_address_space(config);
        AddressSpace other = *engine.create_address_space(config);
        ASSERT_TRUE(other.attach({.pci_address = kernel->device(0).address()}));
        Queue queue = *other.open_queue({.depth = 16});
        const base::UniqueFd bell{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
        const Watch watch = *watched.watch(bell.get(), [&] {
          std::uint64_t count = 0;
          if (::read(bell.get(), &count, sizeof count) != ssize_t{sizeof count}) return true;
          (void)other.map(world.request(0, world.memory(0)));
          (void)other.map(world.request(2, world.memory(2)));
          (void)other.unmap(UnmapRequest::of(Memory::at(0)));
          return true;
        });
        const std::uint64_t one = 1;
        ASSERT_EQ(::write(bell.get(), &one, sizeof one), ssize_t{sizeof one});
        const auto begun = std::chrono::steady_clock::now();
        while (!deadly.fired.load(std::memory_order_relaxed) && std::chrono::steady_clock::now() - begun < 20s)
          std::this_thread::sleep_for(1ms);
        ASSERT_TRUE(deadly.fired.load(std::memory_order_relaxed));
        std::array<Completion, 1> done;
        EXPECT_TRUE(queue.stage(world.request(8, world.memory(8))));
        queue.submit();
        ASSERT_EQ(queue.wait(done, 1, 20s), 1U) << "the lane is held by nobody";
        EXPECT_TRUE(done[0].ok()) << done[0].error.message();
        Memory::expect_agreement(other, kernel->device(0));
        EXPECT_EQ(other.stats().quarantined_mappings, 0U);
        EXPECT_TRUE(other.unmap_all());
        world.expect_usable(other, kernel->device(0));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Software, WorkerDeath,
                         ::testing::Values(Sweep{"iommufd", "iommufd", UnmapMode::strict, true, false},
                                           Sweep{"iommufd_relaxed", "iommufd", UnmapMode::relaxed, true, false},
                                           Sweep{"iommufd_alone", "iommufd", UnmapMode::strict, false, false},
                                           Sweep{"iommufd_twice", "iommufd", UnmapMode::strict, true, true},
                                           Sweep{"iommufd_relaxed_twice", "iommufd", UnmapMode::relaxed, true, true},
                                           Sweep{"type1", "type1", UnmapMode::strict, true, false},
                                           Sweep{"type1_relaxed_alone", "type1", UnmapMode::relaxed, false, false}),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace iovane
