// Every fault that an untranslated request can meet, from the structure that is wrong: the table of the specification's
// section 7.1.3, condition by condition, with the reason it names and whether FPD keeps it from being recorded.
#include <gtest/gtest.h>

#include <functional>
#include <set>
#include <string>

#include "viommu/vtd.hpp"
#include "vtd_guest.hpp"

namespace iovane::viommu {
namespace {

constexpr std::uint16_t device = 0x08;
constexpr std::uint64_t beyond = std::uint64_t{1} << 50;   // above the host address width
constexpr std::uint64_t nowhere = std::uint64_t{1} << 30;  // no RAM
constexpr std::uint64_t legacy_context = 0x2000 + device * 16;
constexpr std::uint64_t context = 0x2000 + device * 32;  // scalable mode
constexpr std::uint64_t directory = 0x3000;
constexpr std::uint64_t pasid = 0x4000;
constexpr std::uint64_t table = 0x8000;  // one table per level follows, down to 0xc000
constexpr std::uint64_t page = 0x5000;   // where address 0 leads

enum class Mode { legacy, legacy_pass_through, first, second, pass_through };

// A guest with one structure per page, in which address 0 of the device is mapped.
struct FaultGuest {
  GuestRam ram{16U << 20};
  GuestMemory memory;
  VtdEvents events;
  VtdConfig config;
  std::unique_ptr<Vtd> unit;

