// Registered memory: pinned once, reached by offset, copied without a second pin.
#include <sys/mman.h>
#include <unistd.h>

#include "conformance/conformance.hpp"

namespace iovane::test {
namespace {

class RegionContract : public Conformance {
 protected:
  bool pins() const { return has(space_->facts().capabilities, Capability::explicit_pin); }
  bool copies() const { return has(space_->facts().capabilities, Capability::copy_reuses_pin); }
  Bytes pinned() { return charged(); }
  RegionId registered(BackendSpace& space, const Memory& memory) {
    const auto region = space.register_memory({.address = memory.data(), .length = memory.length()});
    EXPECT_TRUE(region) << region.error().message();
    return region.value_or(RegionId{});
  }
  static BackendOp region_op(OpKind kind, RegionId region, IovaRange range, std::uint64_t offset,
                             Access access = Access::read_write) {
    return {.kind = kind, .access = access, .region = region, .range = range, .memory = offset};
  }
};

TEST_P(RegionContract, a_map_names_registered_memory_by_offset) {
  make_default();
  const Memory memory{4};
  const RegionId region = registered(*space_, memory);
  const auto result = run(*space_, region_op(OpKind::map, region, at(base, 2), os_page_bytes()));
  ASSERT_TRUE(result.error.ok()) << result.error.message();
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(1)));
  EXPECT_TRUE(writes(*witness_, Iova{base + os_page_bytes()}, memory.page(2)));
  EXPECT_TRUE(unmap(at(base, 2)).error.ok());
  EXPECT_TRUE(space_->unregister_memory(region));
}

TEST_P(RegionContract, what_is_not_inside_the_region_is_invalid) {
  make_default();
  const Memory memory{2};
  const RegionId region = registered(*space_, memory);
  const std::uint64_t page = os_page_bytes();
  for (const OpKind kind : {OpKind::map, OpKind::copy}) {
    if (kind == OpKind::copy && !copies()) continue;
    EXPECT_EQ(run(*space_, region_op(kind, region, at(base, 2), page)).error.code, Errc::invalid_argument);
    EXPECT_EQ(run(*space_, region_op(kind, region, at(base, 1), 2 * page)).error.code, Errc::invalid_argument);
    EXPECT_EQ(run(*space_, region_op(kind, region, at(base, 1), ~std::uint64_t{0} - page + 1)).error.code,
              Errc::invalid_argument);
    EXPECT_EQ(run(*space_, region_op(kind, RegionId{99}, at(base, 1), 0)).error.code, Errc::invalid_argument);
  }
  ASSERT_TRUE(space_->unregister_memory(region));
  EXPECT_EQ(run(*space_, region_op(OpKind::map, region, at(base, 1), 0)).error.code, Errc::invalid_argument);
  EXPECT_EQ(space_->unregister_memory(region).error().code, Errc::not_found);
  EXPECT_EQ(space_->unregister_memory(RegionId{}).error().code, Errc::not_found);
}

