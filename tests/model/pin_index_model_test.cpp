// PinIndex against a std::map of regions: random tapes of operations, compared after every one.
#include <gtest/gtest.h>

#include <array>
#include <map>
#include <vector>

#include "pinning/pin_index.hpp"
#include "support/seed.hpp"

namespace iovane::pinning {
namespace {

struct Model {
  struct Entry {
    MemoryRange range;
    RegionId id;
    std::uint64_t address;
    Access access;
  };
  std::map<std::uint64_t, Entry> by_start;

  const Entry* covering(std::uint64_t key) const {
    auto it = by_start.upper_bound(key);
    if (it == by_start.begin()) return nullptr;
    --it;
    return it->second.range.contains(key) ? &it->second : nullptr;
  }
  bool overlaps(const MemoryRange& r) const {
    auto it = by_start.lower_bound(r.start);
    return (it != by_start.end() && it->second.range.overlaps(r)) || covering(r.start) != nullptr;
  }
};

class PinIndexModel : public testing::TestWithParam<int> {};

TEST_P(PinIndexModel, AgreesWithAnOrderedMap) {
  const std::uint64_t seed = test::seed() + static_cast<std::uint64_t>(GetParam()) * 1'000'003;
  SCOPED_TRACE("IOVANE_SEED=" + std::to_string(seed - static_cast<std::uint64_t>(GetParam()) * 1'000'003));
  test::Random random{seed};
  PinIndex index;
  ASSERT_TRUE(index.open());
  Model model;
  // A few distant areas, small enough that operations collide, with borders of every level inside.
  const std::array<std::uint64_t, 3> areas{0x7f00'0000'0000 - (3U << 20), (std::uint64_t{1} << 39) - (5U << 20),
                                           file_key_first};
  const auto random_key = [&] { return areas[random.below(3)] + random.below(10U << 20); };
  std::vector<RegionId> erased;
  std::uint64_t next_address = 0x1'0000'0000;

  for (int step = 0; step < 20'000; ++step) {
    const std::uint64_t key = random_key();
    switch (random.below(8)) {
      case 0:
      case 1: {
        const std::uint64_t sizes[] = {1, 1, 2, 5, 16, 16, 33, 512, 1024, 700};
        std::uint64_t start = key & ~(granule_bytes - 1);
        const std::uint64_t count = sizes[random.below(10)];
        if (random.one_in(2)) start &= ~std::uint64_t{0xffff};
        if (random.one_in(4)) start &= ~std::uint64_t{0x1f'ffff};
        const MemoryRange range{start, start + count * granule_bytes - 1};
        const auto access = static_cast<Access>(1 + random.below(3));
        if (random.one_in(8)) next_address ^= std::uint64_t{1} << 60;  // beyond what a slot holds
        const auto id = index.insert(range, access, {next_address, 0});
        ASSERT_EQ(bool{id}, !model.overlaps(range)) << step;
        if (id) model.by_start[range.start] = {range, *id, next_address, access};
        next_address += range.length().value;
        break;
      }
      case 2:
        if (const auto* e = model.covering(key)) {
          index.erase(e->id);
          if (random.one_in(4)) {
            ASSERT_TRUE(index.restore(e->id));
          } else {
            erased.push_back(e->id);
            model.by_start.erase(e->range.start);
          }
        }
        if (erased.size() == PinIndex::batch_max || (!erased.empty() && random.one_in(20))) {
          std::array<bool, PinIndex::batch_max> used{};
          index.find_users(erased, {used.data(), erased.size()});
          for (std::size_t i = 0; i < erased.size(); ++i) {
            ASSERT_FALSE(used[i]);
            index.forget(erased[i]);
          }
          erased.clear();
        }
        break;
      case 3:
      case 4: {
        const auto got = index.translate(key);
        const auto* want = model.covering(key);
        ASSERT_EQ(bool{got}, want != nullptr) << step;
        if (want != nullptr) {
          ASSERT_EQ(got->address, want->address + (key - want->range.start));
          ASSERT_EQ(got->id, want->id);
          ASSERT_EQ(got->access, want->access);
          ASSERT_LE(key + got->length_min - 1, want->range.last);
        }
        break;
      }
      case 5:
      case 6: {
        const MemoryRange range{key, key + random.below(random.one_in(2) ? 9000 : 3U << 20)};
        const auto need = static_cast<Access>(1 + random.below(3));
        const auto lease = index.acquire(range, need);
        const auto* want = model.covering(key);
        ASSERT_EQ(bool{lease}, want != nullptr && includes(want->access, need)) << step;
        if (lease) {
          ASSERT_EQ(lease.address(), want->address + (key - want->range.start));
          ASSERT_EQ(lease.length().value, std::min(range.last, want->range.last) - key + 1);
        }
        break;
      }
      default: {
        const MemoryRange range{key, key + random.below(4U << 20)};
        std::array<PinIndex::Piece, 16> pieces;
        const std::size_t n = index.pieces(range, pieces);
        auto it = model.by_start.upper_bound(range.start);
        if (it != model.by_start.begin() && std::prev(it)->second.range.overlaps(range)) --it;
        for (std::size_t i = 0; i < n; ++i, ++it) {
          ASSERT_NE(it, model.by_start.end());
          const MemoryRange clipped = it->second.range.common(range);
          ASSERT_EQ(pieces[i].range, clipped);
          ASSERT_EQ(pieces[i].address, it->second.address + (clipped.start - it->second.range.start));
          ASSERT_EQ(pieces[i].access, it->second.access);
        }
        if (n < pieces.size()) {
          ASSERT_TRUE(it == model.by_start.end() || !it->second.range.overlaps(range));
        }
      }
    }
  }
  ASSERT_EQ(index.region_count(), model.by_start.size() + erased.size());
}

INSTANTIATE_TEST_SUITE_P(Seeds, PinIndexModel, testing::Range(0, 8));

}  // namespace
}  // namespace iovane::pinning
