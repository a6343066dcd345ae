// Every atomic step of the allocator, frozen in turn while the other threads must finish; and seeded interleavings.
#include "iova/interval_allocator.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "support/seed.hpp"
#include "support/seeded_scheduler.hpp"

namespace iovane::iova {
namespace {

static_assert(base::yield_points_enabled, "this program must be compiled with IOVANE_YIELD_POINTS");

constexpr std::uint64_t page = 4096;

IovaRange pages(std::uint64_t first, std::uint64_t count) {
  return {Iova{first * page}, Iova{(first + count) * page - 1}};
}

// Who owns what, as far as the callers know. Entered after a call returned, left before a call begins: what is in here
// is live beyond doubt.
class Ledger {
 public:
  void enter(const IovaRange& r) {
    const std::lock_guard lock{mutex_};
    const auto next = owned_.lower_bound(r.start.value);
    if (next != owned_.end()) {
      EXPECT_GT(next->first, r.last.value);
    }
    if (next != owned_.begin()) {
      EXPECT_LT(std::prev(next)->second, r.start.value);
    }
    owned_.emplace(r.start.value, r.last.value);
  }
  void leave(const IovaRange& r) {
    const std::lock_guard lock{mutex_};
    EXPECT_EQ(owned_.erase(r.start.value), 1U);
  }
  std::optional<IovaRange> take_any(std::uint64_t dice) {
    const std::lock_guard lock{mutex_};
    if (owned_.empty()) return std::nullopt;
    const auto it = std::next(owned_.begin(), static_cast<std::ptrdiff_t>(dice % owned_.size()));
    const IovaRange r{Iova{it->first}, Iova{it->second}};
    owned_.erase(it);
    return r;
  }

 private:
  std::mutex mutex_;
  std::map<std::uint64_t, std::uint64_t> owned_;
};

struct Scene {
  explicit Scene(std::uint64_t space_pages, bool magazines) : space{pages(1, space_pages)} {
    auto made = IntervalAllocator::create({.windows = {&space, 1}, .metadata_limit = 16_MiB, .magazines = magazines});
    EXPECT_TRUE(made) << made.error().message();
    allocator = std::move(*made);
  }

  // One thread's work. Errors that a correct allocator may answer with are accepted, others are not.
  void work(std::uint64_t seed, unsigned operations) {
    std::mt19937_64 random{seed};
    for (unsigned i = 0; i < operations; ++i) {
      const auto dice = random() % 100;
      if (dice < 45) {
        const auto got = allocator->allocate(Bytes{(1 + random() % 3) * page});
        if (got) {
          ledger.enter(*got);
        } else {
          EXPECT_EQ(got.error().code, Errc::iova_exhausted) << got.error().message();
        }
      } else if (dice < 75) {
        if (const auto r = ledger.take_any(random())) {
          const auto freed = allocator->free(*r);
          EXPECT_TRUE(freed) << freed.error().message();
        }
      } else if (dice < 90) {
        const std::uint64_t count = space.span() / page + 1;
        const std::uint64_t at = random() % count;
        const IovaRange r = pages(1 + at, std::min<std::uint64_t>(1 + random() % 4, count - at));
        const auto claimed = allocator->claim(r);
        if (claimed) {
          ledger.enter(r);
        } else {
          EXPECT_EQ(claimed.error().code, Errc::iova_busy) << claimed.error().message();
        }
      } else if (dice < 96) {
        // Frees what is not whole, or not live.
        const auto wrong = allocator->free(pages(1 + random() % 4, 7));
        EXPECT_FALSE(wrong);
      } else {
        std::size_t seen = 0;
        allocator->for_each([&](const IovaRange&) { ++seen; });
        EXPECT_LE(seen, space.span() / page + 1);
      }
    }
  }

  // Runs of several slots, each a third live, and more of them free than their class may keep.
  void populate() {
    std::vector<IovaRange> all;
    for (unsigned i = 0; i < 384; ++i) all.push_back(*allocator->allocate(Bytes{page}));
    std::sort(all.begin(), all.end());
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (i % 3 == 0) {
        ledger.enter(all[i]);
      } else {
        EXPECT_TRUE(allocator->free(all[i]));
      }
    }
  }

  // Frees so many that runs drain, and claims one range again and again.
  void decline(std::uint64_t seed, unsigned frees) {
    std::mt19937_64 random{seed};
    const IovaRange fixed = pages(1 + random() % 2, 1);
    for (unsigned i = 0; i < frees; ++i) {
      if (const auto r = ledger.take_any(random())) {
        const auto freed = allocator->free(*r);
        EXPECT_TRUE(freed) << freed.error().message();
      }
      if (i % 6 != 0) continue;
      const auto claimed = allocator->claim(fixed);
      if (claimed) {
        ledger.enter(fixed);
        ledger.leave(fixed);
        const auto freed = allocator->free(fixed);
        EXPECT_TRUE(freed) << freed.error().message();
      } else {
        EXPECT_EQ(claimed.error().code, Errc::iova_busy) << claimed.error().message();
      }
    }
  }

  void finish() {
    while (const auto r = ledger.take_any(0)) {
      const auto freed = allocator->free(*r);
      ASSERT_TRUE(freed) << freed.error().message();
    }
    const auto stats = allocator->stats();
    EXPECT_EQ(stats.live_intervals, 0U);
    EXPECT_EQ(stats.live.value, 0U);
    // Nothing is lost: the whole space is one piece again.
    const auto all = allocator->claim(space);
    ASSERT_TRUE(all) << all.error().message();
    ASSERT_TRUE(allocator->free(space));
    allocator->trim();
    EXPECT_EQ(allocator->stats().idle.value, 0U);
  }

