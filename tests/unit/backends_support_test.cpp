// What backends stand on: range lists, decorators of a kernel, sysfs, and the real kernel's own calls.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cerrno>
#include <filesystem>
#include <fstream>

#include "backends/kernel_call.hpp"
#include "backends/kernel_decorators.hpp"
#include "backends/range_list.hpp"
#include "backends/sysfs_inventory.hpp"
#include "backends/system_kernel.hpp"
#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "base/fault_point.hpp"
#include "support/scripted_kernel.hpp"

namespace iovane::backends {
namespace {

namespace fs = std::filesystem;
using test::ScriptedKernel;
using Ranges = std::vector<IovaRange>;

constexpr IovaRange range(std::uint64_t start, std::uint64_t last) { return {Iova{start}, Iova{last}}; }

TEST(RangeListTest, touching_and_overlapping_ranges_become_one) {
  EXPECT_EQ(normalized({range(30, 39), range(0, 9), range(10, 19), range(15, 25)}),
            (Ranges{range(0, 25), range(30, 39)}));
  EXPECT_EQ(normalized({IovaRange::everything(), range(5, 6)}), Ranges{IovaRange::everything()});
}

TEST(RangeListTest, holes_are_cut_out) {
  EXPECT_EQ(without({range(0, 99)}, Ranges{range(10, 19), range(90, 200)}), (Ranges{range(0, 9), range(20, 89)}));
  EXPECT_EQ(without({IovaRange::everything()}, Ranges{range(0, 4095), {Iova{~0xfffULL}, iova_max}}),
            (Ranges{range(4096, ~0xfffULL - 1)}));
  EXPECT_TRUE(without({range(5, 6)}, Ranges{range(0, 10)}).empty());
}

TEST(RangeListTest, the_first_missing_part_is_named) {
  const Ranges usable{range(0, 9), range(20, 29), range(30, 39)};
  EXPECT_FALSE(first_missing(usable, range(2, 9)));
  EXPECT_FALSE(first_missing(Ranges{range(20, 39)}, range(25, 35)));
  EXPECT_EQ(first_missing(usable, range(5, 25)), range(10, 19));
  EXPECT_EQ(first_missing(usable, range(12, 13)), range(12, 13));
  EXPECT_EQ(first_missing(usable, range(35, 50)), range(40, 50));
  EXPECT_FALSE(first_missing(Ranges{IovaRange::everything()}, {Iova{~0xfffULL}, iova_max}));
  EXPECT_EQ(first_missing({}, range(1, 2)), range(1, 2));
}

TEST(RangeListTest, only_whole_granules_stay) {
  const Ranges ranges{range(1, 0x2fff), range(0x3001, 0x4ffe), range(0x7000, 0x7ffe), {Iova{~0x1fffULL}, iova_max}};
  EXPECT_EQ(whole_granules(ranges, Bytes{4096}), (Ranges{range(0x1000, 0x2fff), {Iova{~0x1fffULL}, iova_max}}));
  EXPECT_EQ(whole_granules(Ranges{IovaRange::everything()}, Bytes{65536}), Ranges{IovaRange::everything()});
  EXPECT_TRUE(whole_granules(Ranges{{Iova{~0ULL - 5}, iova_max}}, Bytes{4096}).empty());
}

TEST(DecoratorTest, calls_failures_and_descriptors_are_counted) {
  ScriptedKernel inner;
  inner.on<uapi::iommufd::IoasAlloc>([](auto&) { return 0; });
  inner.on_number(uapi::vfio::get_api_version, [](unsigned long) { return 0; });
  CountingKernel kernel{inner};
  const int fd = kernel.open("/dev/iommu", O_RDWR);
  uapi::iommufd::IoasAlloc alloc;
  uapi::iommufd::Destroy destroy;
  EXPECT_EQ(call(kernel, fd, alloc), 0);
  EXPECT_EQ(call(kernel, fd, alloc), 0);
  EXPECT_EQ(call(kernel, fd, destroy), ENOTTY);
  kernel.ioctl_value(fd, uapi::vfio::get_api_version, 0);
  EXPECT_EQ(kernel.calls(uapi::iommufd::IoasAlloc::request), 2U);
  EXPECT_EQ(kernel.calls(), 4U);
  EXPECT_EQ(kernel.failures(), 1U);
  const int copy = kernel.duplicate(fd);
  EXPECT_EQ(kernel.open_descriptors(), 2);
  kernel.close(copy);
  kernel.close(fd);
  EXPECT_EQ(kernel.open_descriptors(), 0);
}

TEST(DecoratorTest, a_rule_fails_the_nth_call_before_or_after_it_took_effect) {
  ScriptedKernel inner;
  int effects = 0;
  inner.on<uapi::iommufd::IoasAlloc>([&](auto&) {
    ++effects;
    return 0;
  });
  FailingKernel kernel{inner};
  kernel.add({.request = uapi::iommufd::IoasAlloc::request, .nth = 2, .times = 2, .os_errno = EBUSY});
  kernel.add({.request = uapi::iommufd::IoasAlloc::request, .nth = 5, .os_errno = EIO, .after_call = true});
  uapi::iommufd::IoasAlloc alloc;
  std::vector<int> answers;
  for (int i = 0; i < 6; ++i) answers.push_back(call(kernel, 3, alloc));
  EXPECT_EQ(answers, (std::vector<int>{0, EBUSY, EBUSY, 0, EIO, 0}));
  EXPECT_EQ(effects, 4);
}

TEST(DecoratorTest, fault_points_reach_every_kind_of_call) {
  ScriptedKernel inner;
  FailingKernel kernel{inner};
  kernel.set_fault_errno(ENFILE);
  for (std::uint64_t n = 1; n <= 3; ++n) {
    base::arm_fault(static_cast<std::uint32_t>(base::FaultKind::kernel_call), n);
    EXPECT_EQ(kernel.open("/dev/iommu", O_RDWR) == -ENFILE, n == 1);
    EXPECT_EQ(kernel.duplicate(3) == -ENFILE, n == 2);
    EXPECT_EQ(kernel.ioctl_value(3, uapi::vfio::get_api_version, 0) == -ENFILE, n == 3);
    EXPECT_TRUE(base::disarm_fault());
  }
}

TEST(DecoratorTest, latency_is_added_to_the_call_that_was_named) {
  ScriptedKernel inner;
  inner.on<uapi::iommufd::IoasAlloc>([](auto&) { return 0; });
  DelayingKernel kernel{inner};
  kernel.delay(uapi::iommufd::IoasAlloc::request, std::chrono::milliseconds{2});
  uapi::iommufd::IoasAlloc alloc;
  const auto before = std::chrono::steady_clock::now();
  call(kernel, 3, alloc);
  EXPECT_GE(std::chrono::steady_clock::now() - before, std::chrono::milliseconds{2});
}

TEST(DecoratorTest, ioctls_have_names) {
  EXPECT_EQ(ioctl_name(uapi::iommufd::IoasMap::request), "IOAS_MAP");
  EXPECT_EQ(ioctl_name(uapi::iommufd::HwQueueAlloc::request), "HW_QUEUE_ALLOC");
  EXPECT_EQ(ioctl_name(uapi::vfio::Type1DmaUnmap::request), "VFIO_IOMMU_UNMAP_DMA");
  EXPECT_EQ(ioctl_name(uapi::vfio::group_get_device_fd), "VFIO_GROUP_GET_DEVICE_FD");
  EXPECT_EQ(ioctl_name(0x5401), "other");
}

TEST(SysfsTest, reserved_regions_leave_out_what_the_kernel_gives_up) {
  EXPECT_EQ(parse_reserved_regions("0x00000000fee00000 0x00000000feefffff msi\n"
                                   "0x0000000000000000 0x0000000000ffffff direct-relaxable\n"
                                   "0x000000fd00000000 0x000000ffffffffff reserved\n"
                                   "nonsense\n0x5 0x4 reserved\n0x00000000000a0000 0x00000000000bffff direct\n"),
            (Ranges{range(0xa0000, 0xbffff), range(0xfee00000, 0xfeefffff), range(0xfd00000000, 0xffffffffff)}));
  EXPECT_TRUE(parse_reserved_regions("").empty());
}

TEST(SysfsTest, the_inventory_reads_a_tree_like_linux_has) {
  const fs::path root = fs::path{testing::TempDir()} / "iovane-sysfs";
  fs::remove_all(root);
  const fs::path device = root / "bus/pci/devices/0000:00:03.0";
  fs::create_directories(device / "vfio-dev/vfio4");
  fs::create_directories(root / "bus/pci/drivers/vfio-pci");
  fs::create_directories(root / "kernel/iommu_groups/12");
  fs::create_directories(root / "bus/pci/devices/0000:00:01.0");
  std::ofstream{device / "vendor"} << "0x1234\n";
  std::ofstream{device / "device"} << "0x11e8\n";
  std::ofstream{device / "numa_node"} << "-1\n";
  std::ofstream{root / "kernel/iommu_groups/12/reserved_regions"} << "0xfee00000 0xfeefffff msi\n";
  fs::create_directory_symlink(root / "bus/pci/drivers/vfio-pci", device / "driver");
  fs::create_directory_symlink(root / "kernel/iommu_groups/12", device / "iommu_group");
  SystemKernel kernel{root.string()};
  const auto devices = kernel.pci_devices();
  fs::remove_all(root);
  ASSERT_TRUE(devices) << devices.error().message();
  ASSERT_EQ(devices->size(), 2U);
  EXPECT_EQ((*devices)[0].address, "0000:00:01.0");
  EXPECT_EQ((*devices)[0].group, -1);
  const PciDevice& found = (*devices)[1];
  EXPECT_EQ(found.vendor, 0x1234);
  EXPECT_EQ(found.device, 0x11e8);
  EXPECT_EQ(found.driver, "vfio-pci");
  EXPECT_EQ(found.group, 12);
  EXPECT_EQ(found.cdev, "/dev/vfio/devices/vfio4");
  EXPECT_EQ(found.numa_node, -1);
  EXPECT_EQ(found.reserved, Ranges{range(0xfee00000, 0xfeefffff)});
  EXPECT_EQ(SystemKernel{"/nowhere"}.pci_devices().error().code, Errc::not_found);
}

TEST(SystemKernelTest, failures_are_negative_errnos) {
  SystemKernel kernel;
  EXPECT_EQ(kernel.open("/nonexistent/iommu", O_RDWR), -ENOENT);
  EXPECT_EQ(kernel.close(-1), -EBADF);
  EXPECT_EQ(kernel.duplicate(-1), -EBADF);
  uapi::iommufd::IoasAlloc alloc;
  const int null = kernel.open("/dev/null", O_RDWR);
  ASSERT_GE(null, 0);
  EXPECT_EQ(call(kernel, null, alloc), ENOTTY);
  EXPECT_EQ(kernel.ioctl_value(null, uapi::vfio::get_api_version, 0), -ENOTTY);
  EXPECT_FALSE(kernel.map_memory(null, 0, 4096, true));
  EXPECT_EQ(kernel.close(null), 0);
}

TEST(SystemKernelTest, memlock_is_what_the_process_has) {
  rlimit limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_MEMLOCK, &limit), 0);
  const MemlockUse use = SystemKernel{}.memlock();
  EXPECT_EQ(use.limit.has_value(), limit.rlim_cur != RLIM_INFINITY);
  if (use.limit) {
    EXPECT_EQ(use.limit->value, limit.rlim_cur);
  }
  EXPECT_EQ(SystemKernel{}.description().substr(0, 6), "Linux ");
}

TEST(DescriptorTest, errors_of_open_name_path_and_cure) {
  ScriptedKernel kernel;
  for (const int os_errno : {ENOENT, EACCES, EBUSY, ENODEV}) {
    kernel.deny("/dev/iommu", os_errno);
    const auto failed = open_descriptor(kernel, "/dev/iommu", {});
    ASSERT_FALSE(failed);
    EXPECT_EQ(failed.error().os_errno, os_errno);
    EXPECT_NE(failed.error().detail().find("/dev/iommu: "), std::string::npos) << failed.error().detail();
    EXPECT_NE(failed.error().detail().find("; "), std::string::npos) << failed.error().detail();
  }
  const auto borrowed = open_descriptor(kernel, "/dev/iommu", {.fd = 9, .duplicate = false});
  EXPECT_EQ(borrowed->get(), 9);
  EXPECT_EQ(kernel.open_count, 0);
}

}  // namespace
}  // namespace iovane::backends
