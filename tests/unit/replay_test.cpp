#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <random>

#include "replay/call_bound.hpp"
#include "replay/engine_target.hpp"
#include "replay/guest_memory.hpp"
#include "replay/host.hpp"
#include "replay/plan.hpp"
#include "replay/raw_target.hpp"
#include "replay/replayer.hpp"
#include "support/seed.hpp"

namespace iovane::replay {
namespace {

using trace::EventKind;

IovaRange pages(std::uint64_t first, std::uint64_t count = 1) {
  return *IovaRange::from_length(Iova{first * 4096}, Bytes{count * 4096});
}
Operation map(std::uint64_t first, std::uint64_t count = 1) { return {EventKind::map, pages(first, count), 0}; }
Operation unmap(std::uint64_t first, std::uint64_t count = 1) { return {EventKind::unmap, pages(first, count), 0}; }

trace::Event map_event(std::uint64_t first, std::uint64_t count, std::uint64_t physical_page) {
  return {EventKind::map, 0, 0, pages(first, count), physical_page * 4096};
}

TEST(ReplayPlan, MovesMemoryTogetherAndKeepsWhatIsContiguous) {
  trace::Trace t;
  t.events = {map_event(1, 1, 1000), map_event(2, 2, 1001), map_event(9, 1, 77)};
  const auto plan = make_plan(t, 0, Bytes{1 << 20});
  ASSERT_TRUE(plan);
  EXPECT_EQ(plan->memory, Bytes{4 * 4096});
  EXPECT_EQ(plan->operations[1].memory, plan->operations[0].memory + 4096);
  EXPECT_NE(plan->operations[2].memory, plan->operations[0].memory);
  EXPECT_EQ(plan->leaf_entries, 4U);
  const auto shorter = make_plan(t, 2, Bytes{1 << 20});
  EXPECT_EQ(shorter->operations.size(), 2U);
  EXPECT_EQ(shorter->memory, Bytes{3 * 4096});
}

TEST(ReplayPlan, KeepsThePositionOfLargePiecesModulo2MiB) {
  trace::Trace t;
  t.events = {map_event(1, 1, 5), map_event(1024, 1024, 512 * 7), map_event(8192, 600, 512 * 20 + 3)};
  const auto plan = make_plan(t, 0, Bytes{64 << 20});
  ASSERT_TRUE(plan);
  EXPECT_EQ(plan->operations[1].memory % (2U << 20), 0U);
  EXPECT_EQ(plan->operations[2].memory % (2U << 20), 3U * 4096);
}

TEST(ReplayPlan, RefusesMoreMemoryThanAllowed) {
  trace::Trace t;
  t.events = {map_event(0, 1ULL << 40, 0)};
  EXPECT_EQ(make_plan(t, 0, Bytes{1ULL << 32}).error().code, Errc::limit_reached);
}

TEST(CutBatches, ClosesAtWhatTouchesTheBatchAndAtTheLimit) {
  const std::array ops{map(1), map(2), unmap(1), map(1), map(5), map(6), map(7), map(8)};
  EXPECT_EQ(cut_batches(ops, 64), (std::vector<std::size_t>{0, 2, 3}));
  EXPECT_EQ(cut_batches(ops, 4), (std::vector<std::size_t>{0, 2, 3, 7}));
  EXPECT_EQ(cut_batches(ops, 1).size(), ops.size());
  EXPECT_TRUE(cut_batches({}, 4).empty());
}

TEST(CutBatches, SeesOverlapsOfAnyKind) {
  EXPECT_EQ(cut_batches(std::array{map(10, 10), unmap(19, 5)}, 64).size(), 2U);
  EXPECT_EQ(cut_batches(std::array{map(10, 2), map(14, 2), unmap(8, 20)}, 64).size(), 2U);
  EXPECT_EQ(cut_batches(std::array{map(10, 2), map(12, 2), map(8, 2)}, 64).size(), 1U);
}

TEST(LeastCalls, JoinsUnmapsThatHaveNothingLiveBetweenThem) {
  trace::Reference before;
  for (const std::uint64_t page : {1, 2, 4, 9, 12}) ASSERT_TRUE(before.map(pages(page), 0));
  EXPECT_EQ(least_calls(std::array{unmap(1), unmap(2)}, before, true), 1U);
  EXPECT_EQ(least_calls(std::array{unmap(4), unmap(1)}, before, true), 2U) << "page 2 stays";
  EXPECT_EQ(least_calls(std::array{unmap(4), unmap(2), unmap(1)}, before, true), 1U) << "a hole is no obstacle";
  EXPECT_EQ(least_calls(std::array{unmap(12), unmap(1), map(10)}, before, true), 3U);
  EXPECT_EQ(least_calls(std::array{unmap(9), unmap(12), map(10)}, before, true), 2U) << "unmaps may run first";
  EXPECT_EQ(least_calls(std::array{unmap(1, 4)}, before, false), 3U) << "one call for each mapping";
  EXPECT_EQ(least_calls(std::array{unmap(1, 4)}, before, true), 1U);
}

/// Small random batches; the fewest calls by trying every way to join neighbours.
TEST(LeastCalls, AgreesWithTryingEverything) {
  std::mt19937_64 random{test::seed()};
  for (int round = 0; round < 2000; ++round) {
    trace::Reference before;
    std::vector<Operation> batch;
    for (std::uint64_t page = 0; page < 10; ++page) {
      if (random() % 3 == 0) continue;
      ASSERT_TRUE(before.map(pages(page), 0));
      if (random() % 2 == 0) batch.push_back(unmap(page));
    }
    std::size_t fewest = batch.size();
    const std::size_t joints = batch.empty() ? 0 : batch.size() - 1;
    for (std::uint64_t joined = 0; joined < (1ULL << joints); ++joined) {
      bool allowed = true;
      std::size_t calls = batch.size();
      for (std::size_t j = 0; j < joints; ++j) {
        if ((joined >> j & 1) == 0) continue;
        --calls;
        for (std::uint64_t page = batch[j].range.last.value / 4096 + 1; page < batch[j + 1].range.start.value / 4096;
             ++page)
          allowed = allowed && !before.overlaps(pages(page));
      }
      if (allowed) fewest = std::min(fewest, calls);
    }
    std::shuffle(batch.begin(), batch.end(), random);
    ASSERT_EQ(least_calls(batch, before, true), fewest);
  }
}

/// A random trace that fulfils the invariant.
Plan random_plan(std::uint64_t seed, std::size_t events) {
  std::mt19937_64 random{seed};
  trace::Trace t;
  trace::Reference live;
  while (t.events.size() < events) {
    const IovaRange range = pages(0x100 + random() % 512, 1 + random() % 8);
    if (random() % 2 == 0 && !live.overlaps(range)) {
      t.events.push_back({EventKind::map, 0, 0, range, (random() % 4096) * 4096});
    } else if (const auto found = live.find(range.start)) {
      t.events.push_back({EventKind::unmap, 0, 0, found->first, 0});
    } else {
      continue;
    }
    EXPECT_TRUE(live.apply(t.events.back()));
  }
  return *make_plan(t, 0, Bytes{64 << 20});
}

struct Setup {
  std::string backend;
  std::string target;
};

/// All runs of ReplayOnModel replay the same plan.
std::optional<std::size_t> stretches_of_random_plan;

class ReplayOnModel : public testing::TestWithParam<Setup> {};

TEST_P(ReplayOnModel, VerifiesARandomTraceAndLeavesNothing) {
  const Plan plan = random_plan(test::seed(), 3000);
  const auto memory = GuestMemory::create(plan.memory);
  ASSERT_TRUE(memory);
  const auto host = Host::open(GetParam().backend, "");
  ASSERT_TRUE(host) << host.error().detail();
  RunOptions options;
  options.batch_max = 32;
  {
    std::unique_ptr<ReplayTarget> target;
    if (GetParam().target == "engine") {
      auto opened = EngineTarget::open(**host, *memory, options.batch_max);
      ASSERT_TRUE(opened) << opened.error().detail();
      target = *std::move(opened);
    } else {
      auto opened = RawTarget::open(**host, *memory, GetParam().target == "leaf" ? RawUnit::leaf : RawUnit::event,
                                    GetParam().target == "event-copy" ? RawMap::copy : RawMap::memory);
      ASSERT_TRUE(opened) << opened.error().detail();
      target = *std::move(opened);
    }
    const auto report = replay(**host, *target, plan, options, "random", GetParam().target);
    ASSERT_TRUE(report) << report.error().detail();
    EXPECT_TRUE(report->verified);
    EXPECT_EQ(report->events, plan.operations.size());
    EXPECT_EQ(report->latency.count(), plan.operations.size());
    EXPECT_GT(report->checks.live_reads, 1000U);
    EXPECT_GT(report->checks.dead_reads, 1000U);
    EXPECT_GE(report->kernel_calls, report->kernel_calls_least);
    EXPECT_EQ(std::accumulate(report->stretches_ns.begin(), report->stretches_ns.end(), std::uint64_t{0}),
              report->elapsed_ns);
    // Cut alike for every target, whatever its own batches are.
    const std::vector<std::size_t> begins = cut_batches(plan.operations, options.batch_max);
    EXPECT_GE(report->stretches_ns.size(), plan.operations.size() / (256 + options.batch_max));
    EXPECT_LE(report->stretches_ns.size(), begins.size());
    EXPECT_EQ(report->stretches_ns.size(), stretches_of_random_plan.value_or(report->stretches_ns.size()));
    stretches_of_random_plan = report->stretches_ns.size();
    if (GetParam().target == "event") {
      EXPECT_EQ(report->kernel_calls, report->events);
    }
    if (GetParam().target == "leaf") {
      EXPECT_EQ(report->kernel_calls, plan.leaf_entries);
    }
    if (GetParam().target == "engine") {
      EXPECT_EQ(report->kernel_calls, report->kernel_calls_least);
      EXPECT_GT(report->checks.index_entries, 1000U);
    }
  }
  const auto clean = (*host)->check_nothing_left();
  EXPECT_TRUE(clean) << clean.error().detail();
}

INSTANTIATE_TEST_SUITE_P(Targets, ReplayOnModel,
                         testing::Values(Setup{"model", "engine"}, Setup{"model", "event"},
                                         Setup{"model", "event-copy"}, Setup{"model", "leaf"},
                                         Setup{"model:type1", "engine"}, Setup{"model:type1", "event"},
                                         Setup{"model:type1-v1", "engine"}, Setup{"model:type1-v1", "leaf"},
                                         Setup{"model:compat", "engine"}, Setup{"model:compat-v1", "engine"}),
                         [](const auto& setup) {
                           std::string name = setup.param.backend + "_" + setup.param.target;
                           for (char& c : name)
                             if (c == ':' || c == '-') c = '_';
                           return name;
                         });

TEST(KeepFastest, TakesEachStretchFromItsFastestRun) {
  const auto run = [](std::vector<std::uint64_t> stretches) {
    RunReport report;
    report.elapsed_ns = std::accumulate(stretches.begin(), stretches.end(), std::uint64_t{0});
    for (const std::uint64_t ns : stretches) report.latency.record(ns);
    report.stretches_ns = std::move(stretches);
    report.batches = report.elapsed_ns;  // to tell them apart
    return report;
  };
  RunReport report = run({10, 900, 30});
  keep_fastest(report, run({20, 20, 40}));
  EXPECT_EQ(report.stretches_ns, (std::vector<std::uint64_t>{10, 20, 30}));
  EXPECT_EQ(report.elapsed_ns, 60U);
  EXPECT_EQ(report.batches, 80U) << "the rest is of the run whose sum was least";
  keep_fastest(report, run({5, 500, 500}));
  EXPECT_EQ(report.elapsed_ns, 55U);
  EXPECT_EQ(report.batches, 80U) << "and not of one that only has a fast stretch";
}

/// A target that is wrong in one way, over one that is right.
class LyingTarget final : public ReplayTarget {
 public:
  enum class Lie { none, skips_an_unmap, maps_elsewhere, counts_wrong, index_misses_one, fails };
  LyingTarget(std::unique_ptr<RawTarget> honest, Lie lie) : honest_{std::move(honest)}, lie_{lie} {}

