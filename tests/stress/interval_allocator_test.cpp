// Several threads with mixed sizes for a bounded time; invariants during the run and at rest.
#include "iova/interval_allocator.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "support/seed.hpp"

namespace iovane::iova {
namespace {

constexpr std::uint64_t page = 4096;

std::chrono::milliseconds budget() {
  const char* given = std::getenv("IOVANE_STRESS_MS");
  return std::chrono::milliseconds{given != nullptr ? std::atoi(given) : 700};
}

// A byte per page of the space: who says that it is live. Two owners of one page are found at once.
class Pages {
 public:
  explicit Pages(std::size_t n) : owner_(n) {}
  void enter(const IovaRange& r) {
    for (std::uint64_t p = r.start.value / page; p <= r.last.value / page; ++p)
      // relaxed: the allocator orders an interval's users; a failure here is the finding.
      EXPECT_EQ(owner_[p].exchange(1, std::memory_order_relaxed), 0) << "page " << p << " handed out twice";
  }
  void leave(const IovaRange& r) {
    for (std::uint64_t p = r.start.value / page; p <= r.last.value / page; ++p)
      EXPECT_EQ(owner_[p].exchange(0, std::memory_order_relaxed), 1) << "page " << p;
  }

 private:
  std::vector<std::atomic<char>> owner_;
};

class Exchange {
 public:
  // Hands an interval to whichever thread comes by next, and takes what another left.
  std::uint64_t swap(std::uint64_t packed, std::uint64_t dice) {
    return slots_[dice % slots_.size()].exchange(packed, std::memory_order_acq_rel);
  }
  std::array<std::atomic<std::uint64_t>, 64>& all() { return slots_; }

