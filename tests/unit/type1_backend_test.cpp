// type1's backend where a kernel has to answer in a way of its own: old kernels, version 1, damaged capability chains.
#include "backends/type1/type1_backend.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "backends/type1/type1_info.hpp"
#include "backends/type1/type1_space.hpp"
#include "backends/uapi/vfio.hpp"
#include "support/scripted_kernel.hpp"
#include "support/seed.hpp"

namespace iovane::backends {
namespace {

namespace vf = uapi::vfio;
using test::ScriptedKernel;

class Type1BackendTest : public testing::Test {
 protected:
  void SetUp() override {
    kernel_.devices.push_back({.address = "0000:00:03.0",
                               .driver = "vfio-pci",
                               .group = 7,
                               .cdev = {},
                               .reserved = {{Iova{0xfee00000}, Iova{0xfeefffff}}}});
    kernel_.on_number(vf::get_api_version, [](unsigned long) { return 0; });
    kernel_.on_number(vf::check_extension, [this](unsigned long e) { return e == vf::unmap_all ? unmap_all_ : 1L; });
    kernel_.on_number(vf::set_iommu, [this](unsigned long type) {
      type_ = type;
      return set_iommu_;
    });
    kernel_.on_number(vf::group_unset_container, [](unsigned long) { return 0; });
    kernel_.on<vf::GroupStatus>([this](vf::GroupStatus& s) {
      s.flags = group_flags_;
      return 0;
    });
    kernel_.on<Container>([this](Container&) { return set_container_; });
    kernel_.on<DeviceName>([this](DeviceName&) { return device_fd_; });
    kernel_.on<vf::Type1Info>([](vf::Type1Info& info) {
      info.flags = vf::type1_info_pgsizes;
      info.iova_pgsizes = 0x40201000;
      return 0;
    });
    kernel_.on<vf::Type1DmaMap>([this](vf::Type1DmaMap&) { return map_; });
    kernel_.on<vf::Type1DmaUnmap>([this](vf::Type1DmaUnmap& u) {
      unmaps_.push_back({u.iova, u.size});
      if (unmap_size_) u.size = *unmap_size_;
      return unmap_;
    });
  }

  // The calls without a structure of ours, in a shape that ScriptedKernel::on understands.
  struct Container {
    static constexpr unsigned long request = vf::group_set_container;
  };
  struct DeviceName {
    static constexpr unsigned long request = vf::group_get_device_fd;
  };

  void open(Interface interface) {
    auto opened = open_type1(kernel_, interface, {});
    ASSERT_TRUE(opened) << opened.error().message();
    backend_ = std::move(*opened);
    auto made = backend_->create_space({});
    ASSERT_TRUE(made);
    space_ = std::move(*made);
  }
  Result<AttachedDevice> attach() { return space_->attach({.pci_address = "0000:00:03.0"}); }
  BackendOpResult run(OpKind kind, std::uint64_t start, std::uint64_t last) {
    const BackendOp op{
        .kind = kind, .access = Access::read, .region = {}, .range = {Iova{start}, Iova{last}}, .memory = 0x100000};
    BackendOpResult result;
    space_->execute({&op, 1}, {&result, 1});
    return result;
  }

