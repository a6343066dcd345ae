// The three layouts of an address space against what the host itself says about its devices: in the lab, the ranges
// that sysfs shows for the devices' groups.
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "conformance/conformance.hpp"
#include "conformance/tapped_backend.hpp"
#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"

namespace iovane::test {
namespace {

/// The kernel as it is, but for what it says a device reserves: no two devices of one lab machine differ in that.
class InventoryKernel final : public KernelDecorator {
 public:
  using KernelDecorator::KernelDecorator;
  Result<std::vector<PciDevice>> pci_devices() override {
    auto all = inner().pci_devices();
    if (!all) return all;
    for (PciDevice& device : *all) {
      if (device.address != address) continue;
      device.reserved.push_back(further);
      std::sort(device.reserved.begin(), device.reserved.end());
    }
    return all;
  }
  std::string address;
  IovaRange further{};
};

class LayoutContract : public Conformance {
 protected:
  void SetUp() override {
    Conformance::SetUp();
    if (HasFatalFailure() || IsSkipped()) return;
    if (spapr()) GTEST_SKIP() << "sPAPR has windows, and its devices reserve nothing";
    if (stage1()) GTEST_SKIP() << "the tables are our own there, and so is the layout";
    inventory_ = std::make_unique<InventoryKernel>(*kernel_);
    backend_.reset();
    auto backend = open_backend(*inventory_, {.name = std::string{to_string(GetParam())}, .descriptor = {}});
    ASSERT_TRUE(backend) << backend.error().message();
    engine_ = EngineAccess::open(std::make_unique<TappedBackend>(*std::move(backend), inner_), "under test");
    reserved_ = reserved_of_group(0);
    ASSERT_FALSE(reserved_.empty()) << "this host reserves nothing for " << address(0);
  }
  void TearDown() override {
    witness_.reset();
    address_space_ = AddressSpace{};
    engine_ = Engine{};
    inventory_.reset();
    Conformance::TearDown();
  }

  std::string address(std::size_t device) { return machine_->devices().at(device); }

  /// Read here once more and by other means than the library's, where there is a sysfs to read.
  std::vector<IovaRange> reserved_of_group(std::size_t device) {
    std::vector<IovaRange> ranges;
    std::ifstream file{fmt::format("/sys/bus/pci/devices/{}/iommu_group/reserved_regions", address(device))};
    if (std::getenv("IOVANE_LAB") != nullptr) {
      EXPECT_TRUE(file.is_open());
      std::string first, last, kind;
      while (file >> first >> last >> kind)
        if (kind != "direct-relaxable")
          ranges.push_back({Iova{std::stoull(first, nullptr, 16)}, Iova{std::stoull(last, nullptr, 16)}});
    } else {
      const auto inventory = kernel_->pci_devices();
      for (const PciDevice& pci : *inventory)
        if (pci.address == address(device)) ranges = pci.reserved;
    }
    std::sort(ranges.begin(), ranges.end());
    return ranges;
  }

  Result<void> open(LayoutPolicy layout, std::vector<IovaRange> promised = {}) {
    AddressSpaceConfig config;
    config.layout = layout;
    config.promised = std::move(promised);
    auto made = engine_.create_address_space(config);
    if (!made) return made.error();
    address_space_ = *std::move(made);
    return {};
  }
  Result<DeviceInfo> attach(std::size_t device) { return address_space_.attach({.pci_address = address(device)}); }
  void bear_witness(const DeviceInfo& device) {
    AttachedDevice attached;
    attached.id = DeviceId{device.id};
    attached.name = device.name;
    attached.device_fd = device.device_fd;
    witness_ = machine_->witness(*inner_, attached);
    ASSERT_NE(witness_, nullptr);
  }
  Completion map(std::uint64_t iova, std::span<std::byte> memory) {
    MapRequest request;
    request.memory = MemoryPiece::of(memory);
    request.placement = Placement::fixed(Iova{iova});
    return address_space_.map(request);
  }
  static bool covers(const std::vector<IovaRange>& ranges, const IovaRange& wanted) {
    return std::any_of(ranges.begin(), ranges.end(), [&](const IovaRange& r) { return r.contains(wanted); });
  }
  static bool touches(const std::vector<IovaRange>& ranges, const IovaRange& wanted) {
    return std::any_of(ranges.begin(), ranges.end(), [&](const IovaRange& r) { return r.overlaps(wanted); });
  }

