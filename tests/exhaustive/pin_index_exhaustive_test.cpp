// Every set of regions over a handful of granules around a table border, and every lookup on each.
#include <gtest/gtest.h>

#include <array>
#include <vector>

#include "pinning/pin_index.hpp"

namespace iovane::pinning {
namespace {

constexpr std::uint64_t granules = 6;

// Splits the granules into runs: digit d of `code` in base 3 says for granule d: 0 gap, 1 begins a region, 2 continues
// the region before it (or is a gap when there is none).
class Exhaustive : public testing::TestWithParam<std::uint64_t> {};

TEST_P(Exhaustive, EveryLayoutAnswersEveryLookup) {
  const std::uint64_t first_key = GetParam();
  PinIndex index;
  ASSERT_TRUE(index.open());
  std::uint64_t layouts = 1;
  for (std::uint64_t i = 0; i < granules; ++i) layouts *= 3;
  for (std::uint64_t layout = 0; layout < layouts; ++layout) {
    struct Want {
      MemoryRange range;
      RegionId id = no_region;
    };
    std::vector<Want> regions;
    std::array<int, granules> owner{};
    owner.fill(-1);
    std::uint64_t code = layout;
    for (std::uint64_t g = 0; g < granules; ++g, code /= 3) {
      const std::uint64_t start = first_key + g * granule_bytes;
      if (code % 3 == 1)
        regions.push_back({{start, start + granule_bytes - 1}});
      else if (code % 3 == 2 && g > 0 && owner[g - 1] >= 0)
        regions.back().range.last += granule_bytes;
      else
        continue;
      owner[g] = static_cast<int>(regions.size()) - 1;
    }
    // In both orders: whoever comes first has its block to itself. Every third layout has addresses that no slot holds.
    const std::uint64_t address_bias = layout % 3 == 0 ? std::uint64_t{1} << 60 : 0;
    for (std::size_t i = 0; i < regions.size(); ++i) {
      Want& r = regions[layout % 2 == 0 ? i : regions.size() - 1 - i];
      auto id = index.insert(r.range, Access::read, {r.range.start + address_bias, 0});
      ASSERT_TRUE(id) << layout;
      r.id = *id;
    }
    for (std::uint64_t a = 0; a < granules; ++a)
      for (std::uint64_t b = a; b < granules; ++b) {
        const MemoryRange asked{first_key + a * granule_bytes + 5, first_key + (b + 1) * granule_bytes - 1};
        const auto lease = index.acquire(asked, Access::read);
        ASSERT_EQ(bool{lease}, owner[a] >= 0) << layout;
        std::array<PinIndex::Piece, granules + 1> pieces;
        const std::size_t n = index.pieces(asked, pieces);
        std::size_t at = 0;
        int previous = -1;
        for (std::uint64_t g = a; g <= b; ++g) {
          if (owner[g] >= 0 && owner[g] != previous) {
            ASSERT_LT(at, n);
            const auto& want = regions[static_cast<std::size_t>(owner[g])];
            ASSERT_EQ(pieces[at].range, want.range.common(asked));
            ASSERT_EQ(pieces[at++].id, want.id);
          }
          previous = owner[g];
        }
        ASSERT_EQ(at, n) << layout << " [" << a << ", " << b << "]";
        if (lease) {
          ASSERT_EQ(lease.length().value, pieces[0].range.length().value);
          ASSERT_EQ(lease.address(), asked.start + address_bias);
        }
        const auto translated = index.translate(asked.start);
        ASSERT_EQ(bool{translated}, owner[a] >= 0) << layout;
        if (translated) {
          ASSERT_EQ(translated->address, asked.start + address_bias);
          ASSERT_EQ(translated->id, regions[static_cast<std::size_t>(owner[a])].id);
        }
        const bool taken = n != 0;
        const MemoryRange whole{first_key + a * granule_bytes, asked.last};
        ASSERT_EQ(index.first_in(whole).has_value(), taken);
        if (taken && (layout + a + b) % 7 == 0) {  // making the error's text is what takes time
          ASSERT_EQ(index.insert(whole, Access::read, {}).error().code, Errc::iova_busy);
        }
      }
    for (const auto& r : regions) {
      index.erase(r.id);
      bool used = true;
      index.find_users({&r.id, 1}, {&used, 1});
      ASSERT_FALSE(used);
      index.forget(r.id);
    }
    ASSERT_EQ(index.region_count(), 0U);
    ASSERT_FALSE(index.first_in({first_key, first_key + granules * granule_bytes - 1}));
  }
}

INSTANTIATE_TEST_SUITE_P(Borders, Exhaustive,
                         testing::Values(0x7f00'0000'0000 + 0x10000 - 3 * granule_bytes,  // a 64 KiB border
                                         0x7f00'0020'0000 - 3 * granule_bytes,            // 2 MiB
                                         (std::uint64_t{1} << 39) - 3 * granule_bytes,    // 512 GiB
                                         0x7f00'0000'0000));

}  // namespace
}  // namespace iovane::pinning
