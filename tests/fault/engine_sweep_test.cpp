// Fail the nth: a mixed workload through the engine, with the 1st, 2nd, ... kernel call or allocation failing, until a
// run ends before its n. After each run the engine's index, what a device can reach and the software IOMMU's books must
// say the same, everything must be usable again, and nothing may be left behind.
#include <gtest/gtest.h>

#include <array>
#include <cerrno>
#include <exception>

#include "backends/kernel_decorators.hpp"
#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/fault_point.hpp"
#include "engine/engine_core.hpp"
#include "engine/out_of_memory.hpp"
#include "iovane/engine.hpp"
#include "support/failing_process.hpp"
#include "support/workload_memory.hpp"

namespace iovane {
namespace {

using backends::CountingKernel;
using backends::FailingKernel;
using backends::model::ModelKernel;
using backends::model::ModelOptions;
using backends::model::ModelUsage;
using base::FaultKind;

struct Sweep {
  const char* name;
  const char* interface;
  FaultKind kind;
  int os_errno;
};
// Names stay the same from run to run.
void PrintTo(const Sweep& sweep, std::ostream* out) { *out << sweep.name; }

class EngineSweep : public ::testing::TestWithParam<Sweep>, protected test::WorkloadMemory {
 protected:
  /// Makes everything that can fail happen once. Every step goes on with what the earlier ones left.
  void workload(backends::Kernel& kernel) {
    auto backend = engine::or_out_of_memory(
        Stage::open, [&] { return backends::open_backend(kernel, {.name = GetParam().interface, .descriptor = {}}); });
    if (!backend) return;
    {
      const test::OwnBusiness whole;
      engine_ = EngineAccess::open(*std::move(backend), "model");
    }
    AddressSpaceConfig config;
    config.dirty_tracking = true;
    for (AddressSpace& space : spaces_) {
      auto made = engine_.create_address_space(config);
      if (!made) return;
      space = *std::move(made);
    }
    made_ = true;
    auto registered = spaces_[0].register_memory({pages_ + 16 * page, Bytes{8 * page}, -1, 0});
    attached_[0] = spaces_[0].attach({.pci_address = kernel_->device(0).address()}).has_value();
    const auto traveller = spaces_[0].attach({.pci_address = kernel_->device(1).address()});
    const auto resident = spaces_[1].attach({.pci_address = kernel_->device(2).address()});

    (void)spaces_[0].map(request(0, memory(0)));
    (void)spaces_[0].map(request(1, memory(1, 3)));
    MapRequest anywhere;
    anywhere.memory = memory(4, 2);
    anywhere.placement = Placement::anywhere({}, Iova{0xffff'ffff});
    const Completion chosen = spaces_[0].map(anywhere);
    (void)spaces_[0].start_dirty_tracking();

    if (auto queue = spaces_[0].open_queue({.depth = 16})) {
      const std::array pieces{memory(6), memory(8), memory(7)};
      MapRequest scattered = request(6, memory(6));
      scattered.pieces = pieces;
      EXPECT_TRUE(queue->stage(scattered));
      EXPECT_TRUE(queue->stage(request(10, memory(9))));
      EXPECT_TRUE(queue->stage(request(12, memory(10))));
      EXPECT_TRUE(queue->stage(request(14, memory(11))));
      if (registered) {
        EXPECT_TRUE(queue->stage(request(20, registered->piece(Bytes{0}, Bytes{2 * page}))));
        EXPECT_TRUE(queue->stage(request(22, registered->piece(Bytes{4 * page}, Bytes{page}))));
      }
      EXPECT_TRUE(queue->stage(UnmapRequest::of(at(0, 1))));
      EXPECT_TRUE(queue->stage(UnmapRequest::of(at(10, 5))));  // three mappings and the holes between
      std::array<Completion, 16> done;
      queue->submit();
      EXPECT_EQ(queue->wait(done, queue->outstanding(), std::chrono::seconds{10}), registered ? 8U : 6U);
    }
    const std::byte mark{0};
    {
      const test::OwnBusiness device;
      (void)kernel_->device(0).dma_write(at(1, 1).start, {&mark, 1});
    }
    std::array<std::uint64_t, 1> bitmap{};
    (void)spaces_[0].read_dirty(at(0, window_pages), Bytes{page}, bitmap);
    (void)spaces_[0].replace({at(1, 3), memory(12, 3), Access::read_write, 0, Order::free});
    if (chosen.ok()) (void)spaces_[0].unmap(UnmapRequest::of(chosen.mapping));
    (void)spaces_[0].map(request(30, memory(24, 4)));
    (void)spaces_[0].unmap(UnmapRequest::of(at(30, 4)));
    (void)spaces_[1].map(request(40, memory(28, 2)));
    if (traveller && resident) (void)spaces_[0].move_device(traveller->id, spaces_[1], AddressSpace::Gap::accept);
    (void)spaces_[0].stop_dirty_tracking();
    (void)spaces_[0].map(request(34, memory(15)));
    if (resident) (void)spaces_[1].unmap_all();
    if (resident) (void)spaces_[1].detach(resident->id);
  }

  void index_and_kernel_agree() {
    if (attached_[0]) expect_agreement(spaces_[0], kernel_->device(0));
  }

  /// With the failure over, everything can be taken down and used again.
  void all_is_usable_again() {
    if (!made_) return;
    for (AddressSpace& space : spaces_) {
      const auto gone = space.unmap_all();
      EXPECT_TRUE(gone) << gone.error().message();
      EXPECT_EQ(space.stats().live_mappings, 0U);
      EXPECT_EQ(space.stats().quarantined_mappings, 0U);
    }
    // Where the call that failed was the unmap of registered memory, its 8 pages stay until the descriptor closes.
    const ModelUsage left = kernel_->usage();
    const bool stranded = GetParam().kind == FaultKind::kernel_call && left.mappings == 1;
    EXPECT_TRUE(left.mappings == 0 || stranded) << left.mappings << " mappings leaked";
    EXPECT_EQ(left.pinned.value, stranded ? 8 * page : 0U) << "pins leaked";
    if (attached_[0]) expect_usable(spaces_[0], kernel_->device(0));
  }

  std::unique_ptr<ModelKernel> kernel_;
  Engine engine_;
  std::array<AddressSpace, 2> spaces_;
  bool made_ = false;  // both spaces exist
  std::array<bool, 2> attached_{};
};

class LostAnswers : public EngineSweep {};

TEST_P(EngineSweep, EveryFailureLeavesIndexPinsAndKernelInAgreement) {
  std::uint64_t n = 0;
  for (bool fired = true; fired;) {
    ++n;
    ASSERT_LT(n, 5000U) << "the sweep does not end";
    SCOPED_TRACE(::testing::Message() << GetParam().name << ", failure " << n);
    ModelOptions options;
    options.devices.resize(3);
    kernel_ = *ModelKernel::create(options);
    test::OwnKernel own{*kernel_};
    FailingKernel failing{own};
    failing.set_fault_errno(GetParam().os_errno);
    attached_ = {};
    made_ = false;
    base::arm_fault(static_cast<std::uint32_t>(GetParam().kind), n);
    try {
      workload(failing);
    } catch (const std::exception& thrown) {
      ADD_FAILURE() << thrown.what() << " was thrown out of the library";
    }
    fired = base::disarm_fault();
    index_and_kernel_agree();
    all_is_usable_again();
    for (AddressSpace& space : spaces_) space = AddressSpace{};
    engine_ = Engine{};
    EXPECT_EQ(kernel_->usage(), ModelUsage{}) << "something was left behind";
    if (HasFailure()) return;
  }
  EXPECT_GT(n, 2U) << "the sweep reached hardly anything";
  std::printf("%s: %llu failures\n", GetParam().name, static_cast<unsigned long long>(n - 1));
}

/// The nth call of each kind that maps or unmaps takes effect and fails all the same: the kernel could not write its
/// answer back.
TEST_P(LostAnswers, LeaveIndexPinsAndKernelInAgreement) {
  std::uint64_t reached = 0;
  for (const unsigned long request :
       {backends::uapi::iommufd::IoasMap::request, backends::uapi::iommufd::IoasCopy::request,
        backends::uapi::iommufd::IoasUnmap::request, backends::uapi::vfio::Type1DmaUnmap::request}) {
    for (std::uint64_t n = 1;; ++n) {
      ASSERT_LT(n, 1000U) << "the sweep does not end";
      SCOPED_TRACE(::testing::Message() << backends::ioctl_name(request) << ", call " << n);
      ModelOptions options;
      options.devices.resize(3);
      kernel_ = *ModelKernel::create(options);
      CountingKernel counting{*kernel_};
      FailingKernel failing{counting};
      attached_ = {};
      made_ = false;
      failing.add({.request = request, .nth = n, .times = 1, .os_errno = EFAULT, .after_call = true});
      workload(failing);
      const bool fired = counting.calls(request) >= n;
      failing.clear();
      index_and_kernel_agree();
      EXPECT_EQ(spaces_[0].stats().quarantined_mappings + spaces_[1].stats().quarantined_mappings, 0U);
      all_is_usable_again();
      for (AddressSpace& space : spaces_) space = AddressSpace{};
      engine_ = Engine{};
      EXPECT_EQ(kernel_->usage(), ModelUsage{}) << "something was left behind";
      if (HasFailure()) return;
      if (!fired) break;
      ++reached;
    }
  }
  EXPECT_GT(reached, 3U) << "the sweep reached hardly anything";
}

/// What the answer would have said is not missed later: once every mapping is gone the last device may leave.
TEST_P(LostAnswers, HoldNoDeviceBack) {
  kernel_ = *ModelKernel::create();
  FailingKernel failing{*kernel_};
  engine_ = EngineAccess::open(*backends::open_backend(failing, {.name = GetParam().interface}), "model");
  spaces_[0] = *engine_.create_address_space({});
  const auto device = spaces_[0].attach({.pci_address = kernel_->device(0).address()});
  ASSERT_TRUE(device) << device.error().message();
  for (const std::uint64_t where : {0, 1, 4}) ASSERT_TRUE(spaces_[0].map(request(where, memory(where))).ok());
  for (const unsigned long call :
       {backends::uapi::iommufd::IoasUnmap::request, backends::uapi::vfio::Type1DmaUnmap::request})
    failing.add({.request = call, .nth = 1, .times = 1, .os_errno = EFAULT, .after_call = true});
  const Completion gone = spaces_[0].unmap(UnmapRequest::of(at(0, 5)));
  EXPECT_TRUE(gone.ok()) << gone.error.message();
  EXPECT_EQ(gone.bytes.value, 3 * page);
  const auto detached = spaces_[0].detach(device->id);
  EXPECT_TRUE(detached) << detached.error().message();
  spaces_[0] = AddressSpace{};
  engine_ = Engine{};
  EXPECT_EQ(kernel_->usage(), ModelUsage{});
}

INSTANTIATE_TEST_SUITE_P(Software, LostAnswers,
                         ::testing::Values(Sweep{"iommufd", "iommufd", FaultKind::kernel_call, EFAULT},
                                           Sweep{"type1", "type1", FaultKind::kernel_call, EFAULT},
                                           Sweep{"type1_v1", "type1-v1", FaultKind::kernel_call, EFAULT},
                                           Sweep{"compat", "compat", FaultKind::kernel_call, EFAULT}),
                         [](const auto& test) { return test.param.name; });

INSTANTIATE_TEST_SUITE_P(Software, EngineSweep,
                         ::testing::Values(Sweep{"iommufd_calls", "iommufd", FaultKind::kernel_call, ENOMEM},
                                           Sweep{"iommufd_calls_busy", "iommufd", FaultKind::kernel_call, EBUSY},
                                           Sweep{"iommufd_allocations", "iommufd", FaultKind::allocation, ENOMEM},
                                           Sweep{"iommufd_system", "iommufd", FaultKind::system_call, 0},
                                           Sweep{"type1_calls", "type1", FaultKind::kernel_call, ENOMEM},
                                           Sweep{"type1_calls_io", "type1", FaultKind::kernel_call, EIO},
                                           Sweep{"type1_allocations", "type1", FaultKind::allocation, ENOMEM}),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace iovane
