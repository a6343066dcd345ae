#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "model_support.hpp"

namespace iovane::backends::model {
namespace {

constexpr std::uint64_t k4 = 4096;
constexpr std::uint64_t u64_max = ~0ULL;

class Iommufd : public ::testing::Test {
 protected:
  explicit Iommufd(const ModelOptions& options = {}) : host{make_host(options)}, user{*host}, cdev{*host, 0} {
    ioas = user.ioas();
    EXPECT_EQ(cdev.bind(user.fd), 0);
  }
  void TearDown() override {
    cdev.close();
    user.close();
    EXPECT_EQ(host->usage(), ModelUsage{}) << "something was not given back";
  }
  bool device_reads(std::uint64_t iova, const std::byte* expected, std::size_t bytes) {
    std::vector<std::byte> got(bytes);
    return host->device(0).dma_read(Iova{iova}, got).ok() && std::memcmp(got.data(), expected, bytes) == 0;
  }
  bool reachable(std::uint64_t iova) {
    std::byte b{};
    return host->device(0).dma_read(Iova{iova}, {&b, 1}).ok();
  }
  std::unique_ptr<ModelKernel> host;
  IommufdUser user;
  CdevUser cdev;
  std::uint32_t ioas = 0;
};

TEST_F(Iommufd, MapsMemoryForADeviceAndTakesItAway) {
  TestMemory memory{4 * k4};
  const auto data = pattern(memory.size(), 1);
  std::memcpy(memory.data(), data.data(), data.size());
  ASSERT_EQ(user.map(ioas, 0x100000, memory.address(), memory.size()), 0);
  EXPECT_FALSE(reachable(0x100000)) << "not attached yet";
  EXPECT_EQ(host->usage().pinned, Bytes{0}) << "nothing is pinned before a table exists";
  ASSERT_EQ(cdev.attach(ioas), 0);
  EXPECT_NE(cdev.hwpt, ioas);
  EXPECT_EQ(host->usage().pinned, Bytes{4 * k4});
  EXPECT_EQ(host->usage().charged_user, Bytes{4 * k4});
  EXPECT_TRUE(device_reads(0x100000, data.data(), data.size()));
  ASSERT_EQ(user.unmap(ioas, 0x100000, memory.size()), 0);
  EXPECT_EQ(user.unmapped, memory.size());
  EXPECT_FALSE(reachable(0x100000));
  EXPECT_EQ(host->usage().pinned, Bytes{0});
}

// ---- errno tables: input -> errno, as kernel-facts and drivers/iommu/iommufd give them ----

struct MapCase {
  const char* what;
  std::uint32_t flags;
  std::uint64_t iova;
  std::uint64_t address;  // relative to the buffer unless absolute
  std::uint64_t length;
  long expected;
  bool absolute = false;
};

TEST_F(Iommufd, MapAnswersWithTheKernelsErrno) {
  ASSERT_EQ(cdev.attach(ioas), 0);
  TestMemory memory{16 * k4};
  constexpr std::uint32_t fixed_rw =
      fd_api::ioas_map_fixed_iova | fd_api::ioas_map_readable | fd_api::ioas_map_writeable;
  ASSERT_EQ(user.map(ioas, 0x200000, memory.address(), 4 * k4), 0);
  void* const read_only = ::mmap(nullptr, k4, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  void* const gone = ::mmap(nullptr, k4, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ::munmap(gone, k4);
  const auto ro = std::bit_cast<std::uint64_t>(read_only);
  const MapCase cases[] = {
      {"unknown flag", fixed_rw | 8, 0x10000, 0, k4, -EOPNOTSUPP},
      {"no right", fd_api::ioas_map_fixed_iova, 0x10000, 0, k4, -EINVAL},
      {"zero length", fixed_rw, 0x10000, 0, 0, -EINVAL},
      {"length 2^64-1", fixed_rw, 0x10000, 0, u64_max, -EOVERFLOW},
      {"iova 2^64-1", fixed_rw, u64_max, 0, k4, -EOVERFLOW},
      {"iova wraps", fixed_rw, u64_max - k4 + 1, 0, 2 * k4, -EOVERFLOW},
      {"misaligned iova", fixed_rw, 0x10800, 0, k4, -EINVAL},
      {"misaligned length", fixed_rw, 0x10000, 0, 0x800, -EINVAL},
      {"misaligned address", fixed_rw, 0x10000, 0x10, k4, -EINVAL},
      {"address wraps", fixed_rw, 0x10000, u64_max - k4 + 1, 2 * k4, -EOVERFLOW, true},
      {"the same again", fixed_rw, 0x200000, 0, 4 * k4, -EEXIST},
      {"overlap from below", fixed_rw, 0x1ff000, 0, 2 * k4, -EEXIST},
      {"overlap from above", fixed_rw, 0x203000, 0, 2 * k4, -EEXIST},
      {"inside", fixed_rw, 0x201000, 0, k4, -EEXIST},
      {"reserved: MSI", fixed_rw, 0xfee00000, 0, k4, -EINVAL},
      {"reserved: runs into MSI", fixed_rw, 0xfedff000, 0, 2 * k4, -EINVAL},
      {"beyond the aperture", fixed_rw, 1ULL << 48, 0, k4, -EINVAL},
      {"runs out of the aperture", fixed_rw, (1ULL << 48) - k4, 0, 2 * k4, -EINVAL},
      {"reserved wins over overlap", fixed_rw, 0x200000, 0, 0xfee00000, -EINVAL},
      {"unmapped memory", fixed_rw, 0x10000, std::bit_cast<std::uint64_t>(gone), k4, -EFAULT, true},
      {"memory of nobody", fixed_rw, 0x10000, 0x1000, k4, -EFAULT, true},
      {"read-only memory for writing", fixed_rw, 0x10000, ro, k4, -EFAULT, true},
      {"read-only memory for reading", fd_api::ioas_map_fixed_iova | fd_api::ioas_map_readable, 0x10000, ro, k4, 0,
       true},
      {"last page of the aperture", fixed_rw, (1ULL << 48) - k4, 0, k4, 0},
      {"page zero", fixed_rw, 0, 0, k4, 0},
      {"right after", fixed_rw, 0x204000, 0, k4, 0},
  };
  for (const MapCase& c : cases) {
    const std::size_t before = host->usage().mappings;
    EXPECT_EQ(user.map(ioas, c.iova, c.absolute ? c.address : memory.address() + c.address, c.length, c.flags),
              c.expected)
        << c.what;
    EXPECT_EQ(host->usage().mappings, before + (c.expected == 0 ? 1 : 0)) << c.what;
  }
  EXPECT_EQ(user.map(77, 0x900000, memory.address(), k4), -ENOENT);
  EXPECT_EQ(user.map(cdev.id, 0x900000, memory.address(), k4), -ENOENT) << "an id of something else";
  EXPECT_EQ(host->usage().pinned.value, host->usage().charged_user.value);
  ::munmap(read_only, k4);
}

TEST_F(Iommufd, StructureSizesFollowTheConvention) {
  struct Longer {
    fd_api::IoasAlloc alloc;
    std::uint32_t tail = 0;
  } longer;
  longer.alloc.size = sizeof longer;
  EXPECT_EQ(host->ioctl(user.fd, fd_api::IoasAlloc::request, &longer), 0);
  longer.tail = 1;
  EXPECT_EQ(host->ioctl(user.fd, fd_api::IoasAlloc::request, &longer), -E2BIG);
  fd_api::IoasAlloc shorter{.size = 8};
  EXPECT_EQ(user.call(shorter), -EINVAL);
  fd_api::IoasAlloc flagged{.flags = 1};
  EXPECT_EQ(user.call(flagged), -EOPNOTSUPP);
  EXPECT_EQ(host->ioctl(user.fd, fd_api::IoasAlloc::request, nullptr), -EFAULT);
  std::uint32_t unknown = 4;
  EXPECT_EQ(host->ioctl(user.fd, fd_api::ioctl_number(0xf0), &unknown), -ENOTTY);
  EXPECT_EQ(host->ioctl(user.fd, fd_api::ioctl_number(0x9f), &unknown), -ENOTTY);
  EXPECT_EQ(host->ioctl(first_descriptor + 500, fd_api::IoasAlloc::request, &flagged), -EBADF);
  EXPECT_EQ(host->ioctl(0, fd_api::IoasAlloc::request, &flagged), -EBADF);
}

TEST_F(Iommufd, UnmapTakesWholeAreasAndStopsWhereItWouldCut) {
  ASSERT_EQ(cdev.attach(ioas), 0);
  TestMemory memory{16 * k4};
  for (const std::uint64_t i : {0, 1, 2, 4}) {
    ASSERT_EQ(user.map(ioas, 0x100000 + 2 * i * k4, memory.address() + 2 * i * k4, 2 * k4), 0);
  }
  EXPECT_EQ(user.unmap(ioas, 0x100000, 0), -EINVAL);
  EXPECT_EQ(user.unmap(ioas, 0x100000, u64_max), -EOVERFLOW);
  EXPECT_EQ(user.unmap(ioas, u64_max, k4), -EOVERFLOW);
  EXPECT_EQ(user.unmap(ioas, u64_max - k4 + 1, 2 * k4), -EOVERFLOW);
  EXPECT_EQ(user.unmap(55, 0x100000, k4), -ENOENT);
  EXPECT_EQ(user.unmap(ioas, 0x700000, k4), -ENOENT) << "nothing there";
  EXPECT_EQ(user.unmap(ioas, 0x100000, k4), -ENOENT) << "cuts the first";
  EXPECT_EQ(user.unmap(ioas, 0x101000, k4), -ENOENT);
  EXPECT_TRUE(reachable(0x100000));
  // The kernel does not look ahead: what lies before the cut is gone.
  EXPECT_EQ(user.unmap(ioas, 0x100000, 3 * k4), -ENOENT);
  EXPECT_FALSE(reachable(0x100000));
  EXPECT_TRUE(reachable(0x102000));
  // Several areas and a hole at once; misaligned borders are fine as long as nothing is cut.
  EXPECT_EQ(user.unmap(ioas, 0x101800, 0x8800), 0);
  EXPECT_EQ(user.unmapped, 6 * k4);
  EXPECT_EQ(user.unmap(ioas, 0, u64_max), 0) << "everything, of nothing";
  EXPECT_EQ(user.unmapped, 0U);
  EXPECT_EQ(user.unmap(ioas, 0, u64_max - 1), -ENOENT);
}

TEST_F(Iommufd, ChoosesAnIovaAsTheKernelDoes) {
  constexpr std::uint32_t rw = fd_api::ioas_map_readable | fd_api::ioas_map_writeable;
  TestMemory memory{8 << 20, 4 << 20};
  ASSERT_EQ(cdev.attach(ioas), 0);
  ASSERT_EQ(user.map(ioas, 0, memory.address() + k4, k4, rw), 0);
  EXPECT_EQ(user.last_iova, k4) << "never zero";
  ASSERT_EQ(user.map(ioas, 0, memory.address() + k4, 2 * k4, rw), 0);
  EXPECT_EQ(user.last_iova, 2 * k4) << "the memory's alignment is one page";
  ASSERT_EQ(user.map(ioas, 0, memory.address(), 16 * k4, rw), 0);
  EXPECT_EQ(user.last_iova, 16 * k4) << "aligned to its length";
  ASSERT_EQ(user.map(ioas, 0, memory.address(), 8 << 20, rw), 0);
  EXPECT_EQ(user.last_iova, 2U << 20) << "aligned to 2 MiB at most";
  ASSERT_EQ(user.map(ioas, 0, memory.address(), k4, rw), 0);
  EXPECT_EQ(user.last_iova, 4 * k4) << "the first gap";
  // Only inside what is allowed.
  ASSERT_EQ(user.allow(ioas, {{0x40000000, 0x4000ffff}, {0x80000000, 0x8fffffff}}), 0);
  ASSERT_EQ(user.map(ioas, 0, memory.address(), 16 * k4, rw), 0);
  EXPECT_EQ(user.last_iova, 0x40000000U);
  ASSERT_EQ(user.map(ioas, 0, memory.address(), 16 * k4, rw), 0);
  EXPECT_EQ(user.last_iova, 0x80000000U);
  ASSERT_EQ(user.allow(ioas, {{0x40000000, 0x4000ffff}}), 0);
  EXPECT_EQ(user.map(ioas, 0, memory.address(), k4, rw), -ENOSPC);
  EXPECT_EQ(user.map(ioas, 0x50000000, memory.address(), k4), 0) << "fixed maps do not ask what is allowed";
  EXPECT_EQ(user.map(ioas, 0, memory.address() + 8, k4, rw), -EINVAL) << "memory below the alignment of the tables";
}

TEST_F(Iommufd, AnUnattachedIoasHasNoAlignmentAndKeepsOffsets) {
  constexpr std::uint32_t rw = fd_api::ioas_map_readable | fd_api::ioas_map_writeable;
  EXPECT_EQ(user.ranges(ioas), (std::vector{IovaRange::everything()}));
  EXPECT_EQ(user.alignment, 1U);
  TestMemory memory{4 * k4};
  ASSERT_EQ(user.map(ioas, 0, memory.address() + 8, 100, rw), 0);
  EXPECT_EQ(user.last_iova, k4 + 8);
  ASSERT_EQ(user.map(ioas, 12345, memory.address() + 8, 10), 0);
  // A table cannot take them.
  EXPECT_EQ(cdev.attach(ioas), -EADDRINUSE);
  ASSERT_EQ(user.unmap(ioas, 0, u64_max), 0);
  EXPECT_EQ(cdev.attach(ioas), 0);
  EXPECT_EQ(user.ranges(ioas),
            (std::vector{IovaRange{Iova{0}, Iova{0xfedfffff}}, IovaRange{Iova{0xfef00000}, Iova{(1ULL << 48) - 1}}}));
  EXPECT_EQ(user.alignment, k4);
  ASSERT_EQ(cdev.detach(), 0);
  EXPECT_EQ(user.ranges(ioas), (std::vector{IovaRange::everything()}));
}

TEST_F(Iommufd, IovaRangesSaysHowMuchRoomItNeeds) {
  ASSERT_EQ(cdev.attach(ioas), 0);
  fd_api::IovaRange one{};
  fd_api::IoasIovaRanges c{.ioas_id = ioas, .num_iovas = 1, .allowed_iovas = std::bit_cast<std::uint64_t>(&one)};
  EXPECT_EQ(user.call(c), -EMSGSIZE);
  EXPECT_EQ(c.num_iovas, 2U);
  EXPECT_EQ(one.last, 0xfedfffffU);
  c = {.ioas_id = ioas, .reserved = 1};
  EXPECT_EQ(user.call(c), -EOPNOTSUPP);
  c = {.ioas_id = 99};
  EXPECT_EQ(user.call(c), -ENOENT);
}

TEST_F(Iommufd, AttachingRefusesToCutWhatIsLiveOrPromised) {
  TestMemory memory{2 * k4};
  ASSERT_EQ(user.map(ioas, 0xfee01000, memory.address(), k4), 0) << "no device: no hole yet";
  EXPECT_EQ(cdev.attach(ioas), -EADDRINUSE);
  EXPECT_EQ(host->usage().pinned, Bytes{0});
  EXPECT_EQ(user.ranges(ioas), (std::vector{IovaRange::everything()})) << "nothing half done";
  ASSERT_EQ(user.unmap(ioas, 0xfee01000, k4), 0);
  EXPECT_EQ(user.allow(ioas, {{0x1000, 0x1000}}), -EINVAL) << "one address is no range there";
  EXPECT_EQ(user.allow(ioas, {{0x1000, 0x2fff}, {0x2000, 0x3fff}}), -EINVAL);
  ASSERT_EQ(user.allow(ioas, {{0xf0000000, 0xffffffff}}), 0);
  EXPECT_EQ(cdev.attach(ioas), -EADDRINUSE);
  ASSERT_EQ(user.allow(ioas, {{0x1000, 0xefffffff}}), 0);
  ASSERT_EQ(cdev.attach(ioas), 0);
  EXPECT_EQ(user.allow(ioas, {{0xfee00000, 0xfeefffff}}), -EADDRINUSE);
  EXPECT_EQ(user.map(ioas, 1ULL << 48, memory.address(), k4), -EINVAL);
}

TEST_F(Iommufd, AttachPinsWhatWasOnlyRecorded) {
  TestMemory memory{4 * k4};
  ASSERT_EQ(user.map(ioas, 0x10000, memory.address(), 2 * k4), 0);
  ASSERT_EQ(user.map(ioas, 0x20000, 0x1000, k4), 0) << "recorded, not looked at";
  EXPECT_EQ(cdev.attach(ioas), -EFAULT);
  EXPECT_EQ(host->usage().pinned, Bytes{0});
  ASSERT_EQ(user.unmap(ioas, 0x20000, k4), 0);
  ASSERT_EQ(cdev.attach(ioas), 0);
  EXPECT_EQ(host->usage().pinned, Bytes{2 * k4});
  ASSERT_EQ(cdev.detach(), 0);
  EXPECT_EQ(host->usage().pinned, Bytes{0});
  EXPECT_FALSE(reachable(0x10000));
  ASSERT_EQ(cdev.attach(ioas), 0);
  EXPECT_TRUE(reachable(0x10000));
}

TEST_F(Iommufd, CopySharesPinsAndTakesAnyMappedPart) {
  const std::uint32_t staging = user.ioas();
  TestMemory memory{8 * k4};
  const auto data = pattern(memory.size(), 4);
  std::memcpy(memory.data(), data.data(), data.size());
  ASSERT_EQ(user.map(staging, 0x100000, memory.address(), 4 * k4), 0);
  ASSERT_EQ(user.map(staging, 0x104000, memory.address() + 4 * k4, 4 * k4,
                     fd_api::ioas_map_fixed_iova | fd_api::ioas_map_readable),
            0);
  ASSERT_EQ(cdev.attach(ioas), 0);
  // Holding the pins without any device in the staging IOAS.
  fd_api::HwptAlloc holder{.dev_id = cdev.id, .pt_id = staging};
  ASSERT_EQ(user.call(holder), 0);
  EXPECT_EQ(host->usage().pinned, Bytes{8 * k4});
  constexpr std::uint32_t fixed_r = fd_api::ioas_map_fixed_iova | fd_api::ioas_map_readable;
  ASSERT_EQ(user.copy(ioas, 0x500000, staging, 0x103000, 2 * k4, fixed_r), 0) << "across the border";
  EXPECT_EQ(host->usage().pinned, Bytes{8 * k4}) << "no second pin";
  EXPECT_TRUE(device_reads(0x500000, data.data() + 3 * k4, 2 * k4));
  EXPECT_EQ(user.copy(ioas, 0x600000, staging, 0x103000, 2 * k4), -EPERM) << "writing, of a read-only area";
  EXPECT_FALSE(reachable(0x600000)) << "all or nothing";
  EXPECT_EQ(user.copy(ioas, 0x600000, staging, 0x107000, 2 * k4, fixed_r), -ENOENT) << "a hole at its last page";
  EXPECT_EQ(user.copy(ioas, 0x600000, staging, 0x0ff000, 2 * k4, fixed_r), -ENOENT);
  EXPECT_EQ(user.copy(ioas, 0x501000, staging, 0x100000, k4, fixed_r), -EEXIST);
  EXPECT_EQ(user.copy(ioas, 0x600000, staging, 0x100000, 0, fixed_r), -EINVAL);
  EXPECT_EQ(user.copy(88, 0x600000, staging, 0x100000, k4, fixed_r), -ENOENT);
  EXPECT_EQ(user.copy(ioas, 0x600000, 88, 0x100000, k4, fixed_r), -ENOENT);
  EXPECT_EQ(user.copy(ioas, 0x600000, staging, 0x100000, k4, fixed_r | 16), -EOPNOTSUPP);
  EXPECT_EQ(user.copy(ioas, 0x600000, staging, 0x100000, k4, fd_api::ioas_map_fixed_iova), -EINVAL);
  // The two parts are areas of their own.
  EXPECT_EQ(user.unmap(ioas, 0x500000, k4), 0);
  EXPECT_FALSE(reachable(0x500000));
  EXPECT_TRUE(reachable(0x501000));
  // The source goes first: the copy keeps its page.
  EXPECT_EQ(user.destroy(staging), -EBUSY) << "an HWPT uses it";
  ASSERT_EQ(user.destroy(holder.out_hwpt_id), 0);
  EXPECT_EQ(host->usage().pinned, Bytes{k4});
  ASSERT_EQ(user.destroy(staging), 0);
  EXPECT_EQ(host->usage().pinned, Bytes{k4});
  EXPECT_TRUE(device_reads(0x501000, data.data() + 4 * k4, k4));
  ASSERT_EQ(user.unmap(ioas, 0x501000, k4), 0);
  EXPECT_EQ(host->usage().pinned, Bytes{0});
}

TEST_F(Iommufd, MapFileNeedsMemoryOfAFile) {
  const int memfd = ::memfd_create("pages", MFD_CLOEXEC);
  ASSERT_EQ(::ftruncate(memfd, 4 * k4), 0);
  const auto data = pattern(2 * k4, 5);
  ASSERT_EQ(::pwrite(memfd, data.data(), data.size(), k4), static_cast<ssize_t>(data.size()));
  ASSERT_EQ(cdev.attach(ioas), 0);
  constexpr std::uint32_t fixed_rw =
      fd_api::ioas_map_fixed_iova | fd_api::ioas_map_readable | fd_api::ioas_map_writeable;
  fd_api::IoasMapFile c{
      .flags = fixed_rw, .ioas_id = ioas, .fd = memfd, .start = k4, .length = 2 * k4, .iova = 0x30000};
  ASSERT_EQ(user.call(c), 0);
  EXPECT_TRUE(device_reads(0x30000, data.data(), data.size()));
  const std::byte mark{0x5a};
  ASSERT_TRUE(host->device(0).dma_write(Iova{0x31000}, {&mark, 1}).ok());
  std::byte seen{};
  ASSERT_EQ(::pread(memfd, &seen, 1, 2 * k4), 1);
  EXPECT_EQ(seen, mark);
  c = {.flags = fixed_rw, .ioas_id = ioas, .fd = memfd, .start = 3 * k4, .length = 2 * k4, .iova = 0x40000};
  EXPECT_EQ(user.call(c), -EINVAL) << "beyond the file";
  c = {.flags = fixed_rw, .ioas_id = ioas, .fd = 100000, .start = 0, .length = k4, .iova = 0x40000};
  EXPECT_EQ(user.call(c), -EBADF);
  const int null_fd = ::open("/dev/null", O_RDWR | O_CLOEXEC);
  c.fd = null_fd;
  EXPECT_EQ(user.call(c), -EINVAL) << "no memory file";
  ::close(null_fd);
  c = {.flags = fd_api::ioas_map_fixed_iova, .ioas_id = ioas, .fd = memfd, .start = 0, .length = k4, .iova = 0x40000};
  EXPECT_EQ(user.call(c), -EINVAL) << "no right";
  ::close(memfd);
  EXPECT_TRUE(reachable(0x30000)) << "the mapping holds the file";
  EXPECT_EQ(host->usage().pinned, Bytes{2 * k4});
}

TEST_F(Iommufd, OptionsSetAndGet) {
  fd_api::Option c{.option_id = fd_api::option_rlimit_mode, .op = fd_api::option_op_set, .val64 = 1};
  EXPECT_EQ(user.call(c), -EBUSY) << "objects exist";
  IommufdUser fresh{*host};
  EXPECT_EQ(fresh.call(c), 0);
  c = {.option_id = fd_api::option_rlimit_mode, .op = fd_api::option_op_get};
  EXPECT_EQ(fresh.call(c), 0);
  EXPECT_EQ(c.val64, 1U);
  c = {.option_id = fd_api::option_rlimit_mode, .op = fd_api::option_op_set, .val64 = 7};
  EXPECT_EQ(fresh.call(c), -EINVAL);
  c = {.option_id = fd_api::option_rlimit_mode, .op = fd_api::option_op_set, .object_id = 1};
  EXPECT_EQ(fresh.call(c), -EOPNOTSUPP);
  c = {.option_id = 9, .op = fd_api::option_op_get};
  EXPECT_EQ(user.call(c), -EOPNOTSUPP);
  c = {.option_id = fd_api::option_huge_pages, .op = fd_api::option_op_get, .object_id = 33};
  EXPECT_EQ(user.call(c), -ENOENT);
  c = {.option_id = fd_api::option_huge_pages, .op = fd_api::option_op_set, .object_id = ioas, .val64 = 0};
  EXPECT_EQ(user.call(c), 0);
  EXPECT_TRUE(user.ranges(ioas).size() == 1 && user.alignment == k4);
  // With a table that holds something the choice is made.
  TestMemory memory{k4};
  ASSERT_EQ(cdev.attach(ioas), 0);
  c.val64 = 1;
  EXPECT_EQ(user.call(c), 0);
  ASSERT_EQ(user.map(ioas, 0x1000, memory.address(), k4), 0);
  c.val64 = 0;
  EXPECT_EQ(user.call(c), -EINVAL);
}

TEST_F(Iommufd, ObjectsInUseCannotBeDestroyed) {
  EXPECT_EQ(user.destroy(1234), -ENOENT);
  EXPECT_EQ(user.destroy(cdev.id), -EBUSY) << "a bound device";
  ASSERT_EQ(cdev.attach(ioas), 0);
  EXPECT_EQ(user.destroy(ioas), -EBUSY);
  EXPECT_EQ(user.destroy(cdev.hwpt), -EBUSY);
  const std::uint32_t hwpt = cdev.hwpt;
  ASSERT_EQ(cdev.detach(), 0);
  EXPECT_EQ(user.destroy(hwpt), -ENOENT) << "an automatic table goes with its last device";
  EXPECT_EQ(user.destroy(ioas), 0);
  EXPECT_EQ(user.map(ioas, 0, 0x1000, k4), -ENOENT);
}

TEST_F(Iommufd, BindAndAttachAnswerWithTheKernelsErrno) {
  EXPECT_EQ(cdev.bind(user.fd), -EINVAL) << "bound already";
  CdevUser again{*host, 0};
  vfio_api::DeviceInfo info;
  EXPECT_EQ(host->ioctl(again.fd, info.request, &info), -EINVAL) << "not bound";
  EXPECT_EQ(again.attach(ioas), -EINVAL);
  EXPECT_EQ(again.bind(user.fd), -EINVAL) << "bound through another file";
  CdevUser other{*host, 1};
  EXPECT_EQ(other.bind(-1), -EINVAL);
  EXPECT_EQ(other.bind(first_descriptor + 999), -EBADF);
  EXPECT_EQ(other.bind(cdev.fd), -EBADFD) << "not an iommufd";
  EXPECT_EQ(cdev.attach(555), -ENOENT);
  EXPECT_EQ(cdev.attach(cdev.id), -EINVAL) << "not a table";
  EXPECT_EQ(cdev.detach(), 0) << "not attached is fine";
  EXPECT_EQ(host->ioctl(cdev.fd, info.request, &info), 0);
  EXPECT_EQ(info.num_regions, 9U);
  EXPECT_EQ(host->open("/dev/vfio/0", 0), -EBUSY) << "the group is used through cdevs";
  EXPECT_EQ(host->open("/dev/vfio/17", 0), -ENOENT);
  EXPECT_EQ(host->open("/dev/vfio/devices/vfio9", 0), -ENOENT);
  EXPECT_EQ(host->open("/dev/kvm", 0), -ENOENT);
  IommufdUser stranger{*host};
  CdevUser theirs{*host, 1};
  EXPECT_EQ(theirs.bind(stranger.fd), 0);
}

TEST_F(Iommufd, ReplaceMovesADeviceBetweenSpaces) {
  const std::uint32_t second = user.ioas();
  TestMemory a{k4};
  TestMemory b{k4};
  a.data()[0] = std::byte{1};
  b.data()[0] = std::byte{2};
  ASSERT_EQ(user.map(ioas, 0x1000, a.address(), k4), 0);
  ASSERT_EQ(user.map(second, 0x1000, b.address(), k4), 0);
  ASSERT_EQ(cdev.attach(ioas), 0);
  EXPECT_TRUE(device_reads(0x1000, a.data(), 1));
  ASSERT_EQ(cdev.attach(second), 0);
  EXPECT_TRUE(device_reads(0x1000, b.data(), 1));
  EXPECT_EQ(host->usage().pinned, Bytes{k4});
  EXPECT_EQ(user.ranges(ioas).size(), 1U) << "the old space is whole again";
  EXPECT_EQ(user.ranges(second).size(), 2U);
  // A space whose mappings the device's holes would cut does not get it; it stays where it is.
  ASSERT_EQ(user.map(ioas, 0xfee00000, a.address(), k4), 0);
  EXPECT_EQ(cdev.attach(ioas), -EADDRINUSE);
  EXPECT_TRUE(device_reads(0x1000, b.data(), 1));
}

TEST_F(Iommufd, DevicesOfOneUnitShareAnAutomaticTable) {
  CdevUser second{*host, 1};
  ASSERT_EQ(second.bind(user.fd), 0);
  ASSERT_EQ(cdev.attach(ioas), 0);
  ASSERT_EQ(second.attach(ioas), 0);
  EXPECT_EQ(cdev.hwpt, second.hwpt);
  TestMemory memory{k4};
  ASSERT_EQ(user.map(ioas, 0x1000, memory.address(), k4), 0);
  std::byte b{};
  EXPECT_TRUE(host->device(1).dma_read(Iova{0x1000}, {&b, 1}).ok());
  ASSERT_EQ(second.detach(), 0);
  EXPECT_FALSE(host->device(1).dma_read(Iova{0x1000}, {&b, 1}).ok());
  EXPECT_TRUE(reachable(0x1000));
}

TEST_F(Iommufd, DirtyBitmapOrsBitsFromTheArgumentsStart) {
  fd_api::HwptAlloc hwpt{.flags = fd_api::hwpt_alloc_dirty_tracking, .dev_id = cdev.id, .pt_id = ioas};
  ASSERT_EQ(user.call(hwpt), 0);
  ASSERT_EQ(cdev.attach(hwpt.out_hwpt_id), 0);
  TestMemory memory{128 * k4};
  ASSERT_EQ(user.map(ioas, 0x100000, memory.address(), 128 * k4), 0);
  std::uint64_t words[2] = {1ULL << 63, 0};
  const auto data = std::bit_cast<std::uint64_t>(&words[0]);
  fd_api::HwptGetDirtyBitmap get{
      .hwpt_id = hwpt.out_hwpt_id, .iova = 0x101000, .length = 70 * k4, .page_size = k4, .data = data};
  EXPECT_EQ(user.call(get), -EINVAL) << "not tracking";
  fd_api::HwptSetDirtyTracking set{.flags = fd_api::hwpt_dirty_tracking_enable, .hwpt_id = hwpt.out_hwpt_id};
  ASSERT_EQ(user.call(set), 0);
  const std::byte b{1};
  for (const std::uint64_t page : {0U, 1U, 3U, 66U, 100U}) {
    ASSERT_TRUE(host->device(0).dma_write(Iova{0x100000 + page * k4}, {&b, 1}).ok());
  }
  get.flags = fd_api::hwpt_get_dirty_bitmap_no_clear;
  ASSERT_EQ(user.call(get), 0);
  EXPECT_EQ(words[0], (1ULL << 63) | 0b101U);
  EXPECT_EQ(words[1], 1ULL << (65 - 64));
  words[0] = words[1] = 0;
  get.flags = 0;
  ASSERT_EQ(user.call(get), 0);
  EXPECT_EQ(words[0], 0b101U);
  words[0] = words[1] = 0;
  ASSERT_EQ(user.call(get), 0);
  EXPECT_EQ(words[0] | words[1], 0U) << "read and cleared";
  const auto expect = [&](const char* what, fd_api::HwptGetDirtyBitmap c, long errno_expected) {
    EXPECT_EQ(user.call(c), errno_expected) << what;
  };
  expect("misaligned", {.hwpt_id = get.hwpt_id, .iova = 0x100800, .length = k4, .page_size = k4, .data = data},
         -EINVAL);
  expect("no page size", {.hwpt_id = get.hwpt_id, .iova = 0x100000, .length = k4, .data = data}, -EINVAL);
  expect("a hole", {.hwpt_id = get.hwpt_id, .iova = 0x17f000, .length = 2 * k4, .page_size = k4, .data = data},
         -EINVAL);
  expect("unknown", {.hwpt_id = 91, .iova = 0x100000, .length = k4, .page_size = k4, .data = data}, -ENOENT);
  expect("flag", {.hwpt_id = get.hwpt_id, .flags = 2, .iova = 0x100000, .length = k4, .page_size = k4, .data = data},
         -EOPNOTSUPP);
  set.flags = 4;
  EXPECT_EQ(user.call(set), -EOPNOTSUPP);
}

TEST_F(Iommufd, HwptAllocAndHardwareInfoAnswerWithTheKernelsErrno) {
  const auto alloc = [&](fd_api::HwptAlloc c) { return user.call(c); };
  EXPECT_EQ(alloc({.dev_id = 444, .pt_id = ioas}), -ENOENT);
  EXPECT_EQ(alloc({.dev_id = cdev.id, .pt_id = 444}), -EINVAL);
  EXPECT_EQ(alloc({.dev_id = cdev.id, .pt_id = cdev.id}), -EINVAL);
  EXPECT_EQ(alloc({.flags = 1U << 9, .dev_id = cdev.id, .pt_id = ioas}), -EOPNOTSUPP);
  EXPECT_EQ(alloc({.dev_id = cdev.id, .pt_id = ioas, .reserved = 1}), -EOPNOTSUPP);
  EXPECT_EQ(alloc({.dev_id = cdev.id, .pt_id = ioas, .data_len = 8}), -EINVAL);
  fd_api::HwInfo info{.dev_id = cdev.id};
  EXPECT_EQ(user.call(info), 0);
  EXPECT_EQ(info.data_type, fd_api::hw_info_type_none);
  EXPECT_EQ(info.out_capabilities, fd_api::hw_cap_dirty_tracking);
  info = {.dev_id = 60};
  EXPECT_EQ(user.call(info), -ENOENT);
}

TEST_F(Iommufd, VfioIoasIsKeptPerDescriptor) {
  fd_api::VfioIoas c{.op = fd_api::vfio_ioas_get};
  EXPECT_EQ(user.call(c), -ENODEV);
  c = {.ioas_id = 700, .op = fd_api::vfio_ioas_set};
  EXPECT_EQ(user.call(c), -ENOENT);
  c = {.ioas_id = ioas, .op = fd_api::vfio_ioas_set};
  EXPECT_EQ(user.call(c), 0);
  c = {.op = fd_api::vfio_ioas_get};
  EXPECT_EQ(user.call(c), 0);
  EXPECT_EQ(c.ioas_id, ioas);
  c = {.op = 9};
  EXPECT_EQ(user.call(c), -EOPNOTSUPP);
  EXPECT_EQ(user.destroy(ioas), 0);
  c = {.op = fd_api::vfio_ioas_get};
  EXPECT_EQ(user.call(c), -ENODEV) << "its IOAS is gone";
}

class LimitedIommufd : public Iommufd {
 protected:
  LimitedIommufd() : Iommufd{{.memlock = {.limit = Bytes{4 * k4}}, .sys_resource = false}} {}
};

TEST_F(LimitedIommufd, TheMemlockLimitIsExact) {
  TestMemory memory{8 * k4};
  ASSERT_EQ(cdev.attach(ioas), 0);
  EXPECT_EQ(user.map(ioas, 0x10000, memory.address(), 5 * k4), -ENOMEM);
  ASSERT_EQ(user.map(ioas, 0x10000, memory.address(), 3 * k4), 0);
  EXPECT_EQ(user.map(ioas, 0x20000, memory.address() + 4 * k4, 2 * k4), -ENOMEM);
  ASSERT_EQ(user.map(ioas, 0x20000, memory.address() + 4 * k4, k4), 0);
  ASSERT_EQ(user.unmap(ioas, 0x10000, 3 * k4), 0);
  ASSERT_EQ(user.map(ioas, 0x10000, memory.address(), 3 * k4), 0);
  fd_api::Option c{.option_id = fd_api::option_rlimit_mode, .op = fd_api::option_op_set, .val64 = 1};
  EXPECT_EQ(user.call(c), -EPERM);
}

class TwoUnits : public Iommufd {
 protected:
  TwoUnits()
      : Iommufd{{.iommus = {IommuOptions{}, IommuOptions{.address_bits = 39, .dirty_tracking = false}},
                 .devices = {DeviceOptions{}, DeviceOptions{.iommu = 1}}}} {}
};

TEST_F(TwoUnits, OneSpaceFillsATableForEach) {
  CdevUser narrow{*host, 1};
  ASSERT_EQ(narrow.bind(user.fd), 0);
  TestMemory memory{2 * k4};
  ASSERT_EQ(user.map(ioas, 1ULL << 40, memory.address(), k4), 0);
  ASSERT_EQ(cdev.attach(ioas), 0);
  EXPECT_EQ(narrow.attach(ioas), -EADDRINUSE) << "its aperture ends below a live mapping";
  ASSERT_EQ(user.unmap(ioas, 1ULL << 40, k4), 0);
  ASSERT_EQ(narrow.attach(ioas), 0);
  EXPECT_NE(narrow.hwpt, cdev.hwpt);
  EXPECT_EQ(user.ranges(ioas).back().last.value, (1ULL << 39) - 1);
  ASSERT_EQ(user.map(ioas, 0x5000, memory.address(), k4), 0);
  EXPECT_EQ(host->usage().pinned, Bytes{k4}) << "once for both tables";
  std::byte b{};
  EXPECT_TRUE(host->device(1).dma_read(Iova{0x5000}, {&b, 1}).ok());
  EXPECT_TRUE(reachable(0x5000));
  EXPECT_EQ(narrow.attach(cdev.hwpt), -EINVAL) << "another unit's table";
  fd_api::HwptAlloc dirty{.flags = fd_api::hwpt_alloc_dirty_tracking, .dev_id = narrow.id, .pt_id = ioas};
  EXPECT_EQ(user.call(dirty), -EOPNOTSUPP);
  ASSERT_EQ(cdev.detach(), 0);
  EXPECT_EQ(host->usage().pinned, Bytes{k4}) << "the other table still holds it";
  EXPECT_TRUE(host->device(1).dma_read(Iova{0x5000}, {&b, 1}).ok());
}

class SharedGroup : public Iommufd {
 protected:
  SharedGroup() : Iommufd{{.devices = {DeviceOptions{.group = 5}, DeviceOptions{.group = 5}}}} {}
};

TEST_F(SharedGroup, MovesAsOne) {
  CdevUser second{*host, 1};
  ASSERT_EQ(second.bind(user.fd), 0);
  TestMemory memory{k4};
  ASSERT_EQ(user.map(ioas, 0x5000, memory.address(), k4), 0);
  ASSERT_EQ(cdev.attach(ioas), 0);
  std::byte b{};
  EXPECT_TRUE(host->device(1).dma_read(Iova{0x5000}, {&b, 1}).ok()) << "the IOMMU cannot tell them apart";
  const std::uint32_t other = user.ioas();
  EXPECT_EQ(second.attach(other), -EINVAL);
  EXPECT_EQ(second.attach(ioas), 0);
  EXPECT_EQ(second.attach(other), 0) << "moves both";
  EXPECT_FALSE(reachable(0x5000));
  ASSERT_EQ(cdev.detach(), 0);
  ASSERT_EQ(second.detach(), 0);
}

TEST_F(Iommufd, DescriptorsCanBeDuplicatedAndHoldTheirObjects) {
  const int copy = host->duplicate(user.fd);
  ASSERT_GT(copy, user.fd);
  EXPECT_EQ(host->duplicate(12), -EBADF);
  TestMemory memory{k4};
  ASSERT_EQ(cdev.attach(ioas), 0);
  ASSERT_EQ(user.map(ioas, 0x1000, memory.address(), k4), 0);
  ASSERT_EQ(host->close(user.fd), 0);
  EXPECT_EQ(host->close(user.fd), -EBADF);
  user.fd = copy;
  EXPECT_TRUE(reachable(0x1000));
  user.close();
  EXPECT_TRUE(reachable(0x1000)) << "the bound device holds the descriptor's objects";
  EXPECT_EQ(host->usage().mappings, 1U);
  cdev.close();
  EXPECT_EQ(host->usage(), ModelUsage{});
}

TEST_F(Iommufd, InjectedFailuresHitTheNthCallAndDoNothingElse) {
  TestMemory memory{4 * k4};
  ASSERT_EQ(cdev.attach(ioas), 0);
  host->injection().fail(fd_api::IoasMap::request, 2, ENOMEM, 2);
  EXPECT_EQ(user.map(ioas, 0x1000, memory.address(), k4), 0);
  EXPECT_EQ(user.map(ioas, 0x2000, memory.address(), k4), -ENOMEM);
  EXPECT_EQ(user.map(ioas, 0x2000, memory.address(), k4), -ENOMEM);
  EXPECT_EQ(user.map(ioas, 0x2000, memory.address(), k4), 0);
  EXPECT_EQ(host->usage().mappings, 2U);
  host->injection().deny("/dev/iommu", EACCES);
  EXPECT_EQ(host->open("/dev/iommu", 0), -EACCES);
  host->injection().delay(fd_api::IoasUnmap::request, std::chrono::milliseconds{5});
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(user.unmap(ioas, 0x1000, k4), 0);
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds{5});
  host->injection().clear();
}

TEST(ModelKernel, OlderKernelsHaveNoMapFile) {
  auto host = make_host({.map_file = false});
  IommufdUser user{*host};
  fd_api::IoasMapFile c{.flags = 7, .ioas_id = user.ioas(), .fd = 0, .length = k4};
  EXPECT_EQ(user.call(c), -ENOTTY);
}

TEST(ModelKernel, ListsItsDevicesAsAHostWould) {
  auto host = make_host({.devices = {DeviceOptions{}, DeviceOptions{.driver = "nvme", .numa_node = 1}}});
  const auto devices = host->pci_devices();
  ASSERT_TRUE(devices.has_value());
  ASSERT_EQ(devices->size(), 2U);
  EXPECT_EQ((*devices)[0].address, "0000:00:03.0");
  EXPECT_EQ((*devices)[0].group, 0);
  EXPECT_EQ((*devices)[0].cdev, "/dev/vfio/devices/vfio0");
  EXPECT_EQ((*devices)[0].reserved, (std::vector{IovaRange{Iova{0xfee00000}, Iova{0xfeefffff}}}));
  EXPECT_EQ((*devices)[1].cdev, "");
  EXPECT_EQ((*devices)[1].numa_node, 1);
  EXPECT_EQ(host->open("/dev/vfio/1", 0), -ENOENT) << "not with VFIO";
  EXPECT_TRUE(host->description().starts_with("model"));
}

TEST(ModelKernel, RefusesImpossibleHosts) {
  EXPECT_FALSE(ModelKernel::create({.iommus = {}}).has_value());
  EXPECT_FALSE(ModelKernel::create({.iommus = {IommuOptions{.address_bits = 64}}}).has_value());
  EXPECT_FALSE(ModelKernel::create({.devices = {DeviceOptions{.iommu = 1}}}).has_value());
  EXPECT_FALSE(ModelKernel::create({.devices = {DeviceOptions{.address = "a"}, DeviceOptions{.address = "a"}}}));
}

}  // namespace
}  // namespace iovane::backends::model