  explicit FaultGuest(Mode mode, const std::function<void(VtdCapabilities&)>& offer) {
    EXPECT_TRUE(memory.add(ram.config()));
    VtdCapabilities& c = config.capabilities;
    c.scalable = c.first_level = c.first_5_level = true;
    c.second_levels_mask = 3U << 3;  // 3 and 4 levels
    c.host_address_width = 46;
    c.guest_address_width = 48;
    if (offer) offer(c);
    unit = std::make_unique<Vtd>(memory, config, events);
    const bool legacy = mode == Mode::legacy || mode == Mode::legacy_pass_through;
    const std::uint64_t rights = mode == Mode::first ? 7 : 3;
    ram.store(0x1000, 0x2001);
    if (legacy) {
      ram.store(legacy_context + 8, 2 | 5 << 8);
      ram.store(legacy_context, mode == Mode::legacy ? table | 1 : 1 | 2 << 2);
    } else {
      ram.store(context, directory | 1 | 8);
      ram.store(context + 8, 3);  // RID_PASID
      ram.store(directory, pasid | 1);
      for (const std::uint64_t entry : {pasid + 3 * 64, pasid + 4 * 64}) {
        ram.store(entry + 8, 5);
        if (mode == Mode::first) ram.store(entry, 1 | 1 << 6), ram.store(entry + 16, table);
        if (mode == Mode::second) ram.store(entry, table | 1 | 2 << 6 | 2 << 2);
        if (mode == Mode::pass_through) ram.store(entry, 1 | 4 << 6);
      }
    }
    for (std::uint64_t at = table; at < table + 3 * 4096; at += 4096) ram.store(at, (at + 4096) | rights);
    ram.store(table + 3 * 4096, page | rights);
    unit->set_root_table(0x1000 | (legacy ? 0 : 1 << 10));
    unit->set_translation(true);
  }
};
constexpr std::uint64_t entry = pasid + 3 * 64;  // of requests without PASID

struct Store {
  std::uint64_t gpa;
  std::uint64_t value;
};
struct Fault {
  const char* condition;  // the specification's code, and which of its examples
  Mode mode;
  VtdFault reason;
  bool qualified;
  std::vector<Store> stores;
  std::uint64_t iova = 0;
  bool write = false;
  std::optional<std::uint32_t> pasid{};
  std::function<void(VtdCapabilities&)> offer{};
  std::optional<std::uint64_t> rtaddr{};
};

std::vector<Fault> every_fault() {
  using F = VtdFault;
  using C = VtdCapabilities;
  const std::uint64_t level_3 = table + 4096;
  const std::uint64_t level_2 = table + 2 * 4096;
  const std::uint64_t level_1 = table + 3 * 4096;
  return {
      {"LRT.1", Mode::legacy, F::root_access, false, {}, 0, false, {}, {}, nowhere},
      {"LRT.2", Mode::legacy, F::root_not_present, false, {{0x1000, 0}}},
      {"LRT.3", Mode::legacy, F::root_reserved, false, {{0x1000, 0x2003}}},
      {"LRT.3 width", Mode::legacy, F::root_reserved, false, {{0x1000, 0x2001 | beyond}}},
      {"LRT.3 high word", Mode::legacy, F::root_reserved, false, {{0x1008, 1}}},
      {"LCT.1", Mode::legacy, F::context_access, false, {{0x1000, nowhere | 1}}},
      {"LCT.2", Mode::legacy, F::context_not_present, true, {{legacy_context, table}}},
      {"LCT.3", Mode::legacy, F::context_reserved, true, {{legacy_context, table | 1 | 0x10}}},
      {"LCT.3 high word", Mode::legacy, F::context_reserved, true, {{legacy_context + 8, 2 | 1 << 24}}},
      {"LCT.4.1", Mode::legacy, F::context_invalid, true, {{legacy_context + 8, 4 | 5 << 8}}},
      {"LCT.4.1 not offered", Mode::legacy, F::context_invalid, true, {{legacy_context + 8, 3 | 5 << 8}}},
      {"LCT.4.2", Mode::legacy, F::context_invalid, true, {{legacy_context, table | 1 | 3 << 2}}},
      {"LCT.4.2 pass-through not offered",
       Mode::legacy_pass_through,
       F::context_invalid,
       true,
       {},
       0,
       false,
       {},
       [](C& c) { c.pass_through = false; }},
      {"LCT.4.2 device TLB not offered",
       Mode::legacy,
       F::context_invalid,
       true,
       {{legacy_context, table | 1 | 1 << 2}},
       0,
       false,
       {},
       [](C& c) { c.device_iotlb = false; }},
      {"LCT.4.3", Mode::legacy, F::context_invalid, true, {{legacy_context, nowhere | 1}}},
      {"LSS.1", Mode::legacy, F::paging_entry_access, true, {{table, nowhere | 3}}},
      {"LSS.1 last level", Mode::legacy, F::paging_entry_access, true, {{level_2, nowhere | 3}}},
      {"LSS.2", Mode::legacy, F::paging_entry_reserved, true, {{level_1, page | 3 | beyond}}},
      {"LSS.2 superpage", Mode::legacy, F::paging_entry_reserved, true, {{table, 0x83}}},
      {"LGN.1.1", Mode::legacy, F::address_beyond_width, true, {}, std::uint64_t{1} << 48},
      {"LGN.1.3", Mode::legacy_pass_through, F::address_beyond_width, true, {}, std::uint64_t{1} << 46},
      {"LGN.2", Mode::legacy, F::write_denied, true, {{level_3, level_2 | 1}}, 0, true},
      {"LGN.2 nothing there", Mode::legacy, F::write_denied, true, {{level_1, 0}}, 0, true},
      {"LGN.3", Mode::legacy, F::read_denied, true, {{level_1, page | 2}}},
      {"LGN.4", Mode::legacy, F::interrupt_address, true, {{level_1, 0xfee0'0000 | 3}}},
      {"LGN.4 pass-through", Mode::legacy_pass_through, F::interrupt_address, true, {}, 0xfeef'fffc},
      {"RTA.1.1", Mode::first, F::sm_root_address, false, {}, 0, false, {}, {}, 0x1000 | 3 << 10},
      {"RTA.1.2", Mode::first, F::sm_root_address, false, {}, 0, false, {}, {}, 0x1000 | 2 << 10},
      {"RTA.1.3", Mode::first, F::sm_root_address, false, {}, 0, false, {}, [](C& c) { c.scalable = false; }},
      {"RTA.2", Mode::legacy, F::sm_translation_mode, false, {}, 0, false, 4},
      {"RTA.4",
       Mode::first,
       F::abort_mode,
       false,
       {},
       0,
       false,
       {},
       [](C& c) { c.abort_mode = true; },
       0x1000 | 3 << 10},
      {"SRT.1", Mode::first, F::sm_root_access, false, {}, 0, false, {}, {}, nowhere | 1 << 10},
      {"SRT.2", Mode::first, F::sm_root_not_present, false, {{0x1000, 0}}},
      {"SRT.3", Mode::first, F::sm_root_reserved, false, {{0x1000, 0x2003}}},
      {"SRT.3 width", Mode::first, F::sm_root_reserved, false, {{0x1000, 0x2001 | beyond}}},
      {"SCT.1", Mode::first, F::sm_context_access, false, {{0x1000, nowhere | 1}}},
      {"SCT.2", Mode::first, F::sm_context_not_present, true, {{context, directory}}},
      {"SCT.3", Mode::first, F::sm_context_reserved, true, {{context, directory | 1 | 0x80}}},
      {"SCT.3 width", Mode::first, F::sm_context_reserved, true, {{context, directory | 1 | beyond}}},
      {"SCT.3 RID_PRIV", Mode::first, F::sm_context_reserved, true, {{context + 8, 1 << 20 | 3}}},
      {"SCT.3 third word", Mode::first, F::sm_context_reserved, true, {{context + 16, 1}}},
      {"SCT.3 fourth word", Mode::first, F::sm_context_reserved, true, {{context + 24, 1}}},
      {"SCT.3 PRE not offered", Mode::first, F::sm_context_reserved, true, {{context, directory | 1 | 0x14}}},
      {"SCT.3 DTE not offered",
       Mode::first,
       F::sm_context_reserved,
       true,
       {{context, directory | 1 | 4}},
       0,
       false,
       {},
       [](C& c) { c.device_iotlb = false; }},
      {"SCT.3 PASIDE not offered",
       Mode::first,
       F::sm_context_reserved,
       true,
       {},
       0,
       false,
       {},
       [](C& c) { c.pasid = false; }},
      {"SCT.3 RID_PASID not offered",
       Mode::first,
       F::sm_context_reserved,
       true,
       {},
       0,
       false,
       {},
       [](C& c) { c.rid_pasid = false; }},
      {"SCT.4.1",
       Mode::first,
       F::sm_context_invalid,
       true,
       {{context, directory | 1 | 0x10}},
       0,
       false,
       {},
       [](C& c) { c.page_requests = true; }},
      {"SCT.4.2", Mode::first, F::sm_context_invalid, true, {{context + 8, 128 * 64}}},
      {"SCT.4.2 for requests with PASID too",
       Mode::first,
       F::sm_context_invalid,
       true,
       {{context + 8, 0xf'ffff}},
       0,
       false,
       4},
      {"SCT.6", Mode::first, F::sm_pasid_disabled, true, {{context, directory | 1}}, 0, false, 4},
      {"SCT.7", Mode::first, F::sm_pasid_too_large, true, {}, 0, false, 128 * 64},
      {"SCT.9", Mode::first, F::sm_pasid_is_rid_pasid, true, {}, 0, false, 3},
      {"SPD.1", Mode::first, F::pasid_directory_access, false, {{context, nowhere | 1}}},
      {"SPD.2", Mode::first, F::pasid_directory_not_present, true, {{directory, pasid}}},
      {"SPD.3", Mode::first, F::pasid_directory_reserved, true, {{directory, pasid | 1 | 4}}},
      {"SPD.3 width", Mode::first, F::pasid_directory_reserved, true, {{directory, pasid | 1 | beyond}}},
      {"SPT.1", Mode::first, F::pasid_entry_access, false, {{directory, nowhere | 1}}},
      {"SPT.2", Mode::first, F::pasid_entry_not_present, true, {{entry, 0}}},
      {"SPT.2 with PASID", Mode::first, F::pasid_entry_not_present, true, {{pasid + 4 * 64, 0}}, 0, false, 4},
      {"SPT.3", Mode::first, F::pasid_entry_reserved, true, {{entry, 1 | 1 << 6 | 0x20}}},
      {"SPT.3 SSADE", Mode::second, F::pasid_entry_reserved, true, {{entry, table | 1 | 2 << 6 | 2 << 2 | 0x200}}},
      {"SPT.3 width", Mode::first, F::pasid_entry_reserved, true, {{entry + 16, table | beyond}}},
      {"SPT.3 second word", Mode::first, F::pasid_entry_reserved, true, {{entry + 8, 5 | 1 << 16}}},
      {"SPT.3 PWSNP not offered", Mode::first, F::pasid_entry_reserved, true, {{entry + 8, 5 | 1 << 23}}},
      {"SPT.3 PGSNP not offered", Mode::first, F::pasid_entry_reserved, true, {{entry + 8, 5 | 1 << 24}}},
      {"SPT.3 PAT not offered", Mode::first, F::pasid_entry_reserved, true, {{entry + 8, 5 | beyond}}},
      {"SPT.3 SRE not offered", Mode::first, F::pasid_entry_reserved, true, {{entry + 16, table | 1}}},
      {"SPT.3 EAFE", Mode::first, F::pasid_entry_reserved, true, {{entry + 16, table | 0x80}}},
      {"SPT.3 last word", Mode::first, F::pasid_entry_reserved, true, {{entry + 56, 1}}},
      {"SPT.3 second level not offered",
       Mode::first,
       F::pasid_entry_reserved,
       true,
       {{entry, table | 1 | 1 << 6}},
       0,
       false,
       {},
       [](C& c) { c.second_level = false; }},
      {"SPT.4.1", Mode::second, F::pasid_entry_invalid, true, {{entry, table | 1 | 2 << 6}}},
      {"SPT.4.1 not offered", Mode::second, F::pasid_entry_invalid, true, {{entry, table | 1 | 2 << 6 | 3 << 2}}},
      {"SPT.4.2", Mode::first, F::pasid_entry_invalid, true, {{entry, 1 | 7 << 6}}},
      {"SPT.4.2 nested", Mode::first, F::pasid_entry_invalid, true, {{entry, 1 | 3 << 6}}},
      {"SPT.4.2 first level not offered",
       Mode::second,
       F::pasid_entry_invalid,
       true,
       {{entry, 1 | 1 << 6}},
       0,
       false,
       {},
       [](C& c) { c.first_level = false; }},
      {"SPT.4.2 pass-through not offered",
       Mode::pass_through,
       F::pasid_entry_invalid,
       true,
       {},
       0,
       false,
       {},
       [](C& c) { c.pass_through = false; }},
      {"SPT.4.3", Mode::first, F::pasid_entry_invalid, true, {{entry + 16, table | 2 << 2}}},
      {"SPT.4.3 not offered",
       Mode::first,
       F::pasid_entry_invalid,
       true,
       {{entry + 16, table | 1 << 2}},
       0,
       false,
       {},
       [](C& c) { c.first_5_level = false; }},
      {"SFS.1", Mode::first, F::first_entry_access, true, {{table, nowhere | 7}}},
      {"SFS.2", Mode::first, F::first_not_present, true, {{level_3, 0}}},
      {"SFS.3", Mode::first, F::first_reserved, true, {{level_1, page | 7 | beyond}}},
      {"SFS.3 superpage", Mode::first, F::first_reserved, true, {{table, level_3 | 7 | 0x80}}},
      {"SFS.3 alignment", Mode::first, F::first_reserved, true, {{level_2, 0x20'0000 | 0x87 | 0x4000}}},
      {"SFS.4", Mode::first, F::first_table_access, true, {{entry + 16, nowhere}}},
      {"SSS.1", Mode::second, F::second_entry_access, true, {{table, nowhere | 3}}},
      {"SSS.2", Mode::second, F::second_not_present, true, {{level_3, 0}}},
      {"SSS.2 all levels together",
       Mode::second,
       F::second_not_present,
       true,
       {{level_3, level_2 | 1}, {level_1, page | 2}}},
      {"SSS.3", Mode::second, F::second_reserved, true, {{level_1, page | 3 | beyond}}},
      {"SSS.4", Mode::second, F::second_table_access, true, {{entry, nowhere | 1 | 2 << 6 | 2 << 2}}},
      {"SGN.1", Mode::first, F::non_canonical, true, {}, std::uint64_t{1} << 47},
      {"SGN.2", Mode::first, F::user_denied, true, {{level_2, level_1 | 3}}},
      {"SGN.4.2", Mode::pass_through, F::sm_host_address_beyond_width, true, {}, std::uint64_t{1} << 46},
      {"SGN.5", Mode::second, F::sm_second_address_beyond_width, true, {}, std::uint64_t{1} << 48},
      {"SGN.6", Mode::first, F::sm_write_denied, true, {{level_2, level_1 | 5}}, 0, true},
      {"SGN.6 second level", Mode::second, F::sm_write_denied, true, {{level_1, page | 1}}, 0, true},
      {"SGN.7", Mode::second, F::sm_read_denied, true, {{level_1, page | 2}}},
      {"SGN.8.1", Mode::first, F::sm_interrupt_address, true, {{level_1, 0xfee0'0000 | 7}}},
      {"SGN.8.1 pass-through", Mode::pass_through, F::sm_interrupt_address, true, {}, 0xfee0'0000},
      {"SGN.10", Mode::first, F::sm_pasid_unsupported, true, {}, 0, false, 256, [](C& c) { c.pasid_bits = 8; }},
  };
}

TEST(VtdFaults, EveryConditionHasTheReasonThatTheSpecificationNames) {
  std::set<VtdFault> seen{VtdFault::none};
  for (const Fault& fault : every_fault()) {
    SCOPED_TRACE(fault.condition);
    const FaultGuest guest{fault.mode, fault.offer};
    const bool mapped = !fault.offer && fault.iova == 0 && !fault.pasid;
    if (mapped) {
      EXPECT_EQ(guest.unit->fault_of(device, std::nullopt, 0, true).reason, VtdFault::none) << "before the damage";
    }
    for (const Store& store : fault.stores) guest.ram.store(store.gpa, store.value);
    if (fault.rtaddr) guest.unit->set_root_table(*fault.rtaddr);
    const auto report = guest.unit->fault_of(device, fault.pasid, fault.iova, fault.write);
    EXPECT_EQ(report.reason, fault.reason) << to_string(report.reason) << ", not " << to_string(fault.reason);
    EXPECT_TRUE(report.record) << "nothing disables faults";
    seen.insert(report.reason);
    // The context entry's FPD counts whether it is present or not.
    const bool legacy = fault.mode == Mode::legacy || fault.mode == Mode::legacy_pass_through;
    const std::uint64_t at = legacy ? legacy_context : context;
    guest.ram.store(at, guest.ram.load(at) | 2);
    EXPECT_EQ(guest.unit->fault_of(device, fault.pasid, fault.iova, fault.write).record, !fault.qualified);
    EXPECT_EQ(is_qualified(fault.reason), fault.qualified);
  }
  for (unsigned code = 0; code < 256; ++code) {
    const auto fault = static_cast<VtdFault>(code);
    EXPECT_EQ(to_string(fault) != "unknown", seen.contains(fault)) << to_string(fault) << " is never given";
  }
}

TEST(VtdFaults, TheBitsOfPasidStructuresDisableThemToo) {
  for (const std::uint64_t at : {directory, entry}) {
    const FaultGuest guest{Mode::first, {}};
    guest.ram.store(table, 0);
    EXPECT_TRUE(guest.unit->fault_of(device, std::nullopt, 0, false).record);
    guest.ram.store(at, guest.ram.load(at) | 2);
    EXPECT_FALSE(guest.unit->fault_of(device, std::nullopt, 0, false).record);
  }
}

TEST(VtdFaults, WhatIsAllowedIsNone) {
  const FaultGuest first{Mode::first, {}};
  first.ram.store(table + 2 * 4096, 0x20'0000 | 0x87 | 0x1000);
  EXPECT_EQ(first.unit->fault_of(device, std::nullopt, 0, true).reason, VtdFault::none) << "bit 12 is PAT";
  EXPECT_EQ(first.unit->fault_of(device, 4, 0, true).reason, VtdFault::none);
  const FaultGuest offered{Mode::first, [](VtdCapabilities& c) {
                             c.page_requests = c.supervisor_requests = c.walk_snoop = c.memory_types = true;
                             c.snoop_control = true;
                           }};
  offered.ram.store(context, directory | 1 | 0x1c);
  offered.ram.store(entry + 8, 5 | 0xfULL << 23 | std::uint64_t{0x0007'0406} << 32);
  offered.ram.store(entry + 16, table | 1);
  EXPECT_EQ(offered.unit->fault_of(device, std::nullopt, 0, true).reason, VtdFault::none);
  const FaultGuest off{Mode::legacy_pass_through, {}};
  off.unit->set_translation(false);
  EXPECT_EQ(off.unit->fault_of(device, std::nullopt, std::uint64_t{1} << 46, true).reason, VtdFault::none);
}

}  // namespace
}  // namespace iovane::viommu
