// VT-d's page tables of every shape: levels, stages and page sizes on their way to the host and back.
#include <gtest/gtest.h>

#include "viommu/recording_target.hpp"
#include "viommu/vtd.hpp"
#include "vtd_guest.hpp"

namespace iovane::viommu {
namespace {

constexpr std::uint16_t device = 0x08;

VtdConfig all() {
  VtdConfig config;
  config.capabilities.scalable = true;
  config.capabilities.first_level = true;
  config.capabilities.first_5_level = true;
  config.capabilities.second_levels_mask = 7U << 3;
  config.capabilities.host_address_width = 46;
  config.capabilities.guest_address_width = 57;
  return config;
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
  Vtd unit{memory, all(), events};
  const std::uint64_t root = 0x1000;
  const std::uint64_t table = 0x8000;
  if (shape.scalable) {
    ram.store(root, 0x2001);
    ram.store(0x2000 + device * 32, 0x3001);
    ram.store(0x3000, 0x4001);
    ram.store(0x4008, 5);
    if (shape.first) ram.store(0x4010, table | (shape.levels - 4) << 2);
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
