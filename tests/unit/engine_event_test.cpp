// What a tracer hears of an engine's life, in the process and, by probes, outside.
#include "engine/engine_event.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <fstream>
#include <mutex>
#include <string>
#include <vector>

#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "support/recording_backend.hpp"

namespace iovane {
namespace {

using base::TraceEvent;
using base::TraceHook;
using base::TraceLevel;
using engine::EngineEvent;
using ::testing::ElementsAre;
using Arguments = std::array<std::uint64_t, 4>;

constexpr std::uint64_t page = 4096;

class EngineEvents : public ::testing::Test {
 protected:
  void SetUp() override { base::set_trace_hook(&hook_); }
  void TearDown() override { base::set_trace_hook(nullptr); }

  std::vector<Arguments> of(EngineEvent event) const {
    std::vector<Arguments> found;
    for (const TraceEvent& e : heard_)
      if (e.event == static_cast<std::uint16_t>(event)) found.push_back(e.arguments);
    return found;
  }
  static MapRequest map_at(std::uint64_t first, std::uint64_t user_data = 0) {
    MapRequest request;
    request.memory = {{}, 0x7000'0000 + first * page, Bytes{page}};
    request.placement = Placement::fixed(Iova{first * page});
    request.user_data = user_data;
    return request;
  }
  static UnmapRequest unmap_of(std::uint64_t first) {
    return UnmapRequest::of(*IovaRange::from_length(Iova{first * page}, Bytes{page}));
  }

  std::vector<TraceEvent> heard_;
  TraceHook hook_{[](void* context, const TraceEvent& event) noexcept {
                    static_cast<EngineEvents*>(context)->heard_.push_back(event);
                  },
                  this, TraceLevel::operation};
  testing::RecordingSpace* backend_ = nullptr;
};

TEST_F(EngineEvents, TellAnAddressSpacesLife) {
  Engine engine = EngineAccess::open(std::make_unique<testing::RecordingBackend>(backend_), "recording");
  AddressSpaceConfig config;
  config.layout = LayoutPolicy::fixed;
  {
    AddressSpace space = *engine.create_address_space(config);
    const auto opened = of(EngineEvent::space_opened);
    ASSERT_EQ(opened.size(), 1U);
    const std::uint64_t number = opened[0][0];
    ASSERT_TRUE(space.attach({.pci_address = "0000:00:03.0"}));
    EXPECT_THAT(of(EngineEvent::device_attached), ElementsAre(Arguments{number, 1, 2, 0}));
    Queue queue = *space.open_queue({.depth = 16});
    EXPECT_THAT(of(EngineEvent::queue_opened), ElementsAre(Arguments{number, 16, 0, 0}));

    ASSERT_TRUE(queue.stage(map_at(16)));
    ASSERT_TRUE(queue.stage(map_at(17)));
    ASSERT_TRUE(queue.stage(map_at(17, 99)));  // in the way of itself
    queue.submit();
    EXPECT_THAT(of(EngineEvent::batch_done), ElementsAre(Arguments{number, 3, 2, 0}));
    EXPECT_THAT(of(EngineEvent::operation_failed),
                ElementsAre(Arguments{number, 99, static_cast<std::uint64_t>(Errc::iova_busy), 0}));

    backend_->fail = [](const backends::BackendOp& op) {
      return op.kind == backends::OpKind::unmap ? make_error(Errc::io_error, Stage::unmap, EIO, "no") : Error{};
    };
    EXPECT_FALSE(space.unmap(unmap_of(16)).ok());
    EXPECT_THAT(of(EngineEvent::mapping_quarantined), ElementsAre(Arguments{number, 16 * page, 17 * page - 1, 0}));
    backend_->fail = [](const backends::BackendOp&) { return Error{}; };
    std::array<Completion, 3> done;
    EXPECT_EQ(queue.poll(done), 3U);
    ASSERT_TRUE(space.detach(1));
    EXPECT_EQ(of(EngineEvent::device_detached).size(), 1U);
    EXPECT_TRUE(of(EngineEvent::space_closed).empty());
    queue = Queue{};
    (void)space.close();
    EXPECT_THAT(of(EngineEvent::space_closed), ElementsAre(Arguments{number, 2 * page, 0, 0}));
  }
  EXPECT_EQ(of(EngineEvent::space_closed).size(), 1U) << "once";
}

TEST_F(EngineEvents, TellFlushesOfRelaxedMode) {
  Engine engine = EngineAccess::open(std::make_unique<testing::RecordingBackend>(backend_), "recording");
  AddressSpaceConfig config;
  config.layout = LayoutPolicy::fixed;
  config.unmap = UnmapMode::relaxed;
  config.relaxed.time_max = std::chrono::hours{1};
  AddressSpace space = *engine.create_address_space(config);
  for (const std::uint64_t p : {16, 18}) ASSERT_TRUE(space.map(map_at(p)).ok());
  for (const std::uint64_t p : {16, 18}) ASSERT_TRUE(space.unmap(unmap_of(p)).ok());
  EXPECT_TRUE(of(EngineEvent::stale_flush).empty());
  ASSERT_TRUE(space.flush());
  const std::uint64_t number = of(EngineEvent::space_opened).at(0)[0];
  EXPECT_THAT(of(EngineEvent::stale_flush), ElementsAre(Arguments{number, 2, 2 * page, 0}));
}

// Every event is a note that tracers find, in the program that links the engine.
TEST_F(EngineEvents, AreUsdtProbesToo) {
  if (!IOVANE_HAVE_USDT) GTEST_SKIP() << "built without sys/sdt.h";
  std::ifstream file{"/proc/self/exe", std::ios::binary | std::ios::ate};
  std::string program(static_cast<std::size_t>(file.tellg()), '\0');
  file.seekg(0).read(program.data(), static_cast<std::streamsize>(program.size()));
  for (const char* name : {"operation_failed", "mapping_quarantined", "worker_died", "space_opened", "space_closed",
                           "queue_opened", "device_attached", "device_detached", "batch_done", "stale_flush"}) {
    const std::string note = std::string{"iovane"} + '\0' + name + '\0';
    EXPECT_NE(program.find(note), std::string::npos) << name;
  }
}

}  // namespace
}  // namespace iovane
