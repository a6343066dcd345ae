// Which system calls each thread makes: docs/ENGINE.md lists them, and here every thread runs under a seccomp filter of
// exactly its list. Whatever else it tried would kill the process.
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <thread>
#include <vector>

#include "backends/kernel_decorators.hpp"
#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"

namespace iovane {
namespace {

using namespace std::chrono_literals;
using iovane::literals::operator""_KiB;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define IOVANE_NEEDS_FILTER() GTEST_SKIP() << "sanitizers make system calls of their own on every thread"
#else
#define IOVANE_NEEDS_FILTER() static_cast<void>(0)
#endif

constexpr std::array<long, 11> worker_calls{
    SYS_io_uring_enter, SYS_ppoll, SYS_read,    SYS_write,  SYS_futex, SYS_clock_gettime,
    SYS_rt_sigprocmask, SYS_exit,  SYS_madvise, SYS_munmap, SYS_rseq};
constexpr std::array<long, 6> understudy_calls{SYS_futex,   SYS_rt_sigprocmask, SYS_exit,
                                               SYS_madvise, SYS_munmap,         SYS_rseq};
constexpr std::array<long, 1> caller_calls{SYS_exit_group};

/// From here on this thread makes these calls or the process ends.
void allow_only(std::span<const long> calls) {
  std::vector<sock_filter> filter{BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr))};
  for (std::size_t i = 0; i < calls.size(); ++i)
    filter.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(calls[i]),
                              static_cast<std::uint8_t>(calls.size() - i), 0));
  filter.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS));
  filter.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
  const sock_fprog program{static_cast<unsigned short>(filter.size()), filter.data()};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
    _exit(3);
}

thread_local bool on_a_worker = false;

void allow_only_the_documented(unsigned) {
  on_a_worker = true;
  std::array<char, 16> name{};
  pthread_getname_np(pthread_self(), name.data(), name.size());
  if (std::string_view{name.data()}.starts_with("iovane-u"))
    allow_only(understudy_calls);
  else
    allow_only(worker_calls);
}

/// A kernel whose calls come from workers only with the documented numbers.
class ListedKernel final : public backends::KernelDecorator {
 public:
  using KernelDecorator::KernelDecorator;
  long ioctl(int fd, unsigned long request, void* argument) noexcept override {
    namespace iommufd = backends::uapi::iommufd;
    namespace vfio = backends::uapi::vfio;
    if (on_a_worker) {
      if (request != iommufd::IoasMap::request && request != iommufd::IoasMapFile::request &&
          request != iommufd::IoasCopy::request && request != iommufd::IoasUnmap::request &&
          request != vfio::Type1DmaMap::request && request != vfio::Type1DmaUnmap::request)
        _exit(8);
      seen.fetch_add(1, std::memory_order_relaxed);
    }
    return inner().ioctl(fd, request, argument);
  }
  std::atomic<int> seen{0};
};

