// Relaxed unmaps: what is answered at once, what is held, and when it is let go.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cerrno>
#include <chrono>
#include <thread>
#include <vector>

#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "support/recording_backend.hpp"

namespace iovane {
namespace {

using namespace iovane::literals;
using backends::OpKind;
using testing::RecordingBackend;
using testing::RecordingSpace;

constexpr std::uint64_t page = 4096;

IovaRange pages(std::uint64_t first, std::uint64_t count = 1) {
  return {Iova{first * page}, Iova{(first + count) * page - 1}};
}

class RelaxedTest : public ::testing::Test {
 protected:
  // No test but the one about time waits for it.
  void open(RelaxedBounds bounds = {.time_max = std::chrono::hours{1}}, LayoutPolicy layout = LayoutPolicy::fixed) {
    engine_ = EngineAccess::open(std::make_unique<RecordingBackend>(backend_), "recording");
    AddressSpaceConfig config;
    config.layout = layout;
    config.unmap = UnmapMode::relaxed;
    config.relaxed = bounds;
    auto space = engine_.create_address_space(config);
    ASSERT_TRUE(space) << space.error().message();
    space_ = *std::move(space);
  }
  void SetUp() override { open(); }

  static MapRequest map_at(std::uint64_t first, std::uint64_t count = 1, std::uint64_t memory = 0x7000'0000) {
    MapRequest request;
    request.memory = {{}, memory + first * page, Bytes{count * page}};
    request.placement = Placement::fixed(Iova{first * page});
    return request;
  }
  Completion map(std::uint64_t first, std::uint64_t count = 1) {
    const Completion done = space_.map(map_at(first, count));
    EXPECT_TRUE(done.ok()) << done.error.message();
    return done;
  }
  Bytes unmap(IovaRange range) {
    const Completion done = space_.unmap(UnmapRequest::of(range));
    EXPECT_TRUE(done.ok()) << done.error.message();
    return done.bytes;
  }