  bool batches() const noexcept override { return false; }
  void run(std::span<const Operation> batch, std::span<Verdict> verdicts) noexcept override {
    Operation op = batch[0];
    const bool now = ++calls_ == 100;
    if (now && lie_ == Lie::fails) {
      verdicts[0] = {make_error(Errc::out_of_memory, Stage::map, "told to"), {}};
      return;
    }
    if (op.kind == EventKind::unmap && lie_ == Lie::skips_an_unmap && calls_ > 100) {
      verdicts[0] = {{}, op.range.length()};
      return;
    }
    if (op.kind == EventKind::map && lie_ == Lie::maps_elsewhere && calls_ > 100) op.memory = op.memory == 0 ? 4096 : 0;
    honest_->run({&op, 1}, verdicts);
    if (op.kind == EventKind::map)
      index_[op.range.start] = batch[0];
    else
      index_.erase(op.range.start);
    if (op.kind == EventKind::unmap && lie_ == Lie::counts_wrong && calls_ > 100) verdicts[0].bytes.value -= 4096;
  }
  Result<Bytes> unmap_all() noexcept override { return honest_->unmap_all(); }
  bool visit_index(const Visit& visit) const override {
    if (lie_ != Lie::index_misses_one) return false;
    for (auto at = index_.begin(); at != index_.end(); ++at)
      if (calls_ < 100 || at != index_.begin()) visit(at->second.range, at->second.memory);
    return true;
  }

