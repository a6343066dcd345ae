#include "iova/layout_policy.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace iovane::iova {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr IovaRange range(std::uint64_t start, std::uint64_t last) { return {Iova{start}, Iova{last}}; }

constexpr IovaRange msi = range(0xfee00000, 0xfeefffff);
constexpr IovaRange rmrr = range(0x7e800000, 0x7effffff);
constexpr IovaRange aperture = range(0, (1ULL << 48) - 1);

DeviceReservations nic() { return {"0000:17:00.0", {msi}}; }
DeviceReservations gpu() { return {"0000:65:00.0", {msi, rmrr}}; }

TEST(UsableRanges, JoinsSortsAndCuts) {
  const std::vector<IovaRange> given{range(0x2000, 0x2fff), range(0, 0xfff), range(0x1000, 0x1fff), range(9, 3)};
  const UsableRanges set{given};
  EXPECT_THAT(set.ranges(), ElementsAre(range(0, 0x2fff)));
  const std::vector<IovaRange> taken{range(0x800, 0x8ff)};
  EXPECT_THAT(set.without(taken).ranges(), ElementsAre(range(0, 0x7ff), range(0x900, 0x2fff)));
}

TEST(UsableRanges, ReachesTheLastAddress) {
  const UsableRanges all{std::vector{IovaRange::everything()}};
  EXPECT_TRUE(all.complement().empty());
  EXPECT_EQ(all.complement().complement(), all);
  const std::vector<IovaRange> top{{Iova{~0ULL}, iova_max}};
  EXPECT_THAT(all.without(top).ranges(), ElementsAre(range(0, ~0ULL - 1)));
  EXPECT_EQ(all.without(top).first_missing(range(5, ~0ULL)), range(~0ULL, ~0ULL));
}

TEST(LayoutPolicy, EngineManagedFollowsTheDevices) {
  auto policy = LayoutPolicy::create({.aperture = {aperture}, .devices = {nic()}});
  ASSERT_TRUE(policy);
  EXPECT_THAT(policy->usable().ranges(), ElementsAre(range(0, 0xfedfffff), range(0xfef00000, aperture.last.value)));
  ASSERT_TRUE(policy->attach(gpu(), {}));
  EXPECT_FALSE(policy->usable().contains(rmrr));
  ASSERT_TRUE(policy->detach("0000:65:00.0"));
  EXPECT_TRUE(policy->usable().contains(rmrr));
  EXPECT_EQ(policy->detach("0000:65:00.0").error().code, Errc::not_found);
}

TEST(LayoutPolicy, EngineManagedRefusesADeviceThatReservesAMapping) {
  auto policy = LayoutPolicy::create({.aperture = {aperture}, .devices = {nic()}});
  ASSERT_TRUE(policy);
  const std::vector<IovaRange> live{range(0x1000, 0x1fff), range(0x7e900000, 0x7e900fff)};
  const auto refusal = policy->refuses(gpu(), live);
  EXPECT_EQ(refusal, (LayoutRefusal{"0000:65:00.0", rmrr, LayoutRefusal::Against::live_mapping, live[1]}));
  const auto attached = policy->attach(gpu(), live);
  ASSERT_FALSE(attached);
  EXPECT_EQ(attached.error().code, Errc::iova_reserved);
  EXPECT_THAT(attached.error().detail(), HasSubstr("0000:65:00.0"));
  EXPECT_THAT(attached.error().detail(), HasSubstr("0x7e800000"));
  EXPECT_THAT(attached.error().detail(), HasSubstr("0x7e900fff"));
  EXPECT_TRUE(policy->usable().contains(rmrr)) << "a refused device must not count";
}

TEST(LayoutPolicy, FixedIsCheckedAtCreation) {
  const auto conflict = LayoutPolicy::create(
      {.layout = Layout::fixed, .aperture = {aperture}, .devices = {gpu()}, .promised = {range(0, 0x7fffffff)}});
  ASSERT_FALSE(conflict);
  EXPECT_THAT(conflict.error().detail(), HasSubstr("0000:65:00.0"));
  const auto outside = LayoutPolicy::create(
      {.layout = Layout::fixed, .aperture = {range(0, 0xffffffff)}, .promised = {range(0, 0x1ffffffff)}});
  ASSERT_FALSE(outside);
  EXPECT_THAT(outside.error().detail(), HasSubstr("0x100000000"));
  EXPECT_FALSE(LayoutPolicy::create({.layout = Layout::fixed, .aperture = {aperture}}));
  EXPECT_FALSE(LayoutPolicy::create({.aperture = {aperture}, .promised = {range(0, 0xfff)}}));
}

