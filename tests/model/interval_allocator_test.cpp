// Random operation tapes on the allocator and on the reference, compared after each operation.
#include "iova/interval_allocator.hpp"

#include <gtest/gtest.h>

#include <random>

#include "support/reference_intervals.hpp"
#include "support/seed.hpp"

namespace iovane::iova {
namespace {

using test::ReferenceIntervals;

constexpr std::uint64_t page = 4096;

IovaRange pages(std::uint64_t first, std::uint64_t count) {
  return {Iova{first * page}, Iova{(first + count) * page - 1}};
}

struct World {
  std::string name;
  std::vector<IovaRange> windows;
  std::uint64_t length_max;  // pages
  unsigned steps;
};

class Tape {
 public:
  /// `limit`: of metadata; with less than the default it may refuse for want of it.
  Tape(const World& world, Direction direction, bool magazines, std::uint64_t seed, Bytes limit = 64_MiB)
      : random_{seed}, world_{world}, metadata_limit_{limit}, starved_{limit < 64_MiB}, reference_{page} {
    reference_.set_windows(world.windows);
    auto made = IntervalAllocator::create({.granule = Bytes{page},
                                           .windows = world.windows,
                                           .direction = direction,
                                           .metadata_limit = limit,
                                           .magazines = magazines});
    EXPECT_TRUE(made) << made.error().message();
    allocator_ = std::move(*made);
  }

  void run() {
    for (unsigned step = 0; step < world_.steps && !::testing::Test::HasFatalFailure(); ++step) {
      SCOPED_TRACE("step " + std::to_string(step));
      // Phases of growth and of decline, so that both full and nearly empty spaces are met.
      const bool grow = (step / 400) % 2 == 0;
      const auto dice = random_() % 100;
      if (dice < (grow ? 50U : 25U)) {
        allocate();
      } else if (dice < 75) {
        free_live();
      } else if (dice < 85) {
        claim();
      } else if (dice < 92) {
        free_wrong();
      } else if (dice < 99) {
        find();
      } else {
        compare_all();
        if (random_() % 8 == 0) allocator_->trim();
      }
    }
    compare_all();
    for (const IovaRange& r : reference_.all()) ASSERT_TRUE(allocator_->free(r)) << r.start.value;
    allocator_->trim();
    const auto stats = allocator_->stats();
    EXPECT_EQ(stats.live_intervals, 0U);
    EXPECT_EQ(stats.live.value, 0U);
    EXPECT_EQ(stats.idle.value, 0U);
    EXPECT_FALSE(stats.span);
    EXPECT_LE(stats.metadata_high_water, metadata_limit_);
  }
  std::uint64_t refusals_for_metadata() const { return refusals_; }

 private:
  std::uint64_t some_length() {
    const std::uint64_t bound = random_() % 4 == 0 ? world_.length_max : std::min<std::uint64_t>(world_.length_max, 6);
    return 1 + random_() % bound;
  }
  std::uint64_t some_page() {
    const IovaRange& w = world_.windows[random_() % world_.windows.size()];
    const std::uint64_t first = w.start.value / page;
    const std::uint64_t count = w.span() / page + 1;
    const std::uint64_t near = std::min<std::uint64_t>(count + 2, 4096);
    // Around either end of the window, where allocations are.
    const std::uint64_t at = random_() % 2 == 0 ? random_() % near : count - std::min(count, random_() % near);
    return std::min(first + at, ~std::uint64_t{0} / page);
  }

  void allocate() {
    const Bytes length{some_length() * page};
    AllocateOptions options;
    if (random_() % 3 == 0) options.align = Bytes{page << (random_() % 8)};
    if (random_() % 4 == 0) options.ceiling = Iova{some_page() * page + random_() % page};
    const auto got = allocator_->allocate(length, options);
    if (!got) {
      if (refused_for_metadata(got.error())) return;
      ASSERT_EQ(got.error().code, Errc::iova_exhausted) << got.error().message();
      ASSERT_FALSE(reference_.fits(length.value, options.align.value, options.ceiling))
          << length.value / page << " pages, align " << options.align.value << ", ceiling " << options.ceiling.value;
      return;
    }
    ASSERT_EQ(got->length(), length);
    ASSERT_EQ(got->start.value % std::max(options.align.value, page), 0U);
    ASSERT_LE(got->last, options.ceiling);
    ASSERT_TRUE(reference_.usable(*got)) << got->start.value;
    ASSERT_FALSE(reference_.overlap(*got)) << got->start.value;
    reference_.add(*got);
  }

  // Where metadata is scarce, any call that takes may be refused for it, and then nothing has changed.
  bool refused_for_metadata(const Error& why) {
    if (!starved_ || why.code != Errc::out_of_memory) return false;
    ++refusals_;
    compare_all();
    return true;
  }

  void free_live() {
    if (reference_.count() == 0) return;
    const IovaRange r = reference_.at(random_() % reference_.count());
    const auto freed = allocator_->free(r);
    ASSERT_TRUE(freed) << freed.error().message();
    reference_.remove(r);
  }

