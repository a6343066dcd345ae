// Unmaps: strict, whole, and counted.
#include "conformance/conformance.hpp"

namespace iovane::test {
namespace {

using UnmapContract = Conformance;

TEST_P(UnmapContract, after_an_unmap_the_device_cannot_reach_the_page) {
  make_default();
  const Memory memory{1};
  ASSERT_TRUE(map(at(base, 1), memory.address()).error.ok());
  ASSERT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));  // the translation is cached now
  const auto result = unmap(at(base, 1));
  ASSERT_TRUE(result.error.ok()) << result.error.message();
  EXPECT_EQ(result.bytes, memory.length());
  EXPECT_TRUE(cannot_read(*witness_, Iova{base}, memory.page(0)));
  EXPECT_TRUE(cannot_write(*witness_, Iova{base}, memory.page(0)));
}

TEST_P(UnmapContract, a_mapping_made_anew_leads_to_the_new_memory) {
  make_default();
  const Memory first{1, 1};
  const Memory second{1, 2};
  ASSERT_TRUE(map(at(base, 1), first.address()).error.ok());
  ASSERT_TRUE(reads(*witness_, Iova{base}, first.page(0)));
  const auto results = run_batch(*space_, {unmap_op(at(base, 1)), map_op(at(base, 1), second.address())});
  ASSERT_TRUE(results[0].error.ok() && results[1].error.ok());
  EXPECT_TRUE(reads(*witness_, Iova{base}, second.page(0)));
  EXPECT_TRUE(unmap(at(base, 1)).error.ok());
}

TEST_P(UnmapContract, one_unmap_takes_many_mappings_and_holes) {
  make_default();
  const Memory memory{8};
  const std::uint64_t page = os_page_bytes();
  ASSERT_TRUE(map(at(base, 1), memory.address(0)).error.ok());
  ASSERT_TRUE(map(at(base + 2 * page, 2), memory.address(1)).error.ok());
  ASSERT_TRUE(map(at(base + 100 * page, 5), memory.address(3)).error.ok());
  ASSERT_TRUE(map(at(base + 200 * page, 1), memory.address(3)).error.ok());
  const auto result = unmap(at(base - 16 * page, 200));
  ASSERT_TRUE(result.error.ok()) << result.error.message();
  EXPECT_EQ(result.bytes, Bytes{8 * page});
  EXPECT_TRUE(cannot_read(*witness_, Iova{base + 100 * page}, memory.page(3)));
  EXPECT_TRUE(reads(*witness_, Iova{base + 200 * page}, memory.page(3))) << "a mapping outside the range is gone";
  EXPECT_EQ(unmap(at(base + 200 * page, 1)).bytes, Bytes{page});
}

TEST_P(UnmapContract, an_unmap_of_nothing_succeeds_with_no_bytes) {
  make_default();
  const auto result = unmap(at(base, 16));
  EXPECT_TRUE(result.error.ok()) << result.error.message();
  EXPECT_EQ(result.bytes, Bytes{});
}

TEST_P(UnmapContract, a_cut_is_refused_and_the_mapping_stays_whole_or_does_what_it_says) {
  make_default();
  const Memory memory{4};
  const std::uint64_t page = os_page_bytes();
  ASSERT_TRUE(map(at(base, 4), memory.address()).error.ok());
  if (has(space_->facts().capabilities, Capability::cut_on_unmap)) {
    EXPECT_EQ(unmap(at(base + page, 2)).bytes, Bytes{2 * page});
    EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
    EXPECT_TRUE(cannot_read(*witness_, Iova{base + page}, memory.page(1)));
    EXPECT_TRUE(cannot_write(*witness_, Iova{base + 2 * page}, memory.page(2)));
    EXPECT_TRUE(reads(*witness_, Iova{base + 3 * page}, memory.page(3)));
    EXPECT_TRUE(map(at(base + page, 1), memory.address(2)).error.ok()) << "the hole can be mapped again";
    EXPECT_EQ(unmap(at(base - page, 8)).bytes, Bytes{3 * page});
    return;
  }
  for (const IovaRange range :
       {at(base, 1), at(base + 3 * page, 1), at(base + page, 2), at(base - page, 2), at(base + 2 * page, 8)}) {
    const auto result = unmap(range);
    EXPECT_EQ(result.error.code, Errc::would_bisect) << result.error.message();
  }
  EXPECT_TRUE(reads(*witness_, Iova{base}, memory.page(0)));
  EXPECT_TRUE(reads(*witness_, Iova{base + 3 * page}, memory.page(3)));
  EXPECT_EQ(unmap(at(base, 4)).bytes, memory.length());
}

TEST_P(UnmapContract, a_cut_write_only_mapping_is_recognised_too) {
  make_default();
  if (has(space_->facts().capabilities, Capability::cut_on_unmap)) return;
  const Memory memory{2};
  ASSERT_TRUE(map(at(base, 2), memory.address(), Access::write).error.ok());
  EXPECT_EQ(unmap(at(base, 1)).error.code, Errc::would_bisect);
  ASSERT_TRUE(unmap(at(base, 2)).error.ok());
  ASSERT_TRUE(map(at(base, 2), memory.address(), Access::read).error.ok());
  EXPECT_EQ(unmap(at(base + os_page_bytes(), 1)).error.code, Errc::would_bisect);
  EXPECT_TRUE(unmap(at(base, 2)).error.ok());
}

TEST_P(UnmapContract, unmap_all_empties_the_space_and_succeeds_on_an_empty_one) {
  make_default();
  const Memory memory{6};
  const std::uint64_t page = os_page_bytes();
  ASSERT_TRUE(map(at(base, 1), memory.address(0)).error.ok());
  ASSERT_TRUE(map(at(high_iova().value_or(base + 0x100'0000), 5), memory.address(1)).error.ok());
  const auto gone = space_->unmap_all();
  ASSERT_TRUE(gone) << gone.error().message();
  EXPECT_EQ(*gone, Bytes{6 * page});
  EXPECT_TRUE(cannot_read(*witness_, Iova{base}, memory.page(0)));
  const auto again = space_->unmap_all();
  ASSERT_TRUE(again) << again.error().message();
  EXPECT_EQ(*again, Bytes{});
  EXPECT_TRUE(map(at(base, 1), memory.address(0)).error.ok());
  EXPECT_EQ(unmap(IovaRange::everything()).bytes, Bytes{page});
}

TEST_P(UnmapContract, many_mappings_go_in_one_unmap) {
  make_default();
  constexpr std::size_t count = 512;
  const Memory memory{count};
  std::vector<BackendOp> ops;
  // Every second granule, so that nothing can be joined.
  for (std::size_t i = 0; i < count; ++i)
    ops.push_back(map_op(at(base + 2 * i * os_page_bytes(), 1), memory.address(i)));
  for (const auto& result : run_batch(*space_, ops)) ASSERT_TRUE(result.error.ok()) << result.error.message();
  EXPECT_TRUE(reads(*witness_, Iova{base + 2 * 317 * os_page_bytes()}, memory.page(317)));
  const auto result = unmap(at(base, 2 * count));
  ASSERT_TRUE(result.error.ok()) << result.error.message();
  EXPECT_EQ(result.bytes, memory.length());
  EXPECT_TRUE(cannot_read(*witness_, Iova{base + 2 * 317 * os_page_bytes()}, memory.page(317)));
}

IOVANE_CONFORMANCE(UnmapContract);

}  // namespace
}  // namespace iovane::test
