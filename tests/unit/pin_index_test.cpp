#include "pinning/pin_index.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <thread>
#include <vector>

namespace iovane::pinning {
namespace {

constexpr std::uint64_t base_key = 0x7f12'3456'0000;  // 64 KiB aligned, not 2 MiB aligned
constexpr MemoryRange granules(std::uint64_t first, std::uint64_t count) {
  return {base_key + first * granule_bytes, base_key + (first + count) * granule_bytes - 1};
}

class PinIndexTest : public testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(index.open()); }
  RegionId add(const MemoryRange& range, std::uint64_t address, Access access = Access::read_write) {
    auto id = index.insert(range, access, {address, 0});
    EXPECT_TRUE(id) << id.error().message();
    return id.value_or(no_region);
  }
  bool drop(RegionId id) {
    index.erase(id);
    bool used = true;
    index.find_users({&id, 1}, {&used, 1});
    if (!used) index.forget(id);
    return !used;
  }
  PinIndex index;
};

TEST_F(PinIndexTest, TranslatesEveryByteOfARegionAndNothingBeside) {
  const auto range = granules(3, 40);  // ragged at both ends of a 64 KiB block
  add(range, 0x1000'0000);
  for (std::uint64_t key = range.start; key <= range.last; key += 1021) {
    const auto t = index.translate(key);
    ASSERT_TRUE(t) << key;
    EXPECT_EQ(t->address, 0x1000'0000 + (key - range.start));
    EXPECT_LE(key + t->length_min - 1, range.last);
  }
  EXPECT_FALSE(index.translate(range.start - 1));
  EXPECT_FALSE(index.translate(range.last + 1));
  EXPECT_TRUE(index.translate(range.last));
}

TEST_F(PinIndexTest, KeepsWholeBlocksInOneSlot) {
  const MemoryRange gib{0x4000'0000, 0x7fff'ffff};
  const std::size_t before = index.memory_bytes();
  add(gib, 0x100'0000'0000);
  EXPECT_LT(index.memory_bytes() - before, 64U * 1024 + 16 * granule_bytes);
  EXPECT_EQ(index.translate(0x6123'4567)->address, 0x100'0000'0000 + 0x2123'4567);
  EXPECT_EQ(index.translate(0x6123'4567)->length_min, 0x6140'0000 - 0x6123'4567);
}

TEST_F(PinIndexTest, RefusesAnOverlapAndNamesIt) {
  add(granules(0, 4), 0x1000);
  auto overlap = index.insert(granules(3, 4), Access::read, {});
  ASSERT_FALSE(overlap);
  EXPECT_EQ(overlap.error().code, Errc::iova_busy);
  EXPECT_NE(overlap.error().detail().find("is live"), std::string::npos);
  EXPECT_TRUE(index.insert(granules(4, 4), Access::read, {}));
  EXPECT_EQ(index.region_count(), 2U);
}

TEST_F(PinIndexTest, RefusesRaggedEmptyAndForbiddenRegions) {
  EXPECT_EQ(index.insert({base_key + 1, base_key + granule_bytes - 1}, Access::read, {}).error().code,
            Errc::invalid_argument);
  EXPECT_EQ(index.insert({base_key, base_key - 1}, Access::read, {}).error().code, Errc::invalid_argument);
  EXPECT_EQ(index.insert(granules(0, 1), Access::none, {}).error().code, Errc::invalid_argument);
  EXPECT_EQ(index.insert({0, ~std::uint64_t{0}}, Access::read, {}).error().code, Errc::invalid_argument);
}

TEST_F(PinIndexTest, LeaseSaysHowFarTheRegionReaches) {
  add(granules(0, 4), 0x10'0000);
  add(granules(4, 40), 0x90'0000);
  const auto within = index.acquire(granules(1, 2), Access::read);
  ASSERT_TRUE(within);
  EXPECT_EQ(within.length().value, 2 * granule_bytes);
  EXPECT_EQ(within.address(), 0x10'0000 + granule_bytes);
  const auto across = index.acquire(granules(2, 20), Access::read);
  ASSERT_TRUE(across);
  EXPECT_EQ(across.length().value, 2 * granule_bytes);
  const auto into_gap = index.acquire(granules(40, 10), Access::read);
  ASSERT_TRUE(into_gap);
  EXPECT_EQ(into_gap.length().value, 4 * granule_bytes);
  EXPECT_FALSE(index.acquire(granules(44, 1), Access::read));
}

TEST_F(PinIndexTest, LeaseNeedsTheRights) {
  add(granules(0, 1), 0x1000, Access::read);
  EXPECT_TRUE(index.acquire(granules(0, 1), Access::read));
  EXPECT_FALSE(index.acquire(granules(0, 1), Access::write));
  EXPECT_FALSE(index.acquire(granules(0, 1), Access::read_write));
}

TEST_F(PinIndexTest, AnswersASpanInPiecesWithGapsBetween) {
  add(granules(1, 2), 0x10'0000);
  add(granules(3, 20), 0x20'0000, Access::read);
  add(granules(30, 600), 0x30'0000);
  std::array<PinIndex::Piece, 8> out;
  const MemoryRange asked{granules(0, 1).start, granules(100, 1).last};
  ASSERT_EQ(index.pieces(asked, out), 3U);
  EXPECT_EQ(out[0].range, granules(1, 2));
  EXPECT_EQ(out[1].range, granules(3, 20));
  EXPECT_EQ(out[1].access, Access::read);
  EXPECT_EQ(out[2].range, granules(30, 71));
  EXPECT_EQ(out[2].address, 0x30'0000U);
  EXPECT_EQ(index.pieces(asked, {out.data(), 2}), 2U);
}

TEST_F(PinIndexTest, ErasedRegionIsNotFoundAndNotReusedWhileLeased) {
  const RegionId id = add(granules(0, 4), 0x1000);
  {
    const auto lease = index.acquire(granules(0, 1), Access::read);
    ASSERT_TRUE(lease);
    EXPECT_FALSE(drop(id));
    EXPECT_FALSE(index.translate(granules(0, 1).start));
    EXPECT_NE(add(granules(0, 4), 0x9000), id);
  }
  bool used = true;
  index.find_users({&id, 1}, {&used, 1});
  EXPECT_FALSE(used);
  index.forget(id);
  EXPECT_EQ(index.translate(granules(0, 1).start)->address, 0x9000U);
}

TEST_F(PinIndexTest, HoldOutlivesTheLeaseAndItsThread) {
  const RegionId id = add(granules(0, 4), 0x1000);
  Hold hold;
  std::thread{[&] {
    const auto lease = index.acquire(granules(1, 1), Access::read);
    ASSERT_TRUE(lease);
    hold = lease.hold();
  }}.join();
  EXPECT_EQ(hold.address(), 0x1000 + granule_bytes);
  EXPECT_FALSE(drop(id));
  hold.drop();
  bool used = true;
  index.find_users({&id, 1}, {&used, 1});
  EXPECT_FALSE(used);
}

TEST_F(PinIndexTest, LeasesBeyondTheGuardWordsAreCounted) {
  const RegionId id = add(granules(0, 4), 0x1000);
  std::vector<Lease> many;
  for (int i = 0; i < 100; ++i) {
    many.push_back(index.acquire(granules(0, 1), Access::read));
    ASSERT_TRUE(many.back());
  }
  EXPECT_TRUE(index.is_held(id));
  index.erase(id);
  for (auto& lease : many) {
    bool used = false;
    index.find_users({&id, 1}, {&used, 1});
    EXPECT_TRUE(used);
    lease.drop();
  }
  bool used = true;
  index.find_users({&id, 1}, {&used, 1});
  EXPECT_FALSE(used);
}

TEST_F(PinIndexTest, RestorePutsAnErasedRegionBack) {
  const RegionId id = add(granules(5, 40), 0x1000);
  index.erase(id);
  EXPECT_FALSE(index.translate(granules(7, 1).start));
  EXPECT_TRUE(index.restore(id));
  EXPECT_EQ(index.translate(granules(7, 1).start)->address, 0x1000 + 2 * granule_bytes);
  index.erase(id);
  const RegionId other = add(granules(6, 1), 0x5000);
  EXPECT_FALSE(index.restore(id));
  EXPECT_EQ(index.translate(granules(6, 1).start)->id, other);
}

TEST_F(PinIndexTest, AccessedIsNotedOnceAndTaken) {
  const RegionId id = add(granules(0, 600), 0x1000);
  EXPECT_FALSE(index.take_accessed(id));
  EXPECT_TRUE(index.acquire<false>(granules(0, 1), Access::read));
  EXPECT_FALSE(index.take_accessed(id));
  EXPECT_TRUE(index.acquire(granules(599, 1), Access::read));
  EXPECT_TRUE(index.take_accessed(id));
  EXPECT_FALSE(index.take_accessed(id));
}

TEST_F(PinIndexTest, TablesAreReusedAfterErase) {
  for (int round = 0; round < 50; ++round) {
    std::vector<RegionId> ids;
    for (std::uint64_t block = 0; block < 64; ++block)
      ids.push_back(add({base_key + (block << 21), base_key + (block << 21) + granule_bytes - 1}, block << 12));
    for (const RegionId id : ids) index.erase(id);
    std::array<bool, 64> used;
    index.find_users(ids, used);
    for (const RegionId id : ids) index.forget(id);
  }
  EXPECT_EQ(index.region_count(), 0U);
  EXPECT_LT(index.memory_bytes(), 1U << 20);
}

TEST_F(PinIndexTest, ALoneRegionNeedsNoTableAndAnswersForItselfOnly) {
  add(granules(100, 3), 0x7000'0000);  // both its blocks are otherwise empty
  const std::size_t before = index.memory_bytes();
  for (std::uint64_t i = 1; i < 1000; ++i)
    add({base_key + (i << 21) + 5 * granule_bytes, base_key + (i << 21) + 6 * granule_bytes - 1}, i << 12);
  EXPECT_LT(index.memory_bytes() - before, 1000 * 64U) << "no table of its own";
  for (std::uint64_t i = 1; i < 1000; ++i) {
    const std::uint64_t start = base_key + (i << 21) + 5 * granule_bytes;
    EXPECT_EQ(index.translate(start + 77)->address, (i << 12) + 77);
    EXPECT_EQ(index.translate(start + 77)->length_min, granule_bytes - 77);
    EXPECT_FALSE(index.translate(start - 1));
    EXPECT_FALSE(index.translate(start + granule_bytes));
  }
  EXPECT_EQ(index.translate(granules(102, 1).last)->address, 0x7000'0000 + 3 * granule_bytes - 1);
  EXPECT_FALSE(index.translate(granules(99, 1).last));
  EXPECT_FALSE(index.translate(granules(103, 1).start));
  EXPECT_EQ(index.first_in(granules(0, 100)), std::nullopt);
  EXPECT_EQ(index.first_in(granules(0, 101))->range, granules(100, 3));
  EXPECT_EQ(index.first_in(granules(103, 300)), std::nullopt);
}

TEST_F(PinIndexTest, CompanyInABlockChangesNoAnswer) {
  const RegionId first = add(granules(3, 2), 0x30'0000, Access::read);
  EXPECT_TRUE(index.acquire(granules(3, 1), Access::read));  // marked before the block is split
  const auto lease = index.acquire(granules(3, 2), Access::read);
  const RegionId near = add(granules(5, 1), 0x50'0000);
  const RegionId far = add(granules(5 + 17, 40), 0x220'0000);
  EXPECT_EQ(index.translate(granules(4, 1).start)->address, 0x30'0000 + granule_bytes);
  EXPECT_EQ(index.translate(granules(4, 1).start)->access, Access::read);
  EXPECT_EQ(index.translate(granules(5, 1).start)->id, near);
  EXPECT_EQ(index.translate(granules(60, 1).start)->address, 0x220'0000 + 38 * granule_bytes);
  EXPECT_EQ(lease.region().range, granules(3, 2));
  EXPECT_TRUE(index.take_accessed(first)) << "the mark moved along";
  EXPECT_FALSE(drop(first)) << "leased";
  EXPECT_TRUE(drop(near));
  EXPECT_TRUE(drop(far));
  EXPECT_FALSE(index.translate(granules(4, 1).start));
}

// Addresses that do not fit a slot: above 48 bits, not a multiple of a granule, and the largest that fits.
TEST_F(PinIndexTest, AddressesOfAnySizeAreKept) {
  const std::array<std::uint64_t, 6> addresses{
      std::uint64_t{1} << 59,         0xffff'ffff'f000, 0xffff'ffff'e000,
      0xffff'ffff'ffff'ffff - 0xffff, 0x1234,           (1ULL << 48) - (1ULL << 15)};
  std::uint64_t at = 0;
  for (const std::uint64_t address : addresses)
    for (const std::uint64_t count : {1, 3, 16}) {
      const auto range = granules(at, count);
      add(range, address);
      at += 16;
      for (std::uint64_t key = range.start; key <= range.last; key += 1001)
        ASSERT_EQ(index.translate(key)->address, address + (key - range.start)) << address << " " << count;
      const auto lease = index.acquire(range, Access::read_write);
      EXPECT_EQ(lease.address(), address);
      EXPECT_EQ(lease.length(), range.length());
    }
}

// A lookup beside a region that has its block to itself may be reading the region's record.
TEST_F(PinIndexTest, AWalkInTheBlockOfALoneRegionHoldsItBack) {
  auto& walk = LeaseGuards::attach()->words[ThreadGuards::walk_word];
  const RegionId alone = add(granules(0, 1), 0x1000);
  const RegionId second = add(granules(512 * 8, 1), 0x2000);
  const RegionId third = add(granules(512 * 8 + 1, 1), 0x3000);  // splits the block of the second
  walk.store(walking_guard(granules(9, 1)), std::memory_order_relaxed);
  index.erase(alone);
  bool used = false;
  EXPECT_EQ(index.find_users({&alone, 1}, {&used, 1}), 1U) << "only a walk holds it back";
  EXPECT_TRUE(used);
  walk.store(walking_guard(granules(512 * 8 + 9, 1)), std::memory_order_relaxed);
  EXPECT_EQ(index.find_users({&alone, 1}, {&used, 1}), 0U);
  EXPECT_FALSE(used);
  index.forget(alone);
  index.erase(third);
  index.find_users({&third, 1}, {&used, 1});
  EXPECT_FALSE(used) << "it came with a slot of its own";
  index.forget(third);
  index.erase(second);
  index.find_users({&second, 1}, {&used, 1});
  EXPECT_TRUE(used) << "walks may have been sent to its record before the block was split";
  walk.store(idle_guard, std::memory_order_relaxed);
  index.find_users({&second, 1}, {&used, 1});
  EXPECT_FALSE(used);
}

TEST_F(PinIndexTest, ReachesTheLastKey) {
  const MemoryRange top{key_last - granule_bytes + 1, key_last};
  add(top, 0xffff'ffff'ffff'f000);
  EXPECT_EQ(index.translate(key_last)->address, 0xffff'ffff'ffff'ffff);
  EXPECT_TRUE(index.acquire(top, Access::read));
  EXPECT_FALSE(index.translate(key_last + 1));
  EXPECT_EQ(index.first_in({0, key_last})->range, top);
}

TEST_F(PinIndexTest, ForkedChildFindsNothingAndMayNotInsert) {
  add(granules(0, 4), 0x1000);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const bool nothing = !index.translate(granules(0, 1).start) && !index.acquire(granules(0, 1), Access::read);
    const bool closed = index.insert(granules(8, 1), Access::read, {}).error().code == Errc::closed;
    _exit(nothing && closed ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_TRUE(index.translate(granules(0, 1).start));
}

// Side by side, and each alone in its 64 KiB.
class PinIndexMemory : public testing::TestWithParam<std::uint64_t> {};

TEST_P(PinIndexMemory, MillionRegionsStayBelow64Megabytes) {
#ifdef IOVANE_SANITIZED
  constexpr std::uint64_t count = 100'000;
#else
  constexpr std::uint64_t count = 1'000'000;
#endif
  PinIndex index;
  ASSERT_TRUE(index.open());
  for (std::uint64_t i = 0; i < count; ++i)
    ASSERT_TRUE(index.insert({base_key + i * GetParam(), base_key + i * GetParam() + granule_bytes - 1},
                             Access::read_write, {i << 13, 0}));
  EXPECT_LT(index.memory_bytes(), count * 64 + (2U << 20));
}
INSTANTIATE_TEST_SUITE_P(Strides, PinIndexMemory, testing::Values(granule_bytes, 65536));

TEST(GuardWord, WalkedKeysCoverWhatWasSearched) {
  for (const MemoryRange searched : {MemoryRange{0, 0}, MemoryRange{0x1000, 0x1fff}, MemoryRange{0xfff, 0x1000},
                                     MemoryRange{0x7fff'ffff'f000, 0x8000'0000'0fff}, MemoryRange{0, key_last}}) {
    const GuardWord w = walking_guard(searched);
    EXPECT_TRUE(is_walking(w));
    EXPECT_TRUE(walked_keys(w).contains(searched));
  }
  EXPECT_FALSE(is_walking(leased_guard(PinIndex::indices_max, RegionTable::regions_max)));
}

}  // namespace
}  // namespace iovane::pinning
