#include "viommu/shadow_domain.hpp"

#include <gtest/gtest.h>

#include <map>

#include "guest_ram.hpp"
#include "viommu/recording_target.hpp"

namespace iovane::viommu {
namespace {

using namespace iovane::literals;

IovaRange pages(std::uint64_t first, std::uint64_t count) {
  return {Iova{first << 12}, Iova{((first + count) << 12) - 1}};
}

struct ShadowDomainTest : ::testing::Test {
  GuestRam ram{64U << 20};
  GuestMemory memory;
  RecordingTarget host;
  void SetUp() override { ASSERT_TRUE(memory.add(ram.config())); }
};

// Every address that the domain says is told to the host reaches the same byte there, and nothing else is there.
void expect_mirrored(const ShadowDomain& domain, const RecordingTarget& host, const GuestMemory& memory) {
  const auto view = memory.view();
  std::uint64_t bytes = 0;
  std::uint64_t at = 0;
  for (auto leaf = domain.index().next(0, iova_max.value); leaf; leaf = domain.index().next(at, iova_max.value)) {
    if ((leaf->word & LeafWord::backed) != 0) {
      bytes += leaf->range.span() + 1;
      const auto* held = host.find(leaf->range.start.value);
      ASSERT_NE(held, nullptr) << std::hex << leaf->range.start.value;
      ASSERT_GE(held->range.last, leaf->range.last);
      const Region* region = view.find(LeafWord::gpa(leaf->word));
      ASSERT_NE(region, nullptr);
      ASSERT_EQ(held->region, region->id);
      ASSERT_EQ(held->region_offset + (leaf->range.start.value - held->range.start.value),
                LeafWord::gpa(leaf->word) - region->gpa);
      ASSERT_EQ(held->access, LeafWord::access(leaf->word));
      if ((leaf->word & LeafWord::unit) != 0) {
        ASSERT_EQ(held->range.start, leaf->range.start);
      }
    }
    if (leaf->range.last == iova_max) break;
    at = leaf->range.last.value + 1;
  }
  std::uint64_t held_bytes = 0;
  for (const auto& [start, held] : host.held()) held_bytes += held.range.span() + 1;
  EXPECT_EQ(bytes, held_bytes);
}

TEST_F(ShadowDomainTest, OneEditIsOneUnitAndOneBatch) {
  ShadowDomain domain{{}};
  const auto view = memory.view();
  ASSERT_TRUE(domain.attach(view, host));
  ASSERT_TRUE(domain.map(view, pages(16, 16), 0x100000, Access::read_write));
  ASSERT_TRUE(domain.map(view, pages(64, 1), 0x5000, Access::read));
  EXPECT_EQ(host.held().size(), 0U) << "nothing before the commit";
  EXPECT_EQ(domain.commit(), Progress::done);
  EXPECT_EQ(host.batches(), 1U);
  ASSERT_EQ(host.held().size(), 2U);
  EXPECT_EQ(host.held().at(16 << 12).range, pages(16, 16));
  EXPECT_EQ(domain.stats().merged_leaves, 15U);
  EXPECT_EQ(domain.map(view, pages(31, 2), 0, Access::read).error().code, Errc::iova_busy);
  EXPECT_EQ(domain.map(view, pages(1, 1), 0x800, Access::read).error().code, Errc::invalid_argument);
  EXPECT_EQ(domain.map(view, pages(1, 1), 0, Access::none).error().code, Errc::invalid_argument);
  EXPECT_EQ(domain.map(view, pages(1, 2), 0xffff'ffff'ffff'f000, Access::read).error().code, Errc::overflow);
}

TEST_F(ShadowDomainTest, AGuestThatCutsAUnitGetsItsRemaindersMappedAgain) {
  ShadowDomain domain{{}};
  const auto view = memory.view();
  ASSERT_TRUE(domain.attach(view, host));
  ASSERT_TRUE(domain.map(view, pages(16, 16), 0x100000, Access::read_write));
  domain.commit_and_wait();
  EXPECT_EQ(domain.unmap(view, pages(20, 4), CutRule::refuse).error().code, Errc::would_bisect);
  EXPECT_EQ(domain.index().leaves(), 16U);
  ASSERT_EQ(domain.unmap(view, pages(20, 4), CutRule::cut).value_or(0U), 4U);
  domain.commit_and_wait();
  ASSERT_EQ(host.held().size(), 2U);
  EXPECT_EQ(host.held().at(16 << 12).range, pages(16, 4));
  EXPECT_EQ(host.held().at(24 << 12).range, pages(24, 8));
  EXPECT_EQ(host.held().at(24 << 12).region_offset, 0x108000U);
  const DomainStats stats = domain.stats();
  EXPECT_EQ(stats.cuts, 1U);
  EXPECT_EQ(stats.gap_bytes, 12U << 12);
}

TEST_F(ShadowDomainTest, ARefusingUnmapMayBeginAndEndAnywhereButCutsNothing) {
  ShadowDomain domain{{}};
  const auto view = memory.view();
  ASSERT_TRUE(domain.attach(view, host));
  ASSERT_TRUE(domain.map(view, pages(16, 1), 0x100000, Access::read));
  ASSERT_TRUE(domain.map(view, pages(17, 1), 0x300000, Access::read));
  ASSERT_TRUE(domain.map(view, pages(512, 512), 0x200000, Access::read));
  domain.commit_and_wait();
  const auto unmap = [&](std::uint64_t first, std::uint64_t last) {
    const auto gone = domain.unmap(view, {Iova{first}, Iova{last}}, CutRule::refuse);
    domain.commit_and_wait();
    expect_mirrored(domain, host, memory);
    return gone ? Errc::ok : gone.error().code;
  };
  EXPECT_EQ(unmap(0x10000, 0x10000), Errc::would_bisect);
  EXPECT_EQ(unmap(0x10001, 0x10fff), Errc::would_bisect);
  EXPECT_EQ(unmap(0x10000, 0x11001), Errc::would_bisect);
  EXPECT_EQ(unmap(0x10800, 0x11fff), Errc::would_bisect);
  EXPECT_EQ(unmap(0x200001, 0x3fffff), Errc::would_bisect);
  EXPECT_EQ(unmap(0x200000, 0x3ffffe), Errc::would_bisect);
  EXPECT_EQ(domain.index().leaves(), 3U);
  EXPECT_EQ(unmap(0xf123, 0x10fff), Errc::ok);
  EXPECT_EQ(unmap(0x11000, 0x1fffff), Errc::ok);
  EXPECT_EQ(unmap(0x1fff00, 0x4000ff), Errc::ok);
  EXPECT_EQ(domain.index().leaves(), 0U);
}

TEST_F(ShadowDomainTest, ATargetThatCanCutHasNoGap) {
  host.may_cut = true;
  ShadowDomain domain{{}};
  const auto view = memory.view();
  ASSERT_TRUE(domain.attach(view, host));
  ASSERT_TRUE(domain.map(view, pages(0, 512), 0x200000, Access::read));  // one 2 MiB leaf
  domain.commit_and_wait();
  ASSERT_TRUE(domain.unmap(view, pages(100, 1), CutRule::cut));
  domain.commit_and_wait();
  EXPECT_EQ(domain.stats().gap_bytes, 0U);
  EXPECT_EQ(host.operations(), 2U);
  expect_mirrored(domain, host, memory);
}

TEST_F(ShadowDomainTest, AssignReplacesASingleLeafInOneOperation) {
  ShadowDomain domain{{}};
  const auto view = memory.view();
  ASSERT_TRUE(domain.attach(view, host));
  EXPECT_TRUE(*domain.assign(view, pages(7, 1), 0x1000, Access::read));
  EXPECT_FALSE(*domain.assign(view, pages(7, 1), 0x1000, Access::read)) << "nothing changed";
  EXPECT_TRUE(*domain.assign(view, pages(7, 1), 0x2000, Access::read_write));
  domain.commit_and_wait();
  EXPECT_EQ(host.operations(), 2U);
  EXPECT_EQ(host.held().at(7 << 12).region_offset, 0x2000U);
  EXPECT_EQ(domain.stats().replaces, 1U);
}

TEST_F(ShadowDomainTest, WhatIsNotRamIsTheGuestsOnly) {
  const GuestRam more{1U << 20, 0x1000'0000};
  ASSERT_TRUE(memory.add(more.config()));
  ShadowDomain domain{{}};
  {
    const auto view = memory.view();
    ASSERT_TRUE(domain.attach(view, host));
    // 1 GiB from the last page of the first region, across the second one, into nothing.
    ASSERT_TRUE(domain.map(view, {Iova{0}, Iova{0x3fff'ffff}}, 0x3ff'f000, Access::read));
    domain.commit_and_wait();
    ASSERT_EQ(host.held().size(), 2U);
    EXPECT_EQ(host.held().at(0).range, pages(0, 1));
    EXPECT_EQ(host.held().at(0xc00'1000).range.length(), 1_MiB);
    EXPECT_EQ(domain.translate(0x2000)->first, 0x400'1000U) << "emulated devices still see it";
    expect_mirrored(domain, host, memory);
  }
  // RAM arrives under it, and leaves again.
  const GuestRam late{1U << 20, 0x800'0000};
  const auto id = memory.add(late.config());
  ASSERT_TRUE(id);
  {
    const auto view = memory.view();
    ASSERT_TRUE(domain.refresh_backing(view));
    domain.commit_and_wait();
    EXPECT_EQ(host.held().size(), 3U);
    expect_mirrored(domain, host, memory);
    ASSERT_TRUE(domain.withdraw_region(*view.find(0x800'0000)));
    domain.commit_and_wait();
    EXPECT_EQ(host.held().size(), 2U);
  }
  ASSERT_TRUE(memory.remove(*id));
  expect_mirrored(domain, host, memory);
}

TEST_F(ShadowDomainTest, OneFailingTargetTakesTheMappingFromAll) {
  RecordingTarget other{"other"};
  ShadowDomain domain{{}};
  const auto view = memory.view();
  ASSERT_TRUE(domain.attach(view, host));
  ASSERT_TRUE(domain.attach(view, other));
  other.fault = [](const HostOp& op) {
    return op.range.start.value == (2U << 12) ? make_error(Errc::memlock_exceeded, Stage::pin, "no more") : Error{};
  };
  for (std::uint32_t i = 1; i < 4; ++i) ASSERT_TRUE(domain.map(view, pages(i, 1), i << 12, Access::read, i));
  domain.commit_and_wait();
  ASSERT_EQ(domain.failures().size(), 1U);
  EXPECT_EQ(domain.failures()[0].tag, 2U);
  EXPECT_EQ(domain.failures()[0].error.code, Errc::memlock_exceeded);
  EXPECT_EQ(host.held().size(), 2U);
  EXPECT_EQ(other.held().size(), 2U);
  EXPECT_FALSE(domain.translate(2 << 12));
  EXPECT_EQ(domain.stats().rollbacks, 1U);
  expect_mirrored(domain, host, memory);
  expect_mirrored(domain, other, memory);
}

TEST_F(ShadowDomainTest, AMapThatFailedAndWasUnmappedInTheSameBatchNeedsNoRollback) {
  RecordingTarget other{"other"};
  ShadowDomain domain{{}};
  const auto view = memory.view();
  ASSERT_TRUE(domain.attach(view, host));
  ASSERT_TRUE(domain.attach(view, other));
  bool first = true;
  other.fault = [&](const HostOp& op) {
    if (op.kind != HostOp::Kind::map || !std::exchange(first, false)) return Error{};
    return make_error(Errc::out_of_memory, Stage::map, "once");
  };
  ASSERT_TRUE(domain.map(view, pages(1, 1), 0x1000, Access::read, 1));
  ASSERT_TRUE(domain.unmap(view, pages(1, 1), CutRule::cut, 2));
  ASSERT_TRUE(domain.map(view, pages(1, 1), 0x1000, Access::read, 3));
  domain.commit_and_wait();
  ASSERT_EQ(domain.failures().size(), 1U);
  EXPECT_EQ(domain.failures()[0].tag, 1U);
  EXPECT_EQ(host.held().size(), 1U);
  EXPECT_EQ(other.held().size(), 1U);
  EXPECT_EQ(domain.stats().rollbacks, 0U);
  expect_mirrored(domain, other, memory);
}

TEST_F(ShadowDomainTest, AttachReplaysAndDetachWithdraws) {
  ShadowDomain domain{{}};
  const auto view = memory.view();
  for (std::uint64_t i = 0; i < 3000; ++i)
    ASSERT_TRUE(domain.map(view, pages(i * 2, 1), (i % 1000) << 12, Access::read_write));
  domain.commit_and_wait();
  ASSERT_TRUE(domain.attach(view, host));
  EXPECT_EQ(host.held().size(), 3000U);
  EXPECT_GE(host.batches(), 2U) << "in batches of bounded size";
  expect_mirrored(domain, host, memory);

  RecordingTarget failing{"failing"};
  failing.fault = [](const HostOp& op) {
    return op.kind == HostOp::Kind::map && op.range.start.value > (4000U << 12)
               ? make_error(Errc::entry_limit, Stage::map, "full")
               : Error{};
  };
  EXPECT_EQ(domain.attach(view, failing).error().code, Errc::entry_limit);
  EXPECT_TRUE(failing.held().empty()) << "nothing is left behind";
  EXPECT_EQ(domain.targets(), 1U);
  ASSERT_TRUE(domain.detach(host));
  EXPECT_TRUE(host.held().empty());
  EXPECT_EQ(domain.detach(host).error().code, Errc::not_found);
}

TEST_F(ShadowDomainTest, LayoutPoliciesDecideAboutReservedRanges) {
  const IovaRange msi{Iova{0xfee0'0000}, Iova{0xfeef'ffff}};
  const auto view = memory.view();
  RecordingTarget holed{"holed"};
  holed.usable = {{Iova{0}, Iova{0xfedf'ffff}}, {Iova{0xfef0'0000}, Iova{0xffff'ffff}}};
  {
    ShadowDomain open{{}};  // engine_managed: a live mapping in the hole is the only obstacle
    ASSERT_TRUE(open.map(view, msi, 0, Access::read));
    EXPECT_EQ(open.attach(view, holed).error().code, Errc::iova_reserved);
    ASSERT_TRUE(open.unmap(view, msi, CutRule::cut));
    open.commit_and_wait();
    ASSERT_TRUE(open.attach(view, holed));
    ASSERT_TRUE(open.map(view, {Iova{0xfed0'0000}, Iova{0xfeff'ffff}}, 0, Access::read));
    open.commit_and_wait();
    EXPECT_TRUE(open.failures().empty());
    EXPECT_EQ(holed.held().size(), 2U) << "around the hole";
    EXPECT_EQ(open.stats().unbacked_bytes, msi.span() + 1);
    expect_mirrored(open, holed, memory);
  }
  {
    DomainConfig config;
    config.layout = LayoutPolicy::fixed;
    config.promised = {{Iova{0}, Iova{0xffff'ffff}}};
    ShadowDomain fixed{config};
    EXPECT_EQ(fixed.attach(view, holed).error().code, Errc::iova_reserved);
    EXPECT_TRUE(fixed.attach(view, host));
  }
  {
    DomainConfig config;
    config.layout = LayoutPolicy::host_constrained;
    ShadowDomain constrained{config};
    ASSERT_TRUE(constrained.attach(view, holed));
    RecordingTarget worse{"worse"};
    worse.usable = {{Iova{0x1000}, Iova{0xfedf'ffff}}};
    EXPECT_EQ(constrained.attach(view, worse).error().code, Errc::iova_reserved);
    EXPECT_TRUE(constrained.attach(view, host));
  }
}

TEST_F(ShadowDomainTest, AsynchronousTargetsAreWaitedForTogether) {
  RecordingTarget slow{"slow"};
  slow.asynchronous = true;
  ShadowDomain domain{{}};
  const auto view = memory.view();
  ASSERT_TRUE(domain.attach(view, host));
  ASSERT_TRUE(domain.attach(view, slow));
  ASSERT_TRUE(domain.map(view, pages(1, 1), 0, Access::read));
  EXPECT_EQ(domain.commit(), Progress::pending);
  EXPECT_EQ(domain.poll(), Progress::pending);
  EXPECT_FALSE(domain.idle());
  slow.finish();
  EXPECT_EQ(domain.poll(), Progress::done);
  EXPECT_TRUE(domain.idle());
  slow.asynchronous = false;
}

// Random edits on two targets, one of which fails now and then; after every batch both hold exactly what the domain
// says, and the domain says exactly what a map of granules says, less what failed.
TEST_F(ShadowDomainTest, RandomEditsStayInStepOnEveryTarget) {
  std::mt19937_64 random{test_seed()};
  RecordingTarget other{"other"};
  other.fault = [&](const HostOp& op) {
    return op.kind == HostOp::Kind::map && random() % 200 == 0 ? make_error(Errc::out_of_memory, Stage::map, "unlucky")
                                                               : Error{};
  };
  ShadowDomain domain{{}};
  const auto view = memory.view();
  ASSERT_TRUE(domain.attach(view, host));
  ASSERT_TRUE(domain.attach(view, other));
  std::map<std::uint64_t, std::uint64_t> model;
  for (int batch = 0; batch < 120; ++batch) {
    const auto edits = 1 + random() % 24;
    for (std::uint64_t e = 0; e < edits; ++e) {
      const std::uint64_t first = random() % 1500;
      const std::uint64_t count = random() % 6 == 0 ? 1 + random() % 700 : 1 + random() % 8;
      const std::uint64_t gpa = (random() % 15000) << 12;  // of 16384 pages: some ranges run out of RAM
      switch (random() % 3) {
        case 0: {
          const auto low = model.lower_bound(first);
          const bool free = low == model.end() || low->first >= first + count;
          const auto mapped = domain.map(view, pages(first, count), gpa, Access::read_write);
          ASSERT_EQ(mapped.has_value(), free);
          if (free)
            for (std::uint64_t i = 0; i < count; ++i) model[first + i] = gpa + (i << 12);
          break;
        }
        case 1:
          ASSERT_TRUE(domain.assign(view, pages(first, count), gpa, Access::read_write));
          for (std::uint64_t i = 0; i < count; ++i) model[first + i] = gpa + (i << 12);
          break;
        default:
          ASSERT_TRUE(domain.unmap(view, pages(first, count), CutRule::cut));
          model.erase(model.lower_bound(first), model.lower_bound(first + count));
      }
    }
    const auto lost_before = domain.stats().lost_bytes;
    domain.commit_and_wait();
    expect_mirrored(domain, host, memory);
    expect_mirrored(domain, other, memory);
    if (HasFatalFailure() || HasNonfatalFailure()) FAIL() << "batch " << batch;
    std::uint64_t missing = 0;
    for (auto it = model.begin(); it != model.end();) {
      const auto found = domain.translate(it->first << 12);
      if (found) {
        ASSERT_EQ(found->first, it->second);
        ++it;
      } else {
        ++missing;
        it = model.erase(it);
      }
    }
    ASSERT_EQ(missing << 12, domain.stats().lost_bytes - lost_before);
    std::uint64_t live = 0;
    domain.for_each_mapping([&](IovaRange r, std::uint64_t, Access) { live += (r.span() + 1) >> 12; });
    ASSERT_EQ(live, model.size());
  }
}

}  // namespace
}  // namespace iovane::viommu
