// Relaxed mode against strict mode: the same operations give the same answers, and what the backend sees differs only
// in when it sees it. Random operations on a small space, with failures of the backend.
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "support/recording_backend.hpp"
#include "support/seed.hpp"

namespace iovane {
namespace {

using testing::RecordingBackend;
using testing::RecordingSpace;

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t space_pages = 48;
constexpr std::uint32_t stale_max = 12;

class Side {
 public:
  explicit Side(UnmapMode mode) {
    engine_ = EngineAccess::open(std::make_unique<RecordingBackend>(backend), "recording");
    AddressSpaceConfig config;
    config.layout = LayoutPolicy::fixed;
    config.unmap = mode;
    config.relaxed = {.mappings_max = stale_max, .bytes_max = Bytes{40 * page}, .time_max = std::chrono::hours{1}};
    space = *engine_.create_address_space(config);
    queue = *space.open_queue({.depth = 64});
    memories.resize(3);
  }
  Memory& memory(std::size_t n) {
    if (!memories[n])
      memories[n] =
          *space.register_memory({.address = reinterpret_cast<void*>(0x7000'0000), .length = Bytes{64 * page}});
    return memories[n];
  }
  std::vector<Completion> finish() {
    queue.submit();
    std::vector<Completion> done(queue.outstanding());
    done.resize(queue.wait(done, done.size(), std::chrono::seconds{20}));
    return done;
  }
  std::map<std::uint64_t, std::uint64_t> mappings() {
    std::map<std::uint64_t, std::uint64_t> all;
    space.for_each(IovaRange::everything(), [&](const MappingInfo& info) {
      all[info.range.start.value] = info.range.length().value;
      return true;
    });
    return all;
  }

  RecordingSpace* backend = nullptr;

 private:
  Engine engine_;

 public:
  AddressSpace space;
  Queue queue;
  std::vector<Memory> memories;
};

class RelaxedModel : public ::testing::TestWithParam<bool> {};

TEST_P(RelaxedModel, AnswersAsStrictModeDoesAndNeverReusesEarly) {
  const bool with_failures = GetParam();
  test::Random random{test::seed() + (with_failures ? 1 : 0)};
  Side strict{UnmapMode::strict};
  Side relaxed{UnmapMode::relaxed};
  // Maps of some places fail in both backends; unmaps never do here (what differs then is who hears of it).
  const auto fail = [with_failures](const RecordingSpace::Op& op) {
    const bool unlucky = with_failures && op.kind != backends::OpKind::unmap && (op.range.start.value / page) % 7 == 3;
    return unlucky ? make_error(Errc::bad_memory, Stage::map, EFAULT, "unlucky") : Error{};
  };
  strict.backend->fail = fail;
  relaxed.backend->fail = fail;

  for (int round = 0; round < 3000; ++round) {
    SCOPED_TRACE(::testing::Message() << "round " << round);
    const std::uint64_t count = 1 + random.below(12);
    for (std::uint64_t i = 0; i < count; ++i) {
      const std::uint64_t first = 16 + random.below(space_pages);
      // Every other one is the page's usual mapping or its unmap, which may be revived.
      const bool usual = random.one_in(2);
      const std::uint64_t length = usual ? 1 : 1 + random.below(4);
      const IovaRange range{Iova{first * page}, Iova{(first + length) * page - 1}};
      const std::uint64_t what = random.below(20);
      const std::size_t source = usual ? first % 4 : random.below(4);
      const std::uint64_t offset = usual ? 0 : random.below(2) * 8;
      for (Side* side : {&strict, &relaxed}) {
        if (what < 9) {
          MapRequest request;
          request.memory = source < 3 ? side->memory(source).piece(Bytes{offset * page}, Bytes{length * page})
                                      : MemoryPiece{{}, 0x5000'0000 + offset * page, Bytes{length * page}};
          request.placement = Placement::fixed(range.start);
          ASSERT_TRUE(side->queue.stage(request));
        } else if (what < 18) {
          ASSERT_TRUE(side->queue.stage(UnmapRequest::of(range)));
        } else if (what == 18) {
          ASSERT_TRUE(side->queue.stage_flush(0));
        } else {
          ASSERT_TRUE(side->queue.stage_fence(0));
        }
        // A map that its unmap overtakes in one phase cannot fail, and phases end at different places in the two modes.
        if (with_failures) {
          ASSERT_TRUE(side->queue.stage_fence(0));
        }
      }
    }
    const auto expected = strict.finish();
    const auto got = relaxed.finish();
    ASSERT_EQ(expected.size(), got.size());
    for (std::size_t i = 0; i < got.size(); ++i) {
      ASSERT_EQ(expected[i].error.code, got[i].error.code) << i << ": " << got[i].error.message();
      if (expected[i].iova.value == 0) continue;  // a fence or a flush: that is 0 in strict mode
      ASSERT_EQ(expected[i].bytes, got[i].bytes) << i;
    }
    ASSERT_EQ(strict.mappings(), relaxed.mappings());

    // The backend has what is live and what is stale, and nothing else. An early reuse would have been an overlap
    // there.
    const Stats stats = relaxed.space.stats();
    ASSERT_EQ(relaxed.backend->live.size(), stats.live_mappings + stats.stale_mappings);
    ASSERT_LT(stats.stale_mappings, stale_max);
    ASSERT_LT(stats.stale_bytes, Bytes{40 * page});
    for (const auto& [start, length] : relaxed.mappings()) {
      ASSERT_TRUE(relaxed.backend->live.contains(start));
      ASSERT_EQ(relaxed.backend->live.at(start).memory, strict.backend->live.at(start).memory);
    }
    ASSERT_EQ(strict.space.stats().maps, stats.maps);
    ASSERT_EQ(strict.space.stats().unmaps, stats.unmaps);

    if (random.one_in(20)) {
      const std::size_t drop = random.below(3);
      for (Side* side : {&strict, &relaxed}) side->memories[drop] = {};
    }
    ASSERT_EQ(relaxed.backend->regions_dropped_early, 0U) << "a pin was dropped while devices could reach it";
    ASSERT_EQ(strict.backend->regions_dropped_early, 0U);
  }
  EXPECT_GT(relaxed.space.stats().revived, 10U);
  EXPECT_GT(relaxed.space.stats().flushes, 100U);
  (void)relaxed.space.unmap_all();
  EXPECT_TRUE(relaxed.backend->live.empty());
}

INSTANTIATE_TEST_SUITE_P(WithAndWithoutFailures, RelaxedModel, ::testing::Bool());

}  // namespace
}  // namespace iovane
