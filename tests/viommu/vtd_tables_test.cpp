// VT-d's structures and page tables of every shape: levels, stages and page sizes on their way to the host, and the
// fault reasons of scalable mode, each from the structure that is wrong.
#include <gtest/gtest.h>

#include "viommu/recording_target.hpp"
#include "viommu/vtd.hpp"
#include "vtd_guest.hpp"

namespace iovane::viommu {
namespace {

constexpr std::uint16_t device = 0x08;

// A scalable-mode guest, one structure per page, and a table with room for five levels.
struct ScalableGuest {
  static constexpr std::uint64_t root = 0x1000;
  static constexpr std::uint64_t context = 0x2000 + device * 32;
  static constexpr std::uint64_t directory = 0x3000;
  static constexpr std::uint64_t pasid = 0x4000;
  static constexpr std::uint64_t table = 0x8000;
  static constexpr std::uint64_t nowhere = 0x4000'0000;  // no RAM

  GuestRam ram{16U << 20};
  GuestMemory memory;
  VtdEvents events;
  std::unique_ptr<Vtd> unit;

  explicit ScalableGuest(VtdConfig config = all()) {
    EXPECT_TRUE(memory.add(ram.config()));
    unit = std::make_unique<Vtd>(memory, config, events);
    ram.store(root, 0x2001);
    ram.store(context, directory | 1);
    ram.store(directory, pasid | 1);
    stage(1, 4);
    unit->set_root_table(root | 1 << 10);
    unit->set_translation(true);
  }
  static VtdConfig all() {
    VtdConfig config;
    config.capabilities.scalable = true;
    config.capabilities.first_level = true;
    config.capabilities.first_5_level = true;
    config.capabilities.second_levels_mask = 7U << 3;
    config.capabilities.host_address_width = 46;
    config.capabilities.guest_address_width = 57;
    return config;
  }
  /// The PASID entry: type 1 first level, 2 second level.
  void stage(std::uint64_t type, std::uint64_t levels) const {
    ram.store(pasid + 8, 5);  // domain id
    if (type == 1) {
      ram.store(pasid + 16, table | (levels - 4) << 2);
      ram.store(pasid, 1 | type << 6);
    } else {
      ram.store(pasid, table | 1 | type << 6 | (levels - 2) << 2);
    }
  }
  VtdFault reason(std::uint64_t iova = 0, bool write = false) const {
    return unit->fault_of(device, std::nullopt, iova, write).reason;
  }
  /// The reason with one word changed, which is then what it was.
  VtdFault with(std::uint64_t gpa, std::uint64_t value, std::uint64_t iova = 0, bool write = false) const {
    const std::uint64_t before = ram.load(gpa);
    ram.store(gpa, value);
    const VtdFault got = reason(iova, write);
    ram.store(gpa, before);
    return got;
  }
  static constexpr std::uint64_t beyond = std::uint64_t{1} << 50;  // above the host address width
};

TEST(VtdFaults, OfTheRegisterAndTheStructures) {
  ScalableGuest g;
  using F = VtdFault;
  EXPECT_EQ(g.with(g.root, 0), F::sm_root_not_present);
  EXPECT_EQ(g.with(g.root, 0x2001 | 2), F::sm_root_reserved);
  EXPECT_EQ(g.with(g.root, 0x2001 | g.beyond), F::sm_root_reserved);
  EXPECT_EQ(g.with(g.root, g.nowhere | 1), F::sm_context_access);
  EXPECT_EQ(g.with(g.context, 0), F::sm_context_not_present);
  EXPECT_EQ(g.with(g.context, g.directory | 1 | 0x20), F::sm_context_reserved);
  EXPECT_EQ(g.with(g.context + 24, 1), F::sm_context_reserved);
  EXPECT_EQ(g.with(g.context, g.nowhere | 1), F::pasid_directory_access);
  EXPECT_EQ(g.with(g.directory, 0), F::pasid_directory_not_present);
  EXPECT_EQ(g.with(g.directory, g.pasid | 1 | 4), F::pasid_directory_reserved);
  EXPECT_EQ(g.with(g.directory, g.nowhere | 1), F::pasid_entry_access);
  EXPECT_EQ(g.with(g.pasid, 0), F::pasid_entry_not_present);
  EXPECT_EQ(g.with(g.pasid + 16, g.table | g.beyond), F::pasid_entry_reserved);
  EXPECT_EQ(g.with(g.pasid, 1 | 7 << 6), F::pasid_entry_invalid);
  g.unit->set_root_table(g.nowhere | 1 << 10);
  EXPECT_EQ(g.reason(), F::sm_root_access);
  g.unit->set_root_table(g.root | 2 << 10);
  EXPECT_EQ(g.reason(), F::sm_root_address) << "a mode that is reserved";
  g.unit->set_root_table(g.nowhere);
  EXPECT_EQ(g.reason(), F::root_access) << "legacy mode";
  // The fault processing disable bits silence what lies behind them, and not what lies before.
  g.unit->set_root_table(g.root | 1 << 10);
  g.ram.store(g.context, g.directory | 1 | 2);
  EXPECT_FALSE(g.unit->fault_of(device, std::nullopt, 0, false).record);
  g.ram.store(g.root, 0);
  EXPECT_TRUE(g.unit->fault_of(device, std::nullopt, 0, false).record);
}

TEST(VtdFaults, OfFirstLevelTables) {
  ScalableGuest g;
  using F = VtdFault;
  g.ram.store(g.table, 0x9000 | 7);
  g.ram.store(0x9000, 0xa000 | 7);
  g.ram.store(0xa000, 0xb000 | 7);
  g.ram.store(0xb000, 0x5000 | 7);
  EXPECT_EQ(g.reason(0, true), F::none);
  EXPECT_EQ(g.with(g.pasid + 16, g.nowhere), F::first_table_access);
  EXPECT_EQ(g.with(0x9000, g.nowhere | 7), F::first_entry_access);
  EXPECT_EQ(g.with(0xa000, 0), F::first_not_present);
  EXPECT_EQ(g.with(0xb000, 0x5000 | 7 | g.beyond), F::first_reserved);
  EXPECT_EQ(g.with(g.table, 0x9000 | 7 | 0x80), F::first_reserved) << "no superpages at level 4";
  EXPECT_EQ(g.with(0xa000, 0x20'0000 | 0x87 | 0x4000), F::first_reserved) << "a superpage that is not aligned";
  EXPECT_EQ(g.with(0xa000, 0x20'0000 | 0x87 | 0x1000), F::none) << "bit 12 of a superpage is PAT";
  EXPECT_EQ(g.with(0xa000, 0xb000 | 3), F::user_denied) << "U/S counts on every level";
  EXPECT_EQ(g.with(0xa000, 0xb000 | 5, 0, true), F::sm_write_denied) << "so does R/W";
  EXPECT_EQ(g.with(0xb000, 0xfee0'0000 | 7), F::sm_interrupt_address);
  EXPECT_EQ(g.reason(std::uint64_t{1} << 47), F::non_canonical);
}

TEST(VtdFaults, OfSecondLevelTablesInScalableMode) {
  ScalableGuest g;
  using F = VtdFault;
  g.stage(2, 3);
  g.ram.store(g.table, 0x9000 | 3);
  g.ram.store(0x9000, 0xa000 | 3);
  g.ram.store(0xa000, 0x5000 | 3);
  EXPECT_EQ(g.reason(0, true), F::none);
  EXPECT_EQ(g.with(g.pasid, g.nowhere | 1 | 2 << 6 | 1 << 2), F::second_table_access);
  EXPECT_EQ(g.with(g.table, g.nowhere | 3), F::second_entry_access);
  EXPECT_EQ(g.with(0x9000, 0), F::second_not_present);
  EXPECT_EQ(g.with(0xa000, 0x5003 | g.beyond), F::second_reserved);
  EXPECT_EQ(g.with(g.pasid, g.table | 1 | 2 << 6), F::pasid_entry_invalid) << "two levels";
  EXPECT_EQ(g.with(g.pasid, g.table | 1 | 2 << 6 | 1 << 2 | 0x400), F::pasid_entry_reserved);
  EXPECT_EQ(g.with(0xa000, 0x5000 | 2), F::sm_read_denied);
  EXPECT_EQ(g.with(0xa000, 0x5000 | 1, 0, true), F::sm_write_denied);
  EXPECT_EQ(g.reason(std::uint64_t{1} << 39), F::sm_address_beyond_width);
}

// Every number of levels, stage and page size that there is, from the guest's entries to what the host holds.
struct Shape {
  bool first;
  bool scalable;
  unsigned levels;
  unsigned leaf_level;  // 1 to 3: 4 KiB, 2 MiB, 1 GiB
};

class VtdShapes : public ::testing::TestWithParam<Shape> {};

TEST_P(VtdShapes, ReachTheHostAndLeaveIt) {
  const Shape& shape = GetParam();
  const GuestRam ram{std::uint64_t{4} << 30};
  GuestMemory memory;
  ASSERT_TRUE(memory.add(ram.config()));
  VtdEvents events;
  RecordingTarget host;
  Vtd unit{memory, ScalableGuest::all(), events};
  const std::uint64_t root = 0x1000;
  const std::uint64_t table = 0x8000;
  if (shape.scalable) {
    ram.store(root, 0x2001);
    ram.store(0x2000 + device * 32, 0x3001);
    ram.store(0x3000, 0x4001);
    ram.store(0x4008, 5);
    ram.store(0x4010, table | (shape.levels - 4) << 2);
    ram.store(0x4000, shape.first ? 1 | 1 << 6 : table | 1 | 2 << 6 | (shape.levels - 2) << 2);
  } else {
    ram.store(root, 0x2001);
    ram.store(0x2000 + device * 16 + 8, (shape.levels - 2) | 5 << 8);
    ram.store(0x2000 + device * 16, table | 1);
  }
  unit.set_root_table(root | (shape.scalable ? 1 << 10 : 0));
  unit.set_translation(true);
  ASSERT_TRUE(unit.add_endpoint(device, std::nullopt, &host));
  // The highest page of the lower half, so that every level's index counts.
  const std::uint64_t page = std::uint64_t{1} << (12 + 9 * (shape.leaf_level - 1));
  const unsigned width = 12 + 9 * shape.levels - (shape.first ? 1 : 0);
  const std::uint64_t iova = (std::uint64_t{1} << width) - page;
  std::uint64_t at = table;
  for (unsigned level = shape.levels; level > shape.leaf_level; --level) {
    const std::uint64_t next = 0x9000 + level * 0x1000;
    ram.store(at + (iova >> (12 + 9 * (level - 1)) & 511) * 8, next | (shape.first ? 7 : 3));
    at = next;
  }
  const std::uint64_t slot = at + (iova >> (12 + 9 * (shape.leaf_level - 1)) & 511) * 8;
  const std::uint64_t gpa = 2 * page > (std::uint64_t{1} << 21) ? 2 * page : std::uint64_t{1} << 21;
  ram.store(slot, gpa | (shape.first ? 5 : 1) | (shape.leaf_level > 1 ? 0x80 : 0));
  VtdDescriptor page_scope{shape.first ? VtdDescriptor::Kind::pasid_iotlb : VtdDescriptor::Kind::iotlb,
                           VtdDescriptor::Scope::page, 5};
  page_scope.address = iova;
  page_scope.address_mask = static_cast<std::uint8_t>(9 * (shape.leaf_level - 1));
  static_cast<void>(unit.execute(page_scope));
  unit.finish();
  ASSERT_EQ(host.held().size(), 1U);
  const auto& held = host.held().begin()->second;
  EXPECT_EQ(held.range, (IovaRange{Iova{iova}, Iova{iova + page - 1}}));
  EXPECT_EQ(held.region_offset, gpa);
  EXPECT_EQ(held.access, Access::read);
  EXPECT_EQ(unit.fault_of(device, std::nullopt, iova + page - 1, false).reason, VtdFault::none);
  ram.store(slot, 0);
  static_cast<void>(unit.execute(page_scope));
  unit.finish();
  EXPECT_TRUE(host.held().empty());
  ASSERT_TRUE(unit.remove_endpoint(device, std::nullopt));
}

std::vector<Shape> every_shape() {
  std::vector<Shape> out;
  for (const unsigned leaf : {1U, 2U, 3U}) {
    for (const unsigned levels : {3U, 4U, 5U})
      for (const bool scalable : {false, true}) out.push_back({false, scalable, levels, leaf});
    for (const unsigned levels : {4U, 5U}) out.push_back({true, true, levels, leaf});
  }
  return out;
}
INSTANTIATE_TEST_SUITE_P(All, VtdShapes, ::testing::ValuesIn(every_shape()), [](const auto& p) {
  const Shape& s = p.param;
  return std::string{s.first      ? "first"
                     : s.scalable ? "second"
                                  : "legacy"} +
         "_levels" + std::to_string(s.levels) + "_leaf" + std::to_string(s.leaf_level);
});

}  // namespace
}  // namespace iovane::viommu