 private:
  std::array<std::atomic<std::uint64_t>, 64> slots_{};
};

std::uint64_t pack(const IovaRange& r) { return (r.start.value / page) << 24 | (r.span() / page + 1); }
IovaRange unpack(std::uint64_t packed) {
  const std::uint64_t first = packed >> 24;
  const std::uint64_t count = packed & 0xffffff;
  return {Iova{first * page}, Iova{(first + count) * page - 1}};
}

struct Shape {
  std::string name;
  std::uint64_t space_pages;
  std::uint64_t length_max;
  bool claims;
  bool reconfigure;
};

class IntervalAllocatorStress : public ::testing::TestWithParam<Shape> {};

TEST_P(IntervalAllocatorStress, NeverHandsOutAPageTwice) {
  const Shape& shape = GetParam();
  const IovaRange space{Iova{page}, Iova{(shape.space_pages + 1) * page - 1}};
  auto made = IntervalAllocator::create({.windows = {&space, 1}, .metadata_limit = 256_MiB});
  ASSERT_TRUE(made) << made.error().message();
  IntervalAllocator& allocator = **made;
  Pages pages{shape.space_pages + 1};
  Exchange exchange;
  std::atomic<bool> stop{false};
  const std::uint64_t seed = test::seed();

  const auto worker = [&](std::uint64_t number) {
    std::mt19937_64 random{seed + number};
    std::vector<IovaRange> mine;
    const auto let_go = [&](const IovaRange& r) {
      pages.leave(r);
      const auto freed = allocator.free(r);
      EXPECT_TRUE(freed) << freed.error().message();
    };
    while (!stop.load(std::memory_order_relaxed)) {
      const auto dice = random() % 100;
      if (dice < 48) {
        const std::uint64_t bound = random() % 8 == 0 ? shape.length_max : std::min<std::uint64_t>(8, shape.length_max);
        AllocateOptions options;
        if (random() % 16 == 0) options.align = Bytes{page << (random() % 4)};
        if (random() % 16 == 0) options.ceiling = Iova{space.last.value / 2};
        const auto got = allocator.allocate(Bytes{(1 + random() % bound) * page}, options);
        if (got) {
          pages.enter(*got);
          mine.push_back(*got);
        } else {
          EXPECT_EQ(got.error().code, Errc::iova_exhausted) << got.error().message();
        }
      } else if (dice < 80) {
        if (mine.empty()) continue;
        std::swap(mine[random() % mine.size()], mine.back());
        let_go(mine.back());
        mine.pop_back();
      } else if (dice < 92) {
        // Another thread will free it.
        if (mine.empty()) continue;
        const std::uint64_t other = exchange.swap(pack(mine.back()), random());
        mine.pop_back();
        if (other != 0) let_go(unpack(other));
      } else if (dice < 96 && shape.claims) {
        const std::uint64_t at = random() % shape.space_pages;
        const std::uint64_t count = std::min(1 + random() % 4, shape.space_pages - at);
        const IovaRange r{Iova{(1 + at) * page}, Iova{(1 + at + count) * page - 1}};
        const auto claimed = allocator.claim(r);
        if (claimed) {
          pages.enter(r);
          mine.push_back(r);
        } else {
          EXPECT_TRUE(claimed.error().code == Errc::iova_busy || claimed.error().code == Errc::iova_reserved)
              << claimed.error().message();
        }
      } else if (!mine.empty()) {
        const IovaRange& r = mine[random() % mine.size()];
        EXPECT_EQ(allocator.find(Iova{r.start.value + random() % (r.span() + 1)}), r);
        if (r.span() > page) {
          EXPECT_EQ(allocator.free({r.start, Iova{r.last.value - page}}).error().code, Errc::would_bisect);
        }
      }
    }
    for (const IovaRange& r : mine) let_go(r);
  };

  // Short-lived threads come and go beside the long-lived ones, so that caches change hands.
  std::thread visitors{[&] {
    for (std::uint64_t v = 0; !stop.load(std::memory_order_relaxed); ++v) {
      std::thread{[&] {
        for (int i = 0; i < 50; ++i) {
          const auto got = allocator.allocate(Bytes{page});
          if (!got) continue;
          pages.enter(*got);
          pages.leave(*got);
          EXPECT_TRUE(allocator.free(*got));
        }
      }}.join();
      if (shape.reconfigure && v % 8 == 0) {
        const std::uint64_t middle = space.last.value / 2 / page * page;
        const std::array<IovaRange, 2> halves{IovaRange{space.start, Iova{middle - 16 * page - 1}},
                                              IovaRange{Iova{middle}, space.last}};
        EXPECT_TRUE(allocator.set_usable(halves));
        EXPECT_TRUE(allocator.set_usable({&space, 1}));
      }
    }
  }};
  std::vector<std::thread> workers;
  for (std::uint64_t t = 0; t < 3; ++t) workers.emplace_back(worker, t);
  std::this_thread::sleep_for(budget());
  stop.store(true, std::memory_order_relaxed);
  for (std::thread& t : workers) t.join();
  visitors.join();
  for (auto& slot : exchange.all()) {
    const std::uint64_t packed = slot.load(std::memory_order_acquire);
    if (packed == 0) continue;
    pages.leave(unpack(packed));
    EXPECT_TRUE(allocator.free(unpack(packed)));
  }
  const auto stats = allocator.stats();
  EXPECT_EQ(stats.live_intervals, 0U);
  EXPECT_EQ(stats.live.value, 0U);
  const auto all = allocator.claim(space);
  EXPECT_TRUE(all) << all.error().message();
}

INSTANTIATE_TEST_SUITE_P(Shapes, IntervalAllocatorStress,
                         ::testing::Values(Shape{"tiny", 40, 6, true, false}, Shape{"small", 2000, 64, true, false},
                                           Shape{"wide", 400000, 700, false, false},
                                           Shape{"reconfigured", 3000, 32, true, true}),
                         [](const auto& stress) { return stress.param.name; });

// Frees a batch on another thread than the one that allocated it, and one interval twice at the same moment.
TEST(IntervalAllocatorStress, OfTwoSimultaneousFreesOneSucceeds) {
  const IovaRange space{Iova{page}, Iova{1000 * page - 1}};
  auto made = IntervalAllocator::create({.windows = {&space, 1}});
  ASSERT_TRUE(made);
  IntervalAllocator& allocator = **made;
  std::atomic<std::uint64_t> round{0};
  std::atomic<std::uint64_t> shared{0};
  std::atomic<int> successes{0};
  std::atomic<int> finished{0};
  constexpr std::uint64_t rounds = 3000;
  const auto racer = [&](bool allocates) {
    for (std::uint64_t r = 1; r <= rounds; ++r) {
      if (allocates) {
        const auto got = allocator.allocate(Bytes{page});
        ASSERT_TRUE(got);
        shared.store(pack(*got), std::memory_order_relaxed);
        successes.store(0, std::memory_order_relaxed);
        finished.store(0, std::memory_order_relaxed);
        round.store(r, std::memory_order_release);
      } else {
        while (round.load(std::memory_order_acquire) < r) std::this_thread::yield();
      }
      const auto freed = allocator.free(unpack(shared.load(std::memory_order_relaxed)));
      if (freed) {
        successes.fetch_add(1, std::memory_order_relaxed);
      } else {
        EXPECT_TRUE(freed.error().code == Errc::not_found || freed.error().code == Errc::busy);
      }
      finished.fetch_add(1, std::memory_order_acq_rel);
      while (finished.load(std::memory_order_acquire) < 2 && round.load(std::memory_order_acquire) == r)
        std::this_thread::yield();
      if (allocates) {
        ASSERT_EQ(successes.load(std::memory_order_relaxed), 1) << "round " << r;
      }
    }
  };
  std::thread a{racer, true};
  std::thread b{racer, false};
  a.join();
  b.join();
}

}  // namespace
}  // namespace iovane::iova