  IovaRange space;
  std::unique_ptr<IntervalAllocator> allocator;
  Ledger ledger;
};

constexpr std::size_t threads = 3;

std::vector<std::function<void()>> bodies(Scene& scene, std::uint64_t seed, unsigned operations) {
  std::vector<std::function<void()>> all;
  for (std::size_t t = 0; t < threads; ++t)
    all.emplace_back([&scene, seed, t, operations] { scene.work(seed * 31 + t, operations); });
  return all;
}

class IntervalAllocatorSchedules : public ::testing::TestWithParam<std::pair<std::uint64_t, bool>> {};

TEST_P(IntervalAllocatorSchedules, KeepIntervalsApart) {
  const auto [space_pages, magazines] = GetParam();
  const std::uint64_t seed = test::seed();
  for (std::uint64_t round = 0; round < 25; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    Scene scene{space_pages, magazines};
    test::SeededScheduler scheduler{seed + round};
    scheduler.run(bodies(scene, seed + round, 12), {});
    scene.finish();
    if (HasFailure()) return;
  }
}

TEST_P(IntervalAllocatorSchedules, LetOthersFinishWhileOneIsFrozen) {
  const auto [space_pages, magazines] = GetParam();
  const std::uint64_t seed = test::seed();
  std::set<std::string> frozen_at;
  for (std::uint64_t variant = 0; variant < 3 * threads; ++variant) {  // each thread is the frozen one three times
    for (std::uint64_t step = 1;; ++step) {
      SCOPED_TRACE("variant " + std::to_string(variant) + ", step " + std::to_string(step));
      Scene scene{space_pages, magazines};
      test::SeededScheduler scheduler{seed + variant};
      const auto report =
          scheduler.run(bodies(scene, seed + variant, 6), {.thread = variant % threads, .at_step = step});
      EXPECT_TRUE(report.others_finished) << "frozen at " << report.frozen_at;
      frozen_at.insert(report.frozen_at);
      scene.finish();
      if (HasFailure()) return;
      if (!report.froze) break;
    }
  }
  std::string names;
  for (const std::string& name : frozen_at) names += name + " ";
  RecordProperty("frozen_at", names);
  EXPECT_GT(frozen_at.size(), 10U) << names;
}

// A schedule takes long under a sanitizer: some of the steps there.
#ifdef IOVANE_SANITIZED
constexpr std::uint64_t stride = 23;
#else
constexpr std::uint64_t stride = 1;
#endif

class DecliningSchedules : public ::testing::TestWithParam<bool> {};

TEST_P(DecliningSchedules, LetOthersFinishWhileOneIsFrozen) {
  const bool magazines = GetParam();
  const std::uint64_t seed = test::seed();
  std::set<std::string> frozen_at;
  const auto missing = [&]() -> const char* {
    for (const char* step : {"run.drain", "run.retire", "slot.settle", "claim.hinted"})
      if (stride == 1 && !frozen_at.contains(step)) return step;
    return nullptr;
  };
  // Each thread once, and on until the rare steps were seen: about one seed in a hundred needs more than the first
  // three.
  for (std::uint64_t variant = 0; variant < threads || (missing() != nullptr && variant < 20 * threads); ++variant) {
    for (std::uint64_t step = 1;; step += stride) {
      SCOPED_TRACE("variant " + std::to_string(variant) + ", step " + std::to_string(step));
      Scene scene{4096, magazines};
      scene.populate();
      std::vector<std::function<void()>> work;
      for (std::uint64_t t = 0; t < threads; ++t)
        work.emplace_back(
            [&scene, seed, variant, t, magazines] { scene.decline(seed * 31 + variant * 7 + t, magazines ? 22 : 7); });
      test::SeededScheduler scheduler{seed + variant};
      const auto report = scheduler.run(work, {.thread = variant % threads, .at_step = step});
      EXPECT_TRUE(report.others_finished) << "frozen at " << report.frozen_at;
      frozen_at.insert(report.frozen_at);
      scene.finish();
      if (HasFailure()) return;
      if (!report.froze) break;
    }
  }
  EXPECT_EQ(missing(), nullptr) << "no schedule froze a thread at " << missing();
}

INSTANTIATE_TEST_SUITE_P(Levels, DecliningSchedules, ::testing::Values(true, false),
                         [](const auto& level) { return std::string{level.param ? "magazines" : "shared"}; });

INSTANTIATE_TEST_SUITE_P(Spaces, IntervalAllocatorSchedules,
                         ::testing::Values(std::pair{std::uint64_t{9}, true}, std::pair{std::uint64_t{70}, true},
                                           std::pair{std::uint64_t{9}, false}),
                         [](const auto& scene) {
                           return std::to_string(scene.param.first) + (scene.param.second ? "" : "_shared");
                         });

// The harness can fail: a lock held across a step keeps the others from finishing.
TEST(SeededScheduler, NoticesALock) {
  std::atomic<int> held{0};
  const auto body = [&] {
    for (int i = 0; i < 3; ++i) {
      int free = 0;
      while (!held.compare_exchange_strong(free, 1, std::memory_order_acquire, std::memory_order_relaxed)) {
        free = 0;
        base::yield_point("spin");
      }
      base::yield_point("inside");
      held.store(0, std::memory_order_release);
      base::yield_point("outside");
    }
  };
  test::SeededScheduler scheduler{1, 1000};
  bool stuck = false;
  for (std::uint64_t step = 1; step < 6; ++step)
    stuck |= !scheduler.run({body, body}, {.thread = 0, .at_step = step}).others_finished;
  EXPECT_TRUE(stuck);
}

}  // namespace
}  // namespace iovane::iova
