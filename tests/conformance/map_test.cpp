// Maps: what the device may do with them, and which ones are refused.
#include <sys/mman.h>

#include <fmt/format.h>

#include "conformance/conformance.hpp"

namespace iovane::test {
namespace {

using MapContract = Conformance;

TEST_P(MapContract, a_mapping_carries_bytes_both_ways) {
  make_default();
  const Memory memory{3};
  const auto result = map(at(base, 3), memory.address());
  ASSERT_TRUE(result.error.ok()) << result.error.message();
  EXPECT_EQ(result.bytes, memory.length());
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  EXPECT_TRUE(writes(*witness_, Iova{base + os_page_bytes()}, memory.page(1)));
  EXPECT_TRUE(reads(*witness_, Iova{base + 2 * os_page_bytes()}, memory.page(2)));
  EXPECT_TRUE(unmap(at(base, 3)).error.ok());
}

TEST_P(MapContract, an_iova_above_4_gib_works) {
  make_default();
  const Memory memory{1};
  const auto high = high_iova();
  if (!high) GTEST_SKIP() << "this platform's window is below 4 GiB";
  const IovaRange range = at(*high + 3 * os_page_bytes(), 1);
  ASSERT_TRUE(map(range, memory.address()).error.ok());
  EXPECT_TRUE(reads(*witness_, range.start, memory.page(0)));
  EXPECT_TRUE(writes(*witness_, range.start, memory.page(0)));
  EXPECT_TRUE(unmap(range).error.ok());
}

TEST_P(MapContract, a_read_only_mapping_cannot_be_written) {
  make_default();
  const Memory memory{1};
  ASSERT_TRUE(map(at(base, 1), memory.address(), Access::read).error.ok());
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  EXPECT_TRUE(cannot_write(*witness_, Iova{base}, memory.page(0)));
  EXPECT_TRUE(unmap(at(base, 1)).error.ok());
}

// Whether the device can read there too is the hardware's affair: Linux's VT-d tables have no write-only entries.
TEST_P(MapContract, a_write_only_mapping_can_be_written) {
  make_default();
  const Memory memory{1};
  ASSERT_TRUE(map(at(base, 1), memory.address(), Access::write).error.ok());
  EXPECT_TRUE(writes(*witness_, Iova{base}, memory.page(0)));
  EXPECT_TRUE(unmap(at(base, 1)).error.ok());
}

TEST_P(MapContract, every_overlap_is_busy_and_leaves_the_first_mapping_alone) {
  make_default();
  const Memory memory{4};
  const Memory other{8, 2};
  ASSERT_TRUE(map(at(base, 4), memory.address()).error.ok());
  const std::uint64_t page = os_page_bytes();
  for (const IovaRange range :
       {at(base, 4), at(base - page, 2), at(base + 3 * page, 2), at(base + page, 1), at(base - page, 8), at(base, 1)}) {
    const auto result = map(range, other.address());
    EXPECT_EQ(result.error.code, Errc::iova_busy) << result.error.message();
    EXPECT_EQ(result.bytes, Bytes{});
  }
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  EXPECT_EQ(unmap(at(base, 4)).bytes, memory.length());
}

TEST_P(MapContract, neighbours_do_not_overlap) {
  make_default();
  const Memory memory{3};
  ASSERT_TRUE(map(at(base + os_page_bytes(), 1), memory.address(1)).error.ok());
  EXPECT_TRUE(map(at(base, 1), memory.address(0)).error.ok());
  EXPECT_TRUE(map(at(base + 2 * os_page_bytes(), 1), memory.address(2)).error.ok());
  EXPECT_EQ(unmap(at(base, 3)).bytes, memory.length());
}

TEST_P(MapContract, a_reserved_iova_is_refused_with_the_hole_named) {
  make_default();
  const Memory memory{1};
  const auto usable = space_->usable_ranges();
  ASSERT_TRUE(usable);
  if (GetParam() == Interface::spapr_v1) GTEST_SKIP() << "one window, and nothing reserved in it";
  ASSERT_GE(usable->size(), 2U) << "this host reserves nothing in the middle";
  const std::uint64_t hole = (*usable)[0].last.value + 1;
  const auto result = map(at(hole, 1), memory.address());
  EXPECT_EQ(result.error.code, Errc::iova_reserved) << result.error.message();
  EXPECT_NE(result.error.detail().find(fmt::format("[{:#x}", hole)), std::string::npos) << result.error.detail();
}

TEST_P(MapContract, a_range_that_only_touches_a_hole_is_refused_whole) {
  make_default();
  const Memory memory{2};
  const auto usable = space_->usable_ranges();
  if (GetParam() == Interface::spapr_v1) GTEST_SKIP() << "one window, and nothing reserved in it";
  ASSERT_TRUE(usable && usable->size() >= 2);
  const std::uint64_t hole = (*usable)[0].last.value + 1;
  EXPECT_EQ(map(at(hole - os_page_bytes(), 2), memory.address()).error.code, Errc::iova_reserved);
  EXPECT_TRUE(map(at(hole - os_page_bytes(), 1), memory.address()).error.ok()) << "part of the refused map stayed";
  EXPECT_TRUE(unmap(at(hole - os_page_bytes(), 1)).error.ok());
}

TEST_P(MapContract, an_iova_beyond_what_the_iommu_translates_is_refused) {
  make_default();
  const Memory memory{1};
  const auto usable = space_->usable_ranges();
  ASSERT_TRUE(usable && !usable->empty());
  if (usable->back().last == iova_max) GTEST_SKIP() << "this IOMMU translates all 64 bits";
  const auto result = map(at(usable->back().last.value + 1, 1), memory.address());
  EXPECT_EQ(result.error.code, Errc::iova_reserved) << result.error.message();
}

TEST_P(MapContract, the_last_usable_granule_can_be_mapped) {
  make_default();
  const Memory memory{1};
  const auto usable = space_->usable_ranges();
  ASSERT_TRUE(usable && !usable->empty());
  const IovaRange last = at(usable->back().last.value - os_page_bytes() + 1, 1);
  ASSERT_TRUE(map(last, memory.address()).error.ok());
  EXPECT_TRUE(reads(*witness_, last.start, memory.page(0)));
  EXPECT_EQ(unmap({last.start, iova_max}).bytes, memory.length());
}

TEST_P(MapContract, memory_that_is_partly_gone_is_bad_and_nothing_stays_mapped) {
  make_default();
  const Memory memory{4};
  ASSERT_EQ(::munmap(memory.data() + 2 * os_page_bytes(), os_page_bytes()), 0);
  const auto result = map(at(base, 4), memory.address());
  EXPECT_EQ(result.error.code, Errc::bad_memory) << result.error.message();
  EXPECT_TRUE(cannot_read(*witness_, Iova{base}, memory.page(0)));
  EXPECT_TRUE(map(at(base, 2), memory.address()).error.ok()) << "the failed map left something behind";
  EXPECT_EQ(unmap(at(base, 4)).bytes, Bytes{2 * os_page_bytes()});
}

TEST_P(MapContract, read_only_memory_cannot_be_mapped_for_writing) {
  make_default();
  const Memory memory{1};
  ASSERT_EQ(::mprotect(memory.data(), memory.length().value, PROT_READ), 0);
  EXPECT_EQ(map(at(base, 1), memory.address()).error.code, Errc::bad_memory);
  if (spapr()) {  // registering pins for writing, and so does a map of version 1
    EXPECT_EQ(map(at(base, 1), memory.address(), Access::read).error.code, Errc::bad_memory);
    return;
  }
  const auto mapped = map(at(base, 1), memory.address(), Access::read);
  EXPECT_TRUE(mapped.error.ok()) << mapped.error.message();
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  EXPECT_TRUE(unmap(at(base, 1)).error.ok());
}

TEST_P(MapContract, malformed_maps_are_invalid) {
  make_default();
  const Memory memory{2};
  const IovaRange half = *IovaRange::from_length(Iova{base}, Bytes{space_->facts().granule.value / 2});
  EXPECT_EQ(map(at(base, 1), memory.address(), Access::none).error.code, Errc::invalid_argument) << "no access";
  EXPECT_EQ(map(at(base + 512, 1), memory.address()).error.code, Errc::invalid_argument) << "IOVA not on a granule";
  EXPECT_EQ(map(at(base, 1), memory.address() + 512).error.code, Errc::invalid_argument) << "memory not on a granule";
  EXPECT_EQ(map(half, memory.address()).error.code, Errc::invalid_argument) << "half a granule";
  EXPECT_EQ(unmap(at(base, 2)).bytes, Bytes{}) << "a refused map left something behind";
}

TEST_P(MapContract, a_failing_part_of_a_batch_fails_alone) {
  make_default();
  const Memory memory{4};
  const std::uint64_t page = os_page_bytes();
  const auto results =
      run_batch(*space_, {map_op(at(base, 1), memory.address(0)), map_op(at(base, 1), memory.address(1)),
                          map_op(at(base + page, 1), memory.address(2)), unmap_op(at(base, 1)),
                          map_op(at(base, 1), memory.address(3))});
  EXPECT_TRUE(results[0].error.ok());
  EXPECT_EQ(results[1].error.code, Errc::iova_busy);
  EXPECT_TRUE(results[2].error.ok());
  EXPECT_TRUE(results[3].error.ok());
  EXPECT_EQ(results[3].bytes, Bytes{page});
  EXPECT_TRUE(results[4].error.ok());
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(3)));
  EXPECT_TRUE(reads(*witness_, Iova{base + page}, memory.page(2)));
  EXPECT_EQ(unmap(at(base, 2)).bytes, Bytes{2 * page});
}

IOVANE_CONFORMANCE(MapContract);

}  // namespace
}  // namespace iovane::test
