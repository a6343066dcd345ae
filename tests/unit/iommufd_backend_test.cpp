// iommufd's backend where a kernel has to answer in a way of its own: errnos, staging layout, dirty tracking.
#include "backends/iommufd/iommufd_backend.hpp"

#include <gtest/gtest.h>

#include <set>

#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "support/scripted_kernel.hpp"

namespace iovane::backends {
namespace {

namespace fd = uapi::iommufd;
namespace vf = uapi::vfio;
using test::ScriptedKernel;

struct Chunk {
  std::uint32_t ioas;
  std::uint64_t iova, length, memory;
  std::uint32_t flags;
};

class IommufdBackendTest : public testing::Test {
 protected:
  void SetUp() override {
    kernel_.devices.push_back({.address = "0000:00:03.0",
                               .driver = "vfio-pci",
                               .group = 1,
                               .cdev = "/dev/vfio/devices/vfio0",
                               .reserved = {{Iova{0xfee00000}, Iova{0xfeefffff}}}});
    kernel_.on<fd::IoasAlloc>([this](fd::IoasAlloc& a) {
      a.out_ioas_id = ++objects_;
      return 0;
    });
    kernel_.on<fd::Destroy>([](fd::Destroy&) { return 0; });
    kernel_.on<fd::IoasIovaRanges>([this](fd::IoasIovaRanges& r) -> long {
      const std::uint32_t room = r.num_iovas;
      r.num_iovas = static_cast<std::uint32_t>(ranges_.size());
      auto* const out = reinterpret_cast<fd::IovaRange*>(static_cast<std::uintptr_t>(r.allowed_iovas));
      for (std::uint32_t i = 0; i < room && i < r.num_iovas; ++i) out[i] = ranges_[i];
      return r.num_iovas > room ? -EMSGSIZE : 0;
    });
    kernel_.on<fd::IoasMap>([this](fd::IoasMap& m) -> long {
      maps_.push_back({m.ioas_id, m.iova, m.length, m.user_va, m.flags});
      return maps_.size() == failing_map_ ? map_answer_ : 0;
    });
    kernel_.on<fd::IoasUnmap>([this](fd::IoasUnmap& u) -> long {
      unmaps_.push_back({u.ioas_id, u.iova, u.length, 0, 0});
      return unmap_answer_;
    });
    kernel_.on<vf::DeviceBindIommufd>([this](vf::DeviceBindIommufd& b) -> long {
      b.out_devid = ++objects_;
      return bind_answer_;
    });
    kernel_.on<vf::DeviceAttachIommufdPt>([this](vf::DeviceAttachIommufdPt& a) -> long {
      attached_.push_back(a.pt_id);
      return attach_answer_;
    });
    kernel_.on<vf::DeviceDetachIommufdPt>([](vf::DeviceDetachIommufdPt&) { return 0; });
    kernel_.on<fd::HwInfo>([this](fd::HwInfo& i) {
      i.data_type = fd::hw_info_type_intel_vtd;
      i.out_capabilities = hardware_capabilities_;
      return 0;
    });
    kernel_.on<fd::HwptAlloc>([this](fd::HwptAlloc& h) -> long {
      h.out_hwpt_id = ++objects_;
      hwpts_.push_back(h);
      return hwpt_answer_;
    });
    open();
  }

  void open() {
    space_.reset();
    backend_.reset();
    auto opened = open_iommufd(kernel_, {});
    ASSERT_TRUE(opened) << opened.error().message();
    backend_ = std::move(*opened);
  }
  void make_space(const SpaceOptions& options = {}) {
    auto made = backend_->create_space(options);
    ASSERT_TRUE(made) << made.error().message();
    space_ = std::move(*made);
    maps_.clear();
  }
  Error map_with(int answer) {
    make_space();
    failing_map_ = 1;
    map_answer_ = answer;
    const BackendOp op{.kind = OpKind::map,
                       .access = Access::read_write,
                       .region = {},
                       .range = {Iova{0x10000}, Iova{0x10fff}},
                       .memory = 0x7000};
    BackendOpResult result;
    space_->execute({&op, 1}, {&result, 1});
    return result.error;
  }
  Result<RegionId> register_at(std::uint64_t address, std::uint64_t length) {
    return space_->register_memory({.address = reinterpret_cast<void*>(address), .length = Bytes{length}});
  }

