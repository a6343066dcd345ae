#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "model_support.hpp"

namespace iovane::backends::model {
namespace {

constexpr std::uint64_t k4 = 4096;
constexpr std::uint64_t u64_max = ~0ULL;

class Type1 : public ::testing::Test {
 protected:
  explicit Type1(const ModelOptions& options = {}, unsigned long type = vfio_api::type1_v2_iommu)
      : host{make_host(options)}, user{std::make_unique<Type1User>(*host, type)} {}
  void TearDown() override {
    user.reset();
    EXPECT_EQ(host->usage(), ModelUsage{}) << "something was not given back";
  }
  bool reachable(std::uint64_t iova, std::size_t device = 0) {
    std::byte b{};
    return host->device(device).dma_read(Iova{iova}, {&b, 1}).ok();
  }
  struct Info {
    long rc = 0;
    vfio_api::Type1Info fixed{};
    std::vector<IovaRange> ranges;
    std::int64_t available = -1;
    std::uint64_t bitmap_bytes_max = 0;
  };
  Info info(int fd, std::uint32_t room = 4096) {
    std::vector<std::uint64_t> words(room / 8);
    vfio_api::Type1Info ask{.argsz = room};
    std::memcpy(words.data(), &ask, std::min<std::size_t>(room, sizeof ask));
    Info result;
    result.rc = host->ioctl(fd, ask.request, words.data());
    std::memcpy(static_cast<void*>(&result.fixed), words.data(), std::min<std::size_t>(room, sizeof ask));
    const auto* const base = std::bit_cast<const std::byte*>(words.data());
    for (std::uint32_t at = room >= sizeof ask ? result.fixed.cap_offset : 0; at != 0;) {
      vfio_api::InfoCapHeader header;
      std::memcpy(static_cast<void*>(&header), base + at, sizeof header);
      if (header.id == vfio_api::type1_cap_dma_avail) {
        vfio_api::Type1CapDmaAvail cap;
        std::memcpy(static_cast<void*>(&cap), base + at, sizeof cap);
        result.available = cap.avail;
      } else if (header.id == vfio_api::type1_cap_iova_range) {
        vfio_api::Type1CapIovaRange cap;
        std::memcpy(static_cast<void*>(&cap), base + at, sizeof cap);
        for (std::uint32_t i = 0; i < cap.nr_iovas; ++i) {
          vfio_api::Type1IovaRange r;
          std::memcpy(static_cast<void*>(&r), base + at + sizeof cap + i * sizeof r, sizeof r);
          result.ranges.push_back({Iova{r.start}, Iova{r.end}});
        }
      } else if (header.id == vfio_api::type1_cap_migration) {
        vfio_api::Type1CapMigration cap;
        std::memcpy(static_cast<void*>(&cap), base + at, sizeof cap);
        result.bitmap_bytes_max = cap.max_dirty_bitmap_size;
      }
      at = header.next;
    }
    return result;
  }
  std::unique_ptr<ModelKernel> host;
  std::unique_ptr<Type1User> user;
};

struct Type1Version1 : Type1 {
  Type1Version1() : Type1{{}, vfio_api::type1_iommu} {}
};
struct Type1Small : Type1 {
  Type1Small() : Type1{{.memlock = {.limit = Bytes{4 * k4}}, .dma_entry_limit = 2}} {}
};
struct Type1Unset : Type1 {
  Type1Unset() : Type1{{}, 0} {}
};

TEST_F(Type1, MapsMemoryForADeviceAndTakesItAway) {
  TestMemory memory{4 * k4};
  const auto data = pattern(memory.size(), 7);
  ASSERT_EQ(user->map(0x100000, memory.address(), memory.size()), 0);
  ASSERT_TRUE(host->device(0).dma_write(Iova{0x100000}, data).ok());
  EXPECT_EQ(std::memcmp(memory.data(), data.data(), data.size()), 0);
  EXPECT_EQ(host->usage().charged_process, Bytes{4 * k4});
  EXPECT_EQ(host->usage().charged_user, Bytes{0});
  ASSERT_EQ(user->unmap(0x100000, memory.size()), 0);
  EXPECT_EQ(user->unmapped, memory.size());
  EXPECT_FALSE(reachable(0x100000));
}

TEST_F(Type1, MapAnswersWithTheKernelsErrno) {
  TestMemory memory{16 * k4};
  const std::uint64_t m = memory.address();
  constexpr std::uint32_t rw = vfio_api::dma_map_flag_read | vfio_api::dma_map_flag_write;
  ASSERT_EQ(user->map(0x200000, m, 4 * k4), 0);
  void* const read_only = ::mmap(nullptr, k4, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const auto ro = std::bit_cast<std::uint64_t>(read_only);
  const struct {
    const char* what;
    std::uint64_t iova, address, size;
    std::uint32_t flags;
    long expected;
  } cases[] = {
      {"unknown flag", 0x10000, m, k4, rw | 16, -EINVAL},
      {"no right", 0x10000, m, k4, 0, -EINVAL},
      {"zero size", 0x10000, m, 0, rw, -EINVAL},
      {"misaligned iova", 0x10800, m, k4, rw, -EINVAL},
      {"misaligned size", 0x10000, m, 0x800, rw, -EINVAL},
      {"misaligned address", 0x10000, m + 8, k4, rw, -EINVAL},
      {"iova wraps", u64_max - k4 + 1, m, 2 * k4, rw, -EINVAL},
      {"address wraps", 0x10000, u64_max - k4 + 1, 2 * k4, rw, -EINVAL},
      {"overlap", 0x201000, m, k4, rw, -EEXIST},
      {"overlap from below", 0x1ff000, m, 2 * k4, rw, -EEXIST},
      {"overlap wins over reserved", 0x200000, m, 0xfee00000, rw, -EEXIST},
      {"reserved", 0xfee00000, m, k4, rw, -EINVAL},
      {"runs into reserved", 0xfedff000, m, 2 * k4, rw, -EINVAL},
      {"beyond the aperture", 1ULL << 48, m, k4, rw, -EINVAL},
      {"unmapped memory", 0x10000, 0x1000, k4, rw, -EFAULT},
      {"read-only memory for writing", 0x10000, ro, k4, rw, -EFAULT},
      {"read-only memory for reading", 0x10000, ro, k4, vfio_api::dma_map_flag_read, 0},
      {"an address for a mapping that has one", 0x200000, m, 4 * k4, vfio_api::dma_map_flag_vaddr, -EINVAL},
      {"an address for nothing", 0x900000, m, k4, vfio_api::dma_map_flag_vaddr, -ENOENT},
      {"rights with an address", 0x200000, m, k4, rw | vfio_api::dma_map_flag_vaddr, -EINVAL},
  };
  for (const auto& c : cases) {
    const std::size_t before = host->usage().mappings;
    EXPECT_EQ(user->map(c.iova, c.address, c.size, c.flags), c.expected) << c.what;
    EXPECT_EQ(host->usage().mappings, before + (c.expected == 0 ? 1 : 0)) << c.what;
  }
  vfio_api::Type1DmaMap shorter{.argsz = 16};
  EXPECT_EQ(host->ioctl(user->fd, shorter.request, &shorter), -EINVAL);
  EXPECT_EQ(host->ioctl(user->fd, shorter.request, nullptr), -EFAULT);
  EXPECT_EQ(host->ioctl(user->fd, vfio_api::ioctl_number(40), &shorter), -ENOTTY);
  ::munmap(read_only, k4);
}

TEST_F(Type1, Version2UnmapsWholeMappingsOnly) {
  TestMemory memory{16 * k4};
  for (const std::uint64_t i : {0, 1, 3}) {
    ASSERT_EQ(user->map(0x100000 + 2 * i * k4, memory.address() + 2 * i * k4, 2 * k4), 0);
  }
  EXPECT_EQ(user->unmap(0x100800, k4), -EINVAL);
  EXPECT_EQ(user->unmap(0x100000, 0), -EINVAL);
  EXPECT_EQ(user->unmap(0x100000, 0x800), -EINVAL);
  EXPECT_EQ(user->unmap(u64_max - k4 + 1, 2 * k4), -EINVAL);
  EXPECT_EQ(user->unmap(0x101000, k4), -EINVAL) << "its second half";
  EXPECT_EQ(user->unmap(0x100000, 3 * k4), -EINVAL) << "cuts the second";
  EXPECT_TRUE(reachable(0x100000)) << "nothing went before the refusal";
  EXPECT_EQ(user->unmap(0x100000, k4, 64), -EINVAL);
  EXPECT_EQ(user->unmap(0x700000, k4), 0) << "nothing there";
  EXPECT_EQ(user->unmapped, 0U);
  EXPECT_EQ(user->unmap(0x100000, 0 - 0x100000ULL), 0) << "ends with the last address: wraps, removes nothing";
  EXPECT_EQ(user->unmapped, 0U);
  EXPECT_EQ(user->unmap(0x0ff000, 16 * k4), 0) << "many, with holes";
  EXPECT_EQ(user->unmapped, 6 * k4);
  ASSERT_EQ(user->map(0x100000, memory.address(), k4), 0);
  EXPECT_EQ(user->unmap(0, k4, vfio_api::dma_unmap_flag_all), -EINVAL);
  EXPECT_EQ(user->unmap(0, 0, vfio_api::dma_unmap_flag_all), 0);
  EXPECT_EQ(user->unmapped, k4);
  EXPECT_EQ(user->unmap(0, 0, vfio_api::dma_unmap_flag_all), 0);
  EXPECT_EQ(user->unmapped, 0U);
}

TEST_F(Type1Version1, GoesByWhereAMappingBegins) {
  TestMemory memory{8 * k4};
  ASSERT_EQ(user->map(0x100000, memory.address(), 4 * k4), 0);
  ASSERT_EQ(user->map(0x104000, memory.address() + 4 * k4, 4 * k4), 0);
  EXPECT_EQ(user->unmap(0x101000, k4), 0) << "the middle of one";
  EXPECT_EQ(user->unmapped, 0U);
  EXPECT_TRUE(reachable(0x101000));
  EXPECT_EQ(user->unmap(0x101000, 4 * k4), 0) << "begins in the middle of one: stops there";
  EXPECT_EQ(user->unmapped, 0U);
  EXPECT_EQ(user->unmap(0x100000, k4), 0) << "its first address takes all of it";
  EXPECT_EQ(user->unmapped, 4 * k4);
  EXPECT_EQ(user->unmap(0x102000, 3 * k4), 0) << "a hole, then the beginning of the next";
  EXPECT_EQ(user->unmapped, 4 * k4);
  vfio_api::DirtyBitmap dirty{.flags = vfio_api::dirty_pages_flag_start};
  EXPECT_EQ(host->ioctl(user->fd, dirty.request, &dirty), -EACCES);
}

TEST_F(Type1Unset, NeedsAGroupAndATypeFirst) {
  TestMemory memory{k4};
  EXPECT_EQ(user->map(0, memory.address(), k4), -EINVAL) << "no SET_IOMMU yet";
  vfio_api::Type1Info i;
  EXPECT_EQ(host->ioctl(user->fd, i.request, &i), -EINVAL);
  EXPECT_EQ(user->device("0000:00:03.0"), -EINVAL);
  const int lonely = host->open("/dev/vfio/vfio", 0);
  EXPECT_EQ(host->ioctl_value(lonely, vfio_api::set_iommu, vfio_api::type1_v2_iommu), -EINVAL) << "no group";
  EXPECT_EQ(host->ioctl_value(lonely, vfio_api::get_api_version, 0), 0);
  EXPECT_EQ(host->ioctl_value(lonely, vfio_api::check_extension, vfio_api::type1_v2_iommu), 1);
  EXPECT_EQ(host->ioctl_value(lonely, vfio_api::check_extension, vfio_api::spapr_tce_v2_iommu), 0);
  EXPECT_EQ(host->ioctl_value(lonely, vfio_api::check_extension, vfio_api::unmap_all), 1);
  host->close(lonely);
  EXPECT_EQ(host->ioctl_value(user->fd, vfio_api::set_iommu, vfio_api::spapr_tce_iommu), -ENODEV);
  EXPECT_EQ(host->ioctl_value(user->fd, vfio_api::set_iommu, vfio_api::type1_iommu), 0);
  EXPECT_EQ(host->ioctl_value(user->fd, vfio_api::set_iommu, vfio_api::type1_v2_iommu), -EINVAL) << "set already";
  EXPECT_EQ(user->map(0, memory.address(), k4), 0);
}

TEST_F(Type1, GroupsAnswerWithTheKernelsErrno) {
  vfio_api::GroupStatus status;
  ASSERT_EQ(host->ioctl(user->group_fd, status.request, &status), 0);
  EXPECT_EQ(status.flags, vfio_api::group_flags_viable | vfio_api::group_flags_container_set);
  int fd = user->fd;
  EXPECT_EQ(host->ioctl(user->group_fd, vfio_api::group_set_container, &fd), -EINVAL) << "has one";
  EXPECT_EQ(host->open("/dev/vfio/0", 0), -EBUSY);
  const int second = host->open("/dev/vfio/1", 0);
  fd = -1;
  EXPECT_EQ(host->ioctl(second, vfio_api::group_set_container, &fd), -EBADF);
  fd = first_descriptor + 900;
  EXPECT_EQ(host->ioctl(second, vfio_api::group_set_container, &fd), -EBADF);
  fd = user->group_fd;
  EXPECT_EQ(host->ioctl(second, vfio_api::group_set_container, &fd), -EBADFD);
  EXPECT_EQ(host->ioctl_value(second, vfio_api::group_unset_container, 0), -EINVAL);
  EXPECT_EQ(user->device("0000:00:04.0"), -ENODEV) << "of another group";
  const int device = user->device("0000:00:03.0");
  ASSERT_GT(device, 0);
  EXPECT_EQ(host->ioctl_value(user->group_fd, vfio_api::group_unset_container, 0), -EBUSY);
  CdevUser cdev{*host, 0};
  IommufdUser iommufd{*host};
  EXPECT_EQ(cdev.bind(iommufd.fd), -EBUSY) << "its group is open";
  vfio_api::RegionInfo bar{.index = vfio_api::pci_bar0_region_index};
  ASSERT_EQ(host->ioctl(device, bar.request, &bar), 0);
  EXPECT_EQ(bar.size, 64U * 1024);
  bar.index = 12;
  EXPECT_EQ(host->ioctl(device, bar.request, &bar), -EINVAL);
  host->close(device);
  EXPECT_EQ(host->ioctl_value(user->group_fd, vfio_api::group_unset_container, 0), 0);
  host->close(second);
}

TEST_F(Type1, InfoHasTheWholeChain) {
  const Info all = info(user->fd);
  ASSERT_EQ(all.rc, 0);
  EXPECT_EQ(all.fixed.iova_pgsizes, (1ULL << 12) | (1ULL << 21) | (1ULL << 30));
  EXPECT_EQ(all.ranges,
            (std::vector{IovaRange{Iova{0}, Iova{0xfedfffff}}, IovaRange{Iova{0xfef00000}, Iova{(1ULL << 48) - 1}}}));
  EXPECT_EQ(all.available, 65535);
  EXPECT_GT(all.bitmap_bytes_max, 0U);
  const Info little = info(user->fd, sizeof(vfio_api::Type1Info));
  EXPECT_EQ(little.rc, 0);
  EXPECT_EQ(little.fixed.cap_offset, 0U);
  EXPECT_GT(little.fixed.argsz, sizeof(vfio_api::Type1Info)) << "says what it needs";
  EXPECT_EQ(info(user->fd, little.fixed.argsz).ranges.size(), 2U) << "and that is enough";
  EXPECT_EQ(info(user->fd, 8).rc, -EINVAL);
}

TEST_F(Type1Small, LimitsAreExact) {
  TestMemory memory{8 * k4};
  EXPECT_EQ(info(user->fd).available, 2);
  EXPECT_EQ(user->map(0x10000, memory.address(), 5 * k4), -ENOMEM);
  ASSERT_EQ(user->map(0x10000, memory.address(), 3 * k4), 0);
  EXPECT_EQ(user->map(0x20000, memory.address(), 2 * k4), -ENOMEM) << "the same pages count again";
  ASSERT_EQ(user->map(0x20000, memory.address(), k4), 0);
  EXPECT_EQ(info(user->fd).available, 0);
  EXPECT_EQ(user->map(0x30000, memory.address(), k4), -ENOSPC);
  EXPECT_EQ(user->map(0xfee00000, memory.address(), k4), -ENOSPC) << "asked before the range is looked at";
  ASSERT_EQ(user->unmap(0x20000, k4), 0);
  EXPECT_EQ(info(user->fd).available, 1);
}

TEST_F(Type1, TheLastGroupTakesTheMappingsAlong) {
  TestMemory memory{k4};
  ASSERT_EQ(user->map(0x10000, memory.address(), k4), 0);
  ASSERT_EQ(host->ioctl_value(user->group_fd, vfio_api::group_unset_container, 0), 0);
  EXPECT_EQ(host->usage().mappings, 0U);
  EXPECT_FALSE(reachable(0x10000));
  EXPECT_EQ(user->map(0x10000, memory.address(), k4), -EINVAL) << "back to having no type";
  int fd = user->fd;
  ASSERT_EQ(host->ioctl(user->group_fd, vfio_api::group_set_container, &fd), 0);
  EXPECT_EQ(host->ioctl_value(user->fd, vfio_api::set_iommu, vfio_api::type1_v2_iommu), 0);
}

struct Type1TwoGroups : Type1 {
  Type1TwoGroups()
      : Type1{{.iommus = {IommuOptions{}, IommuOptions{.address_bits = 39}},
               .devices = {DeviceOptions{},
                           DeviceOptions{.iommu = 1,
                                         .reserved = {{{Iova{0x40000000}, Iova{0x40ffffff}}, ReservedKind::direct},
                                                      {{Iova{0x50000000}, Iova{0x50ffffff}},
                                                       ReservedKind::direct_relaxable}}}}}} {}
};

TEST_F(Type1TwoGroups, AFurtherGroupSeesWhatIsMappedAndNarrowsTheRest) {
  TestMemory memory{2 * k4};
  ASSERT_EQ(user->map(0x40000000, memory.address(), k4), 0);
  const int second = host->open("/dev/vfio/1", 0);
  int fd = user->fd;
  EXPECT_EQ(host->ioctl(second, vfio_api::group_set_container, &fd), -EINVAL) << "it would cut a mapping";
  ASSERT_EQ(user->unmap(0x40000000, k4), 0);
  ASSERT_EQ(user->map(1ULL << 40, memory.address(), k4), 0);
  EXPECT_EQ(host->ioctl(second, vfio_api::group_set_container, &fd), -EINVAL) << "beyond its aperture";
  ASSERT_EQ(user->unmap(1ULL << 40, k4), 0);
  ASSERT_EQ(user->map(0x50000000, memory.address(), k4), 0);
  ASSERT_EQ(host->ioctl(second, vfio_api::group_set_container, &fd), 0);
  EXPECT_TRUE(reachable(0x50000000, 1)) << "a relaxable region is no hole, and old mappings are there";
  EXPECT_EQ(host->usage().charged_process, Bytes{k4});
  EXPECT_EQ(user->map(0x40000000, memory.address(), k4), -EINVAL);
  EXPECT_EQ(info(user->fd).ranges.back().last.value, (1ULL << 39) - 1);
  ASSERT_EQ(user->map(0x60000000, memory.address(), k4), 0);
  EXPECT_TRUE(reachable(0x60000000, 0));
  EXPECT_TRUE(reachable(0x60000000, 1));
  ASSERT_EQ(host->ioctl_value(second, vfio_api::group_unset_container, 0), 0);
  EXPECT_FALSE(reachable(0x60000000, 1));
  EXPECT_TRUE(reachable(0x60000000, 0));
  EXPECT_EQ(info(user->fd).ranges.back().last.value, (1ULL << 48) - 1);
  host->close(second);
}

TEST_F(Type1, DirtyPagesAreAllThatIsMapped) {
  TestMemory memory{8 * k4};
  ASSERT_EQ(user->map(0x10000, memory.address(), 2 * k4), 0);
  ASSERT_EQ(user->map(0x14000, memory.address(), k4), 0);
  std::uint64_t word = 0;
  struct {
    vfio_api::DirtyBitmap head{.argsz = sizeof(vfio_api::DirtyBitmap) + sizeof(vfio_api::DirtyBitmapGet),
                               .flags = vfio_api::dirty_pages_flag_get_bitmap};
    vfio_api::DirtyBitmapGet get{};
  } c;
  c.get = {.iova = 0x10000, .size = 8 * k4, .bitmap = {k4, 8, std::bit_cast<std::uint64_t>(&word)}};
  EXPECT_EQ(host->ioctl(user->fd, vfio_api::DirtyBitmap::request, &c), -EINVAL) << "not tracking";
  vfio_api::DirtyBitmap start{.flags = vfio_api::dirty_pages_flag_start};
  ASSERT_EQ(host->ioctl(user->fd, start.request, &start), 0);
  ASSERT_EQ(host->ioctl(user->fd, vfio_api::DirtyBitmap::request, &c), 0);
  EXPECT_EQ(word, 0b10011U);
  c.get.iova = 0x11000;
  EXPECT_EQ(host->ioctl(user->fd, vfio_api::DirtyBitmap::request, &c), -EINVAL) << "cuts a mapping";
  c.get.iova = 0x10000;
  c.get.bitmap.pgsize = 2 * k4;
  EXPECT_EQ(host->ioctl(user->fd, vfio_api::DirtyBitmap::request, &c), -EINVAL);
  start.flags = vfio_api::dirty_pages_flag_start | vfio_api::dirty_pages_flag_stop;
  EXPECT_EQ(host->ioctl(user->fd, start.request, &start), -EINVAL);
  // With the unmap that takes the mappings away.
  struct {
    vfio_api::Type1DmaUnmap head{.argsz = sizeof(vfio_api::Type1DmaUnmap) + sizeof(vfio_api::Bitmap),
                                 .flags = vfio_api::dma_unmap_flag_get_dirty_bitmap};
    vfio_api::Bitmap bitmap{};
  } u;
  word = 0;
  u.head.iova = 0xf000;
  u.head.size = 8 * k4;
  u.bitmap = {k4, 8, std::bit_cast<std::uint64_t>(&word)};
  ASSERT_EQ(host->ioctl(user->fd, vfio_api::Type1DmaUnmap::request, &u), 0);
  EXPECT_EQ(u.head.size, 3 * k4);
  EXPECT_EQ(word, 0b100110U);
}

TEST_F(Type1, DeviceMemoryCanBeMapped) {
  const int device = user->device("0000:00:03.0");
  const auto bar = host->map_memory(device, 0, 4 * k4, true);
  ASSERT_TRUE(bar.has_value());
  EXPECT_FALSE(host->map_memory(device, 64 * 1024, k4, true).has_value());
  EXPECT_FALSE(host->map_memory(user->fd, 0, k4, true).has_value());
  const auto address = std::bit_cast<std::uint64_t>(*bar);
  ASSERT_EQ(user->map(0x700000, address, 4 * k4), 0);
  EXPECT_EQ(host->usage().charged_process, Bytes{0}) << "no pages to pin";
  const std::byte b{9};
  ASSERT_TRUE(host->device(0).dma_write(Iova{0x700000}, {&b, 1}).ok());
  EXPECT_EQ(*static_cast<std::byte*>(*bar), b);
  // iommufd refuses the same memory.
  CdevUser cdev{*host, 1};
  IommufdUser iommufd{*host};
  const std::uint32_t ioas = iommufd.ioas();
  ASSERT_EQ(cdev.bind(iommufd.fd), 0);
  ASSERT_EQ(cdev.attach(ioas), 0);
  EXPECT_EQ(iommufd.map(ioas, 0x700000, address, k4), -EFAULT);
  host->unmap_memory(*bar, 4 * k4);
  host->close(device);
}

TEST_F(Type1, AddressesCanBeTakenAwayAndGivenBack) {
  TestMemory a{2 * k4};
  ASSERT_EQ(user->map(0x10000, a.address(), k4), 0);
  ASSERT_EQ(user->unmap(0x10000, k4, vfio_api::dma_unmap_flag_vaddr), 0);
  EXPECT_TRUE(reachable(0x10000)) << "the mapping itself stays";
  EXPECT_EQ(user->unmap(0x10000, k4, vfio_api::dma_unmap_flag_vaddr), -EINVAL) << "twice";
  EXPECT_EQ(user->map(0x10000, a.address() + k4, k4, vfio_api::dma_map_flag_vaddr), 0);
  EXPECT_EQ(user->unmap(0x10000, k4), 0);
}

// ---- the compatibility interface of /dev/iommu ----

struct Compat2 : Type1 {
  Compat2() : Type1{{}, 0} {
    user.reset();
    user = std::make_unique<Type1User>(*host, vfio_api::type1_v2_iommu, 0, "/dev/iommu");
    device = user->device("0000:00:03.0");
  }
  void TearDown() override {
    host->close(device);
    Type1::TearDown();
  }
  int device = -1;
};
struct Compat1 : Type1 {
  Compat1() : Type1{{}, 0} {
    user.reset();
    user = std::make_unique<Type1User>(*host, vfio_api::type1_iommu, 0, "/dev/iommu");
    device = user->device("0000:00:03.0");
  }
  void TearDown() override {
    host->close(device);
    Type1::TearDown();
  }
  int device = -1;
};

TEST_F(Compat2, AnswersLikeIommufdNotLikeType1) {
  ASSERT_GT(device, 0);
  TestMemory memory{8 * k4};
  ASSERT_EQ(user->map(0x10000, memory.address(), 2 * k4), 0);
  EXPECT_TRUE(reachable(0x10000));
  EXPECT_EQ(host->usage().charged_process, Bytes{2 * k4}) << "counted per process";
  EXPECT_EQ(user->map(0x11000, memory.address(), k4), -EEXIST);
  EXPECT_EQ(user->map(0xfee00000, memory.address(), k4), -EINVAL);
  EXPECT_EQ(user->map(0x20000, memory.address(), k4, 16), -EINVAL);
  EXPECT_EQ(user->unmap(0x10000, k4), -ENOENT) << "cuts";
  EXPECT_EQ(user->unmap(0x70000, k4), 0) << "nothing there is no error here, as on type1";
  EXPECT_EQ(user->unmapped, 0U);
  EXPECT_EQ(user->unmap(0x10000, 2 * k4), 0);
  EXPECT_EQ(user->unmapped, 2 * k4);
  EXPECT_EQ(user->unmap(0, 0, vfio_api::dma_unmap_flag_all), 0);
  const Info all = info(user->fd);
  EXPECT_EQ(all.available, 0xffffffff);
  EXPECT_EQ(all.ranges.size(), 2U);
  EXPECT_EQ(all.fixed.iova_pgsizes, (1ULL << 12) | (1ULL << 21) | (1ULL << 30));
  vfio_api::DirtyBitmap dirty{.flags = vfio_api::dirty_pages_flag_start};
  EXPECT_EQ(host->ioctl(user->fd, dirty.request, &dirty), -ENOTTY);
  EXPECT_EQ(host->ioctl_value(user->fd, vfio_api::set_iommu, vfio_api::spapr_tce_iommu), -EINVAL);
}

TEST_F(Compat1, CutsMappingsAnywhere) {
  TestMemory memory{8 * k4};
  ASSERT_EQ(user->map(0x10000, memory.address(), 8 * k4), 0);
  EXPECT_EQ(user->unmap(0x12000, 2 * k4), 0);
  EXPECT_EQ(user->unmapped, 2 * k4);
  EXPECT_TRUE(reachable(0x11000));
  EXPECT_FALSE(reachable(0x12000));
  EXPECT_FALSE(reachable(0x13000));
  EXPECT_TRUE(reachable(0x14000));
  EXPECT_EQ(host->usage().pinned, Bytes{6 * k4});
  EXPECT_EQ(user->unmap(0x10800, k4), -EINVAL) << "not on a page border";
  EXPECT_EQ(user->unmap(0x10000, 8 * k4), 0);
  EXPECT_EQ(user->unmapped, 6 * k4);
}

TEST(Compat, NeedsAGroupFirst) {
  auto host = make_host();
  IommufdUser user{*host};
  EXPECT_EQ(host->ioctl_value(user.fd, vfio_api::get_api_version, 0), 0);
  EXPECT_EQ(host->ioctl_value(user.fd, vfio_api::set_iommu, vfio_api::type1_v2_iommu), -ENODEV);
  vfio_api::Type1DmaMap map{.flags = 3, .vaddr = 0x1000, .iova = 0, .size = k4};
  EXPECT_EQ(host->ioctl(user.fd, map.request, &map), -ENODEV);
  EXPECT_EQ(host->ioctl_value(user.fd, vfio_api::check_extension, vfio_api::type1_v2_iommu), 1);
}

}  // namespace
}  // namespace iovane::backends::model
