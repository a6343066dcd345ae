// The three layout policies of an address space, on the software IOMMU: what is refused, when, and what the text says.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "backends/kernel_decorators.hpp"
#include "backends/model/model_kernel.hpp"
#include "backends/open.hpp"
#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "support/recording_backend.hpp"

namespace iovane {
namespace {

using backends::CountingKernel;
using backends::model::DeviceOptions;
using backends::model::ModelKernel;
using backends::model::ModelOptions;
using backends::model::ReservedKind;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr std::uint64_t page = 4096;
constexpr IovaRange range(std::uint64_t start, std::uint64_t last) { return {Iova{start}, Iova{last}}; }
constexpr IovaRange msi = range(0xfee0'0000, 0xfeef'ffff);
constexpr IovaRange rmrr = range(0x7e80'0000, 0x7eff'ffff);

/// Devices 0 and 1 reserve the interrupt window only; device 2 also firmware memory.
class LayoutTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    ModelOptions options;
    options.devices.resize(3);
    options.devices[2].reserved.push_back({rmrr, ReservedKind::direct});
    kernel_ = *ModelKernel::create(options);
    counting_ = std::make_unique<CountingKernel>(*kernel_);
    auto backend = backends::open_backend(*counting_, {.name = GetParam(), .descriptor = {}});
    ASSERT_TRUE(backend) << backend.error().message();
    engine_ = EngineAccess::open(*std::move(backend), "model");
  }
  void TearDown() override {
    space_ = AddressSpace{};
    engine_ = Engine{};
  }

  Result<void> open(LayoutPolicy layout, std::vector<IovaRange> promised = {}) {
    AddressSpaceConfig config;
    config.layout = layout;
    config.promised = std::move(promised);
    auto made = engine_.create_address_space(config);
    if (!made) return made.error();
    space_ = *std::move(made);
    return {};
  }
  std::string name(std::size_t device) { return kernel_->device(device).address(); }
  Result<DeviceInfo> attach(std::size_t device) { return space_.attach({.pci_address = name(device)}); }
  Completion map(std::uint64_t iova) {
    MapRequest request;
    request.memory = MemoryPiece::of(memory_.bytes);
    request.placement = Placement::fixed(Iova{iova});
    return space_.map(request);
  }
  bool usable(const IovaRange& wanted) {
    const auto windows = space_.usable_ranges();
    for (const IovaRange& window : *windows)
      if (window.contains(wanted)) return true;
    return false;
  }
  /// Calls that would bring a device into the space.
  std::uint64_t attach_calls() {
    return counting_->calls(backends::uapi::vfio::DeviceAttachIommufdPt::request) +
           counting_->calls(backends::uapi::vfio::group_set_container);
  }
  /// The refusal comes before anything was attached and names `parts`.
  void expect_refused(std::size_t device, const std::vector<std::string>& parts) {
    const auto before = attach_calls();
    const auto refused = attach(device);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, Errc::iova_reserved) << refused.error().message();
    EXPECT_EQ(attach_calls(), before) << "it had been attached";
    EXPECT_THAT(refused.error().detail(), HasSubstr(name(device)));
    for (const std::string& part : parts) EXPECT_THAT(refused.error().detail(), HasSubstr(part));
  }

  struct alignas(page) Page {
    std::array<std::byte, page> bytes{};
  } memory_;
  std::unique_ptr<ModelKernel> kernel_;
  std::unique_ptr<CountingKernel> counting_;
  Engine engine_;
  AddressSpace space_;
};

TEST_P(LayoutTest, EngineManagedFollowsTheDevices) {
  ASSERT_TRUE(open(LayoutPolicy::engine_managed));
  ASSERT_TRUE(attach(0));
  EXPECT_FALSE(usable(msi));
  EXPECT_TRUE(usable(rmrr));
  const auto second = attach(2);
  ASSERT_TRUE(second) << second.error().message();
  EXPECT_FALSE(usable(rmrr));
  ASSERT_TRUE(space_.detach(second->id));
  EXPECT_TRUE(usable(rmrr)) << "usable ranges were not read again after the detach";
}

