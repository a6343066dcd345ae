// Fail the nth, for what comes by itself: page faults, watched descriptors, fault records, completions that are
// announced, deferred unmaps whose time is up, the cache and the statistics page. With the 1st, 2nd, ... kernel call,
// system call or allocation failing, until a run ends before its n. Nothing waits for ever, no completion is lost, the
// index and devices agree afterwards, and nothing is left behind.
#include <gtest/gtest.h>
#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <thread>
#include <utility>

#include "backends/kernel_decorators.hpp"
#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "base/fault_point.hpp"
#include "base/unique_fd.hpp"
#include "engine/engine_core.hpp"
#include "engine/out_of_memory.hpp"
#include "iovane/engine.hpp"
#include "support/failing_process.hpp"
#include "support/workload_memory.hpp"

namespace iovane {
namespace {

using namespace std::chrono_literals;
using backends::FailingKernel;
using backends::model::ModelKernel;
using backends::model::ModelOptions;
using backends::model::ModelUsage;
using base::FaultKind;
using test::OwnBusiness;

struct Sweep {
  const char* name;
  const char* interface;
  FaultKind kind;
};
// Names stay the same from run to run.
void PrintTo(const Sweep& sweep, std::ostream* out) { *out << sweep.name; }

template <typename Condition>
bool comes_true(Condition&& condition) {
  const auto begun = std::chrono::steady_clock::now();
  while (!condition()) {
    if (std::chrono::steady_clock::now() - begun > 20s) return false;
    std::this_thread::sleep_for(50us);
  }
  return true;
}

class EventSweep : public ::testing::TestWithParam<Sweep>, protected test::WorkloadMemory {
 protected:
  /// Plays once for each n. What a play makes it leaves in engine_, space_ and their kin.
  template <typename Play>
  void sweep(std::uint64_t least, Play&& play) {
    std::uint64_t n = 0;
    for (bool fired = true; fired;) {
      ++n;
      ASSERT_LT(n, 5000U) << "the sweep does not end";
      SCOPED_TRACE(::testing::Message() << GetParam().name << ", failure " << n);
      ModelOptions options;
      options.devices.resize(2);
      if (stage1()) options.iommus.front().nesting = backends::model::Nesting::smmuv3;
      kernel_ = *ModelKernel::create(options);
      test::OwnKernel own{*kernel_};
      FailingKernel failing{own};
      attached_ = false;
      base::arm_fault(static_cast<std::uint32_t>(GetParam().kind), n);
      try {
        if (open(failing)) play();
      } catch (const std::exception& thrown) {
        ADD_FAILURE() << thrown.what() << " was thrown out of the library";
      }
      fired = base::disarm_fault();
      if (attached_ && config_.page_faults) {  // or every look at an unmapped page waits for somebody
        ASSERT_TRUE(space_.on_page_fault([](const PageFaultEvent&) { return std::optional{PageFaultAnswer::fail}; }));
      }
      if (attached_) {
        expect_agreement(space_, kernel_->device(0));
        EXPECT_TRUE(space_.unmap_all());
        expect_usable(space_, kernel_->device(0));
      }
      space_ = AddressSpace{};
      engine_ = Engine{};
      EXPECT_EQ(kernel_->usage(), ModelUsage{}) << "something was left behind";
      EXPECT_FALSE(std::filesystem::exists(stats_path_));
      if (HasFailure()) return;
    }
    EXPECT_GT(n, least) << "the sweep reached hardly anything";
    std::printf("%s: %llu failures\n", GetParam().name, static_cast<unsigned long long>(n - 1));
  }
  static bool stage1() { return std::string_view{GetParam().interface} == "stage1"; }

  /// An engine with a statistics page, and an address space of `config_` with device 0.
  bool open(backends::Kernel& kernel) {
    auto backend = engine::or_out_of_memory(
        Stage::open, [&] { return backends::open_backend(kernel, {.name = GetParam().interface, .descriptor = {}}); });
    if (!backend) return false;
    auto stats = engine::or_out_of_memory(Stage::open, [&] { return engine::StatsPage::create(stats_path_); });
    {
      const OwnBusiness whole;
      engine_ = EngineAccess::open(*std::move(backend), "model", {}, stats ? *std::move(stats) : nullptr);
    }
    auto space = engine_.create_address_space(config_);
    if (!space) return false;
    space_ = *std::move(space);
    if (before_attach_) before_attach_();
    attached_ = space_.attach({.pci_address = kernel_->device(0).address()}).has_value();
    return true;
  }