  ScriptedKernel kernel_;
  std::uint32_t objects_ = 0;
  std::vector<fd::IovaRange> ranges_{{0, 0xfedfffff}, {0xfef00000, (1ULL << 48) - 1}};
  std::vector<Chunk> maps_, unmaps_;
  std::vector<std::uint32_t> attached_;
  std::vector<fd::HwptAlloc> hwpts_;
  std::size_t failing_map_ = 0;
  long map_answer_ = 0, unmap_answer_ = 0, bind_answer_ = 0, attach_answer_ = 0, hwpt_answer_ = 0;
  std::uint64_t hardware_capabilities_ = 0;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<BackendSpace> space_;
};

constexpr std::uint64_t gib = 1ULL << 30;

TEST_F(IommufdBackendTest, each_errno_of_a_map_has_its_own_code) {
  EXPECT_EQ(map_with(-EEXIST).code, Errc::iova_busy);
  EXPECT_EQ(map_with(-EFAULT).code, Errc::bad_memory);
  EXPECT_EQ(map_with(-EPERM).code, Errc::permission);
  EXPECT_EQ(map_with(-EINVAL).code, Errc::invalid_argument);
  EXPECT_EQ(map_with(-ENOMEM).code, Errc::out_of_memory);
  EXPECT_EQ(map_with(-EIO).code, Errc::io_error);
  ranges_ = {{0x100000, 0xffffff}};
  EXPECT_EQ(map_with(-EINVAL).code, Errc::iova_reserved);
  EXPECT_EQ(map_with(-EINVAL).stage, Stage::map);
}

TEST_F(IommufdBackendTest, a_positive_answer_is_a_failure) {
  const Error error = map_with(256);
  EXPECT_EQ(error.code, Errc::io_error);
}

TEST_F(IommufdBackendTest, no_memory_is_memlock_only_where_the_limit_is_the_reason) {
  kernel_.memlock_use = {.limit = Bytes{8192}, .locked = {}, .pinned = Bytes{8000}, .exempt = false};
  const Error at_limit = map_with(-ENOMEM);
  EXPECT_EQ(at_limit.code, Errc::memlock_exceeded);
  for (const char* number : {"8192", "8000", "4096"})
    EXPECT_NE(at_limit.detail().find(number), std::string::npos) << at_limit.detail();
  EXPECT_EQ(space_->headroom().memlock, Bytes{192});
  kernel_.memlock_use.exempt = true;
  EXPECT_EQ(map_with(-ENOMEM).code, Errc::out_of_memory);
  EXPECT_FALSE(space_->headroom().memlock.has_value());
  kernel_.memlock_use = {.limit = Bytes{1 << 20}, .locked = {}, .pinned = {}, .exempt = false};
  EXPECT_EQ(map_with(-ENOMEM).code, Errc::out_of_memory);
}

TEST_F(IommufdBackendTest, staging_chunks_end_at_1_gib_borders_and_agree_with_the_memory) {
  make_space();
  const std::uint64_t address = 5 * gib + 0x1234000;
  ASSERT_TRUE(register_at(address, 3 * gib));
  ASSERT_EQ(maps_.size(), 4U);
  std::uint64_t sum = 0;
  for (const Chunk& chunk : maps_) {
    EXPECT_EQ(chunk.iova % gib, chunk.memory % gib) << "an IOPTE could not be 1 GiB";
    EXPECT_LE(chunk.iova % gib + chunk.length, gib) << "a chunk crosses a border";
    EXPECT_EQ(chunk.memory, address + sum);
    sum += chunk.length;
  }
  EXPECT_EQ(sum, 3 * gib);
}

TEST_F(IommufdBackendTest, staging_stays_inside_the_usable_ranges_and_never_overlaps) {
  ranges_ = {{0x1000, 0x5fffff}, {0x800000, 0xbfffff}, {0x1000000, 0x12fffff}};
  make_space();
  std::vector<RegionId> regions;
  // 2 MiB pieces at odd phases: four fit, at 2 MiB congruent places inside the three windows.
  for (std::uint64_t i = 0; i < 4; ++i) {
    const auto region = register_at(0x10000000 + i * 0x400000, 0x200000);
    if (region) regions.push_back(*region);
  }
  ASSERT_GE(regions.size(), 3U);
  for (std::size_t a = 0; a < maps_.size(); ++a) {
    bool inside = false;
    for (const auto& range : ranges_)
      inside = inside || (maps_[a].iova >= range.start && maps_[a].iova + maps_[a].length - 1 <= range.last);
    EXPECT_TRUE(inside) << std::hex << maps_[a].iova;
    for (std::size_t b = a + 1; b < maps_.size(); ++b)
      EXPECT_TRUE(maps_[a].iova + maps_[a].length <= maps_[b].iova || maps_[b].iova + maps_[b].length <= maps_[a].iova);
  }
  const auto full = register_at(0x40000000, 0x600000);
  EXPECT_EQ(full.error().code, Errc::iova_exhausted);
  // The place of a region that went is taken again.
  const std::uint64_t freed = maps_[1].iova;
  ASSERT_TRUE(space_->unregister_memory(regions[1]));
  ASSERT_TRUE(register_at(0x50000000, 0x200000));
  EXPECT_EQ(maps_.back().iova, freed);
}

TEST_F(IommufdBackendTest, a_chunk_that_fails_takes_the_earlier_ones_back) {
  make_space();
  failing_map_ = 3;
  map_answer_ = -ENOMEM;
  const auto region = register_at(4 * gib, 4 * gib);
  ASSERT_FALSE(region);
  EXPECT_EQ(region.error().stage, Stage::pin);
  ASSERT_EQ(unmaps_.size(), 1U);
  EXPECT_EQ(unmaps_[0].iova, maps_[0].iova);
  EXPECT_EQ(unmaps_[0].length, 2 * gib);
  failing_map_ = 0;
  maps_.clear();
  ASSERT_TRUE(register_at(4 * gib, gib)) << "the failed registration kept its place";
}

TEST_F(IommufdBackendTest, read_only_memory_is_staged_for_reading) {
  make_space();
  failing_map_ = 1;
  map_answer_ = -EFAULT;
  ASSERT_TRUE(register_at(4 * gib, 2 * gib));
  ASSERT_EQ(maps_.size(), 3U);
  EXPECT_NE(maps_[0].flags & fd::ioas_map_writeable, 0U);
  EXPECT_EQ(maps_[1].flags & fd::ioas_map_writeable, 0U);
  EXPECT_EQ(maps_[2].flags & fd::ioas_map_writeable, 0U);
}

TEST_F(IommufdBackendTest, the_same_memory_is_staged_once_and_dropped_with_its_last_space) {
  make_space();
  auto other = backend_->create_space({});
  ASSERT_TRUE(other);
  const auto here = register_at(4 * gib, gib);
  const auto there = (*other)->register_memory({.address = reinterpret_cast<void*>(4 * gib), .length = Bytes{gib}});
  ASSERT_TRUE(here && there);
  EXPECT_EQ(maps_.size(), 1U);
  ASSERT_TRUE(space_->unregister_memory(*here));
  EXPECT_TRUE(unmaps_.empty());
  other->reset();
  EXPECT_EQ(unmaps_.size(), 1U);
}

TEST_F(IommufdBackendTest, the_pin_holder_is_allocated_once_for_the_staging_ioas) {
  make_space();
  ASSERT_TRUE(register_at(4 * gib, gib));
  const std::uint32_t staging = maps_[0].ioas;
  EXPECT_TRUE(hwpts_.empty());
  const auto device = space_->attach({.pci_address = "0000:00:03.0"});
  ASSERT_TRUE(device) << device.error().message();
  ASSERT_EQ(hwpts_.size(), 1U);
  EXPECT_EQ(hwpts_[0].pt_id, staging);
  ASSERT_EQ(attached_.size(), 1U);
  EXPECT_NE(attached_[0], staging) << "the device must not see the staging address space";
  ASSERT_TRUE(register_at(8 * gib, gib));
  EXPECT_EQ(hwpts_.size(), 1U);
}

TEST_F(IommufdBackendTest, a_pin_that_fails_keeps_the_device_out) {
  kernel_.memlock_use = {.limit = Bytes{4096}, .locked = {}, .pinned = {}, .exempt = false};
  make_space();
  ASSERT_TRUE(register_at(4 * gib, gib));
  hwpt_answer_ = -ENOMEM;
  const int open_before = kernel_.open_count;
  const auto device = space_->attach({.pci_address = "0000:00:03.0"});
  EXPECT_EQ(device.error().code, Errc::memlock_exceeded) << device.error().message();
  EXPECT_NE(device.error().detail().find(std::to_string(gib)), std::string::npos);
  EXPECT_TRUE(attached_.empty());
  EXPECT_EQ(kernel_.open_count, open_before);
}

TEST_F(IommufdBackendTest, a_space_that_tracks_dirty_pages_takes_only_devices_that_can) {
  make_space({.dirty_tracking = true});
  const auto refused = space_->attach({.pci_address = "0000:00:03.0"});
  EXPECT_EQ(refused.error().code, Errc::unsupported) << refused.error().message();
  hardware_capabilities_ = fd::hw_cap_dirty_tracking;
  const auto device = space_->attach({.pci_address = "0000:00:03.0"});
  ASSERT_TRUE(device) << device.error().message();
  EXPECT_TRUE(device->dirty_tracking);
  EXPECT_EQ(device->iommu, "Intel VT-d");
  ASSERT_EQ(hwpts_.size(), 1U);
  EXPECT_EQ(hwpts_[0].flags, fd::hwpt_alloc_dirty_tracking);
  ASSERT_EQ(attached_.size(), 1U);
  EXPECT_EQ(attached_[0], hwpts_[0].out_hwpt_id);
  // A second device shares the tracking table.
  ASSERT_TRUE(space_->attach({.pci_address = "0000:00:03.0"}));
  EXPECT_EQ(hwpts_.size(), 1U);
}

TEST_F(IommufdBackendTest, attach_errors_say_what_to_do) {
  make_space();
  attach_answer_ = -EADDRINUSE;
  auto failed = space_->attach({.pci_address = "0000:00:03.0"});
  EXPECT_EQ(failed.error().code, Errc::iova_reserved);
  EXPECT_NE(failed.error().detail().find("0xfee00000"), std::string::npos) << failed.error().detail();
  attach_answer_ = 0;
  bind_answer_ = -EBUSY;
  EXPECT_EQ(space_->attach({.pci_address = "0000:00:03.0"}).error().code, Errc::busy);
  bind_answer_ = -EPERM;
  EXPECT_EQ(space_->attach({.pci_address = "0000:00:03.0"}).error().code, Errc::permission);
  bind_answer_ = 0;
  kernel_.deny("/dev/vfio/devices/vfio0", EACCES);
  failed = space_->attach({.pci_address = "0000:00:03.0"});
  EXPECT_EQ(failed.error().code, Errc::permission);
  EXPECT_EQ(failed.error().stage, Stage::attach);
  kernel_.devices[0].cdev.clear();
  failed = space_->attach({.pci_address = "0000:00:03.0"});
  EXPECT_EQ(failed.error().code, Errc::no_device);
  EXPECT_NE(failed.error().detail().find("vfio-pci"), std::string::npos);
}

TEST_F(IommufdBackendTest, long_range_lists_are_asked_for_again) {
  ranges_.clear();
  for (std::uint64_t i = 0; i < 100; ++i) ranges_.push_back({i * 0x100000, i * 0x100000 + 0xffff});
  make_space();
  const auto usable = space_->usable_ranges();
  ASSERT_TRUE(usable) << usable.error().message();
  EXPECT_EQ(usable->size(), 100U);
}

TEST_F(IommufdBackendTest, a_refused_unmap_is_told_apart) {
  make_space();
  const BackendOp op{.kind = OpKind::unmap, .range = {Iova{0x1000}, Iova{0x1fff}}};
  BackendOpResult result;
  unmap_answer_ = -EBUSY;
  space_->execute({&op, 1}, {&result, 1});
  EXPECT_EQ(result.error.code, Errc::busy);
  unmap_answer_ = -ENOENT;  // and IOAS_COPY finds nothing: nothing was mapped
  kernel_.on<fd::IoasCopy>([](fd::IoasCopy&) { return -ENOENT; });
  space_->execute({&op, 1}, {&result, 1});
  EXPECT_TRUE(result.error.ok());
  kernel_.on<fd::IoasCopy>([](fd::IoasCopy& c) { return c.src_iova == 0x1fff ? 0 : -ENOENT; });
  space_->execute({&op, 1}, {&result, 1});
  EXPECT_EQ(result.error.code, Errc::would_bisect);
}

TEST_F(IommufdBackendTest, page_sizes_are_asked_without_disturbing_a_compat_ioas) {
  std::uint32_t current = 77;
  kernel_.on<fd::VfioIoas>([&](fd::VfioIoas& v) -> long {
    if (v.op == fd::vfio_ioas_get && current == 0) return -ENODEV;
    if (v.op == fd::vfio_ioas_get) v.ioas_id = current;
    if (v.op == fd::vfio_ioas_set) current = v.ioas_id;
    if (v.op == fd::vfio_ioas_clear) current = 0;
    return 0;
  });
  kernel_.on<vf::Type1Info>([&](vf::Type1Info& info) {
    EXPECT_NE(current, 77U);
    info.flags = vf::type1_info_pgsizes;
    info.iova_pgsizes = 0x40201000;
    return 0;
  });
  make_space();
  ASSERT_TRUE(space_->attach({.pci_address = "0000:00:03.0"}));
  EXPECT_EQ(space_->facts().page_sizes, 0x40201000U);
  EXPECT_EQ(current, 77U);
  space_.reset();  // it asks again, of what lives in this function
}

TEST_F(IommufdBackendTest, only_iommufd_descriptors_are_taken) {
  kernel_.on<fd::IoasAlloc>([](fd::IoasAlloc&) { return -ENOTTY; });
  EXPECT_EQ(open_iommufd(kernel_, {.fd = 5, .duplicate = false}).error().code, Errc::unsupported);
  kernel_.deny("/dev/iommu", ENOENT);
  const auto missing = open_iommufd(kernel_, {});
  EXPECT_EQ(missing.error().code, Errc::not_found);
  EXPECT_NE(missing.error().detail().find("/dev/iommu"), std::string::npos);
}

}  // namespace
}  // namespace iovane::backends
