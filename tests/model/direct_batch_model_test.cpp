// Direct batches beside a queue: the same operations in the same batches give the same completions, the same calls to
// the backend and the same mappings, with failures and chains. Random operations on a small space.
#include <gtest/gtest.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <memory>
#include <tuple>
#include <vector>

#include "engine/direct_batch.hpp"
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

struct Side {
  explicit Side(UnmapMode mode) {
    engine = EngineAccess::open(std::make_unique<RecordingBackend>(backend), "recording");
    AddressSpaceConfig config;
    config.layout = LayoutPolicy::fixed;
    config.unmap = mode;
    config.relaxed = {.mappings_max = 12, .bytes_max = Bytes{40 * page}, .time_max = std::chrono::hours{1}};
    space = *engine.create_address_space(config);
    memory = *space.register_memory({.address = reinterpret_cast<void*>(0x7000'0000), .length = Bytes{64 * page}});
  }
  auto mappings() {
    std::vector<std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, bool>> all;
    space.for_each(IovaRange::everything(), [&](const MappingInfo& info) {
      all.emplace_back(info.range.start.value, info.range.last.value, info.memory.offset, info.quarantined);
      return true;
    });
    return all;
  }
  RecordingSpace* backend = nullptr;
  Engine engine;
  AddressSpace space;
  Memory memory;
};

class DirectBatchModel : public ::testing::TestWithParam<UnmapMode> {};

TEST_P(DirectBatchModel, AnswersAsAQueueDoes) {
  test::Random random{test::seed()};
  Side by_queue{GetParam()};
  Side direct{GetParam()};
  Queue queue = *by_queue.space.open_queue({.depth = 1024});
  const auto core = engine::DirectBatch::join(direct.space);
  engine::DirectBatch batch{*core};
  std::uint64_t unlucky = 0;  // the place whose operations the backends fail, in this round
  const auto fail = [&unlucky](const RecordingSpace::Op& op) {
    const bool fails = op.range.start.value / page == unlucky;
    return fails ? make_error(Errc::bad_memory, Stage::map, EIO, "unlucky") : Error{};
  };
  by_queue.backend->fail = fail;
  direct.backend->fail = fail;
  std::uint64_t failed = 0;
  std::uint64_t quarantined = 0;
  for (int round = 0; round < 3000; ++round) {
    SCOPED_TRACE(::testing::Message() << "round " << round);
    // Rarely, so that quarantine does not fill the space.
    unlucky = random.one_in(8) ? 16 + random.below(space_pages) : 0;
    const std::uint64_t count = random.one_in(50) ? 300 + random.below(300) : 1 + random.below(12);
    std::vector<engine::Operation> operations;
    for (std::uint64_t i = 0; i < count; ++i) {
      const std::uint64_t first = 16 + random.below(space_pages);
      const std::uint64_t length = 1 + random.below(4);
      const IovaRange range{Iova{first * page}, Iova{(first + length) * page - 1}};
      // A queue's chain goes on in its next batch, a direct batch's does not.
      const Order order = random.one_in(6) && i + 1 != count ? Order::link : Order::free;
      const std::uint64_t offset = random.below(8) * page;
      const std::uint64_t what = random.below(24);
      if (what < 11) {
        const bool registered = random.one_in(2);
        const auto request = [&](const Side& side) {
          MapRequest r;
          r.memory = registered ? side.memory.piece(Bytes{offset}, Bytes{length * page})
                                : MemoryPiece{{}, 0x5000'0000 + offset, Bytes{length * page}};
          r.placement = Placement::fixed(range.start);
          r.user_data = i;
          r.order = order;
          return r;
        };
        ASSERT_TRUE(queue.stage(request(by_queue)));
        operations.emplace_back(request(direct));
      } else if (what < 20) {
        UnmapRequest request = UnmapRequest::of(range, i);
        request.order = order;
        ASSERT_TRUE(queue.stage(request));
        operations.emplace_back(request);
      } else if (what < 22) {
        ReplaceRequest request{range, {{}, 0x6000'0000 + offset, range.length()}, Access::read, i, order};
        ASSERT_TRUE(queue.stage(request));
        operations.emplace_back(request);
      } else if (what == 22) {
        ASSERT_TRUE(queue.stage_fence(i));
        operations.emplace_back().user_data = i;
      } else {
        ASSERT_TRUE(queue.stage_flush(i));
        operations.emplace_back().user_data = i;
        operations.back().kind = engine::OperationKind::flush;
      }
    }
    queue.submit();
    std::vector<Completion> expected(operations.size());
    ASSERT_EQ(queue.wait(expected, expected.size(), std::chrono::seconds{20}), expected.size());
    std::vector<Completion> got(operations.size());
    ASSERT_TRUE(batch.submit(operations, got));
    std::uint64_t failures = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
      SCOPED_TRACE(::testing::Message() << "operation " << i);
      ASSERT_EQ(got[i].user_data, expected[i].user_data);
      ASSERT_EQ(got[i].error.code, expected[i].error.code) << got[i].error.message();
      ASSERT_EQ(got[i].iova, expected[i].iova);
      ASSERT_EQ(got[i].bytes, expected[i].bytes);
      ASSERT_EQ(got[i].mapping, expected[i].mapping);
      failures += got[i].ok() ? 0 : 1;
    }
    ASSERT_EQ(batch.failures(), failures);
    failed += failures;
    ASSERT_EQ(direct.mappings(), by_queue.mappings());
    ASSERT_EQ(direct.backend->live.size(), by_queue.backend->live.size());
    ASSERT_EQ(direct.space.stats().backend_ops, by_queue.space.stats().backend_ops);
    quarantined = direct.space.stats().quarantined_mappings;
    ASSERT_EQ(quarantined, by_queue.space.stats().quarantined_mappings);
    if (!random.one_in(30)) continue;
    unlucky = 0;
    for (Side* side : {&by_queue, &direct}) (void)side->space.unmap_all();
  }
  EXPECT_GT(failed, 1000U);
}

INSTANTIATE_TEST_SUITE_P(StrictAndRelaxed, DirectBatchModel, ::testing::Values(UnmapMode::strict, UnmapMode::relaxed),
                         [](const auto& p) { return p.param == UnmapMode::strict ? "strict" : "relaxed"; });

}  // namespace
}  // namespace iovane