TEST_P(LayoutTest, EngineManagedRefusesADeviceThatReservesALiveMapping) {
  ASSERT_TRUE(open(LayoutPolicy::engine_managed));
  ASSERT_TRUE(attach(0));
  ASSERT_TRUE(map(rmrr.start.value + 4 * page).ok());
  expect_refused(2, {"0x7e800000", "0x7effffff", "0x7e804000", "0x7e804fff", "mapped"});
  EXPECT_TRUE(usable(rmrr));
  ASSERT_TRUE(space_.unmap_all());
  EXPECT_TRUE(attach(2));
}

TEST_P(LayoutTest, AFixedLayoutIsCheckedAtCreationOrWithTheFirstDevice) {
  const IovaRange beyond = range(std::uint64_t{1} << 50, (std::uint64_t{1} << 50) + 0xfffff);
  auto opened = open(LayoutPolicy::fixed, {beyond});
  // iommufd and a container without devices promise anything; the device's page tables decide.
  if (opened) {
    const auto refused = attach(0);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, Errc::iova_reserved) << refused.error().message();
  }
}

TEST_P(LayoutTest, AFixedLayoutIsEnforcedOnEveryLaterAttach) {
  const IovaRange low = range(0, 0x7fff'ffff);
  ASSERT_TRUE(open(LayoutPolicy::fixed, {low}));
  ASSERT_TRUE(attach(0));
  expect_refused(2, {"0x7e800000", "0x7effffff", "[0x0, 0x7fffffff]", "promises"});
  EXPECT_TRUE(attach(1));
  EXPECT_TRUE(map(rmrr.start.value).ok());
}

TEST_P(LayoutTest, HostConstrainedIsMadeWhenItIsShownAndThenKept) {
  ASSERT_TRUE(open(LayoutPolicy::host_constrained));
  const auto first = attach(0);
  ASSERT_TRUE(first);
  const auto shown = space_.guest_layout();
  ASSERT_TRUE(shown) << shown.error().message();
  ASSERT_FALSE(shown->holes.empty());
  bool named = false;
  for (const LayoutHole& hole : shown->holes)
    if (hole.range == msi) {
      named = true;
      EXPECT_THAT(hole.devices, Contains(name(0)));
    }
  EXPECT_TRUE(named) << "the interrupt window is no hole";
  // The same holes again are welcome; one more is not.
  const auto second = attach(1);
  ASSERT_TRUE(second) << second.error().message();
  expect_refused(2, {"0x7e800000", "0x7effffff", "guest was shown"});
  // What was shown stays as devices go.
  ASSERT_TRUE(space_.detach(first->id));
  EXPECT_FALSE(usable(msi));
  const auto again = space_.guest_layout();
  ASSERT_TRUE(again);
  ASSERT_EQ(again->holes.size(), shown->holes.size());
  for (std::size_t i = 0; i < shown->holes.size(); ++i) {
    EXPECT_EQ(again->holes[i].range, shown->holes[i].range);
    EXPECT_EQ(again->holes[i].devices, shown->holes[i].devices);
  }
  EXPECT_FALSE(map(msi.start.value).ok());
}

TEST_P(LayoutTest, HostConstrainedTakesEveryDeviceBeforeItIsShown) {
  ASSERT_TRUE(open(LayoutPolicy::host_constrained));
  ASSERT_TRUE(attach(0));
  ASSERT_TRUE(attach(2));
  const auto shown = space_.guest_layout();
  ASSERT_TRUE(shown) << shown.error().message();
  for (const IovaRange& window : shown->usable) EXPECT_FALSE(window.overlaps(rmrr));
}

TEST_P(LayoutTest, ADeviceThatTheBackendRefusesDoesNotCount) {
  ASSERT_TRUE(open(LayoutPolicy::engine_managed));
  ASSERT_TRUE(attach(0));
  EXPECT_FALSE(space_.attach({.pci_address = "0000:ff:1f.7"}));
  EXPECT_FALSE(space_.attach({.pci_address = "0000:ff:1f.7"})) << "it is said to be attached";
  EXPECT_EQ(attach(0).error().code, Errc::busy);
  EXPECT_TRUE(attach(1));
}

TEST_P(LayoutTest, PromisesBelongToFixedLayoutsOnly) {
  const auto refused = open(LayoutPolicy::engine_managed, {range(0, 0xfffff)});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, Errc::invalid_argument);
}

