// The shadow over the real engine, on a backend that records, and on the software IOMMU whose device moves bytes.
#include "viommu/engine_target.hpp"

#include <gtest/gtest.h>

#include "guest_ram.hpp"
#include "iovane/engine.hpp"
#include "viommu/domain_snapshot.hpp"
#include "viommu/recording_target.hpp"
#include "viommu/shadow_domain.hpp"
#include "virtio_requests.hpp"

namespace iovane::viommu {
namespace {

IovaRange pages(std::uint64_t first, std::uint64_t count) {
  return {Iova{first << 12}, Iova{((first + count) << 12) - 1}};
}

struct EngineTargetTest : ::testing::TestWithParam<const char*> {
  GuestRam ram{16U << 20};
  GuestMemory memory;
  Engine engine;
  AddressSpace space;
  AddressSpace other_space;
  void SetUp() override {
    ASSERT_TRUE(memory.add(ram.config()));
    EngineConfig config;
    config.backend = GetParam();
    auto opened = Engine::open(config);
    ASSERT_TRUE(opened) << opened.error().message();
    engine = std::move(*opened);
    AddressSpaceConfig fixed;
    fixed.layout = LayoutPolicy::fixed;
    fixed.promised = {{Iova{0}, Iova{0xfedf'ffff}}};
    for (AddressSpace* s : {&space, &other_space}) {
      auto made = engine.create_address_space(fixed);
      ASSERT_TRUE(made) << made.error().message();
      *s = std::move(*made);
    }
  }
};

TEST_P(EngineTargetTest, WhatTheGuestMapsIsInTheEngineAndNothingElse) {
  EngineTargetConfig config;
  config.batch_max = 64;  // batches are longer: they go through in pieces
  auto target = EngineTarget::create(space, memory, config);
  ASSERT_TRUE(target) << target.error().message();
  auto other = EngineTarget::create(other_space, memory, {});
  ASSERT_TRUE(other) << other.error().message();
  std::mt19937_64 random{test_seed()};
  ShadowDomain domain{{}};
  const auto view = memory.view();
  ASSERT_TRUE(domain.attach(view, **target));
  ASSERT_TRUE(domain.attach(view, **other));
  for (int batch = 0; batch < 40; ++batch) {
    for (int edit = 0; edit < 60; ++edit) {
      const std::uint64_t first = random() % 3000;
      const std::uint64_t count = 1 + random() % 12;
      if (random() % 3 != 0) {
        ASSERT_TRUE(domain.assign(view, pages(first, count), (random() % 4000) << 12, Access::read_write));
      } else {
        ASSERT_TRUE(domain.unmap(view, pages(first, count), CutRule::cut));
      }
    }
    domain.commit_and_wait();
    for (const EditFailure& failure : domain.failures()) FAIL() << failure.error.message();
    for (AddressSpace* s : {&space, &other_space}) {
      std::uint64_t bytes = 0;
      bool same = true;
      s->for_each(IovaRange::everything(), [&](const MappingInfo& m) {
        bytes += m.range.span() + 1;
        for (std::uint64_t a = m.range.start.value; a < m.range.last.value; a += 4096) {
          const auto found = domain.translate(a);
          same = same && found && found->first == m.memory.offset + (a - m.range.start.value);
        }
        return true;
      });
      ASSERT_TRUE(same) << "batch " << batch;
      std::uint64_t expected = 0;
      std::uint64_t at = 0;
      for (auto leaf = domain.index().next(0, iova_max.value); leaf; leaf = domain.index().next(at, iova_max.value)) {
        if ((leaf->word & LeafWord::backed) != 0) expected += leaf->range.span() + 1;
        at = leaf->range.last.value + 1;
      }
      ASSERT_EQ(bytes, expected) << "batch " << batch;
    }
  }
  ASSERT_TRUE(domain.detach(**target));
  EXPECT_EQ(space.stats().live_mappings, 0U);
  ASSERT_TRUE(domain.detach(**other));
}

INSTANTIATE_TEST_SUITE_P(Backends, EngineTargetTest, ::testing::Values("model", "model:type1"),
                         [](const auto& p) { return std::string{p.param} == "model" ? "iommufd" : "type1"; });

TEST(DomainSnapshot, ComesBackOnAnotherHostAndIsNotBelievedWhenDamaged) {
  const GuestRam ram{64U << 20};
  GuestMemory memory;
  ASSERT_TRUE(memory.add(ram.config()));
  const auto view = memory.view();
  ShadowDomain source{{}};
  ASSERT_TRUE(source.map(view, pages(16, 16), 0x100000, Access::read_write));
  ASSERT_TRUE(source.map(view, pages(32, 1), 0x110000, Access::read));
  ASSERT_TRUE(source.map(view, pages(512, 1024), 0x200000, Access::write));
  ASSERT_TRUE(source.map(view, {Iova{1ULL << 62}, Iova{(1ULL << 62) + 0xfff}}, 1ULL << 40, Access::read));
  source.commit_and_wait();
  const auto bytes = save_domain(source);
  ASSERT_TRUE(bytes);
  RecordingTarget host;
  {
    ShadowDomain there{{}};
    ASSERT_TRUE(there.attach(view, host));
    ASSERT_TRUE(restore_domain(*bytes, view, there));
    EXPECT_EQ(host.held().size(), 3U) << "the fourth is no RAM";
    EXPECT_EQ(*save_domain(there), *bytes) << "the same bytes again";
    EXPECT_EQ(restore_domain(*bytes, view, there).error().code, Errc::invalid_argument) << "not empty";
  }
  EXPECT_TRUE(host.held().empty());
  for (std::size_t i = 0; i < bytes->size(); ++i) {
    auto damaged = *bytes;
    damaged[i] ^= std::byte{0x10};
    ShadowDomain there{{}};
    ASSERT_EQ(restore_domain(damaged, view, there).error().code, Errc::bad_format) << "byte " << i;
    ASSERT_EQ(there.index().leaves(), 0U);
    ASSERT_EQ(restore_domain(std::span{*bytes}.first(i), view, there).error().code, Errc::bad_format);
  }
  DomainConfig narrow;
  narrow.address_bits = 48;
  ShadowDomain other{narrow};
  EXPECT_EQ(restore_domain(*bytes, view, other).error().code, Errc::bad_format);
  ShadowDomain refused{{}};
  ASSERT_TRUE(refused.attach(view, host));
  host.fault = [](const HostOp& op) {
    return op.kind == HostOp::Kind::map ? make_error(Errc::entry_limit, Stage::map, "full") : Error{};
  };
  EXPECT_EQ(restore_domain(*bytes, view, refused).error().code, Errc::entry_limit);
  EXPECT_EQ(refused.index().leaves(), 0U);
  host.fault = nullptr;
}

}  // namespace
}  // namespace iovane::viommu
