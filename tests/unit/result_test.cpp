#include "iovane/result.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <memory>
#include <thread>
#include <vector>

#include "base/error_text.hpp"

namespace iovane {
namespace {

using ::testing::HasSubstr;

TEST(Result, HoldsAValueOrAnError) {
  const Result<int> good{7};
  EXPECT_TRUE(good);
  EXPECT_EQ(*good, 7);
  EXPECT_TRUE(good.error().ok());
  const Result<int> bad{make_error(Errc::busy, Stage::attach, "device is in use")};
  EXPECT_FALSE(bad);
  EXPECT_EQ(bad.error().code, Errc::busy);
  EXPECT_EQ(bad.value_or(3), 3);
}

TEST(Result, CarriesMoveOnlyValuesThroughAndThen) {
  Result<std::unique_ptr<int>> made{std::make_unique<int>(5)};
  const auto doubled = std::move(made).and_then([](std::unique_ptr<int> p) -> Result<int> { return *p * 2; });
  ASSERT_TRUE(doubled);
  EXPECT_EQ(*doubled, 10);
}

TEST(Error, KeepsItsTextUntilTheRingHasGoneRound) {
  const Error first = base::fail(Errc::memlock_exceeded, Stage::pin, ENOMEM, "need {} bytes, limit {}", 4096, 0);
  EXPECT_EQ(first.detail(), "need 4096 bytes, limit 0");
  EXPECT_THAT(first.message(), HasSubstr("pin: memlock_exceeded"));
  for (std::size_t i = 0; i < error_details_kept; ++i) (void)make_error(Errc::busy, Stage::map, "newer");
  EXPECT_EQ(first.detail(), "pinning would pass RLIMIT_MEMLOCK");
}

TEST(Error, CutsALongTextInsteadOfLosingIt) {
  const std::string longer(2 * error_detail_bytes_max, 'x');
  const Error error = make_error(Errc::io_error, Stage::map, longer);
  EXPECT_EQ(error.detail(), longer.substr(0, error_detail_bytes_max - 1));
}

TEST(Error, WithoutTextDescribesItsCode) {
  EXPECT_EQ(Error({.code = Errc::would_bisect}).detail(), "the range would cut a mapping; nothing was unmapped");
}

// Readers race with writers that lap the ring: a text is either whole and the right one, or the code's description.
TEST(Error, ThreadsNeverSeeATornText) {
  std::atomic<bool> torn{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([t, &torn] {
      for (int i = 0; i < 5000; ++i) {
        const std::string text(static_cast<std::size_t>(10 + i % 400), static_cast<char>('a' + t));
        const Error error = make_error(Errc::io_error, Stage::map, text);
        const std::string seen = error.detail();
        // relaxed: read after join only.
        if (seen != text && seen != "the kernel failed the call") torn.store(true, std::memory_order_relaxed);
      }
    });
  for (auto& thread : threads) thread.join();
  EXPECT_FALSE(torn.load(std::memory_order_relaxed));
}

}  // namespace
}  // namespace iovane
