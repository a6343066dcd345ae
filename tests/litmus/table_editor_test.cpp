// Every atomic step of the first-stage table editor, frozen in turn while the other threads must finish; and seeded
// interleavings. The threads share tables, blocks and hinted groups, and collect empty tables meanwhile.
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <set>
#include <string>

#include "support/first_stage_walker.hpp"
#include "support/seed.hpp"
#include "support/seeded_scheduler.hpp"

namespace iovane::test {
namespace {

static_assert(base::yield_points_enabled, "this program must be compiled with IOVANE_YIELD_POINTS");

constexpr std::uint64_t k4 = 4096, m2 = 2U << 20;
constexpr unsigned threads = 3;
constexpr std::uint64_t memory_base = 1024 * m2;  // an address leads to itself beyond this

IovaRange at(std::uint64_t iova, std::uint64_t bytes) { return *IovaRange::from_length(Iova{iova}, Bytes{bytes}); }

// Regions of 2 MiB: 0 has a page of each thread, 3 to 5 are those of one alone, 1 begins as a hinted group of 64 KiB, 2
// as a block; 32 to 47 begin as a hinted group of blocks. A thread owns the pieces whose number is its own modulo the
// number of threads.
struct Scene {
  Scene() : world{smmuv3_format(), 3, 256} {
    EXPECT_EQ(world.map(at(m2, 16 * k4), memory_base + m2), MapVerdict::done);
    EXPECT_EQ(world.map(at(2 * m2, m2), memory_base + 2 * m2), MapVerdict::done);
    EXPECT_EQ(world.map(at(32 * m2, 16 * m2), memory_base + 32 * m2), MapVerdict::done);
    for (const auto& [first, unit, count, mapped] : {Pieces{0, k4, 3, false}, Pieces{m2, k4, 16, true},
                                                     Pieces{2 * m2, 32 * k4, 16, true}, Pieces{32 * m2, m2, 16, true}})
      for (std::uint64_t i = 0; i < count; ++i) owned[i % threads][first + i * unit] = {unit, mapped};
    for (unsigned t = 0; t < threads; ++t) owned[t][(3 + t) * m2] = {k4, false};  // a table of its own, often empty
    for (std::uint64_t i = 0; i < 16; ++i) (void)world.walker.translate(m2 + i * k4);
  }
  void work(unsigned me, std::uint64_t first_seed, unsigned operations) {
    Random random{first_seed * threads + me};
    auto& mine = owned[me];
    for (unsigned i = 0; i < operations; ++i) {
      if (random.one_in(6)) {
        world.editor.trim();
        continue;
      }
      auto piece = std::next(mine.begin(), static_cast<std::ptrdiff_t>(random.below(mine.size())));
      if (random.one_in(3)) piece = random.one_in(2) ? mine.find((3 + me) * m2) : mine.begin();
      const std::uint64_t iova = piece->first;
      auto& [bytes, mapped] = piece->second;
      const bool large = random.one_in(2);
      if (mapped) {
        EXPECT_EQ(world.unmap(at(iova, bytes)), bytes);
        EXPECT_EQ(world.walker.translate(iova), std::nullopt) << std::hex << iova;
      } else {
        EXPECT_EQ(world.map(at(iova, bytes), memory_base + iova, Access::read, large), MapVerdict::done);
        EXPECT_EQ(world.walker.translate(iova), memory_base + iova);
      }
      mapped = !mapped;
    }
  }
  void finish() {
    std::uint64_t left = 0;
    for (const auto& mine : owned) {
      for (const auto& [iova, piece] : mine) {
        EXPECT_EQ(world.walker.translate(iova), piece.second ? std::optional{memory_base + iova} : std::nullopt)
            << std::hex << iova;
        if (piece.second) left += piece.first;
      }
    }
    EXPECT_EQ(world.unmap(at(0, 64 * m2)), left);
    EXPECT_TRUE(world.editor.is_free(at(0, 64 * m2)));
    world.editor.trim();
    EXPECT_EQ(world.pool.taken(), 2U) << "root and the table below it";
  }