  void claim() {
    const std::uint64_t first = some_page();
    const std::uint64_t room = ~std::uint64_t{0} / page - first + 1;
    const IovaRange r{Iova{first * page}, Iova{first * page + (std::min(some_length(), room) * page - 1)}};
    const auto claimed = allocator_->claim(r);
    if (!reference_.usable(r)) {
      ASSERT_FALSE(claimed);
      ASSERT_TRUE(claimed.error().code == Errc::iova_reserved || claimed.error().code == Errc::iova_busy);
    } else if (reference_.overlap(r)) {
      ASSERT_FALSE(claimed);
      ASSERT_EQ(claimed.error().code, Errc::iova_busy);
    } else {
      if (!claimed && refused_for_metadata(claimed.error())) return;
      ASSERT_TRUE(claimed) << claimed.error().message();
      reference_.add(r);
    }
  }

  void free_wrong() {
    const std::uint64_t first = some_page();
    const std::uint64_t room = ~std::uint64_t{0} / page - first + 1;
    IovaRange r{Iova{first * page}, Iova{first * page + (std::min(some_length(), room) * page - 1)}};
    if (reference_.count() > 0 && random_() % 2 == 0) {
      r = reference_.at(random_() % reference_.count());
      if (r.span() >= page && random_() % 2 == 0) {
        r.last.value -= page;
      } else if (r.last != iova_max) {
        r.last.value += page;
      }
    }
    if (reference_.has(r)) return;
    const auto freed = allocator_->free(r);
    ASSERT_FALSE(freed);
    const bool touches_start = reference_.find(r.start).has_value();
    ASSERT_EQ(freed.error().code, touches_start ? Errc::would_bisect : Errc::not_found);
  }

  void find() {
    const Iova a{some_page() * page + random_() % page};
    ASSERT_EQ(allocator_->find(a), reference_.find(a)) << a.value;
    if (reference_.count() > 0) {
      const IovaRange r = reference_.at(random_() % reference_.count());
      const Iova inside{r.start.value + random_() % (r.span() + 1)};
      ASSERT_EQ(allocator_->find(inside), r);
    }
  }

  void compare_all() {
    std::vector<IovaRange> seen;
    allocator_->for_each([&](const IovaRange& r) { seen.push_back(r); });
    ASSERT_EQ(seen, reference_.all());
    const auto stats = allocator_->stats();
    ASSERT_EQ(stats.live_intervals, reference_.count());
    ASSERT_EQ(stats.live.value, reference_.bytes());
  }

  std::mt19937_64 random_;
  World world_;
  Bytes metadata_limit_;
  bool starved_;
  std::uint64_t refusals_ = 0;
  ReferenceIntervals reference_;
  std::unique_ptr<IntervalAllocator> allocator_;
};

std::vector<World> worlds() {
  return {
      {"tiny", {pages(0, 13)}, 5, 6000},
      {"tiny_odd", {pages(3, 7), pages(11, 1), pages(17, 30)}, 9, 6000},
      {"small", {pages(1, 300)}, 40, 6000},
      {"holes", {pages(16, 100), pages(128, 64), pages(256, 500), pages(0xfee00 + 256, 300)}, 70, 6000},
      {"top", {{Iova{~std::uint64_t{0} - 200 * page + 1}, iova_max}}, 20, 5000},
      {"everything", {IovaRange::everything()}, 3000, 5000},
      {"intel_host", {{Iova{0}, Iova{0xfedfffff}}, {Iova{0xfef00000}, Iova{(1ULL << 48) - 1}}}, 600, 6000},
  };
}

class IntervalAllocatorModel : public ::testing::TestWithParam<std::tuple<World, Direction, bool>> {};

TEST_P(IntervalAllocatorModel, AgreesWithTheReference) {
  const std::uint64_t seed = test::seed();
  SCOPED_TRACE("IOVANE_SEED=" + std::to_string(seed));
  const auto& [world, direction, magazines] = GetParam();
  Tape{world, direction, magazines, seed}.run();
}

INSTANTIATE_TEST_SUITE_P(Worlds, IntervalAllocatorModel,
                         ::testing::Combine(::testing::ValuesIn(worlds()),
                                            ::testing::Values(Direction::top_down, Direction::bottom_up),
                                            ::testing::Values(true, false)),
                         [](const auto& tape) {
                           return std::get<0>(tape.param).name +
                                  (std::get<1>(tape.param) == Direction::top_down ? "_down" : "_up") +
                                  (std::get<2>(tape.param) ? "" : "_shared");
                         });

// Every limit from the least that is allowed: the tape goes on through refusals, and nothing that lives is ever refused
// its way back.
TEST(IntervalAllocatorWithoutMetadata, EveryRefusalAtEveryLimitChangesNothing) {
  const std::uint64_t seed = test::seed();
  const World world{"scarce", {pages(16, 4000), pages(5000, 3000)}, 60, 1600};
  std::uint64_t limits_that_refused = 0;
  std::uint64_t refusals = 0;
  for (std::uint64_t kib = 64; kib <= 320 && !HasFatalFailure(); kib += 2) {
    SCOPED_TRACE("IOVANE_SEED=" + std::to_string(seed) + ", limit of " + std::to_string(kib) + " KiB");
    for (const bool magazines : {true, false}) {
      Tape tape{world, Direction::top_down, magazines, seed + kib, Bytes{kib << 10}};
      tape.run();
      limits_that_refused += tape.refusals_for_metadata() != 0 ? 1 : 0;
      refusals += tape.refusals_for_metadata();
    }
  }
  RecordProperty("refusals", std::to_string(refusals));
  EXPECT_GT(limits_that_refused, 20U) << "the limits are too generous to show anything";
}

}  // namespace
}  // namespace iovane::iova