  Engine engine_;
  AddressSpace space_;
  RecordingSpace* backend_ = nullptr;
};

TEST_F(RelaxedTest, AnswersAtOnceAndAsksTheBackendLater) {
  const Completion mapped = map(16, 2);
  EXPECT_EQ(unmap(pages(16, 2)), 8_KiB);
  EXPECT_EQ(backend_->live.size(), 1U) << "devices still reach it";
  EXPECT_EQ(space_.find(Iova{16 * page}).error().code, Errc::not_found) << "the caller's view";
  EXPECT_EQ(space_.unmap(UnmapRequest::of(mapped.mapping)).error.code, Errc::stale_handle);
  EXPECT_EQ(space_.unmap(UnmapRequest::of(pages(16, 2))).error.code, Errc::not_found);
  std::size_t seen = 0;
  space_.for_each(IovaRange::everything(), [&](const MappingInfo&) { return ++seen != 0; });
  EXPECT_EQ(seen, 0U);
  Stats stats = space_.stats();
  EXPECT_EQ(stats.stale_mappings, 1U);
  EXPECT_EQ(stats.stale_bytes, 8_KiB);
  EXPECT_EQ(stats.live_mappings, 0U);
  EXPECT_EQ(*space_.flush(), 8_KiB);
  EXPECT_TRUE(backend_->live.empty());
  stats = space_.stats();
  EXPECT_EQ(stats.stale_mappings, 0U);
  EXPECT_EQ(stats.flushed, 1U);
  EXPECT_EQ(stats.stale_window.count, 1U);
  EXPECT_EQ(*space_.flush(), Bytes{0});
}

TEST_F(RelaxedTest, FlushesInAddressOrderAndMergesWhatHasNothingLiveBetween) {
  for (const std::uint64_t first : {40, 10, 30, 20, 50}) map(first);
  for (const std::uint64_t first : {50, 10, 40, 20}) unmap(pages(first));  // 30 stays
  backend_->batches.clear();
  EXPECT_EQ(*space_.flush(), 16_KiB);
  ASSERT_EQ(backend_->batches.size(), 1U);
  ASSERT_EQ(backend_->batches[0].size(), 2U);
  EXPECT_EQ(backend_->batches[0][0].range, (IovaRange{pages(10).start, pages(20).last}));
  EXPECT_EQ(backend_->batches[0][1].range, (IovaRange{pages(40).start, pages(50).last}));
  EXPECT_EQ(backend_->live.size(), 1U);
}

TEST_F(RelaxedTest, FlushesAcrossHolesOnlyWhereTheBackendWalksThemCheaply) {
  space_ = {};
  engine_ = EngineAccess::open(std::make_unique<RecordingBackend>(backend_), "recording");
  backend_->facts_.unmap_hole_max = Bytes{2 * page};
  AddressSpaceConfig config;
  config.layout = LayoutPolicy::fixed;
  config.unmap = UnmapMode::relaxed;
  config.relaxed.time_max = std::chrono::hours{1};
  space_ = *engine_.create_address_space(config);
  for (const std::uint64_t first : {10, 13, 17}) map(first);
  for (const std::uint64_t first : {17, 13, 10}) unmap(pages(first));
  backend_->batches.clear();
  EXPECT_EQ(*space_.flush(), 12_KiB);
  ASSERT_EQ(backend_->batches.size(), 1U);
  ASSERT_EQ(backend_->batches[0].size(), 2U);
  EXPECT_EQ(backend_->batches[0][0].range, pages(10, 4));
  EXPECT_EQ(backend_->batches[0][1].range, pages(17));
}

TEST_F(RelaxedTest, AMapOfTheSameMemoryTakesTheStaleMappingOver) {
  const Completion first = map(16);
  unmap(pages(16));
  backend_->batches.clear();
  const Completion again = map(16);
  EXPECT_TRUE(backend_->batches.empty()) << "no call at all";
  EXPECT_NE(again.mapping, first.mapping) << "the old name stays dead";
  EXPECT_EQ(space_.unmap(UnmapRequest::of(first.mapping)).error.code, Errc::stale_handle);
  EXPECT_EQ(space_.stats().revived, 1U);
  EXPECT_EQ(space_.stats().stale_mappings, 0U);
  EXPECT_EQ(*space_.flush(), Bytes{0});
  EXPECT_EQ(backend_->live.size(), 1U);
  EXPECT_TRUE(space_.unmap(UnmapRequest::of(again.mapping)).ok());
  EXPECT_EQ(*space_.flush(), 4_KiB);
  EXPECT_TRUE(backend_->live.empty());
}

TEST_F(RelaxedTest, AMapOfOtherMemoryAccessOrSizeMakesTheFlushHappenFirst) {
  map(16);
  unmap(pages(16));
  const Completion other = space_.map(map_at(16, 1, 0x9000'0000));
  ASSERT_TRUE(other.ok()) << other.error.message();
  EXPECT_EQ(backend_->live.begin()->second.memory, 0x9000'0000 + 16 * page);
  EXPECT_EQ(space_.stats().flushed, 1U);

  unmap(pages(16));
  MapRequest read_only = map_at(16, 1, 0x9000'0000);
  read_only.access = Access::read;
  ASSERT_TRUE(space_.map(read_only).ok());
  EXPECT_EQ(backend_->live.begin()->second.access, Access::read);

  unmap(pages(16));
  MapRequest wider = map_at(15, 3, 0x9000'0000);
  wider.access = Access::read;
  ASSERT_TRUE(space_.map(wider).ok()) << "overlaps what is stale, not what is live";
  EXPECT_EQ(backend_->live.size(), 1U);
  EXPECT_EQ(space_.stats().revived, 0U);
}

TEST_F(RelaxedTest, UnmapAndMapInOneBatchKeepTheirOrder) {
  Queue queue = *space_.open_queue();
  map(16);
  ASSERT_TRUE(queue.stage(UnmapRequest::of(pages(16))));
  ASSERT_TRUE(queue.stage(map_at(16, 1, 0x9000'0000)));
  ASSERT_TRUE(queue.stage(UnmapRequest::of(pages(16))));
  ASSERT_TRUE(queue.stage_flush(7));
  queue.submit();
  std::vector<Completion> done(4);
  ASSERT_EQ(queue.wait(done, 4, std::chrono::seconds{10}), 4U);
  for (const Completion& completion : done) EXPECT_TRUE(completion.ok()) << completion.error.message();
  EXPECT_EQ(done[3].user_data, 7U);
  EXPECT_EQ(done[3].bytes, Bytes{0}) << "the second map was cancelled, the first flushed for its sake";
  EXPECT_TRUE(backend_->live.empty());
}

TEST_F(RelaxedTest, BoundsOfCountAndBytesHold) {
  open({.mappings_max = 8, .bytes_max = 1_GiB, .time_max = std::chrono::hours{1}});
  for (std::uint64_t i = 0; i < 40; ++i) {
    map(16 + i);
    unmap(pages(16 + i));
    EXPECT_LT(space_.stats().stale_mappings, 8U);
    EXPECT_EQ(backend_->live.size(), space_.stats().stale_mappings);
  }
  EXPECT_EQ(space_.stats().stale_mappings_peak, 8U);
  open({.mappings_max = 1000, .bytes_max = 64_KiB, .time_max = std::chrono::hours{1}});
  for (std::uint64_t i = 0; i < 40; ++i) {
    map(16 + 4 * i, 4);
    unmap(pages(16 + 4 * i, 4));
    EXPECT_LT(space_.stats().stale_bytes, 64_KiB);
  }
}

TEST_F(RelaxedTest, OneUnmapOfMoreThanTheBoundIsFlushedInParts) {
  open({.mappings_max = 4, .bytes_max = 1_GiB, .time_max = std::chrono::hours{1}});
  for (std::uint64_t i = 0; i < 600; ++i) map(16 + 2 * i);
  EXPECT_EQ(unmap(pages(0, 2000)), Bytes{600 * page});
  EXPECT_EQ(space_.stats().stale_mappings, 0U);
  EXPECT_TRUE(backend_->live.empty());
}

TEST_F(RelaxedTest, TheTimeBoundHoldsWithoutFurtherCalls) {
  open({.time_max = std::chrono::milliseconds{2}});
  for (int round = 0; round < 3; ++round) {
    map(16);
    unmap(pages(16));
    const auto begun = std::chrono::steady_clock::now();
    while (space_.stats().stale_mappings != 0) {
      ASSERT_LT(std::chrono::steady_clock::now() - begun, std::chrono::seconds{20}) << "nobody flushed";
      std::this_thread::sleep_for(std::chrono::milliseconds{1});
    }
  }
  EXPECT_GE(space_.stats().flushes, 3U);
  EXPECT_EQ(space_.stats().stale_window.count, 3U);
}

TEST_F(RelaxedTest, TheAllocatorGetsAnIovaBackOnlyAfterTheFlush) {
  open({.time_max = std::chrono::hours{1}}, LayoutPolicy::engine_managed);
  MapRequest request;
  request.memory = {{}, 0x7000'0000, 4_KiB};
  const Completion first = space_.map(request);
  ASSERT_TRUE(first.ok()) << first.error.message();
  unmap({first.iova, Iova{first.iova.value + page - 1}});
  const Completion second = space_.map(request);
  ASSERT_TRUE(second.ok());
  EXPECT_NE(second.iova, first.iova);
  (void)space_.flush();
  request.placement = Placement::fixed(first.iova);
  const Completion third = space_.map(request);
  EXPECT_TRUE(third.ok()) << third.error.message();
  EXPECT_EQ(space_.stats().flushes, 1U) << "free already";
}

TEST_F(RelaxedTest, AFullSpaceFlushesInsteadOfRefusing) {
  open({.time_max = std::chrono::hours{1}}, LayoutPolicy::engine_managed);
  MapRequest huge;
  huge.memory = {{}, 0x7000'0000, Bytes{(std::uint64_t{1} << 47) + (std::uint64_t{1} << 46)}};
  const Completion first = space_.map(huge);
  ASSERT_TRUE(first.ok()) << first.error.message();
  unmap({first.iova, Iova{first.iova.value + huge.memory.length.value - 1}});
  const Completion second = space_.map(huge);
  EXPECT_TRUE(second.ok()) << second.error.message();
}

TEST_F(RelaxedTest, AKernelOutOfMemlockGetsTheStalePinsFirst) {
  map(16);
  unmap(pages(16));
  bool refused = false;
  backend_->fail = [&](const RecordingSpace::Op& op) {
    if (op.kind != OpKind::map || backend_->live.empty()) return Error{};
    refused = true;
    return make_error(Errc::memlock_exceeded, Stage::map, ENOMEM, "one mapping at a time");
  };
  const Completion done = space_.map(map_at(32));
  EXPECT_TRUE(refused);
  EXPECT_TRUE(done.ok()) << done.error.message();
  EXPECT_EQ(backend_->live.size(), 1U);
  EXPECT_EQ(backend_->live.begin()->first, 32 * page);
}

TEST_F(RelaxedTest, MemoryStaysRegisteredUntilItsLastMappingIsFlushed) {
  Memory memory = *space_.register_memory({.address = reinterpret_cast<void*>(0x7000'0000), .length = 16_KiB});
  MapRequest request = map_at(16);
  request.memory = memory.piece(Bytes{0}, 4_KiB);
  ASSERT_TRUE(space_.map(request).ok());
  unmap(pages(16));
  memory = {};
  EXPECT_EQ(backend_->regions_live, 1U) << "a device could still write there";
  (void)space_.flush();
  EXPECT_EQ(backend_->regions_live, 0U);
}

TEST_F(RelaxedTest, WhatTheKernelFailsToFlushIsQuarantined) {
  for (std::uint64_t i = 0; i < 3; ++i) map(16 + i);
  unmap(pages(16, 3));
  backend_->fail = [](const RecordingSpace::Op& op) {
    return op.kind == OpKind::unmap && op.range == pages(17) ? make_error(Errc::io_error, Stage::unmap, EIO, "stuck")
                                                             : Error{};
  };
  EXPECT_EQ(*space_.flush(), 8_KiB);
  EXPECT_EQ(space_.stats().quarantined_mappings, 1U);
  EXPECT_EQ(space_.map(map_at(17)).error.code, Errc::quarantined);
  EXPECT_TRUE(space_.map(map_at(16)).ok());
}

TEST_F(RelaxedTest, UnmapAllAndDestructionLeaveNothing) {
  map(16);
  map(17);
  unmap(pages(16));
  EXPECT_EQ(*space_.unmap_all(), 4_KiB) << "the other one was reported when it was unmapped";
  EXPECT_TRUE(backend_->live.empty());
  EXPECT_EQ(space_.stats().stale_mappings, 0U);
  map(16);
  unmap(pages(16));
  space_ = {};
}

TEST_F(RelaxedTest, RefusesBoundsThatMeanNothing) {
  for (const RelaxedBounds& bounds :
       {RelaxedBounds{.mappings_max = 0}, RelaxedBounds{.mappings_max = 2U << 20}, RelaxedBounds{.bytes_max = {}},
        RelaxedBounds{.time_max = std::chrono::nanoseconds{0}}}) {
    engine_ = EngineAccess::open(std::make_unique<RecordingBackend>(backend_), "recording");
    AddressSpaceConfig config;
    config.unmap = UnmapMode::relaxed;
    config.relaxed = bounds;
    EXPECT_EQ(engine_.create_address_space(config).error().code, Errc::invalid_argument);
  }
}

}  // namespace
}  // namespace iovane