  struct Pieces {
    std::uint64_t first, unit, count;
    bool mapped;
  };
  TableWorld world;
  std::map<std::uint64_t, std::pair<std::uint64_t, bool>> owned[threads];
};

SeededScheduler::Report run(std::uint64_t schedule_seed, std::uint64_t work_seed, unsigned operations,
                            SeededScheduler::Freeze freeze) {
  Scene scene;
  SeededScheduler scheduler{schedule_seed};
  std::vector<std::function<void()>> bodies;
  for (unsigned t = 0; t < threads; ++t) bodies.push_back([&, t] { scene.work(t, work_seed, operations); });
  const auto report = scheduler.run(bodies, freeze);
  scene.finish();
  return report;
}

TEST(TableEditorLitmus, a_thread_frozen_at_any_step_holds_up_nobody) {
  const std::uint64_t first = seed();
  std::set<std::string> frozen_at;
  std::uint64_t runs = 0;
  for (std::size_t thread = 0; thread < 12 * threads; ++thread) {  // and twelve rounds, with other work each
    for (std::uint64_t step = 1;; ++step) {
      const auto report =
          run(first + step, first + thread / threads, 12, {.thread = thread % threads, .at_step = step});
      if (!report.froze) break;
      ++runs;
      frozen_at.insert(report.frozen_at);
      ASSERT_TRUE(report.others_finished) << "thread " << thread << " frozen at step " << step << ", "
                                          << report.frozen_at << ": the others waited for it";
      ASSERT_FALSE(HasFailure()) << "thread " << thread << ", step " << step << ", " << report.frozen_at;
    }
  }
  std::string names;
  for (const std::string& name : frozen_at) names += " " + name;
  std::printf("%llu runs, frozen at:%s\n", static_cast<unsigned long long>(runs), names.c_str());
  for (const char* const wanted : {"table_editor.park", "table_editor.unpark", "table_editor.cut", "table_editor.link",
                                   "table_editor.finish_cut", "table_editor.let_go", "table_editor.clear"})
    EXPECT_TRUE(frozen_at.contains(wanted)) << wanted << " was never reached";
}

// Two threads come and go in a table that a third one collects whenever it is empty.
TEST(TableEditorLitmus, a_collector_frozen_at_any_step_is_helped_and_so_is_its_helper) {
  const std::uint64_t first = seed();
  std::set<std::string> frozen_at;
  for (std::uint64_t round = 0; round < 300; ++round) {
    for (std::size_t thread = 0; thread < 3; ++thread) {
      for (std::uint64_t step = 1;; ++step) {
        TableWorld world{smmuv3_format(), 3, 256};
        SeededScheduler scheduler{first + 100 * round + step};
        const auto come_and_go = [&](std::uint64_t iova) {
          for (int i = 0; i < 3; ++i) {
            EXPECT_EQ(world.map(at(iova, k4), memory_base + iova), MapVerdict::done);
            EXPECT_EQ(world.walker.translate(iova), memory_base + iova);
            EXPECT_EQ(world.unmap(at(iova, k4)), k4);
            EXPECT_EQ(world.walker.translate(iova), std::nullopt);
          }
        };
        const auto collect = [&] {
          for (int i = 0; i < 5; ++i) world.editor.trim();
        };
        const auto report = scheduler.run({collect, [&] { come_and_go(m2); }, [&] { come_and_go(m2 + k4); }},
                                          {.thread = thread, .at_step = step});
        if (!report.froze) break;
        frozen_at.insert(report.frozen_at);
        ASSERT_TRUE(report.others_finished) << "thread " << thread << " frozen at " << report.frozen_at;
        ASSERT_FALSE(HasFailure()) << "round " << round << ", thread " << thread << ", step " << step;
        world.editor.trim();
        ASSERT_EQ(world.pool.taken(), 2U) << "round " << round << ", step " << step << ", " << report.frozen_at;
      }
    }
  }
  for (const char* const wanted : {"table_editor.dead", "table_editor.drain", "table_editor.let_go",
                                   "table_editor.help_drain", "table_editor.helped"})
    EXPECT_TRUE(frozen_at.contains(wanted)) << wanted << " was never reached";
}

TEST(TableEditorLitmus, seeded_interleavings_agree_with_what_each_thread_knows) {
  const std::uint64_t first = seed();
  for (std::uint64_t i = 0; i < 150; ++i) {
    const auto report = run(first + i, first + i, 24, {});
    ASSERT_TRUE(report.others_finished);
    ASSERT_FALSE(HasFailure()) << "seed " << first + i;
  }
}

}  // namespace
}  // namespace iovane::test
