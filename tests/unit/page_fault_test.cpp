// I/O page faults through the engine: a device waits for a page until somebody maps it and answers.
#include <gtest/gtest.h>
#include <poll.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <optional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "backends/kernel_decorators.hpp"
#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "base/fault_point.hpp"
#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"

namespace iovane {
namespace {

using backends::model::ModelKernel;
using backends::model::ModelOptions;
using backends::model::ModelUsage;

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t iova = 0x20'0000;

class PageFaults : public ::testing::Test {
 protected:
  void SetUp() override {
    engine_ = EngineAccess::open(*backends::open_backend(*kernel_, {.name = "iommufd", .descriptor = {}}), "model");
    AddressSpaceConfig config;
    config.layout = LayoutPolicy::fixed;
    config.page_faults = true;
    auto space = engine_.create_address_space(config);
    ASSERT_TRUE(space) << space.error().message();
    space_ = *std::move(space);
    EXPECT_EQ(space_.page_fault_fd(), -1) << "before the first device";
    const auto device = space_.attach({.pci_address = kernel_->device(0).address()});
    ASSERT_TRUE(device) << device.error().message();
    device_ = device->id;
    ASSERT_GE(space_.page_fault_fd(), 0);
  }
  void TearDown() override {
    space_ = AddressSpace{};
    engine_ = Engine{};
    EXPECT_EQ(kernel_->usage(), ModelUsage{});
  }
  bool readable(int timeout_ms) {
    pollfd wait{.fd = space_.page_fault_fd(), .events = POLLIN, .revents = 0};
    return ::poll(&wait, 1, timeout_ms) == 1;
  }
  /// The one page fault that is waiting.
  PageFaultEvent next() {
    EXPECT_TRUE(readable(10'000));
    std::array<PageFaultEvent, 2> events;
    const auto got = space_.read_page_faults(events);
    EXPECT_TRUE(got) << got.error().message();
    EXPECT_EQ(got.value_or(0U), 1U);
    return events[0];
  }
  void map(std::uint64_t at, std::span<std::byte> memory, Access access = Access::read_write) {
    MapRequest request;
    request.memory = MemoryPiece::of(memory);
    request.access = access;
    request.placement = Placement::fixed(Iova{at});
    const Completion done = space_.map(request);
    ASSERT_TRUE(done.ok()) << done.error.message();
  }

  struct alignas(page) Page {
    std::array<std::byte, page> bytes{};
  };
  std::unique_ptr<ModelKernel> kernel_ = *ModelKernel::create();
  Engine engine_;
  AddressSpace space_;
  std::uint32_t device_ = 0;
  std::vector<Page> memory_{4};
};

TEST_F(PageFaults, APageIsMappedWhenADeviceAsksForIt) {
  EXPECT_FALSE(readable(0));
  std::array<std::byte, 16> bytes{};
  bytes.fill(std::byte{7});
  backends::model::DmaResult result;
  std::thread device{[&] { result = kernel_->device(0).dma_write(Iova{iova + page - 8}, bytes); }};
  for (std::uint64_t p = 0; p < 2; ++p) {  // the write crosses into a second page
    const PageFaultEvent event = next();
    EXPECT_EQ(event.device_id, device_);
    EXPECT_EQ(event.address, Iova{iova + p * page});
    EXPECT_EQ(event.access, Access::write);
    EXPECT_TRUE(event.last);
    map(iova + p * page, memory_[p].bytes);
    EXPECT_TRUE(space_.answer_page_fault(event, PageFaultAnswer::retry));
    EXPECT_EQ(space_.answer_page_fault(event, PageFaultAnswer::retry).error().code, Errc::not_found) << "once";
  }
  device.join();
  EXPECT_TRUE(result.ok());
  EXPECT_EQ(memory_[0].bytes[page - 1], std::byte{7});
  EXPECT_EQ(memory_[1].bytes[7], std::byte{7});
  EXPECT_FALSE(readable(0));
  EXPECT_EQ(kernel_->device(0).fault_count(), 0U) << "nothing failed";
}

TEST_F(PageFaults, AMissingRightAsksTooAndFailIsFinal) {
  map(iova, memory_[0].bytes, Access::read);
  backends::model::DmaResult result;
  const std::byte one{1};
  std::thread device{[&] { result = kernel_->device(0).dma_write(Iova{iova}, {&one, 1}); }};
  const PageFaultEvent event = next();
  EXPECT_EQ(event.access, Access::write);
  EXPECT_TRUE(space_.answer_page_fault(event, PageFaultAnswer::fail));
  device.join();
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.fault->reason, backends::model::FaultReason::no_permission);
}

TEST_F(PageFaults, ADetachLetsItsDeviceGo) {
  backends::model::DmaResult result;
  std::array<std::byte, 4> bytes{};
  std::thread device{[&] { result = kernel_->device(0).dma_read(Iova{iova}, bytes); }};
  const PageFaultEvent event = next();
  ASSERT_TRUE(space_.detach(device_));
  device.join();
  EXPECT_FALSE(result.ok());
  EXPECT_EQ(space_.answer_page_fault(event, PageFaultAnswer::retry).error().code, Errc::not_found);
}

TEST_F(PageFaults, ARetryWithoutAMapEndsAfterABoundedNumber) {
  backends::model::DmaResult result;
  std::array<std::byte, 4> bytes{};
  std::atomic<bool> over{false};
  std::thread device{[&] {
    result = kernel_->device(0).dma_read(Iova{iova}, bytes);
    over.store(true, std::memory_order_release);  // pairs with the acquire below
  }};
  std::uint64_t answers = 0;
  while (!over.load(std::memory_order_acquire)) {
    std::array<PageFaultEvent, 4> events;
    const auto got = space_.read_page_faults(events);
    ASSERT_TRUE(got);
    for (std::size_t i = 0; i < *got; ++i, ++answers)
      EXPECT_TRUE(space_.answer_page_fault(events[i], PageFaultAnswer::retry));
  }
  device.join();
  EXPECT_FALSE(result.ok());
  EXPECT_LE(answers, 8U);
}

TEST_F(PageFaults, TheWorkerAsksAHandlerAndAnswers) {
  std::atomic<unsigned> asked{0};
  std::thread::id ran_on;
  ASSERT_TRUE(space_.on_page_fault([&](const PageFaultEvent& event) -> std::optional<PageFaultAnswer> {
    ran_on = std::this_thread::get_id();
    asked.fetch_add(1, std::memory_order_relaxed);
    const std::uint64_t p = (event.address.value - iova) / page;
    if (p >= 3) return PageFaultAnswer::fail;
    if (p == 2) throw std::runtime_error{"not this one"};
    map(event.address.value, memory_[p].bytes, event.access);
    return PageFaultAnswer::retry;
  }));
  for (int round = 0; round < 20; ++round) {  // the worker sleeps in between, or not
    std::array<std::byte, 16> bytes{};
    bytes.fill(static_cast<std::byte>(round));
    asked = 0;
    EXPECT_TRUE(kernel_->device(0).dma_write(Iova{iova + page - 8}, bytes).ok());
    EXPECT_EQ(memory_[1].bytes[7], static_cast<std::byte>(round));
    EXPECT_EQ(asked, 2U);
    EXPECT_NE(ran_on, std::this_thread::get_id());
    ASSERT_TRUE(space_.unmap(UnmapRequest::of(IovaRange::everything())).ok());
    if (round % 4 == 0) std::this_thread::sleep_for(std::chrono::milliseconds{2});
  }
  std::array<std::byte, 4> bytes{};
  EXPECT_FALSE(kernel_->device(0).dma_read(Iova{iova + 3 * page}, bytes).ok());
  EXPECT_FALSE(kernel_->device(0).dma_read(Iova{iova + 2 * page}, bytes).ok()) << "a handler that throws says fail";
}

TEST_F(PageFaults, WhatTheHandlerLeavesIsAnsweredLater) {
  std::atomic<bool> seen{false};
  PageFaultEvent event;
  ASSERT_TRUE(space_.on_page_fault([&](const PageFaultEvent& e) -> std::optional<PageFaultAnswer> {
    event = e;
    seen.store(true, std::memory_order_release);  // pairs with the acquire below
    return std::nullopt;
  }));
  backends::model::DmaResult result;
  std::array<std::byte, 4> bytes{};
  std::thread device{[&] { result = kernel_->device(0).dma_read(Iova{iova}, bytes); }};
  while (!seen.load(std::memory_order_acquire)) std::this_thread::yield();
  map(iova, memory_[0].bytes);
  EXPECT_TRUE(space_.answer_page_fault(event, PageFaultAnswer::retry));
  device.join();
  EXPECT_TRUE(result.ok());
}

TEST_F(PageFaults, AnEmptyHandlerLeavesThemToTheCallerAgain) {
  std::atomic<unsigned> asked{0};
  const auto count = [&](const PageFaultEvent&) -> std::optional<PageFaultAnswer> {
    asked.fetch_add(1, std::memory_order_relaxed);
    return PageFaultAnswer::fail;
  };
  std::array<std::byte, 4> bytes{};
  for (unsigned round = 1; round <= 3; ++round) {
    ASSERT_TRUE(space_.on_page_fault(count));
    EXPECT_FALSE(kernel_->device(0).dma_read(Iova{iova}, bytes).ok());
    EXPECT_EQ(asked, round);
    ASSERT_TRUE(space_.on_page_fault({}));
    std::thread device{[&] { EXPECT_FALSE(kernel_->device(0).dma_read(Iova{iova}, bytes).ok()); }};
    const PageFaultEvent event = next();
    EXPECT_TRUE(space_.answer_page_fault(event, PageFaultAnswer::fail));
    device.join();
    EXPECT_EQ(asked, round);
  }
}

TEST_F(PageFaults, AHandlerThatCameBeforeTheDeviceHearsOfIt) {
  AddressSpaceConfig config;
  config.layout = LayoutPolicy::fixed;
  config.page_faults = true;
  AddressSpace other = *engine_.create_address_space(config);
  std::atomic<unsigned> asked{0};
  ASSERT_TRUE(other.on_page_fault([&](const PageFaultEvent&) -> std::optional<PageFaultAnswer> {
    asked.fetch_add(1, std::memory_order_relaxed);
    EXPECT_EQ(other.on_page_fault({}).error().code, Errc::busy) << "from inside";
    return PageFaultAnswer::fail;
  }));
  ASSERT_TRUE(space_.move_device(device_, other));
  std::array<std::byte, 4> bytes{};
  EXPECT_FALSE(kernel_->device(0).dma_read(Iova{iova}, bytes).ok());
  EXPECT_EQ(asked, 1U);
}

TEST(PageFaultRefusals, SayWhatIsMissing) {
  ModelOptions options;
  options.iommus.front().page_faults = false;
  auto kernel = *ModelKernel::create(options);
  Engine engine = EngineAccess::open(*backends::open_backend(*kernel, {.name = "iommufd", .descriptor = {}}), "model");
  AddressSpaceConfig config;
  config.page_faults = true;
  auto space = engine.create_address_space(config);
  ASSERT_TRUE(space);
  const auto device = space->attach({.pci_address = kernel->device(0).address()});
  EXPECT_EQ(device.error().code, Errc::unsupported) << device.error().message();
  EXPECT_NE(device.error().detail().find(kernel->device(0).address()), std::string::npos) << device.error().detail();
  std::array<PageFaultEvent, 1> events;
  *space = AddressSpace{};
  auto plain = engine.create_address_space({});
  ASSERT_TRUE(plain);
  EXPECT_EQ(plain->read_page_faults(events).error().code, Errc::no_device);
  EXPECT_EQ(plain->page_fault_fd(), -1);
  const auto handler = [](const PageFaultEvent&) { return std::optional{PageFaultAnswer::fail}; };
  EXPECT_EQ(plain->on_page_fault(handler).error().code, Errc::unsupported);
  *plain = AddressSpace{};
  Engine type1 = EngineAccess::open(*backends::open_backend(*kernel, {.name = "type1", .descriptor = {}}), "model");
  auto container = type1.create_address_space(config);
  EXPECT_FALSE(container) << "a promise that type1 cannot keep";
  EXPECT_EQ(container.error().code, Errc::unsupported);
}

// What nobody waits for: fault records, where the interface delivers them.
TEST(FaultRecords, AreToldWithDeviceAddressAndAccess) {
  ModelOptions options;
  options.iommus.front().nesting = backends::model::Nesting::smmuv3;
  auto kernel = *ModelKernel::create(options);
  for (const bool delivers : {true, false}) {
    Engine engine = EngineAccess::open(
        *backends::open_backend(*kernel, {.name = delivers ? "stage1" : "iommufd", .descriptor = {}}), "model");
    auto space = engine.create_address_space({});
    ASSERT_TRUE(space) << space.error().message();
    EXPECT_EQ(space->fault_record_fd(), -1) << "before the first device";
    const auto device = space->attach({.pci_address = kernel->device(0).address()});
    ASSERT_TRUE(device) << device.error().message();
    std::array<FaultRecord, 4> records;
    if (!delivers) {
      EXPECT_EQ(space->fault_record_fd(), -1);
      EXPECT_EQ(space->read_fault_records(records).error().code, Errc::unsupported);
      continue;
    }
    std::array<std::byte, 16> bytes{};
    EXPECT_FALSE(kernel->device(0).dma_write(Iova{iova}, bytes).ok());
    pollfd wait{.fd = space->fault_record_fd(), .events = POLLIN, .revents = 0};
    EXPECT_EQ(::poll(&wait, 1, 0), 1);
    const auto got = space->read_fault_records(records);
    ASSERT_TRUE(got) << got.error().message();
    ASSERT_EQ(*got, 1U);
    EXPECT_EQ(records[0].device_id, device->id);
    EXPECT_EQ(records[0].address, Iova{iova});
    EXPECT_EQ(records[0].access, Access::write);
    EXPECT_EQ(records[0].reason, FaultRecord::Reason::not_mapped);
  }
}

TEST(FaultRecords, AreHandedOutByAWorkerThatWatchesTheirDescriptor) {
  ModelOptions options;
  options.iommus.front().nesting = backends::model::Nesting::smmuv3;
  auto kernel = *ModelKernel::create(options);
  Engine engine = EngineAccess::open(*backends::open_backend(*kernel, {.name = "stage1", .descriptor = {}}), "model");
  AddressSpace space = *engine.create_address_space({});
  ASSERT_TRUE(space.attach({.pci_address = kernel->device(0).address()}));
  std::array<FaultRecord, 64> told;
  std::atomic<std::size_t> count{0};
  Watch watch = *space.watch(space.fault_record_fd(), [&] {
    std::array<FaultRecord, 4> some;
    for (;;) {
      const auto got = space.read_fault_records(some);
      EXPECT_TRUE(got) << got.error().message();
      if (!got || *got == 0) return true;
      const std::size_t before = count.load(std::memory_order_relaxed);  // relaxed: only this thread stores it
      std::copy_n(some.begin(), *got, told.begin() + static_cast<std::ptrdiff_t>(before));
      count.store(before + *got, std::memory_order_release);  // pairs with the acquire below
    }
  });
  std::array<std::byte, 16> bytes{};
  for (std::size_t i = 0; i < 20; ++i) {
    EXPECT_FALSE(kernel->device(0).dma_write(Iova{iova + i * page}, bytes).ok());
    const auto begun = std::chrono::steady_clock::now();
    while (count.load(std::memory_order_acquire) < i + 1 &&
           std::chrono::steady_clock::now() - begun < std::chrono::seconds{20})
      std::this_thread::yield();
    ASSERT_EQ(count.load(std::memory_order_acquire), i + 1) << "a record that nobody was told of";
    EXPECT_EQ(told[i].address, Iova{iova + i * page});
    EXPECT_EQ(told[i].access, Access::write);
    EXPECT_EQ(told[i].reason, FaultRecord::Reason::not_mapped);
    if (i % 5 == 0) std::this_thread::sleep_for(std::chrono::milliseconds{2});  // the worker sleeps, or not
  }
}

// What the kernel would not take at first is said again: the device waits for it.
TEST(PageFaultAnswers, AreSaidUntilTheyAreTaken) {
  auto kernel = *ModelKernel::create();
  backends::FailingKernel failing{*kernel};
  failing.set_fault_errno(EINTR);
  Engine engine = EngineAccess::open(*backends::open_backend(failing, {.name = "iommufd", .descriptor = {}}), "model");
  AddressSpaceConfig config;
  config.layout = LayoutPolicy::fixed;
  config.page_faults = true;
  AddressSpace space = *engine.create_address_space(config);
  ASSERT_TRUE(space.attach({.pci_address = kernel->device(0).address()}));
  std::atomic<unsigned> asked{0};
  ASSERT_TRUE(space.on_page_fault([&](const PageFaultEvent&) -> std::optional<PageFaultAnswer> {
    asked.fetch_add(1, std::memory_order_relaxed);
    // The next call of this worker is the write of the answer.
    base::arm_fault(static_cast<std::uint32_t>(base::FaultKind::kernel_call), 1);
    return PageFaultAnswer::fail;
  }));
  std::array<std::byte, 4> bytes{};
  const auto begun = std::chrono::steady_clock::now();
  EXPECT_FALSE(kernel->device(0).dma_read(Iova{iova}, bytes).ok());
  EXPECT_LT(std::chrono::steady_clock::now() - begun, std::chrono::seconds{5}) << "the device gave up by itself";
  EXPECT_TRUE(base::disarm_fault()) << "the answer was never refused";
  EXPECT_EQ(asked, 1U) << "the handler is asked once";
}

}  // namespace
}  // namespace iovane