  /// Calls that would bring a device into the space.
  std::uint64_t attach_calls() {
    return kernel_->calls(backends::uapi::vfio::DeviceAttachIommufdPt::request) +
           kernel_->calls(backends::uapi::vfio::group_set_container);
  }
  /// Refused before the kernel heard of it, with device and range named.
  void expect_refused(std::size_t device, const IovaRange& reserved) {
    const auto before = attach_calls();
    const auto refused = attach(device);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, Errc::iova_reserved) << refused.error().message();
    EXPECT_EQ(attach_calls(), before) << "it had been attached";
    const std::string detail{refused.error().detail()};
    EXPECT_NE(detail.find(address(device)), std::string::npos) << detail;
    EXPECT_NE(detail.find(fmt::format("{:#x}", reserved.start.value)), std::string::npos) << detail;
    EXPECT_NE(detail.find(fmt::format("{:#x}", reserved.last.value)), std::string::npos) << detail;
  }

  std::unique_ptr<InventoryKernel> inventory_;
  Engine engine_;
  AddressSpace address_space_;
  BackendSpace* inner_ = nullptr;
  std::vector<IovaRange> reserved_;  ///< by the first device
};

TEST_P(LayoutContract, an_engine_managed_layout_is_what_the_host_offers_less_what_devices_reserve) {
  ASSERT_TRUE(open(LayoutPolicy::engine_managed));
  const auto device = attach(0);
  ASSERT_TRUE(device) << device.error().message();
  const auto usable = address_space_.usable_ranges();
  ASSERT_TRUE(usable) << usable.error().message();
  for (const IovaRange& hole : reserved_) EXPECT_FALSE(touches(*usable, hole)) << std::hex << hole.start.value;
  const Memory memory{1};
  const Completion inside = map(reserved_.front().start.value, memory.page(0));
  EXPECT_EQ(inside.error.code, Errc::iova_reserved) << inside.error.message();
  // What it chooses itself is what the device reaches.
  MapRequest anywhere;
  anywhere.memory = MemoryPiece::of(memory.page(0));
  const Completion chosen = address_space_.map(anywhere);
  ASSERT_TRUE(chosen.ok()) << chosen.error.message();
  EXPECT_TRUE(covers(*usable, {chosen.iova, chosen.iova}));
  bear_witness(*device);
  EXPECT_TRUE(reads(*witness_, chosen.iova, memory.page(0)));
  witness_.reset();
  ASSERT_TRUE(address_space_.unmap_all());
  ASSERT_TRUE(address_space_.detach(device->id));
  if (container()) return;  // a container without devices knows no ranges
  const auto after = address_space_.usable_ranges();
  ASSERT_TRUE(after);
  EXPECT_TRUE(covers(*after, reserved_.front())) << "usable ranges were not read again after the detach";
}

TEST_P(LayoutContract, a_live_mapping_keeps_a_device_out_that_reserves_it) {
  ASSERT_TRUE(open(LayoutPolicy::engine_managed));
  const Memory memory{1};
  const Completion early = map(reserved_.front().start.value, memory.page(0));
  if (container()) {
    EXPECT_FALSE(early.ok()) << "a container without devices maps nothing";
    return;
  }
  ASSERT_TRUE(early.ok()) << early.error.message();
  expect_refused(0, reserved_.front());
  ASSERT_TRUE(address_space_.unmap_all());
  EXPECT_TRUE(attach(0));
}

TEST_P(LayoutContract, a_promise_that_a_device_cannot_keep_is_refused_and_one_that_it_can_is_kept) {
  // At creation or, where the host says nothing before its first device, with that.
  if (open(LayoutPolicy::fixed, {{Iova{0}, reserved_.front().last}})) expect_refused(0, reserved_.front());
  address_space_ = AddressSpace{};

  const IovaRange promised = at(base, 1024);
  const auto opened = open(LayoutPolicy::fixed, {promised});
  ASSERT_TRUE(opened) << opened.error().message();
  if (GetParam() == Interface::iommufd) {
    EXPECT_EQ(kernel_->calls(backends::uapi::iommufd::IoasAllowIovas::request), 2U) << "one for each promise";
  }
  const auto device = attach(0);
  ASSERT_TRUE(device) << device.error().message();
  const Memory memory{1};
  ASSERT_TRUE(map(promised.last.value - os_page_bytes() + 1, memory.page(0)).ok());
  bear_witness(*device);
  EXPECT_TRUE(reads(*witness_, Iova{promised.last.value - os_page_bytes() + 1}, memory.page(0)));
  if (machine_->devices().size() < 2) GTEST_SKIP() << "one witness only";
  inventory_->address = address(1);
  inventory_->further = at(base + 16 * os_page_bytes(), 2);
  expect_refused(1, inventory_->further);
  inventory_->address.clear();
  const auto second = attach(1);
  EXPECT_TRUE(second) << second.error().message();
  EXPECT_TRUE(reads(*witness_, Iova{promised.last.value - os_page_bytes() + 1}, memory.page(0)));
}

TEST_P(LayoutContract, what_a_guest_is_shown_is_what_the_host_shows_and_does_not_change) {
  ASSERT_TRUE(open(LayoutPolicy::host_constrained));
  const auto device = attach(0);
  ASSERT_TRUE(device) << device.error().message();
  const auto shown = address_space_.guest_layout();
  ASSERT_TRUE(shown) << shown.error().message();
  // The holes that name the device are exactly what sysfs lists for its group.
  std::vector<IovaRange> named;
  for (const LayoutHole& hole : shown->holes)
    if (std::find(hole.devices.begin(), hole.devices.end(), address(0)) != hole.devices.end())
      named.push_back(hole.range);
  EXPECT_EQ(named, reserved_);
  // Holes and usable ranges together are every address, once.
  std::vector<IovaRange> all = shown->usable;
  for (const LayoutHole& hole : shown->holes) all.push_back(hole.range);
  std::sort(all.begin(), all.end());
  ASSERT_FALSE(all.empty());
  EXPECT_EQ(all.front().start, Iova{0});
  EXPECT_EQ(all.back().last, iova_max);
  for (std::size_t i = 1; i < all.size(); ++i) EXPECT_TRUE(all[i - 1].precedes_directly(all[i])) << i;
  EXPECT_EQ(shown->usable, address_space_.usable_ranges().value_or(std::vector<IovaRange>{}));

  if (machine_->devices().size() < 2) GTEST_SKIP() << "one device only";
  // A device that comes later and needs a hole more is refused; the same device with the same holes is welcome.
  inventory_->address = address(1);
  inventory_->further = at(base, 4);
  expect_refused(1, inventory_->further);
  inventory_->address.clear();
  const auto second = attach(1);
  ASSERT_TRUE(second) << second.error().message();
  const auto again = address_space_.guest_layout();
  ASSERT_TRUE(again);
  EXPECT_EQ(again->usable, shown->usable);
  const Memory memory{1};
  ASSERT_TRUE(map(base, memory.page(0)).ok());
  bear_witness(*second);
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
}

TEST_P(LayoutContract, a_guest_that_was_shown_everything_gets_no_device_that_reserves_something) {
  ASSERT_TRUE(open(LayoutPolicy::host_constrained));
  const auto shown = address_space_.guest_layout();
  if (container()) {
    EXPECT_EQ(shown.error().code, Errc::unsupported) << "a container without devices knows no ranges";
    return;
  }
  ASSERT_TRUE(shown) << shown.error().message();
  ASSERT_TRUE(covers(shown->usable, reserved_.front()));
  expect_refused(0, reserved_.front());
  const auto breaches = address_space_.check_layout();
  ASSERT_TRUE(breaches);
  EXPECT_TRUE(breaches->empty());
}

IOVANE_CONFORMANCE(LayoutContract);

}  // namespace
}  // namespace iovane::test
