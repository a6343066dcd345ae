#include "iovane/types.hpp"

#include <gtest/gtest.h>

namespace iovane {
namespace {

using namespace iovane::literals;

TEST(IovaRange, ReachesTheLastAddressWithoutOverflow) {
  const auto top = IovaRange::from_length(Iova{0xffff'ffff'ffff'f000}, 4_KiB);
  ASSERT_TRUE(top.has_value());
  EXPECT_EQ(top->last, iova_max);
  EXPECT_EQ(top->length(), 4_KiB);
  EXPECT_FALSE(top->precedes_directly({Iova{0}, Iova{0xfff}}));
}

TEST(IovaRange, RefusesZeroLengthAndWrapping) {
  EXPECT_FALSE(IovaRange::from_length(Iova{0}, Bytes{0}).has_value());
  EXPECT_FALSE(IovaRange::from_length(Iova{0xffff'ffff'ffff'f000}, Bytes{0x1001}).has_value());
}

TEST(IovaRange, OverlapAndIntersectionAreInclusive) {
  const IovaRange a{Iova{0x1000}, Iova{0x1fff}};
  const IovaRange touching{Iova{0x1fff}, Iova{0x2fff}};
  const IovaRange after{Iova{0x2000}, Iova{0x2fff}};
  EXPECT_TRUE(a.overlaps(touching));
  EXPECT_EQ(a.intersection(touching), (IovaRange{Iova{0x1fff}, Iova{0x1fff}}));
  EXPECT_FALSE(a.overlaps(after));
  EXPECT_TRUE(a.precedes_directly(after));
  EXPECT_EQ(a.intersection(after), std::nullopt);
}

TEST(Access, IncludesComparesRights) {
  EXPECT_TRUE(includes(Access::read_write, Access::read));
  EXPECT_FALSE(includes(Access::read, Access::write));
  EXPECT_TRUE(includes(Access::read, Access::none));
}

}  // namespace
}  // namespace iovane