  ScriptedKernel kernel_;
  unsigned long type_ = 0;
  long unmap_all_ = 1, set_iommu_ = 0, set_container_ = 0, device_fd_ = 55, map_ = 0, unmap_ = 0;
  std::uint32_t group_flags_ = vf::group_flags_viable;
  std::optional<std::uint64_t> unmap_size_;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> unmaps_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<BackendSpace> space_;
};

TEST_F(Type1BackendTest, the_version_decides_the_type) {
  open(Interface::type1_v1);
  ASSERT_TRUE(attach());
  EXPECT_EQ(type_, vf::type1_iommu);
  space_.reset();
  backend_.reset();
  open(Interface::type1_v2);
  ASSERT_TRUE(attach());
  EXPECT_EQ(type_, vf::type1_v2_iommu);
}

TEST_F(Type1BackendTest, version_1_unmaps_a_span_mapping_by_mapping) {
  open(Interface::type1_v1);
  ASSERT_TRUE(attach());
  for (const std::uint64_t start : {0x10000U, 0x20000U, 0x30000U, 0x90000U})
    ASSERT_TRUE(run(OpKind::map, start, start + 0x1fff).error.ok());
  const auto gone = run(OpKind::unmap, 0xf000, 0x3ffff);
  EXPECT_TRUE(gone.error.ok()) << gone.error.message();
  EXPECT_EQ(gone.bytes, Bytes{0x6000});
  const std::vector<std::pair<std::uint64_t, std::uint64_t>> wanted{
      {0x10000, 0x2000}, {0x20000, 0x2000}, {0x30000, 0x2000}};
  EXPECT_EQ(unmaps_, wanted);
}

TEST_F(Type1BackendTest, version_1_refuses_a_cut_before_asking_the_kernel) {
  open(Interface::type1_v1);
  ASSERT_TRUE(attach());
  ASSERT_TRUE(run(OpKind::map, 0x10000, 0x1ffff).error.ok());
  EXPECT_EQ(run(OpKind::unmap, 0x10000, 0x10fff).error.code, Errc::would_bisect);
  EXPECT_EQ(run(OpKind::unmap, 0x11000, 0x1ffff).error.code, Errc::would_bisect);
  EXPECT_EQ(run(OpKind::unmap, 0x12000, 0x13fff).error.code, Errc::would_bisect);
  EXPECT_TRUE(unmaps_.empty());
}

TEST_F(Type1BackendTest, version_1_notices_an_unmap_that_did_nothing) {
  open(Interface::type1_v1);
  ASSERT_TRUE(attach());
  ASSERT_TRUE(run(OpKind::map, 0x10000, 0x10fff).error.ok());
  unmap_size_ = 0;
  EXPECT_EQ(run(OpKind::unmap, 0x10000, 0x10fff).error.code, Errc::io_error);
  unmap_size_.reset();
  EXPECT_EQ(run(OpKind::unmap, 0x10000, 0x10fff).bytes, Bytes{0x1000}) << "the mapping was forgotten";
}

TEST_F(Type1BackendTest, kernels_without_unmap_all_are_emptied_window_by_window) {
  unmap_all_ = 0;
  kernel_.on<vf::Type1Info>([](vf::Type1Info& info) {
    struct {
      vf::Type1Info info;
      vf::Type1CapIovaRange cap;
      vf::Type1IovaRange ranges[2];
    } answer{};
    if (info.argsz < sizeof answer) {
      info.argsz = sizeof answer;
      info.flags = vf::type1_info_pgsizes | vf::type1_info_caps;
      return 0;
    }
    answer.info = {.argsz = sizeof answer, .flags = vf::type1_info_caps, .cap_offset = sizeof(vf::Type1Info)};
    answer.cap = {.header = {.id = vf::type1_cap_iova_range, .version = 1, .next = 0}, .nr_iovas = 2, .reserved = 0};
    answer.ranges[0] = {0, 0xfedfffff};
    answer.ranges[1] = {0xfef00000, 0x7fffffffff};
    std::memcpy(static_cast<void*>(&info), &answer, sizeof answer);
    return 0;
  });
  open(Interface::type1_v2);
  EXPECT_FALSE(has(space_->facts().capabilities, Capability::unmap_all));
  ASSERT_TRUE(attach());
  ASSERT_TRUE(space_->unmap_all());
  const std::vector<std::pair<std::uint64_t, std::uint64_t>> wanted{{0, 0xfee00000}, {0xfef00000, 0x7f01100000}};
  EXPECT_EQ(unmaps_, wanted);
}

TEST_F(Type1BackendTest, the_last_granule_of_all_is_never_touched) {
  open(Interface::type1_v2);
  ASSERT_TRUE(attach());
  EXPECT_EQ(run(OpKind::map, ~0xfffULL, ~0ULL).error.code, Errc::iova_reserved);
  ASSERT_TRUE(run(OpKind::unmap, 0x1000, ~0ULL).error.ok());
  EXPECT_EQ(unmaps_.back().first + unmaps_.back().second, ~0xfffULL);
  const std::size_t before = unmaps_.size();
  EXPECT_TRUE(run(OpKind::unmap, ~0xfffULL, ~0ULL).error.ok());
  EXPECT_EQ(unmaps_.size(), before);
  EXPECT_EQ(space_->usable_ranges()->back().last.value, ~0xfffULL - 1);
}

TEST_F(Type1BackendTest, a_full_container_is_an_entry_limit) {
  open(Interface::type1_v2);
  ASSERT_TRUE(attach());
  map_ = -ENOSPC;
  EXPECT_EQ(run(OpKind::map, 0x1000, 0x1fff).error.code, Errc::entry_limit);
}

TEST_F(Type1BackendTest, attach_errors_say_what_to_do_and_leave_nothing_open) {
  open(Interface::type1_v2);
  const int open_before = kernel_.open_count;
  group_flags_ = 0;
  EXPECT_EQ(attach().error().code, Errc::busy) << "not viable";
  group_flags_ = vf::group_flags_viable | vf::group_flags_container_set;
  EXPECT_EQ(attach().error().code, Errc::busy) << "in another container";
  group_flags_ = vf::group_flags_viable;
  set_container_ = -EBUSY;
  EXPECT_EQ(attach().error().code, Errc::busy);
  set_container_ = 0;
  set_iommu_ = -EPERM;
  const auto unsafe = attach();
  EXPECT_EQ(unsafe.error().code, Errc::permission);
  EXPECT_NE(unsafe.error().detail().find("interrupt"), std::string::npos);
  set_iommu_ = 0;
  device_fd_ = -ENODEV;
  EXPECT_EQ(attach().error().code, Errc::no_device);
  kernel_.deny("/dev/vfio/7", ENOENT);
  EXPECT_EQ(attach().error().code, Errc::not_found);
  EXPECT_EQ(kernel_.open_count, open_before);
}

TEST_F(Type1BackendTest, a_container_without_the_driver_is_unsupported) {
  kernel_.on_number(vf::check_extension, [](unsigned long) { return 0; });
  EXPECT_EQ(open_type1(kernel_, Interface::type1_v2, {}).error().code, Errc::unsupported);
  kernel_.on_number(vf::get_api_version, [](unsigned long) { return 1; });
  EXPECT_EQ(open_type1(kernel_, Interface::type1_v2, {}).error().code, Errc::unsupported);
  EXPECT_EQ(open_type1(kernel_, Interface::iommufd, {}).error().code, Errc::invalid_argument);
}

// A chain from a kernel that lies must neither read beyond the answer nor run for ever.
TEST_F(Type1BackendTest, damaged_capability_chains_end) {
  std::mt19937_64 random{test::seed()};
  for (int round = 0; round < 2000; ++round) {
    const std::uint64_t shape = random();
    kernel_.on<vf::Type1Info>([&](vf::Type1Info& info) {
      const std::uint32_t given = info.argsz;
      const std::uint32_t wanted = 24 + static_cast<std::uint32_t>(shape % 64) * 4;
      auto* const bytes = reinterpret_cast<unsigned char*>(&info);
      for (std::uint32_t i = 4; i < given; ++i) bytes[i] = static_cast<unsigned char>(random() % 4 == 0 ? random() : 0);
      info.argsz = (shape & 0x100) != 0 ? wanted : given;
      info.flags |= vf::type1_info_caps;
      info.cap_offset = static_cast<std::uint32_t>(random() % (given + 8));
      return 0;
    });
    const auto info = type1::query_container(kernel_, 3);
    if (!info) {
      EXPECT_EQ(info.error().code, Errc::busy);
    }
  }
}

TEST_F(Type1BackendTest, a_chain_that_points_back_ends) {
  kernel_.on<vf::Type1Info>([](vf::Type1Info& info) {
    struct {
      vf::Type1Info info;
      vf::InfoCapHeader first, second;
    } answer{};
    if (info.argsz < sizeof answer) {
      info.argsz = sizeof answer;
      return 0;
    }
    answer.info = {.argsz = sizeof answer, .flags = vf::type1_info_caps, .cap_offset = 24};
    answer.first = {.id = 99, .version = 1, .next = 32};
    answer.second = {.id = 98, .version = 1, .next = 24};
    std::memcpy(static_cast<void*>(&info), &answer, sizeof answer);
    return 0;
  });
  EXPECT_TRUE(type1::query_container(kernel_, 3));
}

TEST(LiveStartsTest, agrees_with_a_plain_list) {
  std::mt19937_64 random{test::seed()};
  type1::LiveStarts live;
  std::map<std::uint64_t, std::uint64_t> reference;
  for (int step = 0; step < 20000; ++step) {
    const std::uint64_t start = random() % 64 * 16;
    const std::uint64_t last = start + random() % 3 * 16 + 15;
    bool overlaps = false, cut = false;
    for (const auto& [s, l] : reference) {
      overlaps = overlaps || (s <= last && start <= l);
      cut = cut || (s <= last && start <= l && (s < start || l > last));
    }
    const IovaRange range{Iova{start}, Iova{last}};
    ASSERT_EQ(live.cut_by(range), cut);
    const auto next = live.next(range.start, range.last);
    const auto at = reference.lower_bound(start);
    ASSERT_EQ(next.has_value(), at != reference.end() && at->first <= last);
    if (next) {
      ASSERT_EQ(next->start.value, at->first);
      ASSERT_EQ(next->last.value, at->second);
    }
    if (random() % 2 == 0 && !overlaps) {
      ASSERT_TRUE(live.prepare());
      live.insert(range);
      reference.emplace(start, last);
    } else if (next) {
      live.erase(next->start);
      reference.erase(next->start.value);
    }
    if (random() % 1000 == 0) {
      live.clear();
      reference.clear();
    }
  }
}

}  // namespace
}  // namespace iovane::backends
