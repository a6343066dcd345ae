// Devices: attach, detach, move, and what they take out of a space.
#include <fcntl.h>
#include <fmt/format.h>

#include <algorithm>

#include "conformance/conformance.hpp"

namespace iovane::test {
namespace {

class DeviceContract : public Conformance {
 protected:
  bool two_devices() { return machine_->devices().size() >= 2; }
  PciDevice pci(std::size_t index) {
    const auto inventory = kernel_->pci_devices();
    for (const PciDevice& device : inventory ? *inventory : std::vector<PciDevice>{})
      if (device.address == machine_->devices().at(index)) return device;
    return {};
  }
};

TEST_P(DeviceContract, an_attach_tells_the_usable_ranges) {
  make_default();
  const auto usable = space_->usable_ranges();
  ASSERT_TRUE(usable) << usable.error().message();
  ASSERT_FALSE(usable->empty());
  for (std::size_t i = 0; i < usable->size(); ++i) {
    EXPECT_EQ((*usable)[i].start.value % space_->facts().granule.value, 0U);
    EXPECT_EQ(((*usable)[i].last.value + 1) % space_->facts().granule.value, 0U);
    if (i > 0) {
      EXPECT_LT((*usable)[i - 1].last, (*usable)[i].start);
    }
  }
  EXPECT_EQ(device_.reserved.empty(), spapr()) << "on sPAPR, what is in no window is out of reach";
  for (const IovaRange& hole : device_.reserved)
    for (const IovaRange& range : *usable) EXPECT_FALSE(range.overlaps(hole)) << std::hex << hole.start.value;
  EXPECT_NE(space_->facts().page_sizes & space_->facts().granule.value, 0U) << "the granule is no page size";
}

TEST_P(DeviceContract, maps_before_the_first_device_wait_for_it_or_say_why_not) {
  space_ = make_space();
  const Memory memory{2};
  const auto result = map(at(base, 2), memory.address());
  if (container() || stage1()) {  // stage 1: the first device decides what tables look like
    EXPECT_EQ(result.error.code, Errc::no_device) << result.error.message();
    EXPECT_EQ(space_->usable_ranges().value_or(std::vector<IovaRange>{IovaRange::everything()}).size(), 0U);
    EXPECT_TRUE(unmap(at(base, 2)).error.ok());
    EXPECT_TRUE(space_->unmap_all());
    return;
  }
  ASSERT_TRUE(result.error.ok()) << result.error.message();
  device_ = attach(*space_);
  witness_ = machine_->witness(*space_, device_);
  EXPECT_TRUE(reads(*witness_, Iova{base + os_page_bytes()}, memory.page(1)));
  EXPECT_EQ(unmap(at(base, 2)).bytes, memory.length());
}

TEST_P(DeviceContract, a_device_whose_reserved_range_is_mapped_is_refused_and_named) {
  if (container() || stage1()) return;  // no maps without a device there
  space_ = make_space();
  const auto reserved = pci(0).reserved;
  if (reserved.empty()) GTEST_SKIP() << "this host does not list reserved ranges";
  const Memory memory{1};
  ASSERT_TRUE(map(at(reserved.front().start.value, 1), memory.address()).error.ok());
  const auto attached = space_->attach({.pci_address = machine_->devices()[0]});
  ASSERT_FALSE(attached);
  EXPECT_EQ(attached.error().code, Errc::iova_reserved) << attached.error().message();
  EXPECT_NE(attached.error().detail().find(machine_->devices()[0]), std::string::npos) << attached.error().detail();
  EXPECT_EQ(unmap(at(reserved.front().start.value, 1)).bytes, memory.length());
  device_ = attach(*space_);  // nothing stands in its way any more
  EXPECT_GE(device_.device_fd, 0);
}

TEST_P(DeviceContract, a_promise_keeps_conflicting_devices_out) {
  space_ = make_space();
  if (!has(space_->facts().capabilities, Capability::promise_ranges)) {
    const IovaRange some = at(base, 1);
    EXPECT_EQ(space_->promise({&some, 1}).error().code, Errc::unsupported);
    return;
  }
  const IovaRange all_of_32_bits{Iova{0}, Iova{0xffff'ffff}};
  ASSERT_TRUE(space_->promise({&all_of_32_bits, 1}));
  const auto attached = space_->attach({.pci_address = machine_->devices()[0]});
  ASSERT_FALSE(attached) << "the device reserves an address below 4 GiB and came in all the same";
  EXPECT_EQ(attached.error().code, Errc::iova_reserved) << attached.error().message();
  const IovaRange first_gib{Iova{0}, Iova{0x3fff'ffff}};
  ASSERT_TRUE(space_->promise({&first_gib, 1}));
  device_ = attach(*space_);
  ASSERT_GE(device_.device_fd, 0);
  const auto late = space_->promise({&all_of_32_bits, 1});
  EXPECT_EQ(late.error().code, Errc::iova_reserved) << late.error().message();
  const IovaRange overlapping[] = {at(base, 2), at(base, 1)};
  EXPECT_EQ(space_->promise(overlapping).error().code, Errc::invalid_argument);
}

TEST_P(DeviceContract, a_device_is_in_one_space_at_a_time) {
  make_default();
  EXPECT_EQ(space_->attach({.pci_address = device_.name}).error().code,
            container() || compat() ? Errc::ok : Errc::busy);
  const auto other = make_space();
  const auto again = other->attach({.pci_address = device_.name});
  EXPECT_EQ(again.error().code, Errc::busy) << again.error().message();
  const Memory memory{1};
  ASSERT_TRUE(map(at(base, 1), memory.address()).error.ok());
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0))) << "the refused attach disturbed the first one";
}

TEST_P(DeviceContract, devices_that_do_not_exist_are_named) {
  space_ = make_space();
  const auto missing = space_->attach({.pci_address = "0000:7f:1f.7"});
  EXPECT_EQ(missing.error().code, Errc::no_device);
  EXPECT_NE(missing.error().detail().find("0000:7f:1f.7"), std::string::npos);
  EXPECT_EQ(space_->attach({}).error().code, Errc::invalid_argument);
  EXPECT_EQ(space_->detach(DeviceId{77}).error().code, Errc::not_found);
}

TEST_P(DeviceContract, the_last_device_leaves_and_comes_back) {
  make_default();
  const Memory memory{1};
  ASSERT_TRUE(map(at(base, 1), memory.address()).error.ok());
  witness_.reset();
  const auto gone = space_->detach(device_.id);
  if (container()) {
    EXPECT_EQ(gone.error().code, Errc::busy) << "a container drops its mappings with its last group";
    ASSERT_TRUE(unmap(at(base, 1)).error.ok());
    const auto empty = space_->detach(device_.id);
    ASSERT_TRUE(empty) << empty.error().message();
  } else {
    ASSERT_TRUE(gone) << gone.error().message();
  }
  EXPECT_EQ(space_->detach(device_.id).error().code, Errc::not_found);
  const DeviceId first = device_.id;
  device_ = attach(*space_);
  EXPECT_NE(device_.id, first) << "ids are never reused";
  witness_ = machine_->witness(*space_, device_);
  ASSERT_NE(witness_, nullptr);
  if (container()) {
    ASSERT_TRUE(map(at(base, 1), memory.address()).error.ok());
  }
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  EXPECT_TRUE(unmap(at(base, 1)).error.ok());
}

TEST_P(DeviceContract, two_devices_of_one_space_see_the_same) {
  make_default();
  if (!two_devices()) GTEST_SKIP() << "one witness only";
  const Memory memory{2};
  ASSERT_TRUE(map(at(base, 1), memory.address()).error.ok());
  const auto joined = space_->attach({.pci_address = machine_->devices().at(1)});
  if (spapr() && !joined) {
    EXPECT_FALSE(joined.error().detail().empty());
    ASSERT_TRUE(unmap(at(base, 1)).error.ok());
    GTEST_SKIP() << "this platform does not let groups share windows: " << joined.error().detail();
  }
  ASSERT_TRUE(joined) << joined.error().message();
  const AttachedDevice& second = *joined;
  auto other = machine_->witness(*space_, second);
  ASSERT_NE(other, nullptr);
  ASSERT_TRUE(map(at(base + os_page_bytes(), 1), memory.address(1)).error.ok());
  EXPECT_TRUE(reads(*other, Iova{base}, memory.page(0)));
  EXPECT_TRUE(writes(*other, Iova{base + os_page_bytes()}, memory.page(1)));
  EXPECT_TRUE(reads(*witness_, Iova{base + os_page_bytes()}, memory.page(1)));
  EXPECT_EQ(unmap(at(base, 2)).bytes, memory.length());
  EXPECT_TRUE(cannot_read(*other, Iova{base}, memory.page(0)));
  // Who leaves takes nothing along, in any window.
  const Iova high{spapr_v2() ? high_iova().value_or(0) : base + 0x10'0000};
  ASSERT_TRUE(map(at(base, 1), memory.address(0)).error.ok());
  ASSERT_TRUE(map(at(high.value, 1), memory.address(1)).error.ok());
  other.reset();
  EXPECT_TRUE(space_->detach(second.id));
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  EXPECT_TRUE(writes(*witness_, high, memory.page(1)));
  EXPECT_EQ(unmap(at(base, 1)).bytes, Bytes{os_page_bytes()});
  EXPECT_EQ(unmap(at(high.value, 1)).bytes, Bytes{os_page_bytes()});
  EXPECT_TRUE(cannot_read(*witness_, high, memory.page(1)));
}

TEST_P(DeviceContract, spaces_are_separate) {
  make_default();
  if (!two_devices()) GTEST_SKIP() << "one witness only";
  const auto second_space = make_space();
  const AttachedDevice second = attach(*second_space, 1);
  auto other = machine_->witness(*second_space, second);
  ASSERT_NE(other, nullptr);
  const Memory mine{1, 1};
  const Memory theirs{1, 2};
  ASSERT_TRUE(map(at(base, 1), mine.address()).error.ok());
  EXPECT_TRUE(cannot_read(*other, Iova{base}, mine.page(0)));
  ASSERT_TRUE(run(*second_space, map_op(at(base, 1), theirs.address())).error.ok());
  EXPECT_TRUE(reads(*witness_, Iova{base}, mine.page(0)));
  EXPECT_TRUE(reads(*other, Iova{base}, theirs.page(0)));
  ASSERT_TRUE(unmap(at(base, 1)).error.ok());
  EXPECT_TRUE(reads(*other, Iova{base}, theirs.page(0)));
}

TEST_P(DeviceContract, a_device_moves_between_spaces_where_the_interface_can) {
  make_default();
  const auto target = make_space();
  const Memory here{1, 1};
  const Memory there{1, 2};
  ASSERT_TRUE(map(at(base, 1), here.address()).error.ok());
  if (!by_cdev()) {
    EXPECT_EQ(backend_->move_device(*space_, device_.id, *target).error().code, Errc::unsupported);
    EXPECT_TRUE(reads(*witness_, Iova{base}, here.page(0)));
    return;
  }
  ASSERT_TRUE(run(*target, map_op(at(base, 1), there.address())).error.ok());
  witness_.reset();
  const auto moved = backend_->move_device(*space_, device_.id, *target);
  ASSERT_TRUE(moved) << moved.error().message();
  EXPECT_EQ(moved->id, device_.id);
  auto other = machine_->witness(*target, *moved);
  ASSERT_NE(other, nullptr);
  EXPECT_TRUE(reads(*other, Iova{base}, there.page(0)));
  EXPECT_EQ(space_->detach(device_.id).error().code, Errc::not_found);
  EXPECT_EQ(backend_->move_device(*space_, device_.id, *target).error().code, Errc::not_found);
  other.reset();
  EXPECT_TRUE(target->detach(moved->id));
}

TEST_P(DeviceContract, descriptors_can_be_handed_in) {
  const char* const path = container() ? "/dev/vfio/vfio" : "/dev/iommu";
  const PciDevice witness_pci = pci(0);
  const std::string device_path = by_cdev() ? witness_pci.cdev : fmt::format("/dev/vfio/{}", witness_pci.group);
  backend_.reset();
  for (const bool duplicate : {false, true}) {
    const int fd = kernel_->open(path, O_RDWR);
    ASSERT_GE(fd, 0);
    const int device_fd = kernel_->open(device_path.c_str(), O_RDWR);
    ASSERT_GE(device_fd, 0);
    backend_ = open(fd, duplicate);
    ASSERT_NE(backend_, nullptr);
    if (duplicate) kernel_->close(fd);
    DeviceSource source{.pci_address = machine_->devices()[0]};
    (by_cdev() ? source.cdev_fd : source.group_fd) = device_fd;
    const Memory memory{1};
    for (int round = 0; round < 2; ++round) {
      space_ = make_space();
      if (!by_cdev() && round == 1) break;  // one container is one space
      ASSERT_NE(space_, nullptr);
      auto attached = space_->attach(source);
      ASSERT_TRUE(attached) << attached.error().message();
      witness_ = machine_->witness(*space_, *attached);
      ASSERT_NE(witness_, nullptr);
      ASSERT_TRUE(map(at(base, 1), memory.address()).error.ok());
      EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
      witness_.reset();
      space_.reset();
      if (!by_cdev()) {
        EXPECT_EQ(backend_->create_space({}).error().code, Errc::limit_reached);
        break;
      }
    }
    backend_.reset();
    EXPECT_EQ(kernel_->close(device_fd), 0) << "a descriptor that was lent is gone";
    if (!duplicate) {
      EXPECT_EQ(kernel_->close(fd), 0) << "a descriptor that was lent is gone";
    }
  }
}

TEST_P(DeviceContract, a_wrong_descriptor_is_refused) {
  backend_.reset();
  // The other interface's descriptor.
  const std::string group = fmt::format("/dev/vfio/{}", pci(0).group);
  const std::string other = spapr() ? group : container() ? pci(0).cdev : std::string{"/dev/vfio/vfio"};
  const int fd = kernel_->open(other.c_str(), O_RDWR);
  ASSERT_GE(fd, 0);
  if (compat()) {  // a container speaks the same calls; making an IOAS on it is what fails
    const auto opened = open_backend(*kernel_, {.name = "compat", .descriptor = {.fd = fd, .duplicate = false}});
    EXPECT_FALSE(opened && (*opened)->create_space({}));
    kernel_->close(fd);
    return;
  }
  const auto opened = backends::open_backend(
      *kernel_, {.name = std::string{to_string(GetParam())}, .descriptor = {.fd = fd, .duplicate = false}});
  EXPECT_FALSE(opened);
  kernel_->close(fd);
}

IOVANE_CONFORMANCE(DeviceContract);

}  // namespace
}  // namespace iovane::test