  std::unique_ptr<ModelKernel> kernel_;
  const std::string stats_path_ =
      (std::filesystem::temp_directory_path() / ("iovane-sweep-" + std::to_string(::getpid()))).string();
  AddressSpaceConfig config_;
  std::function<void()> before_attach_;
  Engine engine_;
  AddressSpace space_;
  bool attached_ = false;
};

class PageFaultSweep : public EventSweep {
 protected:
  /// A device that asks for a page, and what became of it.
  class Asking {
   public:
    Asking(backends::model::SimulatedDevice& device, Iova where)
        : thread_{[this, &device, where] {
            const OwnBusiness hardware;
            std::array<std::byte, 4> bytes{};
            (void)device.dma_read(where, bytes);
            over_.store(true, std::memory_order_release);  // pairs with the acquire in is_over()
          }} {}
    ~Asking() { thread_.join(); }
    bool is_over() const { return over_.load(std::memory_order_acquire); }

   private:
    std::atomic<bool> over_{false};
    std::thread thread_;
  };
  std::optional<PageFaultAnswer> mapped(const PageFaultEvent& event) {
    const std::uint64_t p = (event.address.value - base_iova) / page;
    return space_.map(request(p, memory(p))).ok() ? PageFaultAnswer::retry : PageFaultAnswer::fail;
  }
  std::unique_ptr<Asking> ask(std::uint64_t where) {
    const OwnBusiness hardware;
    return std::make_unique<Asking>(kernel_->device(0), at(where).start);
  }
};

TEST_P(PageFaultSweep, NoDeviceWaitsForEver) {
  config_.page_faults = true;
  config_.layout = LayoutPolicy::fixed;
  bool handled = false;
  const auto handler = [this](const PageFaultEvent& event) { return mapped(event); };
  before_attach_ = [&] { handled = space_.on_page_fault(handler).has_value(); };
  sweep(10, [&] {
    if (!attached_) return;
    for (std::uint64_t p = 0; p < 3; ++p) {
      if (!handled) handled = space_.on_page_fault(handler).has_value();
      if (!handled) continue;
      const auto device = ask(p);
      EXPECT_TRUE(comes_true([&] { return device->is_over(); })) << "a device waits for page " << p;
      if (p == 1) handled = !space_.on_page_fault({}).has_value();
    }
    if (handled && !space_.on_page_fault({})) return;
    // By hand.
    const auto device = ask(5);
    PageFaultEvent event;
    EXPECT_TRUE(comes_true([&] { return space_.read_page_faults({&event, 1}).value_or(0U) == 1; }));
    const auto answer = mapped(event);
    EXPECT_TRUE(comes_true([&] { return space_.answer_page_fault(event, *answer).has_value(); }));
    EXPECT_TRUE(comes_true([&] { return device->is_over(); }));
  });
}

class DeliverySweep : public EventSweep {};

TEST_P(DeliverySweep, NothingIsLostAndNobodyWaitsForEver) {
  config_.unmap = UnmapMode::relaxed;
  config_.relaxed.time_max = 200us;
  config_.layout = LayoutPolicy::fixed;
  io_uring ring{};
  const bool has_ring = io_uring_queue_init(8, &ring, 0) == 0;
  sweep(10, [&] {
    if (!attached_) return;
    // A descriptor that a worker watches.
    base::UniqueFd bell;
    {
      const OwnBusiness mine;
      bell = base::UniqueFd{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    }
    std::atomic<std::uint64_t> heard{0};  // relaxed throughout, as told: counts, nothing is read through them
    auto watch = space_.watch(bell.get(), [&] {
      const OwnBusiness mine;
      std::uint64_t count = 0;
      if (::read(bell.get(), &count, sizeof count) == ssize_t{sizeof count})
        heard.fetch_add(count, std::memory_order_relaxed);
      return true;
    });
    for (std::uint64_t i = 1; watch && i <= 3; ++i) {
      const std::uint64_t one = 1;
      EXPECT_EQ(::write(bell.get(), &one, sizeof one), ssize_t{sizeof one});
      EXPECT_TRUE(comes_true([&] { return heard.load(std::memory_order_relaxed) == i; }))
          << "nobody heard of event " << i;
    }
    // Fault records, where there are any.
    std::atomic<std::uint64_t> told{0};
    Result<Watch> records =
        space_.fault_record_fd() < 0 ? Result<Watch>{Watch{}} : space_.watch(space_.fault_record_fd(), [&] {
          std::array<FaultRecord, 4> some;
          const auto got = space_.read_fault_records(some);
          told.fetch_add(got.value_or(0U), std::memory_order_relaxed);
          return true;
        });
    if (records && *records) {
      {
        const OwnBusiness device;
        std::array<std::byte, 4> bytes{};
        EXPECT_FALSE(kernel_->device(0).dma_read(at(40).start, bytes).ok());
      }
      EXPECT_TRUE(comes_true([&] { return told.load(std::memory_order_relaxed) == 1; }))
          << "a fault record that nobody was told of";
    }
    // Batches that a worker executes, announced in every way.
    auto queue = space_.open_queue({.depth = 16, .submit = SubmitMode::never_block});
    auto second = space_.open_queue({.depth = 4});
    if (!queue) return;
    const int announced = queue->event_fd();
    const bool in_ring = has_ring && queue->deliver_to_ring(ring.ring_fd, 7).has_value();
    for (std::uint64_t round = 0; round < 2; ++round) {
      for (std::uint64_t p = 0; p < 4; ++p) EXPECT_TRUE(queue->stage(request(p, memory(p))));
      for (std::uint64_t p = 0; p < 4; ++p) EXPECT_TRUE(queue->stage(UnmapRequest::of(at(p))));
      queue->submit();
      if (announced >= 0) {
        const OwnBusiness mine;
        pollfd wait{.fd = announced, .events = POLLIN, .revents = 0};
        EXPECT_EQ(::poll(&wait, 1, 20'000), 1) << "completions were not announced";
      }
      std::array<Completion, 16> done;
      EXPECT_EQ(queue->wait(done, 8, 20s), 8U) << "completions were lost";
    }
    if (second) {
      EXPECT_TRUE(second->stage(request(20, memory(20))));
      second->submit();
      std::array<Completion, 1> done;
      EXPECT_EQ(second->wait(done, 1, 20s), 1U);
    }
    // The worker's timer, unless somebody was faster.
    EXPECT_TRUE(comes_true([&] { return space_.stats().stale_mappings == 0; })) << "a deferred unmap was forgotten";
    if (in_ring) (void)queue->deliver_to_ring(-1, 0);
  });
  if (has_ring) io_uring_queue_exit(&ring);
}

class CacheSweep : public EventSweep {};

TEST_P(CacheSweep, PinsAndIndexAgree) {
  sweep(10, [&] {
    if (!attached_) return;
    auto registered =
        space_.register_memory({pages_ + 16 * page, Bytes{8 * page}, -1, 0}, PopulateConfig{.threads = 2});
    CacheConfig config;
    config.chunk = Bytes{4 * page};
    config.ceiling = Iova{0xffff'ffff};
    if (!space_.open_cache(config)) return;
    for (int round = 0; round < 2; ++round) {
      auto one = space_.acquire(memory(0, 2));
      auto same = space_.acquire(memory(1));
      auto other = space_.acquire(memory(9), Access::read);
      auto counted = space_.acquire_portable(memory(4, 3));
      std::array<MemoryLease, 8> all;
      (void)space_.acquire_all(memory(0, 14), Access::read_write, all);
      if (registered) (void)space_.acquire(registered->piece(Bytes{page}, Bytes{2 * page}));
      for (const auto& [lease, first] : {std::pair{&one, 0}, {&same, 1}, {&other, 9}, {&counted, 4}}) {
        if (!*lease) continue;
        const OwnBusiness device;
        std::array<std::byte, 1> seen{};
        EXPECT_TRUE(kernel_->device(0).dma_read((*lease)->iova(), seen).ok()) << "page " << first;
        EXPECT_EQ(seen[0], static_cast<std::byte>(first + 1));
      }
      (void)space_.invalidate(memory(9));
      (void)space_.cache_stats();
    }
    (void)space_.evict(Bytes{~std::uint64_t{0}});
  });
}

constexpr auto named = [](const auto& test) { return std::string{test.param.name}; };

INSTANTIATE_TEST_SUITE_P(Software, PageFaultSweep,
                         ::testing::Values(Sweep{"calls", "iommufd", FaultKind::kernel_call},
                                           Sweep{"system", "iommufd", FaultKind::system_call},
                                           Sweep{"allocations", "iommufd", FaultKind::allocation}),
                         named);
INSTANTIATE_TEST_SUITE_P(Software, DeliverySweep,
                         ::testing::Values(Sweep{"iommufd_calls", "iommufd", FaultKind::kernel_call},
                                           Sweep{"iommufd_system", "iommufd", FaultKind::system_call},
                                           Sweep{"iommufd_allocations", "iommufd", FaultKind::allocation},
                                           Sweep{"type1_calls", "type1", FaultKind::kernel_call},
                                           Sweep{"type1_allocations", "type1", FaultKind::allocation},
                                           Sweep{"stage1_calls", "stage1", FaultKind::kernel_call},
                                           Sweep{"stage1_system", "stage1", FaultKind::system_call},
                                           Sweep{"stage1_allocations", "stage1", FaultKind::allocation}),
                         named);
INSTANTIATE_TEST_SUITE_P(Software, CacheSweep,
                         ::testing::Values(Sweep{"iommufd_calls", "iommufd", FaultKind::kernel_call},
                                           Sweep{"iommufd_system", "iommufd", FaultKind::system_call},
                                           Sweep{"iommufd_allocations", "iommufd", FaultKind::allocation},
                                           Sweep{"type1_calls", "type1", FaultKind::kernel_call},
                                           Sweep{"type1_allocations", "type1", FaultKind::allocation}),
                         named);

}  // namespace
}  // namespace iovane
