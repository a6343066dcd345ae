#include "base/futex.hpp"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

namespace iovane::base {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

TEST(Futex, DoesNotSleepWhenTheWordHasChangedAlready) {
  std::atomic<std::uint32_t> word{1};
  const auto begin = Clock::now();
  futex_wait(word, 0, 60s);
  EXPECT_LT(Clock::now() - begin, 30s);
}

TEST(Futex, SleepsUntilTheTimeout) {
  std::atomic<std::uint32_t> word{0};
  const auto begin = Clock::now();
  // Sleeps may end early for no reason; a caller asks for what is left, as here.
  for (auto left = 20ms - (Clock::now() - begin); left > 0ns; left = 20ms - (Clock::now() - begin)) {
    futex_wait(word, 0, left);
  }
  EXPECT_GE(Clock::now() - begin, 20ms);
  EXPECT_LT(Clock::now() - begin, 30s);
}

TEST(Futex, WakingWakesEveryoneAndShowsWhatWasWritten) {
  std::atomic<std::uint32_t> word{0};
  int message = 0;  // plain: ThreadSanitizer reports if the word does not order it
  std::vector<std::thread> sleepers;
  for (int n = 0; n < 4; ++n) {
    sleepers.emplace_back([&] {
      // acquire: pairs with the release store below.
      while (word.load(std::memory_order_acquire) == 0) futex_wait(word, 0, std::chrono::nanoseconds{-1});
      EXPECT_EQ(message, 42);
    });
  }
  std::this_thread::sleep_for(5ms);  // most of them sleep by now; none need to
  message = 42;
  word.store(1, std::memory_order_release);  // release: the message, see above
  futex_wake_all(word);
  for (auto& sleeper : sleepers) sleeper.join();
}

TEST(Futex, WakingNobodyIsFine) {
  std::atomic<std::uint32_t> word{0};
  futex_wake_all(word);
}

}  // namespace
}  // namespace iovane::base