 private:
  std::unique_ptr<RawTarget> honest_;
  Lie lie_;
  std::uint64_t calls_ = 0;
  std::map<Iova, Operation> index_;
};

class Verification : public testing::TestWithParam<std::pair<LyingTarget::Lie, const char*>> {};

TEST_P(Verification, NoticesATargetThatIsWrong) {
  const Plan plan = random_plan(test::seed(), 2000);
  const auto memory = GuestMemory::create(plan.memory);
  const auto host = Host::open("model", "");
  ASSERT_TRUE(host);
  auto honest = RawTarget::open(**host, *memory, RawUnit::event, RawMap::memory);
  ASSERT_TRUE(honest);
  LyingTarget target{*std::move(honest), GetParam().first};
  const auto report = replay(**host, target, plan, {}, "random", "liar");
  if (GetParam().second == nullptr) {
    EXPECT_TRUE(report) << report.error().detail();
    return;
  }
  ASSERT_FALSE(report);
  EXPECT_NE(report.error().detail().find(GetParam().second), std::string::npos) << report.error().detail();
  EXPECT_EQ(is_verification_failure(report.error()), GetParam().first != LyingTarget::Lie::fails);
}

INSTANTIATE_TEST_SUITE_P(Lies, Verification,
                         testing::Values(std::pair{LyingTarget::Lie::none, nullptr},
                                         std::pair{LyingTarget::Lie::skips_an_unmap, "still reads at"},
                                         std::pair{LyingTarget::Lie::maps_elsewhere, "reads other memory at"},
                                         std::pair{LyingTarget::Lie::counts_wrong, "the reference says"},
                                         std::pair{LyingTarget::Lie::index_misses_one, "the index"},
                                         std::pair{LyingTarget::Lie::fails, "event 100, "}));

TEST(ReplayHost, SaysWhatItLacks) {
  EXPECT_NE(Host::open("modell", "").error().detail().find("there are: auto, iommufd"), std::string::npos);
  EXPECT_EQ(Host::open("model:nothing", "").error().code, Errc::invalid_argument);
  EXPECT_EQ(Host::open("model", "0000:99:00.0").error().code, Errc::no_device);
}

TEST(GuestMemory, StampsEveryGranule) {
  const auto memory = GuestMemory::create(Bytes{3 * 4096});
  ASSERT_TRUE(memory);
  for (std::uint64_t offset = 0; offset < 3 * 4096; offset += 4096) {
    std::uint64_t stamp = 0;
    std::memcpy(&stamp, memory->data() + offset, sizeof stamp);
    EXPECT_EQ(stamp, GuestMemory::stamp(offset));
  }
}

}  // namespace
}  // namespace iovane::replay