// Exit status 0 when the workload went through.
[[noreturn]] void workers_under_the_filter() {
  auto kernel = *backends::model::ModelKernel::create();  // answers ioctls without the real kernel
  ListedKernel listed{*kernel};
  auto backend = backends::open_backend(listed, {.name = "iommufd"});
  Engine engine = EngineAccess::open(*std::move(backend), "model", {.on_start = allow_only_the_documented});
  AddressSpaceConfig config;
  config.layout = LayoutPolicy::fixed;
  config.unmap = UnmapMode::relaxed;
  config.relaxed.time_max = 200us;
  config.page_faults = true;
  AddressSpace space = *engine.create_address_space(config);
  if (!space.attach({.pci_address = kernel->device(0).address()})) _exit(4);
  const int news = ::eventfd(0, EFD_NONBLOCK);
  std::atomic<int> heard{0};
  const Watch watch = *space.watch(news, [&] {
    std::uint64_t count = 0;
    if (::read(news, &count, sizeof count) > 0) heard.fetch_add(1, std::memory_order_relaxed);
    return true;
  });
  if (!space.on_page_fault([](const PageFaultEvent&) { return std::optional{PageFaultAnswer::fail}; })) _exit(5);
  alignas(4096) static std::array<std::byte, 4096> memory{};
  // What the software IOMMU allocates on first use is not the worker's business.
  for (std::uint64_t round = 0; round < 100; ++round) {
    MapRequest request;
    request.memory = MemoryPiece::of(memory);
    request.placement = Placement::fixed(Iova{0x10'0000 + round * 4096});
    if (!space.map(request).ok()) _exit(9);
  }
  if (!space.unmap_all()) _exit(10);
  Queue queue = *space.open_queue({.submit = SubmitMode::never_block});
  (void)queue.event_fd();
  for (std::uint64_t round = 0; round < 100; ++round) {
    MapRequest request;
    request.memory = MemoryPiece::of(memory);
    const Iova place{0x10'0000 + round * 4096};
    request.placement = Placement::fixed(place);
    (void)queue.stage(request);
    queue.submit();
    std::array<Completion, 1> done;
    if (queue.wait(done, 1, 20s) != 1 || !done[0].ok()) _exit(1);
    (void)queue.stage(UnmapRequest::of(IovaRange{place, Iova{place.value + 4095}}));
    queue.submit();
    if (queue.wait(done, 1, 20s) != 1 || !done[0].ok()) _exit(1);
    if (round % 10 != 0) continue;
    const std::uint64_t one = 1;
    (void)!::write(news, &one, sizeof one);
    if (kernel->device(0).dma_read(Iova{0x40000}, std::span{memory}.first(4)).ok()) _exit(6);
    std::this_thread::sleep_for(1ms);
  }
  if (heard.load(std::memory_order_relaxed) == 0 || listed.seen.load(std::memory_order_relaxed) < 100) _exit(7);
  queue = {};
  (void)space.close();
  _exit(0);
}

TEST(SystemCallsDeathTest, OfAWorkerAndItsUnderstudyAreTheDocumentedOnes) {
  IOVANE_NEEDS_FILTER();
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(workers_under_the_filter(), ::testing::ExitedWithCode(0), "");
}

/// Claims success for everything, and makes no call.
class IdleSpace final : public backends::BackendSpace {
 public:
  IdleSpace() noexcept { facts_.capabilities = backends::Capability::span_unmap | backends::Capability::unmap_all; }
  const backends::SpaceFacts& facts() const noexcept override { return facts_; }
  void execute(std::span<const backends::BackendOp> ops,
               std::span<backends::BackendOpResult> results) noexcept override {
    for (std::size_t i = 0; i < ops.size(); ++i) results[i] = {{}, ops[i].range.length()};
  }
  Result<Bytes> unmap_all() noexcept override { return Bytes{0}; }
  Result<backends::RegionId> register_memory(const backends::MemoryRange&) override { return backends::RegionId{1}; }
  Result<void> unregister_memory(backends::RegionId) override { return {}; }
  Result<backends::AttachedDevice> attach(const backends::DeviceSource&) override { return backends::AttachedDevice{}; }
  Result<void> detach(backends::DeviceId) override { return {}; }
  Result<std::vector<IovaRange>> usable_ranges() override {
    return std::vector<IovaRange>{{Iova{0}, Iova{(std::uint64_t{1} << 48) - 1}}};
  }
  Result<void> promise(std::span<const IovaRange>) override { return {}; }
  backends::Headroom headroom() noexcept override { return {}; }

 private:
  backends::SpaceFacts facts_;
};

class IdleBackend final : public backends::Backend {
 public:
  backends::Interface interface() const noexcept override { return backends::Interface::iommufd; }
  Result<std::unique_ptr<backends::BackendSpace>> create_space(const backends::SpaceOptions&) override {
    return std::unique_ptr<backends::BackendSpace>{std::make_unique<IdleSpace>()};
  }
  Result<backends::AttachedDevice> move_device(backends::BackendSpace&, backends::DeviceId,
                                               backends::BackendSpace&) override {
    return make_error(Errc::unsupported, Stage::attach, "there are no devices here");
  }
};

// Stage, submit, poll, the same set of pages over and over; after the first round no memory is asked for either, which
// would be a system call sooner or later.
[[noreturn]] void a_caller_under_the_filter(LayoutPolicy layout) {
  Engine engine = EngineAccess::open(std::make_unique<IdleBackend>(), "idle");
  AddressSpaceConfig config;
  config.layout = layout;
  AddressSpace space = *engine.create_address_space(config);
  Queue queue = *space.open_queue({.depth = 64});
  std::array<Completion, 64> done;
  for (std::uint64_t round = 0; round < 20'000; ++round) {
    if (round == 10) allow_only(caller_calls);
    for (std::uint64_t i = 0; i < 64; ++i) {
      MapRequest map;
      map.memory = {{}, 0x7000'0000, 4_KiB};
      map.placement =
          layout == LayoutPolicy::fixed ? Placement::fixed(Iova{(16 + 2 * i) * 4096}) : Placement::anywhere();
      if (!queue.stage(map)) _exit(1);
    }
    queue.submit();
    if (queue.poll(done) != 64) _exit(2);
    for (const Completion& mapped : done)
      if (!mapped.ok() || !queue.stage(UnmapRequest::of(mapped.mapping))) _exit(4);
    queue.submit();
    if (queue.poll(done) != 64) _exit(5);
    for (const Completion& unmapped : done)
      if (!unmapped.ok()) _exit(6);
  }
  _exit(0);
}

TEST(SystemCallsDeathTest, OfACallerAreNone) {
  IOVANE_NEEDS_FILTER();
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(a_caller_under_the_filter(LayoutPolicy::fixed), ::testing::ExitedWithCode(0), "");
  EXPECT_EXIT(a_caller_under_the_filter(LayoutPolicy::engine_managed), ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace iovane