TEST(LayoutPolicy, FixedIsEnforcedOnLaterAttaches) {
  auto policy = LayoutPolicy::create(
      {.layout = Layout::fixed, .aperture = {aperture}, .devices = {nic()}, .promised = {range(0, 0x7fffffff)}});
  ASSERT_TRUE(policy);
  EXPECT_THAT(policy->usable().ranges(), ElementsAre(range(0, 0x7fffffff)));
  EXPECT_THAT(policy->promise()->ranges(), ElementsAre(range(0, 0x7fffffff)));
  EXPECT_EQ(policy->refuses(gpu(), {})->against, LayoutRefusal::Against::promise);
  EXPECT_EQ(policy->refuses(gpu(), {})->other, range(0, 0x7fffffff));
  EXPECT_FALSE(policy->attach(gpu(), {}));
  EXPECT_TRUE(policy->attach({"harmless", {range(0x100000000, 0x1000fffff)}}, {}));
  EXPECT_EQ(policy->attach({"harmless", {}}, {}).error().code, Errc::busy);
}

TEST(LayoutPolicy, HostConstrainedIsMadeOnceAndShown) {
  auto policy = LayoutPolicy::create({.layout = Layout::host_constrained, .aperture = {aperture}, .devices = {nic()}});
  ASSERT_TRUE(policy);
  const auto holes = policy->exported_holes();
  ASSERT_EQ(holes.size(), 2U);
  EXPECT_EQ(holes[0], (ExportedHole{msi, {"0000:17:00.0"}}));
  EXPECT_EQ(holes[1], (ExportedHole{{Iova{1ULL << 48}, iova_max}, {}}));
  // The same holes again are welcome, one more is not, before anything is attached.
  EXPECT_TRUE(policy->attach({"second nic", {msi}}, {}));
  const auto refusal = policy->refuses(gpu(), {});
  ASSERT_TRUE(refusal);
  EXPECT_EQ(refusal->reserved, rmrr);
  EXPECT_EQ(refusal->against, LayoutRefusal::Against::layout);
  EXPECT_FALSE(policy->attach(gpu(), {}));
  // Detaching does not change what the guest was shown.
  ASSERT_TRUE(policy->detach("0000:17:00.0"));
  ASSERT_TRUE(policy->detach("second nic"));
  EXPECT_EQ(policy->exported_holes(), holes);
  EXPECT_FALSE(policy->usable().contains(msi));
}

TEST(LayoutPolicy, ReportsWhatTheHostTookAway) {
  auto policy = LayoutPolicy::create({.layout = Layout::host_constrained, .aperture = {aperture}, .devices = {nic()}});
  ASSERT_TRUE(policy);
  const std::vector<IovaRange> live{range(0x7e900000, 0x7e900fff), range(0x1000, 0x1fff)};
  const std::vector<IovaRange> same{range(0, 0xfedfffff), range(0xfef00000, aperture.last.value)};
  EXPECT_THAT(policy->host_says(same, live), IsEmpty());
  const std::vector<IovaRange> less{range(0, 0x7e7fffff), range(0x7f000000, 0xfedfffff),
                                    range(0xfef00000, aperture.last.value)};
  const auto broken = policy->host_says(less, live);
  ASSERT_EQ(broken.size(), 2U);
  EXPECT_EQ(broken[0].reserved, rmrr);
  EXPECT_EQ(broken[1].other, live[0]);
  EXPECT_FALSE(policy->usable().contains(rmrr));
}

TEST(LayoutPolicy, RefusesNonsense) {
  EXPECT_EQ(LayoutPolicy::create({.aperture = {range(5, 4)}}).error().code, Errc::invalid_argument);
  EXPECT_EQ(LayoutPolicy::create({.aperture = {aperture}, .devices = {nic(), nic()}}).error().code,
            Errc::invalid_argument);
  EXPECT_EQ(LayoutPolicy::create({.aperture = {msi}, .devices = {nic()}}).error().code, Errc::invalid_argument);
}

}  // namespace
}  // namespace iovane::iova
