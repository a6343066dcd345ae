// Random operation tapes on MappingIndex and on std::map: every answer must be the same.
#include <gtest/gtest.h>

#include <algorithm>
#include <ostream>
#include <random>
#include <string>

#include "model/mapping_index_reference.hpp"
#include "support/seed.hpp"

namespace iovane::engine {
namespace {

using test::ReferenceIndex;

constexpr std::uint64_t top = std::numeric_limits<std::uint64_t>::max();

/// Where a tape's ranges lie: addresses are base + granule * (a number below granules), wrapping at 2^64.
struct Terrain {
  const char* name;
  std::uint64_t base;
  std::uint64_t granule;
  std::uint64_t granules;
  std::uint64_t length_max;  // in granules
  std::uint32_t mappings_max;
};

// Keeps bytes of the struct out of test names.
void PrintTo(const Terrain& terrain, std::ostream* out) { *out << terrain.name; }

class MappingIndexModel : public testing::TestWithParam<Terrain> {
 protected:
  IovaRange some_range() {
    const Terrain& t = GetParam();
    const std::uint64_t start = some_address() / t.granule * t.granule;
    const std::uint64_t length = t.granule * (1 + (random_() % t.length_max));
    const auto range = IovaRange::from_length(Iova{start}, Bytes{length});
    return range ? *range : IovaRange{Iova{start}, Iova{top}};
  }
  std::uint64_t some_address() {
    const Terrain& t = GetParam();
    return t.base + t.granule * (random_() % t.granules) + random_() % t.granule;
  }
  std::mt19937_64 random_{test::seed()};
};

TEST_P(MappingIndexModel, AnswersAsAnOrderedMapDoes) {
  const Terrain& t = GetParam();
  auto index = *MappingIndex::create(t.mappings_max);
  ReferenceIndex reference{t.mappings_max};
  std::vector<MappingId> live, dead;
  std::uint32_t tag = 0;
  constexpr unsigned steps = 60'000;
  for (unsigned step = 0; step < steps; ++step) {
    // Tides: mostly filling, then mostly emptying, so that nodes are made and dissolved at every size.
    const bool filling = (step / 2'500) % 2 == 0;
    const auto dice = random_() % 100;
    if (dice < (filling ? 55U : 20U)) {
      MappingRecord record;
      record.range = some_range();
      record.tag = ++tag;
      const Errc expected = reference.verdict(record);
      const auto id = index.insert(record);
      ASSERT_EQ(id.error().code, expected) << "step " << step;
      if (id) {
        reference.insert(record, *id);
        live.push_back(*id);
      }
    } else if (dice < 75) {
      if (live.empty()) continue;
      const auto pick = random_() % live.size();
      const MappingId id = live[pick];
      const std::uint64_t start = index.find(id)->range.start.value;
      ASSERT_TRUE(index.erase(id));
      reference.erase(start);
      live[pick] = live.back();
      live.pop_back();
      dead.push_back(id);
      ASSERT_FALSE(index.erase(id));
    } else if (dice < 85) {
      const Iova a{some_address()};
      ASSERT_EQ(index.covering(a), reference.covering(a)) << "step " << step;
    } else if (dice < 95) {
      const IovaRange range = some_range();
      ASSERT_EQ(index.first_in(range), reference.id_at(reference.first_in(range))) << "step " << step;
      std::vector<MappingId> expected, visited;
      for (auto at = reference.first_in(range);
           at != reference.entries().end() && at->second.record.range.overlaps(range); ++at) {
        expected.push_back(at->second.id);
      }
      index.for_each(range, [&](MappingId id, const MappingRecord&) { visited.push_back(id); });
      ASSERT_EQ(visited, expected) << "step " << step;
    } else if (!dead.empty()) {
      const MappingId id = dead[random_() % dead.size()];
      ASSERT_EQ(index.find(id), nullptr);
      ASSERT_EQ(index.next(id), MappingId{});
    }
    if (step % 1'000 == 999) {
      ASSERT_NO_FATAL_FAILURE(test::expect_same(index, reference)) << "step " << step;
    }
  }
  // Empty it in random order.
  std::shuffle(live.begin(), live.end(), random_);
  for (const MappingId id : live) {
    reference.erase(index.find(id)->range.start.value);
    ASSERT_TRUE(index.erase(id));
  }
  ASSERT_NO_FATAL_FAILURE(test::expect_same(index, reference));
}

INSTANTIATE_TEST_SUITE_P(Terrains, MappingIndexModel,
                         testing::Values(Terrain{"dense_pages", 0x1000'0000, 4096, 3000, 1, 1U << 20},
                                         Terrain{"pages_of_many_lengths", 0, 4096, 1U << 16, 64, 1U << 20},
                                         Terrain{"large_pages", 0, 2U << 20, 512, 3, 1U << 20},
                                         Terrain{"single_bytes", 0, 1, 400, 3, 1U << 20},
                                         Terrain{"top_of_the_space", top - 0xffff, 16, 4096, 40, 1U << 20},
                                         Terrain{"around_the_wrap", top - 2047, 1, 4096, 4, 1U << 20},
                                         Terrain{"scattered_everywhere", 0, 1, top, 1U << 30, 1U << 20},
                                         Terrain{"huge_ranges", 0, 1, top, top, 1U << 20},
                                         Terrain{"small_limit", 0, 4096, 1000, 2, 37}),
                         [](const auto& terrain) { return std::string{terrain.param.name}; });

}  // namespace
}  // namespace iovane::engine