TEST_P(LayoutTest, NothingIsBrokenWhenNothingChanged) {
  ASSERT_TRUE(open(LayoutPolicy::engine_managed));
  ASSERT_TRUE(attach(0));
  ASSERT_TRUE(map(0x10'0000).ok());
  const auto breaches = space_.check_layout();
  ASSERT_TRUE(breaches);
  EXPECT_THAT(*breaches, IsEmpty());
}

// A host that takes addresses away behind our back, as a second user of a shared IOAS may.
class VanishingRanges : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::RecordingSpace* recorder = nullptr;
    engine_ = EngineAccess::open(std::make_unique<testing::RecordingBackend>(recorder), "recording");
    host_ = recorder;
    AddressSpaceConfig config;
    config.layout = LayoutPolicy::fixed;
    config.promised = {range(0x1000, 0xfed'ffff)};
    space_ = *engine_.create_address_space(config);
    MapRequest request;
    request.memory = {{}, 0x7000'0000, Bytes{4 * page}};
    request.placement = Placement::fixed(Iova{0x2000'0000});
    ASSERT_TRUE(space_.map(request).ok());
  }
  Engine engine_;
  AddressSpace space_;
  testing::RecordingSpace* host_ = nullptr;
};

TEST_F(VanishingRanges, LiveMappingsAndPromisesInsideAreReported) {
  host_->usable = {range(0x1000, 0x7ff'ffff), range(0x2000'1000, 0xffff'ffff)};
  const auto breaches = space_.check_layout();
  ASSERT_TRUE(breaches);
  ASSERT_EQ(breaches->size(), 2U);
  EXPECT_FALSE((*breaches)[0].live);
  EXPECT_EQ((*breaches)[0].needed, range(0x1000, 0xfed'ffff));
  EXPECT_EQ((*breaches)[0].missing, range(0x800'0000, 0xfed'ffff));
  EXPECT_TRUE((*breaches)[1].live);
  EXPECT_EQ((*breaches)[1].needed, range(0x2000'0000, 0x2000'3fff));
  EXPECT_EQ((*breaches)[1].missing, range(0x2000'0000, 0x2000'0fff));
  EXPECT_THAT((*breaches)[1].text, HasSubstr("0x20003fff"));
}

TEST_F(VanishingRanges, ADeviceOfWhichTheHostSaidNothingIsTakenOutAgain) {
  host_->usable = {range(0x1000, 0x1fff'ffff)};
  const auto refused = space_.attach({.pci_address = "0000:00:05.0"});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, Errc::iova_reserved);
  EXPECT_THAT(refused.error().detail(), HasSubstr("0000:00:05.0"));
  EXPECT_THAT(refused.error().detail(), HasSubstr("0x20000000"));
  host_->usable = {range(0x1000, 0x3fff'ffff)};
  EXPECT_TRUE(space_.attach({.pci_address = "0000:00:05.0"})) << "the refused device still counts";
}

TEST_F(VanishingRanges, ADetachSaysWhatDoesNotHoldAnyMore) {
  const auto device = space_.attach({.pci_address = "0000:00:05.0"});
  ASSERT_TRUE(device);
  host_->usable = {range(0x1000, 0x1fff'ffff)};
  const auto detached = space_.detach(device->id);
  ASSERT_FALSE(detached);
  EXPECT_THAT(detached.error().detail(), HasSubstr("0x20000000"));
}

INSTANTIATE_TEST_SUITE_P(Interfaces, LayoutTest, ::testing::Values("iommufd", "type1"),
                         [](const auto& i) { return std::string{i.param}; });

}  // namespace
}  // namespace iovane
