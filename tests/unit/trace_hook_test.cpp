#include "base/trace_hook.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <vector>

namespace iovane::base {
namespace {

enum class TestEvent : std::uint16_t { first_thing = 3, iovane_test_probe = 9 };

std::vector<TraceEvent> heard;
void hear(void* context, const TraceEvent& event) noexcept {
  static_cast<std::vector<TraceEvent>*>(context)->push_back(event);
}

class TraceHookTest : public testing::Test {
 protected:
  void SetUp() override { heard.clear(); }
  void TearDown() override { set_trace_hook(nullptr); }
  TraceHook hook_{hear, &heard, TraceLevel::batch};
};

TEST_F(TraceHookTest, HearsNothingUntilSet) {
  IOVANE_TRACE(TraceLevel::error, TestEvent, first_thing, 1, 2, 3, 4);
  EXPECT_TRUE(heard.empty());
}

TEST_F(TraceHookTest, HearsTheEventWithItsArguments) {
  EXPECT_EQ(set_trace_hook(&hook_), nullptr);
  IOVANE_TRACE(TraceLevel::change, TestEvent, first_thing, 1, 2U, 3L, ~0ULL);
  ASSERT_EQ(heard.size(), 1U);
  EXPECT_EQ(heard[0].level, TraceLevel::change);
  EXPECT_EQ(heard[0].event, 3);
  EXPECT_THAT(heard[0].arguments, testing::ElementsAre(1, 2, 3, ~0ULL));
}

TEST_F(TraceHookTest, HearsItsLevelAndTheMoreUrgentOnes) {
  set_trace_hook(&hook_);
  for (const TraceLevel level : {TraceLevel::error, TraceLevel::change, TraceLevel::batch, TraceLevel::operation}) {
    IOVANE_TRACE(level, TestEvent, first_thing, 0, 0, 0, 0);
  }
  EXPECT_EQ(heard.size(), 3U);
}

TEST_F(TraceHookTest, GivesBackTheHookBefore) {
  const TraceHook other{hear, &heard, TraceLevel::error};
  set_trace_hook(&hook_);
  EXPECT_EQ(set_trace_hook(&other), &hook_);
  EXPECT_EQ(set_trace_hook(nullptr), &other);
  IOVANE_TRACE(TraceLevel::error, TestEvent, first_thing, 0, 0, 0, 0);
  EXPECT_TRUE(heard.empty());
}

TEST_F(TraceHookTest, EvaluatesArgumentsOnce) {
  int evaluated = 0;
  IOVANE_TRACE(TraceLevel::error, TestEvent, first_thing, ++evaluated, 0, 0, 0);
  set_trace_hook(&hook_);
  IOVANE_TRACE(TraceLevel::error, TestEvent, first_thing, ++evaluated, 0, 0, 0);
  EXPECT_EQ(evaluated, 2);
}

// The note that tracers look for: "stapsdt", three addresses, "iovane", the probe's name.
TEST_F(TraceHookTest, LeavesAUsdtProbeInTheProgram) {
  if (!IOVANE_HAVE_USDT) GTEST_SKIP() << "built without sys/sdt.h";
  IOVANE_TRACE(TraceLevel::operation, TestEvent, iovane_test_probe, 1, 2, 3, 4);
  std::ifstream file{"/proc/self/exe", std::ios::binary | std::ios::ate};
  std::string program(static_cast<std::size_t>(file.tellg()), '\0');
  file.seekg(0).read(program.data(), static_cast<std::streamsize>(program.size()));
  ASSERT_TRUE(file);
  // Put together here, so that the program does not contain it for this reason.
  const std::string name = std::string{"iovane"} + '\0' + "iovane_test" + "_probe" + '\0';
  const std::size_t at = program.find(name);
  ASSERT_NE(at, std::string::npos);
  EXPECT_EQ(program.substr(at - 24 - 8, 7), "stapsdt");
}

}  // namespace
}  // namespace iovane::base
