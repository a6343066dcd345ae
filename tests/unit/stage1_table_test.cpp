// First-stage tables: the entries of each architecture, and the editor that writes them.
#include <gtest/gtest.h>

#include <map>

#include "backends/stage1/smmuv3.hpp"
#include "support/first_stage_walker.hpp"
#include "support/seed.hpp"

namespace iovane::test {
namespace {

constexpr std::uint64_t k4 = 4096, m2 = 2U << 20, g1 = 1U << 30;

IovaRange at(std::uint64_t iova, std::uint64_t bytes) { return *IovaRange::from_length(Iova{iova}, Bytes{bytes}); }

// Numbers from the manuals, spelled out.
TEST(TableFormatTest, smmuv3_entries_are_what_the_architecture_says) {
  constexpr TableFormat f = smmuv3_format();
  EXPECT_EQ(f.table(0x4000'2000), 0x4000'2003U);
  // nG, AF, inner shareable, EL0, attribute 0, page; UXN and PXN.
  EXPECT_EQ(f.leaf(0, 0x4123'4000, Access::read_write, 0), 0x0060'0000'4123'4f43U);
  EXPECT_EQ(f.leaf(0, 0x4123'4000, Access::read, 0), 0x0060'0000'4123'4fc3U) << "AP[2] is read-only";
  EXPECT_EQ(f.leaf(1, 0x4120'0000, Access::read_write, 0), 0x0060'0000'4120'0f41U) << "a block has bit 1 clear";
  EXPECT_EQ(f.kind(f.leaf(1, m2, Access::read, 0), 1), EntryKind::leaf);
  EXPECT_EQ(f.kind(f.table(m2), 1), EntryKind::table);
  EXPECT_EQ(f.kind(f.leaf(0, m2, Access::read, 0), 0), EntryKind::leaf);
}

TEST(TableFormatTest, x86_entries_are_what_the_architecture_says) {
  for (const TableFormat& f : {vtd_format(), amd_format()}) {
    EXPECT_EQ(f.table(0x4000'2000), 0x4000'2027U) << "present, writable, user, accessed";
    EXPECT_EQ(f.leaf(0, 0x4123'4000, Access::read_write, 0), 0x4123'4067U) << "and dirty";
    EXPECT_EQ(f.leaf(0, 0x4123'4000, Access::read, 0), 0x4123'4065U);
    EXPECT_EQ(f.leaf(2, 0x4000'0000, Access::read_write, 0), 0x4000'00e7U) << "PS";
    EXPECT_EQ(f.kind(f.leaf(2, g1, Access::read, 0), 2), EntryKind::leaf);
    EXPECT_EQ(f.kind(f.table(g1), 2), EntryKind::table);
  }
}

TEST(TableFormatTest, what_software_marks_is_invalid_for_hardware_and_told_apart) {
  for (const TableFormat& f : {smmuv3_format(), vtd_format()}) {
    for (const std::uint64_t entry : {f.draining(0x7000), f.cutting(0x7000)}) {
      EXPECT_EQ(entry & 1, 0U);
      EXPECT_EQ(f.address(entry), 0x7000U);
    }
    EXPECT_EQ(f.kind(f.draining(0), 1), EntryKind::draining);
    EXPECT_EQ(f.kind(f.cutting(0), 1), EntryKind::cutting);
    EXPECT_EQ(f.kind(0, 1), EntryKind::empty);
    const std::uint64_t own = f.leaf(1, m2, Access::read, TableFormat::own_pin_bit);
    const std::uint64_t part = f.part_of(own, 0, 5 * k4);
    EXPECT_EQ(f.address(part), m2 + 5 * k4);
    EXPECT_FALSE(f.is_writable(part));
    EXPECT_NE(part & TableFormat::own_pin_bit, 0U);
  }
}

TEST(Smmuv3Test, the_context_descriptor_is_the_one_that_a_kernel_accepted) {
  // Seen to work on Linux 7.2 with QEMU's SMMUv3: 39 bits, ASID 7.
  const auto words = smmuv3::context_descriptor(0x4000'1000, 39, 7, 5);
  EXPECT_EQ(words[0], 25ULL | 1U << 8 | 1U << 10 | 3U << 12 | 1ULL << 30 | 1ULL << 31 | 5ULL << 32 | 1ULL << 41 |
                          1ULL << 45 | 1ULL << 46 | 1ULL << 47 | 7ULL << 48);
  EXPECT_EQ(words[1], 0x4000'1000U);
  EXPECT_EQ(words[3], 0xffU);
  const auto entry = smmuv3::stream_table_entry(0x4000'0000);
  EXPECT_EQ(entry[0], 0x4000'000bU);
  EXPECT_EQ(entry[1], 0xd4U);
}

TEST(Smmuv3Test, commands_cover_exactly_the_range) {
  for (const bool ranged : {true, false}) {
    for (std::uint64_t pages = 1; pages <= 1100; ++pages) {
      std::array<smmuv3::Command, 1200> commands;
      const IovaRange range = at(0x12'3456'7000, pages * k4);
      const std::size_t count = smmuv3::commands_for(range, 9, ranged, true, commands.data(), commands.size());
      ASSERT_NE(count, 0U);
      if (ranged) {
        EXPECT_LE(count, 3U);
      }
      std::uint64_t next = range.start.value;
      for (std::size_t i = 0; i < count; ++i) {
        const smmuv3::Decoded d = smmuv3::decode(commands[i]);
        ASSERT_TRUE(d.known && d.leaf && !d.everything);
        EXPECT_EQ(d.asid, 9);
        ASSERT_EQ(d.range.start.value, next);
        next = d.range.last.value + 1;
      }
      ASSERT_EQ(next, range.last.value + 1) << pages;
    }
  }
  smmuv3::Command one;
  EXPECT_EQ(smmuv3::commands_for(at(0, 2 * k4), 1, false, true, &one, 1), 0U) << "does not fit";
}

class EditorTest : public testing::TestWithParam<std::tuple<Architecture, unsigned>> {
 protected:
  static TableFormat format() {
    switch (std::get<0>(GetParam())) {
      case Architecture::smmuv3: return smmuv3_format();
      case Architecture::vtd: return vtd_format();
      case Architecture::amd: break;
    }
    return amd_format();
  }
  TableWorld world_{format(), std::get<1>(GetParam())};
};

TEST_P(EditorTest, a_page_leads_where_it_was_told) {
  ASSERT_EQ(world_.map(at(0x12'3000, k4), 0x7'0000), MapVerdict::done);
  EXPECT_EQ(world_.walker.translate(0x12'3000), 0x7'0000U);
  EXPECT_FALSE(world_.walker.translate(0x12'4000));
  EXPECT_EQ(world_.map(at(0x12'3000, k4), 0x8'0000), MapVerdict::occupied);
  EXPECT_EQ(world_.unmap(at(0x12'3000, k4)), k4);
  EXPECT_FALSE(world_.walker.translate(0x12'3000));
  EXPECT_EQ(world_.unmap(at(0x12'3000, k4)), 0U);
}

TEST_P(EditorTest, alignment_decides_on_blocks) {
  unsigned level = 9;
  ASSERT_EQ(world_.map(at(3 * g1, g1 + m2 + k4), 5 * g1), MapVerdict::done);
  EXPECT_NE(world_.editor.find(Iova{3 * g1 + 77 * k4}, level), 0U);
  EXPECT_EQ(level, 2U);
  EXPECT_NE(world_.editor.find(Iova{4 * g1}, level), 0U);
  EXPECT_EQ(level, 1U);
  EXPECT_NE(world_.editor.find(Iova{4 * g1 + m2}, level), 0U);
  EXPECT_EQ(level, 0U);
  EXPECT_EQ(world_.walker.translate(3 * g1 + 77 * k4), 5 * g1 + 77 * k4);
  EXPECT_EQ(world_.walker.translate(4 * g1 + m2), 6 * g1 + m2);
  EXPECT_EQ(world_.map(at(3 * g1 + 9 * k4, k4), 0), MapVerdict::occupied);
  EXPECT_EQ(world_.map(at(2 * g1, 2 * g1), 0), MapVerdict::occupied);
  EXPECT_FALSE(world_.walker.translate(2 * g1)) << "a refused map left something behind";
  EXPECT_EQ(world_.unmap(at(0, 8 * g1)), g1 + m2 + k4);
  ASSERT_EQ(world_.map(at(g1, m2), g1 + k4), MapVerdict::done) << "memory that is not aligned";
  EXPECT_NE(world_.editor.find(Iova{g1}, level), 0U);
  EXPECT_EQ(level, 0U);
}

TEST_P(EditorTest, a_block_is_cut_break_before_make) {
  ASSERT_EQ(world_.map(at(g1, g1), 2 * g1, Access::read), MapVerdict::done);
  ASSERT_EQ(world_.walker.translate(g1 + 5 * m2), 2 * g1 + 5 * m2);
  const std::size_t before = world_.walker.forgets();
  EXPECT_EQ(world_.unmap(at(g1 + 5 * m2 + 3 * k4, 2 * k4)), 2 * k4);
  EXPECT_EQ(world_.walker.forgets() - before, 2U) << "one for each level that was cut";
  EXPECT_EQ(world_.walker.translate(g1 + 5 * m2 + 2 * k4), 2 * g1 + 5 * m2 + 2 * k4);
  EXPECT_FALSE(world_.walker.translate(g1 + 5 * m2 + 3 * k4));
  EXPECT_FALSE(world_.walker.translate(g1 + 5 * m2 + 4 * k4));
  EXPECT_EQ(world_.walker.translate(2 * g1 - k4), 3 * g1 - k4);
  EXPECT_EQ(world_.unmap(at(0, 4 * g1)), g1 - 2 * k4);
}

TEST_P(EditorTest, sixteen_that_one_map_fills_carry_the_hint) {
  const std::uint64_t hint = world_.editor.format().hint_bit;
  unsigned level = 9;
  const auto hinted = [&](std::uint64_t iova) {
    const std::uint64_t entry = world_.editor.find(Iova{iova}, level);
    EXPECT_NE(entry, 0U) << std::hex << iova;
    return hint != 0 && (entry & hint) != 0;
  };
  // Three groups and a part on either side.
  ASSERT_EQ(world_.map(at(m2 + 7 * k4, 60 * k4), 4 * m2 + 7 * k4), MapVerdict::done);
  for (std::uint64_t page = 7; page < 67; ++page)
    EXPECT_EQ(hinted(m2 + page * k4), hint != 0 && page >= 16 && page < 64) << page;
  // Memory that lies otherwise than the addresses; fifteen of sixteen; sixteen in two maps; no large entries wanted.
  ASSERT_EQ(world_.map(at(m2 + 128 * k4, 16 * k4), 4 * m2 + 3 * k4), MapVerdict::done);
  ASSERT_EQ(world_.map(at(m2 + 144 * k4, 15 * k4), 4 * m2), MapVerdict::done);
  ASSERT_EQ(world_.map(at(m2 + 160 * k4, 8 * k4), 4 * m2), MapVerdict::done);
  ASSERT_EQ(world_.map(at(m2 + 168 * k4, 8 * k4), 4 * m2 + 8 * k4), MapVerdict::done);
  ASSERT_EQ(world_.map(at(m2 + 176 * k4, 16 * k4), 4 * m2, Access::read, false), MapVerdict::done);
  for (std::uint64_t page = 128; page < 192; ++page)
    if (page != 159) {
      EXPECT_FALSE(hinted(m2 + page * k4)) << page;
    }
  // Blocks of 2 MiB, sixteen of them in 32 MiB.
  ASSERT_EQ(world_.map(at(31 * m2, 19 * m2), 127 * m2), MapVerdict::done);
  for (std::uint64_t block = 31; block < 50; ++block) {
    EXPECT_EQ(hinted(block * m2), hint != 0 && block >= 32 && block < 48) << block;
    EXPECT_EQ(level, 1U);
    EXPECT_EQ(world_.walker.translate(block * m2 + 5 * k4), (block + 96) * m2 + 5 * k4);
  }
  EXPECT_EQ(world_.unmap(at(0, 64 * m2)), (60 + 16 + 15 + 16 + 16) * k4 + 19 * m2);
}

TEST_P(EditorTest, a_part_of_a_group_goes_and_the_walker_does_not_take_it_from_the_others) {
  for (const std::uint64_t unit : {k4, m2}) {
    const std::uint64_t from = 64 * m2, memory = 192 * m2;
    ASSERT_EQ(world_.map(at(from, 16 * unit), memory), MapVerdict::done);
    ASSERT_EQ(world_.walker.translate(from + 5 * unit), memory + 5 * unit);
    EXPECT_EQ(world_.unmap(at(from + 3 * unit, 2 * unit)), 2 * unit);
    for (std::uint64_t i = 0; i < 16; ++i) {  // each asked in turn: none speaks for its neighbours any more
      const bool gone = i == 3 || i == 4;
      EXPECT_EQ(world_.walker.translate(from + i * unit), gone ? std::nullopt : std::optional{memory + i * unit}) << i;
    }
    // What comes into the hole is a mapping of its own.
    ASSERT_EQ(world_.map(at(from + 3 * unit, unit), memory + 40 * unit), MapVerdict::done);
    EXPECT_EQ(world_.walker.translate(from + 2 * unit), memory + 2 * unit);
    EXPECT_EQ(world_.walker.translate(from + 3 * unit), memory + 40 * unit);
    EXPECT_EQ(world_.unmap(at(from, 16 * unit)), 15 * unit);
    ASSERT_EQ(world_.map(at(from, 16 * unit), memory), MapVerdict::done) << "and as one again";
    EXPECT_EQ(world_.unmap(at(from, 16 * unit)), 16 * unit);
  }
}

TEST_P(EditorTest, a_page_out_of_a_hinted_block_takes_hint_and_block) {
  ASSERT_EQ(world_.map(at(64 * m2, 32 * m2), 192 * m2), MapVerdict::done);
  ASSERT_EQ(world_.walker.translate(70 * m2), 198 * m2);
  EXPECT_EQ(world_.unmap(at(70 * m2 + 9 * k4, k4)), k4);
  EXPECT_EQ(world_.walker.translate(70 * m2 + 8 * k4), 198 * m2 + 8 * k4);
  EXPECT_EQ(world_.walker.translate(70 * m2 + 9 * k4), std::nullopt);
  EXPECT_EQ(world_.walker.translate(71 * m2), 199 * m2);
  EXPECT_EQ(world_.unmap(at(0, 128 * m2)), 32 * m2 - k4);
}

TEST_P(EditorTest, a_group_whose_invalidation_fails_waits_for_one_that_succeeds) {
  if (world_.editor.format().hint_bit == 0) return;
  ASSERT_EQ(world_.map(at(m2, 16 * k4), 4 * m2), MapVerdict::done);
  world_.walker.set_refusing(true);
  EXPECT_EQ(world_.unmap(at(m2, k4)), 0U);
  EXPECT_FALSE(world_.unmapped_all.load(std::memory_order_relaxed));  // relaxed: one thread
  EXPECT_EQ(world_.map(at(m2, k4), 0), MapVerdict::occupied);
  world_.walker.set_refusing(false);
  EXPECT_EQ(world_.unmap(at(m2 + k4, k4)), k4);
  EXPECT_EQ(world_.walker.translate(m2), 4 * m2);
  EXPECT_EQ(world_.walker.translate(m2 + k4), std::nullopt);
  EXPECT_EQ(world_.unmap(at(m2, 16 * k4)), 15 * k4);
}

// The canary of the hints: entries that keep the hint over a hole lead the walker into it.
TEST_P(EditorTest, a_hint_that_is_left_over_a_hole_shows) {
  if (world_.editor.format().hint_bit == 0) return;
  ASSERT_EQ(world_.map(at(m2, 15 * k4), 4 * m2), MapVerdict::done);
  unsigned level = 9;
  ASSERT_NE(world_.editor.find(Iova{m2}, level), 0U);
  Table* table = world_.pool.at(world_.editor.root_address());
  for (unsigned l = world_.editor.levels() - 1; l > 0; --l)
    table = world_.pool.at(
        world_.editor.format().address(table->entries[index_of(m2, l)].load(std::memory_order_acquire)));  // A.entry
  table->entries[3].fetch_or(world_.editor.format().hint_bit, std::memory_order_release);                  // R.entry
  ASSERT_TRUE(world_.walker.translate(m2 + 3 * k4));
  EXPECT_EQ(world_.walker.translate(m2 + 15 * k4), 4 * m2 + 15 * k4) << "nothing is mapped there";
}

TEST_P(EditorTest, a_cut_whose_invalidation_fails_changes_nothing) {
  ASSERT_EQ(world_.map(at(g1, m2), 2 * g1), MapVerdict::done);
  const std::uint32_t tables = world_.pool.taken();
  world_.walker.set_refusing(true);
  EXPECT_EQ(world_.unmap(at(g1, k4)), 0U);
  EXPECT_FALSE(world_.unmapped_all.load(std::memory_order_relaxed));  // relaxed: one thread
  world_.walker.set_refusing(false);
  EXPECT_EQ(world_.walker.translate(g1), 2 * g1);
  EXPECT_EQ(world_.pool.taken(), tables);
  EXPECT_EQ(world_.unmap(at(g1, k4)), k4);
  EXPECT_EQ(world_.unmap(at(g1, m2)), m2 - k4);
}

TEST_P(EditorTest, a_sweep_takes_empty_tables_of_all_levels_and_never_under_a_walker) {
  const std::uint64_t top = last_address(world_.editor.levels()).value - g1 + 1;
  // Three GiB apart, and with more than three levels far enough that tables above level 1 become empty too.
  const std::uint64_t apart = world_.editor.levels() == 3 ? 3 * g1 : 515 * g1;
  std::map<std::uint64_t, std::uint64_t> live;
  const auto map_and_walk = [&](std::uint64_t iova, std::uint64_t memory) {
    ASSERT_EQ(world_.map(at(iova, k4), memory), MapVerdict::done);
    ASSERT_EQ(world_.walker.translate(iova), memory);  // the walker knows the tables now
    live[iova] = memory;
  };
  for (std::uint64_t i = 0; i < 160; ++i) map_and_walk(i * apart + i * m2, i * k4);
  ASSERT_EQ(world_.map(at(top, g1), 7 * g1), MapVerdict::done) << "a block of 1 GiB";
  for (std::uint64_t i = 0; i < 160; ++i) map_and_walk(i * apart + g1 + i * m2, i * m2);
  const std::uint32_t before = world_.pool.taken();
  for (auto one = live.begin(); one != live.end();) {
    if (one->second / k4 % 8 == 0 && one->second < 160 * k4) {
      ++one;
      continue;
    }
    ASSERT_EQ(world_.unmap(at(one->first, k4)), k4);
    one = live.erase(one);
  }
  world_.walker.set_refusing(true);
  EXPECT_EQ(world_.editor.sweep(), 0U);
  EXPECT_EQ(world_.pool.taken(), before) << "nothing is given back that a walker may know";
  for (const auto& [iova, memory] : live) EXPECT_EQ(world_.walker.translate(iova), memory);
  world_.walker.set_refusing(false);
  EXPECT_GT(world_.editor.trim(), 0U);
  for (std::uint64_t i = 0; i < 320; ++i) {  // the walker knows the tables above once more
    const std::uint64_t iova = i / 2 * apart + i % 2 * g1 + 300 * m2;
    ASSERT_EQ(world_.walker.translate(iova), std::nullopt);
  }
  const std::uint32_t trimmed = world_.pool.taken();
  world_.walker.set_refusing(true);
  EXPECT_EQ(world_.editor.sweep(), 0U);
  EXPECT_EQ(world_.pool.taken(), trimmed) << "all of them are back in their places";
  world_.walker.set_refusing(false);
  EXPECT_GE(world_.editor.sweep(), world_.editor.levels() == 3 ? 299U : 400U);
  EXPECT_LE(world_.pool.taken(), live.size() * (world_.editor.levels() - 1) + 8);
  for (const auto& [iova, memory] : live) EXPECT_EQ(world_.walker.translate(iova), memory);
  EXPECT_EQ(world_.walker.translate(top + g1 - 5 * k4), 8 * g1 - 5 * k4);
  // The pages come back in other places; a walker that still knew them there would be led astray.
  for (std::uint64_t i = 0; i < 160; ++i) map_and_walk((159 - i) * apart + (i % 2) * g1 + 400 * m2, (1000 + i) * k4);
  for (const auto& [iova, memory] : live) EXPECT_EQ(world_.walker.translate(iova), memory);
}

TEST_P(EditorTest, empty_tables_are_collected_and_never_under_a_walker) {
  constexpr std::uint64_t count = 600;
  for (std::uint64_t i = 0; i < count; ++i) {
    ASSERT_EQ(world_.map(at(i * m2, k4), i * k4), MapVerdict::done);
    ASSERT_EQ(world_.walker.translate(i * m2), i * k4);  // the walker knows the table now
  }
  EXPECT_EQ(world_.editor.trim(), 0U) << "all are in use";
  for (std::uint64_t i = 0; i < count; i += 2) ASSERT_EQ(world_.unmap(at(i * m2, k4)), k4);
  const std::uint32_t before = world_.pool.taken();
  EXPECT_EQ(world_.editor.trim(), count / 2);
  EXPECT_EQ(world_.pool.taken(), before - count / 2);
  // The pages come back in other places; a walker that still knew them there would be led astray.
  for (std::uint64_t i = 0; i < count / 2; ++i)
    ASSERT_EQ(world_.map(at(100 * g1 / 64 + (2000 + i) * m2, k4), 0x5000'0000 + i * k4, Access::read, false),
              MapVerdict::done);
  for (std::uint64_t i = 0; i < count; ++i)
    ASSERT_EQ(world_.walker.translate(i * m2), i % 2 == 0 ? std::nullopt : std::optional{i * k4});
}

// The canary: if invalidations did nothing, the test above would have to fail. A deaf walker shows that it would.
TEST_P(EditorTest, a_walker_that_is_not_told_goes_astray) {
  ASSERT_EQ(world_.map(at(0, k4), 0x1000), MapVerdict::done);
  ASSERT_EQ(world_.walker.translate(0), 0x1000U);
  ASSERT_EQ(world_.unmap(at(0, k4)), k4);
  world_.walker.set_deaf(true);
  ASSERT_EQ(world_.editor.trim(), 1U);
  ASSERT_EQ(world_.map(at(m2, k4), 0x2000), MapVerdict::done);  // in the page that was collected
  EXPECT_EQ(world_.walker.translate(0), 0x2000U) << "the stale table leads to somebody else's mapping";
}

TEST_P(EditorTest, a_failed_collection_puts_everything_back) {
  ASSERT_EQ(world_.map(at(0, k4), 0x1000), MapVerdict::done);
  ASSERT_EQ(world_.unmap(at(0, k4)), k4);
  const std::uint32_t tables = world_.pool.taken();
  world_.walker.set_refusing(true);
  EXPECT_EQ(world_.editor.trim(), 0U);
  EXPECT_EQ(world_.pool.taken(), tables);
  world_.walker.set_refusing(false);
  ASSERT_EQ(world_.map(at(0, k4), 0x3000), MapVerdict::done);
  EXPECT_EQ(world_.walker.translate(0), 0x3000U);
  EXPECT_EQ(world_.pool.taken(), tables) << "the same table again";
}

TEST_P(EditorTest, without_tables_a_map_fails_and_says_how_far_it_came) {
  world_.memory.allow(0);
  std::uint64_t mapped = 0;
  while (world_.map(at(mapped * m2, k4), 0x1000, Access::read, false) == MapVerdict::done) ++mapped;
  EXPECT_GT(mapped, 10U);
  EXPECT_LT(mapped, 64U);
  EXPECT_EQ(world_.map(at(300 * m2, 4 * m2), 0, Access::read, false), MapVerdict::no_tables);
  EXPECT_TRUE(world_.editor.is_free(at(300 * m2, 4 * m2)));
  EXPECT_EQ(world_.unmap(at(0, m2)), k4);
  EXPECT_EQ(world_.map(at(299 * m2, k4), 0x9000), MapVerdict::done) << "the empty table is found";
}

// Every sequence of three operations (four where there are three levels) out of sixteen, at borders of tables and
// blocks, against a map of pages.
TEST_P(EditorTest, every_short_sequence_agrees_with_a_map) {
  struct Op {
    bool map;
    std::uint64_t start, bytes;
  };
  std::vector<Op> ops;
  for (const auto& [start, bytes] :
       std::initializer_list<std::pair<std::uint64_t, std::uint64_t>>{{m2 - k4, k4},
                                                                      {m2, m2},
                                                                      {m2 - k4, 2 * k4},
                                                                      {m2 + k4, k4},
                                                                      {0, 3 * m2},
                                                                      {2 * m2, k4},
                                                                      {m2, k4},
                                                                      {m2 - k4, m2 + 2 * k4},
                                                                      {2 * m2, 16 * k4}})
    for (const bool map : {true, false}) ops.push_back({map, start, bytes});
  std::map<std::uint64_t, std::uint64_t> pages;
  const auto inside = [&](const Op& op) {
    return std::pair{pages.lower_bound(op.start), pages.lower_bound(op.start + op.bytes)};
  };
  const std::size_t n = ops.size();
  const std::size_t depth = world_.editor.levels() == 3 ? 4 : 3;
  for (std::size_t code = 0; code < n * n * n * (depth == 4 ? n : 1); ++code) {
    for (std::size_t step = 0, rest = code; step < depth; ++step, rest /= n) {
      const Op& op = ops[rest % n];
      const auto [from, to] = inside(op);
      if (op.map) {
        const std::uint64_t memory = 8 * m2 + op.start;
        const bool free = from == to;
        ASSERT_EQ(world_.map(at(op.start, op.bytes), memory), free ? MapVerdict::done : MapVerdict::occupied) << code;
        for (std::uint64_t p = 0; free && p < op.bytes; p += k4) pages[op.start + p] = memory + p;
      } else {
        const auto expected = static_cast<std::uint64_t>(std::distance(from, to)) * k4;
        pages.erase(from, to);
        ASSERT_EQ(world_.unmap(at(op.start, op.bytes)), expected) << code;
      }
    }
    for (const std::uint64_t iova :
         {std::uint64_t{0}, m2 - k4, m2, m2 + k4, m2 + 2 * k4, 2 * m2 - k4, 2 * m2, 2 * m2 + k4}) {
      const auto known = pages.find(iova);
      ASSERT_EQ(world_.walker.translate(iova), known == pages.end() ? std::nullopt : std::optional{known->second})
          << code;
    }
    const std::uint64_t left = pages.size() * k4;
    pages.clear();
    ASSERT_EQ(world_.unmap(at(0, 8 * m2)), left) << code;
    if (code % 64 == 0) world_.editor.trim();
  }
}

TEST_P(EditorTest, random_operations_agree_with_a_map) {
  Random random{seed()};
  std::map<std::uint64_t, std::uint64_t> pages;
  for (int step = 0; step < 30'000; ++step) {
    const std::uint64_t unit = random.one_in(4) ? m2 : random.one_in(3) ? 16 * k4 : k4;
    const std::uint64_t start = random.below(6 * m2 / unit) * unit + random.below(3) * g1;
    const std::uint64_t bytes = (1 + random.below(unit == k4 ? 20 : 2)) * unit;
    const auto from = pages.lower_bound(start), to = pages.lower_bound(start + bytes);
    if (random.one_in(2)) {
      const std::uint64_t memory = random.below(1U << 10) * unit;
      const bool free = from == to;
      ASSERT_EQ(world_.map(at(start, bytes), memory, Access::read_write, !random.one_in(3)),
                free ? MapVerdict::done : MapVerdict::occupied);
      for (std::uint64_t p = 0; free && p < bytes; p += k4) pages[start + p] = memory + p;
    } else {
      const auto expected = static_cast<std::uint64_t>(std::distance(from, to)) * k4;
      pages.erase(from, to);
      ASSERT_EQ(world_.unmap(at(start, bytes)), expected);
    }
    for (int probe = 0; probe < 4; ++probe) {
      const std::uint64_t iova = start + random.below(32) * k4;
      const auto known = pages.find(iova);
      ASSERT_EQ(world_.walker.translate(iova), known == pages.end() ? std::nullopt : std::optional{known->second});
    }
    if (random.one_in(500)) world_.editor.trim();
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, EditorTest,
                         testing::Values(std::tuple{Architecture::smmuv3, 3U}, std::tuple{Architecture::smmuv3, 4U},
                                         std::tuple{Architecture::vtd, 4U}, std::tuple{Architecture::vtd, 5U},
                                         std::tuple{Architecture::amd, 4U}));

}  // namespace
}  // namespace iovane::test
