// The engine's contract (docs/ARCHITECTURE.md) against a backend that records what it is asked.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <thread>
#include <vector>

#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "support/recording_backend.hpp"

namespace iovane {
namespace {

using namespace iovane::literals;
using backends::OpKind;
using ::testing::HasSubstr;
using testing::RecordingBackend;
using testing::RecordingSpace;

constexpr std::uint64_t page = 4096;

IovaRange pages(std::uint64_t first, std::uint64_t count = 1) {
  return {Iova{first * page}, Iova{(first + count) * page - 1}};
}

class EngineTest : public ::testing::Test {
 protected:
  void open(LayoutPolicy layout = LayoutPolicy::fixed) {
    RecordingSpace* recorder = nullptr;
    engine_ = EngineAccess::open(std::make_unique<RecordingBackend>(recorder), "recording");
    backend_ = recorder;
    AddressSpaceConfig config;
    config.layout = layout;
    auto space = engine_.create_address_space(config);
    ASSERT_TRUE(space) << space.error().message();
    space_ = *std::move(space);
    auto queue = space_.open_queue({.depth = 64});
    ASSERT_TRUE(queue) << queue.error().message();
    queue_ = *std::move(queue);
  }
  void SetUp() override { open(); }

  // Memory is never touched by the recording backend: any address does.
  static MapRequest map_at(std::uint64_t first, std::uint64_t count = 1, std::uint64_t user_data = 0) {
    MapRequest request;
    request.memory = {{}, 0x7000'0000 + first * page, Bytes{count * page}};
    request.placement = Placement::fixed(Iova{first * page});
    request.user_data = user_data;
    return request;
  }
  void map(std::uint64_t first, std::uint64_t count = 1) {
    const Completion done = space_.map(map_at(first, count));
    ASSERT_TRUE(done.ok()) << done.error.message();
  }
  std::vector<Completion> run() {
    queue_.submit();
    std::vector<Completion> all(queue_.outstanding());
    all.resize(queue_.wait(all, all.size(), std::chrono::seconds{10}));
    EXPECT_EQ(queue_.outstanding(), 0U);
    return all;
  }
  void stage(const auto& request) { ASSERT_TRUE(queue_.stage(request)); }

  Engine engine_;
  AddressSpace space_;
  Queue queue_;
  RecordingSpace* backend_ = nullptr;
};

TEST_F(EngineTest, MapsABatchInOneBackendCallAndCompletesEveryOperation) {
  for (std::uint64_t i = 0; i < 8; ++i) stage(map_at(16 + i, 1, 100 + i));
  const auto done = run();
  ASSERT_EQ(done.size(), 8U);
  for (std::uint64_t i = 0; i < 8; ++i) {
    EXPECT_TRUE(done[i].ok()) << done[i].error.message();
    EXPECT_EQ(done[i].user_data, 100 + i);
    EXPECT_EQ(done[i].iova, Iova{(16 + i) * page});
    EXPECT_TRUE(done[i].mapping);
  }
  EXPECT_EQ(backend_->batches.size(), 1U);
  EXPECT_EQ(backend_->live.size(), 8U);
}

TEST_F(EngineTest, AMapIntoAHoleOfAWideUnmapOfTheSameBatch) {
  map(16);
  map(18);
  stage(UnmapRequest::of(pages(16, 3)));
  stage(map_at(17));
  const auto done = run();
  ASSERT_EQ(done.size(), 2U);
  EXPECT_TRUE(done[0].ok()) << done[0].error.message();
  EXPECT_EQ(done[0].bytes, 8_KiB);
  EXPECT_TRUE(done[1].ok()) << done[1].error.message();
  ASSERT_EQ(backend_->live.size(), 1U);
  EXPECT_EQ(backend_->live.begin()->first, 17 * page);
}

TEST_F(EngineTest, NeverMergesMapsOfDifferentRequests) {
  stage(map_at(16));
  stage(map_at(17));  // IOVA and memory both continue the first
  run();
  ASSERT_EQ(backend_->batches.size(), 1U);
  EXPECT_EQ(backend_->batches[0].size(), 2U);
}

TEST_F(EngineTest, RefusesOverlapWithALiveMappingAndNamesIt) {
  map(16, 4);
  const Completion done = space_.map(map_at(18));
  EXPECT_EQ(done.error.code, Errc::iova_busy);
  EXPECT_THAT(done.error.detail(), HasSubstr("0x10000"));
  EXPECT_EQ(backend_->live.size(), 1U);
}

TEST_F(EngineTest, RefusesAReservedRangeAndNamesTheHole) {
  const Completion done = space_.map(map_at(0xfedff, 2));
  EXPECT_EQ(done.error.code, Errc::iova_reserved);
  EXPECT_THAT(done.error.detail(), HasSubstr("[0xfee00000, 0xfeefffff]"));
  EXPECT_TRUE(backend_->batches.empty());
}

TEST_F(EngineTest, RefusesMalformedRequestsWithoutAskingTheBackend) {
  MapRequest zero = map_at(16);
  zero.memory.length = {};
  EXPECT_EQ(space_.map(zero).error.code, Errc::invalid_argument);
  MapRequest odd = map_at(16);
  odd.memory.length = Bytes{page + 1};
  EXPECT_EQ(space_.map(odd).error.code, Errc::invalid_argument);
  MapRequest shifted = map_at(16);
  shifted.memory.offset += 8;
  EXPECT_EQ(space_.map(shifted).error.code, Errc::invalid_argument);
  MapRequest no_right = map_at(16);
  no_right.access = Access::none;
  EXPECT_EQ(space_.map(no_right).error.code, Errc::invalid_argument);
  MapRequest wrapping = map_at(16);
  wrapping.placement = Placement::fixed(Iova{~std::uint64_t{0} - page + 1});
  wrapping.memory.length = 8_KiB;
  EXPECT_EQ(space_.map(wrapping).error.code, Errc::overflow);
  MapRequest foreign = map_at(16);
  foreign.memory.memory = MemoryId{77};
  EXPECT_EQ(space_.map(foreign).error.code, Errc::stale_handle);
  EXPECT_EQ(space_.unmap(UnmapRequest::of(IovaRange{Iova{0x2000}, Iova{0x1fff}})).error.code, Errc::invalid_argument);
  EXPECT_EQ(space_.unmap(UnmapRequest::of(MappingId{12345})).error.code, Errc::stale_handle);
  EXPECT_TRUE(backend_->batches.empty());
  EXPECT_EQ(space_.stats().failures, 8U);
}

TEST_F(EngineTest, AnUnmapThatWouldCutAMappingRemovesNothing) {
  map(16);
  map(20, 4);
  const Completion done = space_.unmap(UnmapRequest::of(pages(16, 6)));
  EXPECT_EQ(done.error.code, Errc::would_bisect);
  EXPECT_EQ(backend_->live.size(), 2U);
  EXPECT_EQ(space_.stats().live_mappings, 2U);
}

TEST_F(EngineTest, OneUnmapCoversManyMappingsAndHoles) {
  map(16);
  map(20, 2);
  map(40);
  const Completion done = space_.unmap(UnmapRequest::of(pages(10, 20)));
  EXPECT_TRUE(done.ok()) << done.error.message();
  EXPECT_EQ(done.bytes, 12_KiB);
  EXPECT_EQ(backend_->live.size(), 1U);
}

TEST_F(EngineTest, UnmappingNothingIsAnErrorButUnmappingEverythingIsNot) {
  EXPECT_EQ(space_.unmap(UnmapRequest::of(pages(16))).error.code, Errc::not_found);
  const Completion all = space_.unmap(UnmapRequest::of(IovaRange::everything()));
  EXPECT_TRUE(all.ok()) << all.error.message();
  EXPECT_EQ(all.bytes, Bytes{0});
}

TEST_F(EngineTest, MergesUnmapsWhoseSpanHoldsNothingElse) {
  for (const std::uint64_t at : {16, 18, 20, 30}) map(at);
  backend_->batches.clear();
  stage(UnmapRequest::of(pages(20), 3));
  stage(UnmapRequest::of(pages(16), 1));
  stage(UnmapRequest::of(pages(18), 2));
  const auto done = run();
  for (const Completion& c : done) {
    EXPECT_TRUE(c.ok()) << c.error.message();
    EXPECT_EQ(c.bytes, 4_KiB);
  }
  EXPECT_EQ(done[0].user_data, 3U);
  ASSERT_EQ(backend_->batches.size(), 1U);
  ASSERT_EQ(backend_->batches[0].size(), 1U);
  EXPECT_EQ(backend_->batches[0][0].range, (IovaRange{Iova{16 * page}, Iova{21 * page - 1}}));
  EXPECT_EQ(backend_->live.size(), 1U);
}

TEST_F(EngineTest, MergesUnmapsOnlyAcrossHolesThatTheBackendWalksCheaply) {
  queue_ = {};
  space_ = {};
  RecordingSpace* recorder = nullptr;
  engine_ = EngineAccess::open(std::make_unique<RecordingBackend>(recorder), "recording");
  backend_ = recorder;
  backend_->facts_.unmap_hole_max = Bytes{2 * page};
  AddressSpaceConfig config;
  config.layout = LayoutPolicy::fixed;
  space_ = *engine_.create_address_space(config);
  queue_ = *space_.open_queue({.depth = 64});
  for (const std::uint64_t at : {16, 17, 20, 24, 27}) map(at);
  backend_->batches.clear();
  for (const std::uint64_t at : {27, 16, 24, 17, 20}) stage(UnmapRequest::of(pages(at)));
  for (const Completion& c : run()) EXPECT_TRUE(c.ok()) << c.error.message();
  ASSERT_EQ(backend_->batches.size(), 1U);
  ASSERT_EQ(backend_->batches[0].size(), 2U);
  EXPECT_EQ(backend_->batches[0][0].range, pages(16, 5));
  EXPECT_EQ(backend_->batches[0][1].range, pages(24, 4));
  EXPECT_TRUE(backend_->live.empty());
}

TEST_F(EngineTest, DoesNotMergeUnmapsAcrossALiveMapping) {
  for (const std::uint64_t at : {16, 17, 18}) map(at);
  backend_->batches.clear();
  stage(UnmapRequest::of(pages(16)));
  stage(UnmapRequest::of(pages(18)));
  run();
  ASSERT_EQ(backend_->batches.size(), 1U);
  EXPECT_EQ(backend_->batches[0].size(), 2U);
  EXPECT_EQ(backend_->live.size(), 1U);
  EXPECT_TRUE(backend_->live.contains(17 * page));
}

TEST_F(EngineTest, AMapAndItsUnmapInOneBatchNeedNoBackendCall) {
  stage(map_at(16, 1, 1));
  stage(UnmapRequest::of(pages(16), 2));
  const auto done = run();
  ASSERT_EQ(done.size(), 2U);
  EXPECT_TRUE(done[0].ok());
  EXPECT_TRUE(done[1].ok());
  EXPECT_EQ(done[1].bytes, 4_KiB);
  EXPECT_TRUE(backend_->batches.empty());
  EXPECT_EQ(space_.stats().cancelled_pairs, 1U);
  EXPECT_EQ(space_.stats().live_mappings, 0U);
}

TEST_F(EngineTest, OverlappingOperationsOfAQueueTakeEffectInOrder) {
  map(16);
  backend_->batches.clear();
  stage(UnmapRequest::of(pages(16), 1));
  stage(map_at(16, 2, 2));
  stage(map_at(17, 1, 3));  // overlaps the second: must see it live
  const auto done = run();
  EXPECT_TRUE(done[0].ok());
  EXPECT_TRUE(done[1].ok()) << done[1].error.message();
  EXPECT_EQ(done[2].error.code, Errc::iova_busy);
  ASSERT_EQ(backend_->live.size(), 1U);
  EXPECT_EQ(backend_->live.begin()->second.range, pages(16, 2));
}

TEST_F(EngineTest, AFenceSeparatesBackendCalls) {
  stage(map_at(16));
  ASSERT_TRUE(queue_.stage_fence(9));
  stage(map_at(20));
  const auto done = run();
  ASSERT_EQ(done.size(), 3U);
  EXPECT_EQ(done[1].user_data, 9U);
  EXPECT_EQ(backend_->batches.size(), 2U);
}

TEST_F(EngineTest, ALinkedOperationRunsOnlyAfterSuccess) {
  UnmapRequest missing = UnmapRequest::of(pages(16), 1);
  missing.order = Order::link;
  MapRequest second = map_at(17, 1, 2);
  second.order = Order::link;
  stage(missing);
  stage(second);
  stage(map_at(18, 1, 3));
  stage(map_at(19, 1, 4));
  const auto done = run();
  EXPECT_EQ(done[0].error.code, Errc::not_found);
  EXPECT_EQ(done[1].error.code, Errc::cancelled);
  EXPECT_EQ(done[2].error.code, Errc::cancelled);
  EXPECT_TRUE(done[3].ok());
  EXPECT_EQ(backend_->live.size(), 1U);
}

TEST_F(EngineTest, OneFailingMapOfABatchFailsAlone) {
  backend_->fail = [](const backends::BackendOp& op) {
    if (op.kind == OpKind::map && op.range.start.value == 17 * page)
      return make_error(Errc::bad_memory, Stage::map, EFAULT, "no such memory");
    return Error{};
  };
  for (const std::uint64_t at : {16, 17, 18}) stage(map_at(at));
  const auto done = run();
  EXPECT_TRUE(done[0].ok());
  EXPECT_EQ(done[1].error.code, Errc::bad_memory);
  EXPECT_EQ(done[1].error.os_errno, EFAULT);
  EXPECT_FALSE(done[1].mapping);
  EXPECT_TRUE(done[2].ok());
  EXPECT_EQ(space_.find(Iova{17 * page}).error().code, Errc::not_found);
}

TEST_F(EngineTest, AFailedMergedUnmapIsRetriedInPartsAndOnlyTheCulpritIsQuarantined) {
  for (const std::uint64_t at : {16, 17, 18}) map(at);
  backend_->fail = [](const backends::BackendOp& op) {
    if (op.kind == OpKind::unmap && op.range.start.value == 17 * page)
      return make_error(Errc::busy, Stage::unmap, EBUSY, "pinned by hardware");
    return Error{};
  };
  for (const std::uint64_t at : {16, 17, 18}) stage(UnmapRequest::of(pages(at), at));
  const auto done = run();
  EXPECT_TRUE(done[0].ok()) << done[0].error.message();
  EXPECT_EQ(done[1].error.code, Errc::busy);
  EXPECT_TRUE(done[2].ok()) << done[2].error.message();
  const Stats stats = space_.stats();
  EXPECT_EQ(stats.quarantined_mappings, 1U);
  EXPECT_EQ(stats.quarantined_bytes, 4_KiB);
  EXPECT_EQ(stats.live_mappings, 0U);
  // Its IOVA is never handed out again.
  EXPECT_EQ(space_.map(map_at(17)).error.code, Errc::quarantined);
  EXPECT_EQ(space_.unmap(UnmapRequest::of(pages(17))).error.code, Errc::quarantined);
  EXPECT_TRUE(space_.map(map_at(16)).ok());
}

TEST_F(EngineTest, AKernelThatRemovesLessThanWasMappedIsNotBelieved) {
  map(16, 2);
  backend_->live.begin()->second.range = pages(16, 1);  // as if the kernel had lost half of it
  const Completion done = space_.unmap(UnmapRequest::of(pages(16, 2)));
  EXPECT_EQ(done.error.code, Errc::io_error);
  EXPECT_EQ(space_.stats().quarantined_mappings, 1U);
}

TEST_F(EngineTest, AScatterListIsOneUnit) {
  const std::array pieces{MemoryPiece{{}, 0x7000'0000, 4_KiB}, MemoryPiece{{}, 0x7000'1000, 4_KiB},
                          MemoryPiece{{}, 0x7100'0000, 8_KiB}};
  MapRequest request = map_at(16);
  request.pieces = pieces;
  const Completion done = space_.map(request);
  ASSERT_TRUE(done.ok()) << done.error.message();
  EXPECT_EQ(done.bytes, 16_KiB);
  ASSERT_EQ(backend_->batches.size(), 1U);
  EXPECT_EQ(backend_->batches[0].size(), 2U);  // the first two pieces are contiguous
  EXPECT_EQ(space_.unmap(UnmapRequest::of(pages(16, 2))).error.code, Errc::would_bisect);
  EXPECT_EQ(space_.unmap(UnmapRequest::of(done.mapping)).bytes, 16_KiB);
  EXPECT_TRUE(backend_->live.empty());
}

TEST_F(EngineTest, AScatterListWithABadPieceLeavesNothingBehind) {
  backend_->fail = [](const backends::BackendOp& op) {
    return op.memory == 0x7200'0000 ? make_error(Errc::bad_memory, Stage::map, EFAULT, "bad") : Error{};
  };
  const std::array pieces{MemoryPiece{{}, 0x7000'0000, 4_KiB}, MemoryPiece{{}, 0x7200'0000, 4_KiB},
                          MemoryPiece{{}, 0x7300'0000, 4_KiB}};
  MapRequest request = map_at(16);
  request.pieces = pieces;
  EXPECT_EQ(space_.map(request).error.code, Errc::bad_memory);
  EXPECT_TRUE(backend_->live.empty());
  EXPECT_EQ(space_.stats().live_mappings, 0U);
  EXPECT_TRUE(space_.map(map_at(16, 3)).ok());
}

TEST_F(EngineTest, ReplaceWithoutTheCapabilityUnmapsAndMaps) {
  map(16);
  EXPECT_FALSE(space_.facts().replace_is_atomic);
  const Completion done = space_.replace({pages(16), {{}, 0x7900'0000, 4_KiB}, Access::read, 5, Order::free});
  ASSERT_TRUE(done.ok()) << done.error.message();
  EXPECT_EQ(backend_->live.begin()->second.memory, 0x7900'0000U);
  EXPECT_EQ(space_.find(Iova{16 * page})->access, Access::read);
}

TEST_F(EngineTest, AFailedReplaceLeavesTheOldMapping) {
  map(16);
  backend_->fail = [](const backends::BackendOp& op) {
    return op.memory == 0x7900'0000 ? make_error(Errc::bad_memory, Stage::map, EFAULT, "bad") : Error{};
  };
  const Completion done = space_.replace({pages(16), {{}, 0x7900'0000, 4_KiB}, Access::read, 5, Order::free});
  EXPECT_EQ(done.error.code, Errc::bad_memory);
  EXPECT_EQ(backend_->live.begin()->second.memory, 0x7000'0000U + 16 * page);
  EXPECT_EQ(space_.find(Iova{16 * page})->access, Access::read_write);
}

TEST_F(EngineTest, AFullQueueIsAShortCountAndNothingIsLost) {
  std::vector<MapRequest> requests;
  for (std::uint64_t i = 0; i < 100; ++i) requests.push_back(map_at(16 + i, 1, i));
  const std::size_t staged = queue_.stage(std::span<const MapRequest>{requests});
  EXPECT_EQ(staged, 64U);
  EXPECT_EQ(queue_.space_left(), 0U);
  EXPECT_EQ(run().size(), 64U);
  EXPECT_EQ(queue_.space_left(), 64U);
}

TEST_F(EngineTest, EventFdAnnouncesCompletions) {
  const int fd = queue_.event_fd();
  ASSERT_GE(fd, 0);
  stage(map_at(16));
  queue_.submit();
  std::uint64_t count = 0;
  EXPECT_EQ(::read(fd, &count, sizeof count), static_cast<ssize_t>(sizeof count));
  EXPECT_GE(count, 1U);
  Completion done;
  EXPECT_EQ(queue_.poll({&done, 1}), 1U);
}

TEST_F(EngineTest, WaitReturnsWhenTheTimeRanOut) {
  Completion done;
  EXPECT_EQ(queue_.wait({&done, 1}, 1, std::chrono::milliseconds{1}), 0U);  // nothing outstanding: at once
  stage(map_at(16));                                                        // staged, never submitted
  EXPECT_EQ(queue_.wait({&done, 1}, 1, std::chrono::milliseconds{1}), 0U);
}

TEST_F(EngineTest, RegisteredMemoryOutlivesItsOwnerUntilTheLastMapping) {
  auto memory = space_.register_memory({reinterpret_cast<void*>(0x7000'0000), 1_MiB, -1, 0});
  ASSERT_TRUE(memory) << memory.error().message();
  MapRequest request = map_at(16);
  request.memory = memory->piece(8_KiB, 4_KiB);
  ASSERT_TRUE(space_.map(request).ok());
  request.placement = Placement::fixed(Iova{20 * page});
  request.memory = memory->piece(1_MiB, 4_KiB);
  EXPECT_EQ(space_.map(request).error.code, Errc::invalid_argument);
  *memory = Memory{};
  EXPECT_EQ(backend_->regions_live, 1U);
  EXPECT_TRUE(space_.unmap(UnmapRequest::of(pages(16))).ok());
  EXPECT_EQ(backend_->regions_live, 0U);
}

TEST_F(EngineTest, LeasesUnmapThemselvesAndGoStale) {
  MappingId id;
  {
    auto lease = space_.map_lease(map_at(16));
    ASSERT_TRUE(lease) << lease.error().message();
    EXPECT_EQ(lease->iova(), Iova{16 * page});
    id = lease->id();
  }
  EXPECT_TRUE(backend_->live.empty());
  EXPECT_EQ(space_.adopt(id).error().code, Errc::stale_handle);
  EXPECT_EQ(space_.unmap(UnmapRequest::of(id)).error.code, Errc::stale_handle);
}

TEST_F(EngineTest, HandlesThatOutliveTheAddressSpaceAnswerClosed) {
  auto lease = space_.map_lease(map_at(16));
  ASSERT_TRUE(lease);
  space_ = AddressSpace{};
  stage(map_at(20));
  const auto done = run();
  ASSERT_EQ(done.size(), 1U);
  EXPECT_EQ(done[0].error.code, Errc::closed);
  EXPECT_EQ(lease->unmap().error().code, Errc::closed);
}

TEST_F(EngineTest, UnmapAllFallsBackToSingleUnmapsAndQuarantinesTheRest) {
  for (const std::uint64_t at : {16, 18, 20}) map(at);
  backend_->fail = [](const backends::BackendOp& op) {
    const bool culprit = op.range == IovaRange::everything() || op.range.start.value == 18 * page;
    return culprit ? make_error(Errc::busy, Stage::unmap, EBUSY, "busy") : Error{};
  };
  EXPECT_EQ(space_.unmap_all().error().code, Errc::busy);
  EXPECT_EQ(space_.stats().quarantined_mappings, 1U);
  EXPECT_EQ(space_.stats().live_mappings, 0U);
  backend_->fail = [](const backends::BackendOp&) { return Error{}; };
  EXPECT_TRUE(space_.unmap_all());
  EXPECT_EQ(space_.stats().quarantined_mappings, 0U);
}

TEST_F(EngineTest, ClosingReportsWhatTheKernelWouldNotUnmap) {
  for (const std::uint64_t at : {16, 18, 20}) map(at, 2);
  std::uint64_t calls = 0;
  backend_->fail = [&](const backends::BackendOp& op) {
    ++calls;
    const bool culprit = op.range == IovaRange::everything() || op.range.start.value == 18 * page;
    return culprit ? make_error(Errc::busy, Stage::unmap, EBUSY, "busy") : Error{};
  };
  const CloseReport report = space_.close();
  EXPECT_EQ(report.unmapped, Bytes{4 * page});
  EXPECT_EQ(report.mappings_given_up, 1U);
  EXPECT_EQ(report.bytes_given_up, Bytes{2 * page});
  EXPECT_EQ(report.why.code, Errc::busy);
  EXPECT_LE(calls, 1U + 2 * 3U);
  EXPECT_EQ(space_.map(map_at(30)).error.code, Errc::closed);
  EXPECT_EQ(space_.close().mappings_given_up, 0U);
}

TEST_F(EngineTest, ClosingUnderTrafficLosesNoCompletion) {
  std::atomic<bool> started{false};
  std::uint64_t completed = 0, staged = 0, done_well = 0, closed = 0;
  std::thread traffic{[&] {
    std::array<Completion, 64> done;
    for (std::uint64_t round = 0; closed == 0; ++round) {
      for (std::uint64_t i = 0; i < 32; ++i)
        if (queue_.stage(map_at(0x1000 + 32 * round + i))) ++staged;
      queue_.submit();
      while (queue_.outstanding() != 0) {
        const std::size_t got = queue_.wait(done, 1, std::chrono::seconds{20});
        if (got == 0) return;
        completed += got;
        for (std::size_t i = 0; i < got; ++i) (done[i].ok() ? done_well : closed) += 1;
        started = true;
      }
    }
  }};
  while (!started) std::this_thread::yield();
  const CloseReport report = space_.close();
  traffic.join();
  EXPECT_EQ(completed, staged);
  EXPECT_GT(closed, 0U);
  EXPECT_EQ(report.unmapped, Bytes{done_well * page});
  EXPECT_EQ(report.mappings_given_up, 0U);
}

TEST_F(EngineTest, AnywherePlacementIsRefusedWhereTheCallerOwnsTheLayout) {
  MapRequest request = map_at(16);
  request.placement = Placement::anywhere();
  EXPECT_EQ(space_.map(request).error.code, Errc::invalid_argument);
}

TEST_F(EngineTest, TheEngineChoosesDistinctUsableAddresses) {
  open(LayoutPolicy::engine_managed);
  std::vector<IovaRange> taken;
  for (int i = 0; i < 40; ++i) {
    MapRequest request = map_at(16);
    request.placement = Placement::anywhere({}, Iova{0xffff'ffff});
    stage(request);
  }
  for (const Completion& c : run()) {
    ASSERT_TRUE(c.ok()) << c.error.message();
    const auto range = *IovaRange::from_length(c.iova, c.bytes);
    EXPECT_LE(range.last, Iova{0xffff'ffff});
    for (const IovaRange& other : taken) EXPECT_FALSE(other.overlaps(range));
    taken.push_back(range);
  }
  // A fixed map beside them is claimed, and refused where one of them lies.
  MapRequest clash = map_at(0);
  clash.placement = Placement::fixed(taken[7].start);
  EXPECT_EQ(space_.map(clash).error.code, Errc::iova_busy);
}

TEST_F(EngineTest, AnotherThreadsBatchIsTakenAlong) {
  // While the first batch is inside the backend, a second thread submits and must not be kept waiting.
  auto other = space_.open_queue();
  ASSERT_TRUE(other);
  bool first_call = true;
  backend_->before_batch = [&] {
    if (!std::exchange(first_call, false)) return;
    std::thread{[&] {
      ASSERT_TRUE(other->stage(map_at(40)));
      other->submit();  // returns although the lane is held
      Completion none;
      EXPECT_EQ(other->poll({&none, 1}), 0U);
    }}.join();
  };
  stage(map_at(16));
  EXPECT_EQ(run().size(), 1U);
  Completion done;
  EXPECT_EQ(other->poll({&done, 1}), 1U);
  EXPECT_TRUE(done.ok());
}

}  // namespace
}  // namespace iovane