TEST_P(RegionContract, a_copy_reaches_the_same_memory_without_a_second_pin) {
  make_default();
  const Memory memory{8};
  const RegionId region = registered(*space_, memory);
  EXPECT_EQ(copies(), by_cdev());
  EXPECT_EQ(pins(), by_cdev() || spapr_v2());
  if (!copies()) {
    EXPECT_EQ(run(*space_, region_op(OpKind::copy, region, at(base, 1), 0)).error.code, Errc::unsupported);
    return;
  }
  const Bytes once = pinned();
  EXPECT_EQ(once, memory.length());
  for (std::uint64_t i = 0; i < 4; ++i) {
    const auto result = run(*space_, region_op(OpKind::copy, region, at(base + i * 0x10'0000, 2), i * os_page_bytes()));
    ASSERT_TRUE(result.error.ok()) << result.error.message();
  }
  EXPECT_EQ(pinned(), once);
  EXPECT_TRUE(reads(*witness_, Iova{base + 0x10'0000}, memory.page(1)));
  EXPECT_TRUE(writes(*witness_, Iova{base + 0x30'0000}, memory.page(3)));
  const auto overlap = run(*space_, region_op(OpKind::copy, region, at(base, 1), 0));
  EXPECT_EQ(overlap.error.code, Errc::iova_busy) << overlap.error.message();
  EXPECT_EQ(unmap(at(base, 0x400)).bytes, Bytes{8 * os_page_bytes()});
  EXPECT_TRUE(cannot_read(*witness_, Iova{base + 0x10'0000}, memory.page(1)));
  EXPECT_TRUE(space_->unregister_memory(region));
  EXPECT_EQ(pinned(), Bytes{});
}

TEST_P(RegionContract, copies_of_part_of_a_region_may_be_read_only) {
  make_default();
  if (!copies()) return;  // as the test of copies asserts
  const Memory memory{2};
  const RegionId region = registered(*space_, memory);
  ASSERT_TRUE(run(*space_, region_op(OpKind::copy, region, at(base, 1), os_page_bytes(), Access::read)).error.ok());
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(1)));
  EXPECT_TRUE(cannot_write(*witness_, Iova{base}, memory.page(1)));
  EXPECT_TRUE(unmap(at(base, 1)).error.ok());
}

TEST_P(RegionContract, memory_registered_before_any_device_is_pinned_by_the_first_one) {
  space_ = make_space();
  const Memory memory{4};
  const RegionId region = registered(*space_, memory);
  EXPECT_EQ(pinned(), Bytes{});
  device_ = attach(*space_);
  EXPECT_EQ(pinned(), pins() ? memory.length() : Bytes{});
  const auto result = run(*space_, region_op(copies() ? OpKind::copy : OpKind::map, region, at(base, 4), 0));
  ASSERT_TRUE(result.error.ok()) << result.error.message();
  witness_ = machine_->witness(*space_, device_);
  EXPECT_TRUE(reads(*witness_, Iova{base + 3 * os_page_bytes()}, memory.page(3)));
  EXPECT_TRUE(unmap(at(base, 4)).error.ok());
}

TEST_P(RegionContract, memory_known_to_two_spaces_is_pinned_once) {
  make_default();
  if (!pins()) return;  // each mapping pins for itself there
  const auto other = make_space();
  const Memory memory{4};
  const auto pins_of_memory = [&] { return Bytes{pinned().value - other->table_memory().value}; };
  const RegionId here = registered(*space_, memory);
  const RegionId there = registered(*other, memory);
  EXPECT_EQ(pins_of_memory(), memory.length());
  const OpKind kind = copies() ? OpKind::copy : OpKind::map;
  ASSERT_TRUE(run(*space_, region_op(kind, here, at(base, 4), 0)).error.ok());
  if (!container()) {  // a container without a device takes none
    ASSERT_TRUE(run(*other, region_op(kind, there, at(base, 4), 0)).error.ok());
  }
  EXPECT_EQ(pins_of_memory(), memory.length());
  EXPECT_TRUE(other->unregister_memory(there));
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  EXPECT_EQ(pins_of_memory(), memory.length());
}

TEST_P(RegionContract, memory_that_is_not_there_cannot_be_registered) {
  make_default();
  const Memory memory{2};
  EXPECT_EQ(space_->register_memory({.address = memory.data() + 8, .length = Bytes{os_page_bytes()}}).error().code,
            Errc::invalid_argument);
  EXPECT_EQ(space_->register_memory({.address = memory.data(), .length = Bytes{}}).error().code,
            Errc::invalid_argument);
  if (!pins()) return;  // found by the map there
  ASSERT_EQ(::munmap(memory.data() + os_page_bytes(), os_page_bytes()), 0);
  const auto result = space_->register_memory({.address = memory.data(), .length = memory.length()});
  EXPECT_EQ(result.error().code, Errc::bad_memory) << result.error().message();
  EXPECT_EQ(pinned(), Bytes{});
}

TEST_P(RegionContract, read_only_memory_pins_and_maps_for_reading) {
  make_default();
  if (!copies()) return;  // as the test of copies asserts
  const Memory memory{1};
  ASSERT_EQ(::mprotect(memory.data(), memory.length().value, PROT_READ), 0);
  const RegionId region = registered(*space_, memory);
  EXPECT_TRUE(run(*space_, region_op(OpKind::copy, region, at(base, 1), 0, Access::read)).error.ok());
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  const auto result = run(*space_, region_op(OpKind::copy, region, at(base + 0x10'0000, 1), 0));
  EXPECT_EQ(result.error.code, Errc::permission) << result.error.message();
}

TEST_P(RegionContract, a_file_needs_no_process_address_where_the_kernel_can) {
  make_default();
  const int fd = ::memfd_create("iovane-test", MFD_CLOEXEC);
  ASSERT_GE(fd, 0);
  const std::size_t page = os_page_bytes();
  ASSERT_EQ(::ftruncate(fd, static_cast<off_t>(4 * page)), 0);
  auto* const window = static_cast<std::byte*>(::mmap(nullptr, 4 * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
  ASSERT_NE(window, MAP_FAILED);
  for (std::size_t i = 0; i < 4 * page; ++i) window[i] = static_cast<std::byte>(i * 7 + i / page);
  const auto region =
      space_->register_memory({.address = nullptr, .length = Bytes{2 * page}, .fd = fd, .fd_offset = page});
  if (!has(space_->facts().capabilities, Capability::file_memory)) {
    EXPECT_EQ(region.error().code, Errc::unsupported) << region.error().message();
  } else {
    ASSERT_TRUE(region) << region.error().message();
    for (const OpKind kind : {OpKind::map, OpKind::copy}) {
      if (kind == OpKind::copy && !copies()) continue;
      ASSERT_TRUE(run(*space_, region_op(kind, *region, at(base, 1), page)).error.ok());
      EXPECT_TRUE(reads(*witness_, Iova{base}, {window + 2 * page, page}));
      EXPECT_TRUE(unmap(at(base, 1)).error.ok());
    }
  }
  ::munmap(window, 4 * page);
  ::close(fd);
}

IOVANE_CONFORMANCE(RegionContract);

}  // namespace
}  // namespace iovane::test
