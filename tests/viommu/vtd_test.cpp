#include "viommu/vtd.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "recorded_data.hpp"
#include "viommu/recording_target.hpp"
#include "vtd_guest.hpp"

namespace iovane::viommu {
namespace {

struct CountingEvents : VtdEvents {
  int interrupts = 0;
  int errors = 0;
  int failures = 0;
  void wait_completed() noexcept override { ++interrupts; }
  void queue_error(std::uint64_t) noexcept override { ++errors; }
  void shadow_failed(std::uint16_t, const Error&) noexcept override { ++failures; }
};

VtdConfig legacy_config() {
  VtdConfig config;
  config.capabilities.second_levels_mask = 7U << 3;  // 3, 4 and 5 levels
  config.capabilities.host_address_width = 46;
  config.capabilities.guest_address_width = 57;
  return config;
}

struct VtdTest : ::testing::Test {
  GuestRam ram{256U << 20};
  GuestMemory memory;
  CountingEvents events;
  RecordingTarget host;
  Vtd unit{memory, legacy_config(), events};
  VtdGuest guest{ram, unit};
  static constexpr std::uint16_t device = 0x08;
  void SetUp() override { ASSERT_TRUE(memory.add(ram.config())); }
  // With its target taken back before the target goes.
  void TearDown() override { static_cast<void>(unit.remove_endpoint(device, std::nullopt)); }
};

TEST_F(VtdTest, FollowsADeviceFromPassThroughToItsTableAndBack) {
  ASSERT_TRUE(unit.add_endpoint(device, std::nullopt, &host));
  EXPECT_EQ(unit.set_root_table(VtdGuest::root), Progress::done);
  EXPECT_EQ(host.held().size(), 1U) << "translation is off: RAM maps to itself";
  EXPECT_EQ(unit.translate(device, std::nullopt, 0x1234)->first, 0x1234U);

  const std::uint64_t table = guest.new_table();
  guest.set_context(device, table, 4, 7);
  guest.put(table, 4, 0xabcd000, 0x55000 | 3);
  guest.start();
  ASSERT_EQ(host.held().size(), 1U);
  EXPECT_EQ(host.held().at(0xabcd000).region_offset, 0x55000U);
  EXPECT_EQ(unit.domain_of(device, std::nullopt)->index().leaves(), 1U);
  EXPECT_FALSE(unit.translate(device, std::nullopt, 0x1234));

  ram.store(guest.slot(table, 4, 0xabcd000, 1), 0);
  guest.page(7, 0xabcd000);
  guest.wait(1);
  EXPECT_EQ(guest.ring(), Progress::done);
  EXPECT_EQ(guest.waited(), 1U);
  EXPECT_TRUE(host.held().empty());
  EXPECT_EQ(unit.set_translation(false), Progress::done);
  EXPECT_EQ(host.held().size(), 1U);
}

TEST_F(VtdTest, OneNotificationIsOneBatchWhateverItHolds) {
  const std::uint64_t table = guest.new_table();
  guest.set_context(device, table, 3, 1);
  guest.start();
  ASSERT_TRUE(unit.add_endpoint(device, std::nullopt, &host));
  unit.finish();
  for (std::uint64_t i = 0; i < 16; ++i) {
    guest.put(table, 3, 0x400000 + i * 0x1000, (0x80000 + i * 0x3000) | 3);
    guest.page(1, 0x400000 + i * 0x1000);
    guest.wait(static_cast<std::uint32_t>(100 + i));
  }
  const auto before = host.batches();
  EXPECT_EQ(guest.ring(), Progress::done);
  EXPECT_EQ(host.batches(), before + 1);
  EXPECT_EQ(host.held().size(), 16U);
  EXPECT_EQ(guest.waited(), 115U) << "the last of them, in order";
  EXPECT_EQ(unit.head(), 32U * 16);
}

TEST_F(VtdTest, WaitsCompleteOnlyWhenTheHostIsDone) {
  const std::uint64_t table = guest.new_table();
  guest.set_context(device, table, 3, 1);
  guest.start();
  ASSERT_TRUE(unit.add_endpoint(device, std::nullopt, &host));
  unit.finish();
  host.asynchronous = true;
  guest.put(table, 3, 0x1000, 0x80000 | 1);
  guest.page(1, 0x1000);
  guest.wait(9);
  EXPECT_EQ(guest.ring(), Progress::pending);
  EXPECT_EQ(unit.advance(), Progress::pending);
  EXPECT_EQ(guest.waited(), 0U);
  EXPECT_EQ(unit.head(), 0U);
  // Another notification meanwhile is taken along later.
  guest.wait(10);
  EXPECT_EQ(guest.ring(), Progress::pending);
  host.finish();
  EXPECT_EQ(unit.advance(), Progress::done);
  EXPECT_EQ(guest.waited(), 10U);
  host.asynchronous = false;
}

TEST_F(VtdTest, SuperpagesAndTheirBreakUpChangeOnlyWhatDiffers) {
  const std::uint64_t table = guest.new_table();
  guest.set_context(device, table, 4, 1);
  guest.start();
  ASSERT_TRUE(unit.add_endpoint(device, std::nullopt, &host));
  guest.put(table, 4, 0x4000'0000, 0x20'0000 | 0x83, 2);
  guest.page(1, 0x4000'0000, 9);
  guest.ring();
  ASSERT_EQ(host.held().size(), 1U);
  EXPECT_EQ(host.held().begin()->second.range.length(), Bytes{2U << 20});
  // The same memory in small pages: nothing to tell the host.
  const std::uint64_t small = guest.new_table();
  for (std::uint64_t i = 0; i < 512; ++i) ram.store(small + i * 8, (0x20'0000 + i * 0x1000) | 3);
  const std::uint64_t slot = guest.slot(table, 4, 0x4000'0000, 2);
  ram.store(slot, small | 3);
  auto operations = host.operations();
  guest.page(1, 0x4000'0000, 9);
  guest.ring();
  EXPECT_EQ(host.operations(), operations);
  // One page of it goes.
  ram.store(small + 5 * 8, 0);
  guest.page(1, 0x4000'5000);
  guest.ring();
  EXPECT_EQ(host.find(0x4000'5000), nullptr);
  EXPECT_NE(host.find(0x4000'4000), nullptr);
  EXPECT_NE(host.find(0x4000'6000), nullptr);
  // And the whole becomes one read-only superpage elsewhere.
  ram.store(slot, 0x60'0000 | 0x81);
  guest.page(1, 0x4000'0000, 9);
  guest.ring();
  ASSERT_EQ(host.held().size(), 1U);
  EXPECT_EQ(host.held().begin()->second.access, Access::read);
  EXPECT_EQ(host.held().begin()->second.region_offset, 0x60'0000U);
  // 1 GiB pages reach beyond RAM: only RAM is told to the host.
  guest.put(table, 4, 0x8000'0000, 0x83, 3);
  guest.page(1, 0x8000'0000, 18);
  guest.ring();
  EXPECT_EQ(host.find(0x8000'0000)->range.length(), Bytes{256U << 20});
  EXPECT_EQ(events.failures, 0);
}

// One guest action maps eight pages in a row: one host mapping, that a later action cuts; or, by policy, eight.
TEST_F(VtdTest, TheExactPolicyMergesNothingSoNothingIsCut) {
  for (const bool exact : {false, true}) {
    VtdConfig config = legacy_config();
    config.domain.exact = exact;
    RecordingTarget apart{"apart"};
    Vtd other{memory, config, events};
    VtdGuest driver{ram, other, 0x200000};
    const std::uint64_t table = driver.new_table();
    driver.set_context(device, table, 3, 1);
    driver.start();
    ASSERT_TRUE(other.add_endpoint(device, std::nullopt, &apart));
    for (std::uint64_t i = 0; i < 8; ++i) driver.put(table, 3, i << 12, (0x50'0000 + (i << 12)) | 3);
    driver.page(1, 0, 3);
    driver.ring();
    other.finish();
    EXPECT_EQ(apart.held().size(), exact ? 8U : 1U);
    driver.put(table, 3, 0x3000, 0);
    driver.page(1, 0x3000);
    driver.ring();
    other.finish();
    EXPECT_EQ(apart.held().size(), exact ? 7U : 2U);
    const DomainStats stats = other.domain_of(device, std::nullopt)->stats();
    EXPECT_EQ(stats.cuts, exact ? 0U : 1U);
    EXPECT_EQ(stats.gap_bytes, exact ? 0U : 7U << 12);
    ASSERT_TRUE(other.remove_endpoint(device, std::nullopt));
  }
}

TEST_F(VtdTest, DevicesThatShareATableShareADomainAndAFailureTakesItFromAll) {
  RecordingTarget other{"other"};
  const std::uint64_t table = guest.new_table();
  guest.set_context(device, table, 3, 5);
  guest.set_context(0x10, table, 3, 5);
  guest.start();
  ASSERT_TRUE(unit.add_endpoint(device, std::nullopt, &host));
  ASSERT_TRUE(unit.add_endpoint(0x10, std::nullopt, &other));
  EXPECT_EQ(unit.domains(), 1U);
  other.fault = [](const HostOp& op) {
    return op.range.start.value == 0x2000 ? make_error(Errc::entry_limit, Stage::map, "full") : Error{};
  };
  for (std::uint64_t iova = 0x1000; iova < 0x4000; iova += 0x1000) {
    guest.put(table, 3, iova, (iova * 16) | 3);
    guest.page(5, iova);
  }
  guest.ring();
  EXPECT_EQ(events.failures, 1);
  EXPECT_EQ(host.held().size(), 2U);
  EXPECT_EQ(other.held().size(), 2U);
  // The device's context is cleared: it leaves, the other stays.
  const std::uint64_t context = (ram.load(VtdGuest::root) & ~0xfffULL) + device * 16U;
  ram.store(context, 0);
  guest.context_device(device, 5);
  guest.wait(3);
  guest.ring();
  EXPECT_TRUE(host.held().empty());
  EXPECT_EQ(other.held().size(), 2U);
  EXPECT_EQ(guest.waited(), 3U);
  EXPECT_EQ(unit.fault_of(device, std::nullopt, 0x1000, false).reason, VtdFault::context_not_present);
  ASSERT_TRUE(unit.remove_endpoint(0x10, std::nullopt));
  EXPECT_TRUE(other.held().empty());
}

TEST_F(VtdTest, BadDescriptorsStopTheQueueUntilTheGuestClearsTheError) {
  guest.start();
  guest.wait(1);
  guest.enqueue(0xf, 0);
  guest.wait(2);
  EXPECT_EQ(guest.ring(), Progress::done);
  EXPECT_EQ(events.errors, 1);
  EXPECT_EQ(guest.waited(), 1U);
  EXPECT_EQ(unit.head(), 16U) << "points at the bad one";
  ram.store(VtdGuest::queue + 16, 0x25 | 5ULL << 32);
  ram.store(VtdGuest::queue + 24, VtdGuest::status);
  EXPECT_EQ(unit.clear_queue_error(), Progress::done);
  EXPECT_EQ(guest.waited(), 2U);
  EXPECT_EQ(unit.write_tail(0x7fff0), Progress::done);
  EXPECT_EQ(events.errors, 2) << "a tail beyond the queue";
  EXPECT_FALSE(unit.set_queue(0x20008)) << "reserved bits";
}

TEST_F(VtdTest, WaitsMayRaiseAnInterruptAndMayPointNowhere) {
  guest.start();
  guest.enqueue(0x35 | 7ULL << 32, 0xffff'ffff'ffff'f000);
  EXPECT_EQ(guest.ring(), Progress::done);
  EXPECT_EQ(events.interrupts, 1);
}

// Each malformed structure, and what the specification calls it.
TEST_F(VtdTest, MalformedTablesHaveTheSpecificationsFaultReasons) {
  const std::uint64_t table = guest.new_table();
  const auto reason = [&](std::uint64_t iova, bool write) {
    return unit.fault_of(device, std::nullopt, iova, write).reason;
  };
  guest.start();
  EXPECT_EQ(reason(0, false), VtdFault::root_not_present);
  ram.store(VtdGuest::root, 0x100001 | 0x10);
  EXPECT_EQ(reason(0, false), VtdFault::root_reserved);
  ram.store(VtdGuest::root, 0xff00'0000'0001);
  EXPECT_EQ(reason(0, false), VtdFault::root_reserved) << "beyond the host address width";
  ram.store(VtdGuest::root, 0x2000'0000'0001);
  EXPECT_EQ(reason(0, false), VtdFault::context_access) << "no RAM there";
  ram.store(VtdGuest::root, 0);
  guest.set_context(device, table, 4, 1);
  const std::uint64_t context = (ram.load(VtdGuest::root) & ~0xfffULL) + device * 16U;
  EXPECT_EQ(reason(0x1000, false), VtdFault::read_denied) << "nothing mapped";
  EXPECT_EQ(reason(0x1000, true), VtdFault::write_denied);
  ram.store(context, table | 0x11);
  EXPECT_EQ(reason(0, false), VtdFault::context_reserved);
  ram.store(context, table | 1 | 3 << 2);
  EXPECT_EQ(reason(0, false), VtdFault::context_invalid) << "reserved translation type";
  ram.store(context, table | 1);
  ram.store(context + 8, 6);
  EXPECT_EQ(reason(0, false), VtdFault::context_invalid) << "reserved address width";
  ram.store(context + 8, 2 | 1 << 8);
  EXPECT_EQ(reason(1ULL << 48, false), VtdFault::address_beyond_width);
  ram.store(table, 0x2000'0000'0003);
  EXPECT_EQ(reason(0, false), VtdFault::paging_entry_access);
  ram.store(table, 0x83);
  EXPECT_EQ(reason(0, false), VtdFault::paging_entry_reserved) << "no superpages at level 4";
  ram.store(table, 0);
  guest.put(table, 4, 0x1000, 0x5000 | 1);
  EXPECT_EQ(reason(0x1fff, false), VtdFault::none);
  EXPECT_EQ(reason(0x1fff, true), VtdFault::write_denied);
  guest.put(table, 4, 0x1000, 0x5000 | 3 | 1ULL << 50);
  EXPECT_EQ(reason(0x1000, false), VtdFault::paging_entry_reserved);
  guest.put(table, 4, 0x20'0000, 0x21'0000 | 0x83, 2);
  EXPECT_EQ(reason(0x20'0000, false), VtdFault::paging_entry_reserved) << "a superpage that is not aligned";
  guest.put(table, 4, 0x2000, 0xfee0'0000 | 3);
  EXPECT_EQ(reason(0x2000, true), VtdFault::interrupt_address);
  ram.store(context, table | 1 | 2);
  EXPECT_FALSE(unit.fault_of(device, std::nullopt, 0x3000, false).record) << "FPD";
  ram.store(context, 1 | 2 << 2);
  EXPECT_EQ(reason(0x1234, true), VtdFault::none) << "pass-through";
  EXPECT_EQ(unit.fault_of(device, 5, 0, false).reason, VtdFault::sm_translation_mode);
}

TEST(VtdScalable, FindsItsWayThroughDirectoriesAndFirstLevelTables) {
  const GuestRam ram{64U << 20};
  GuestMemory memory;
  ASSERT_TRUE(memory.add(ram.config()));
  CountingEvents events;
  VtdConfig config = legacy_config();
  config.capabilities.scalable = true;
  config.capabilities.first_level = true;
  config.capabilities.first_5_level = true;
  RecordingTarget host;
  RecordingTarget pasid_host{"pasid 70"};
  Vtd unit{memory, config, events};
  // Device 0x98 is in the upper half of its bus: root at 0x1000, context 0x2000, directory 0x3000, PASID tables 0x4000.
  const std::uint16_t device = 0x98;
  const auto reason = [&](std::optional<std::uint32_t> pasid, std::uint64_t iova, bool write = false) {
    return unit.fault_of(device, pasid, iova, write).reason;
  };
  unit.set_root_table(0x1400);
  unit.set_translation(true);
  EXPECT_EQ(reason({}, 0), VtdFault::sm_root_not_present);
  ram.store(0x1008, 0x2001);
  EXPECT_EQ(reason({}, 0), VtdFault::sm_context_not_present);
  const std::uint64_t context = 0x2000 + (device & 0x7f) * 32;
  ram.store(context, 0x3001);
  EXPECT_EQ(reason({}, 0), VtdFault::pasid_directory_not_present);
  EXPECT_EQ(reason(70, 0), VtdFault::sm_pasid_disabled);
  ram.store(context, 0x3001 | 8);
  EXPECT_EQ(reason(64 * 128, 0), VtdFault::sm_pasid_too_large);
  ram.store(context + 8, 0xf'ffff);
  EXPECT_EQ(reason({}, 0), VtdFault::sm_context_invalid) << "RID_PASID beyond the directory";
  ram.store(context + 8, 0);
  ram.store(context + 16, 1);
  EXPECT_EQ(reason({}, 0), VtdFault::sm_context_reserved);
  ram.store(context + 16, 0);
  ram.store(0x3000, 0x4001);
  ram.store(0x3008, 0x5001);
  EXPECT_EQ(reason({}, 0), VtdFault::pasid_entry_not_present);
  ram.store(0x4000, 1 | 3 << 6);
  EXPECT_EQ(reason({}, 0), VtdFault::pasid_entry_invalid) << "nested is not offered";
  ram.store(0x4000, 1 | 1 << 6);
  ram.store(0x4008, 11);
  ram.store(0x4010, 0x8000);
  EXPECT_EQ(reason({}, 0), VtdFault::first_not_present);
  EXPECT_EQ(reason({}, 1ULL << 47), VtdFault::non_canonical);
  ram.store(0x8000, 0x9000 | 3);
  EXPECT_EQ(reason({}, 0), VtdFault::user_denied);
  // PASID 70 is in the second table: five levels, and a page at the very top of the address space.
  ram.store(0x5000 + 6 * 64, 1 | 1 << 6);
  ram.store(0x5008 + 6 * 64, 12);
  ram.store(0x5010 + 6 * 64, 0x1'0000 | 4);
  for (std::uint64_t level = 0; level < 4; ++level)
    ram.store(0x1'0ff8 + level * 0x1000, (0x1'1000 + level * 0x1000) | 7);
  ram.store(0x1'4ff8, 0xabc000 | 7);
  ram.store(0x8000, 0x9000 | 7);
  ram.store(0x9000, 0xa000 | 7);
  ram.store(0xa000, 0x40'0000 | 0x87);
  ASSERT_TRUE(unit.add_endpoint(device, std::nullopt, &host));
  ASSERT_TRUE(unit.add_endpoint(device, 70, &pasid_host));
  // PASID cache, then PASID-based IOTLB.
  EXPECT_EQ(unit.execute({VtdDescriptor::Kind::pasid_cache, VtdDescriptor::Scope::global}), Progress::done);
  ASSERT_EQ(host.held().size(), 1U);
  EXPECT_EQ(host.held().begin()->second.range.length(), Bytes{2U << 20});
  ASSERT_EQ(pasid_host.held().size(), 1U);
  EXPECT_EQ(pasid_host.held().begin()->second.range.last, iova_max);
  EXPECT_EQ(unit.translate(device, 70, iova_max.value)->first, 0xabcfffU);
  ram.store(0x1'4ff8, 0xabc000 | 5);
  VtdDescriptor page{VtdDescriptor::Kind::pasid_iotlb, VtdDescriptor::Scope::page, 12};
  page.pasid = 70;
  page.address = 0xffff'ffff'ffff'f000;
  EXPECT_EQ(unit.execute(page), Progress::done);
  EXPECT_EQ(pasid_host.held().begin()->second.access, Access::read);
  EXPECT_EQ(reason(70, iova_max.value, true), VtdFault::sm_write_denied);
  EXPECT_EQ(events.failures, 0);
  ASSERT_TRUE(unit.remove_endpoint(device, std::nullopt));
  ASSERT_TRUE(unit.remove_endpoint(device, 70));
  EXPECT_TRUE(pasid_host.held().empty());
}

TEST_F(VtdTest, TablesThatPointAtThemselvesCostABoundedAmountAndEndAsAFailedDomain) {
  VtdConfig config = legacy_config();
  config.domain.nodes_max = 64;
  config.work_per_call = 4096;
  CountingEvents seen;
  Vtd small{memory, config, seen};
  VtdGuest hostile{ram, small, 0x200000};
  const std::uint64_t table = hostile.new_table();
  for (std::uint64_t i = 0; i < 512; ++i) ram.store(table + i * 8, table | 3);  // 2^36 leaves in one page
  hostile.set_context(device, table, 4, 1);
  small.set_queue(VtdGuest::queue);
  small.set_root_table(VtdGuest::root);
  small.set_translation(true);
  ASSERT_TRUE(small.add_endpoint(device, std::nullopt, &host));
  small.finish();
  EXPECT_EQ(small.stats().failed_domains, 1U);
  EXPECT_EQ(seen.failures, 1);
  EXPECT_GT(small.stats().yields, 2U) << "others had their turn";
  EXPECT_TRUE(host.held().empty());
  // A domain that fails again is emptied in pieces, too.
  hostile.domain(1);
  const ShadowDomain* domain = small.domain_of(device, std::nullopt);
  ASSERT_NE(domain, nullptr);
  std::uint64_t most = 0;
  std::uint64_t before = domain->stats().leaves_unmapped;
  Progress progress = hostile.ring();
  for (;; progress = small.advance()) {
    const std::uint64_t now = domain->stats().leaves_unmapped;
    most = std::max(most, now - std::exchange(before, now));
    if (progress == Progress::done) break;
  }
  EXPECT_EQ(small.stats().failed_domains, 2U);
  EXPECT_GT(most, 0U);
  EXPECT_LE(most, 4096U + 512U);
  EXPECT_TRUE(host.held().empty());
  // Page invalidations of a failed domain cost nothing; a whole one starts again, on a table that is sane now.
  hostile.page(1, 0);
  hostile.ring();
  EXPECT_TRUE(host.held().empty());
  for (std::uint64_t i = 0; i < 512; ++i) ram.store(table + i * 8, 0);
  hostile.put(table, 4, 0x1000, 0x5003);
  hostile.domain(1);
  hostile.wait(4);
  hostile.ring();
  small.finish();
  EXPECT_EQ(host.held().size(), 1U);
  EXPECT_EQ(hostile.waited(), 4U);
  ASSERT_TRUE(small.remove_endpoint(device, std::nullopt));
}

// The guest's processor rewrites its tables while we walk them. When it has stopped and invalidated, the shadow says
// what the tables say.
TEST_F(VtdTest, TablesMayChangeWhileWeWalkThem) {
  const std::uint64_t table = guest.new_table();
  guest.set_context(device, table, 3, 1);
  for (std::uint64_t i = 0; i < 1024; ++i) guest.put(table, 3, i << 12, 0);
  const std::uint64_t first = guest.slot(table, 3, 0, 1);
  const std::uint64_t directory = guest.slot(table, 3, 0, 2);
  const std::uint64_t leaf_tables = ram.load(directory);
  guest.start();
  ASSERT_TRUE(unit.add_endpoint(device, std::nullopt, &host));
  std::atomic<bool> stop{false};
  const std::uint64_t seed = test_seed();
  std::thread processor{[&] {
    std::mt19937_64 random{seed};
    // relaxed: a flag.
    while (!stop.load(std::memory_order_relaxed)) {
      ram.store(first + (random() % 512) * 8, random() % 3 == 0 ? 0 : ((random() % 0x10000) << 12 | (random() & 3)));
      if (random() % 64 == 0) ram.store(directory, random() % 2 == 0 ? leaf_tables : (0x40'0000 | 0x83));
    }
  }};
  for (int round = 0; round < 300; ++round) {
    guest.domain(1);
    guest.wait(static_cast<std::uint32_t>(round));
    guest.ring();
    unit.finish();
  }
  stop.store(true, std::memory_order_relaxed);
  processor.join();
  guest.global();
  guest.ring();
  unit.finish();
  EXPECT_EQ(events.failures, 0);
  for (std::uint64_t iova = 0; iova < (4U << 20); iova += 4096) {
    const auto by_tables = unit.fault_of(device, std::nullopt, iova, false).reason == VtdFault::none;
    const auto by_write = unit.fault_of(device, std::nullopt, iova, true).reason == VtdFault::none;
    const auto* held = host.find(iova);
    ASSERT_EQ(held != nullptr, by_tables || by_write) << std::hex << iova;
    if (held == nullptr) continue;
    ASSERT_EQ(may_read(held->access), by_tables);
    ASSERT_EQ(may_write(held->access), by_write);
  }
}

TEST_F(VtdTest, MemoryComesAndGoesUnderAMappedGuest) {
  const std::uint64_t table = guest.new_table();
  guest.set_context(device, table, 3, 1);
  guest.put(table, 3, 0x1000, 0x2000'0000 | 3);
  guest.put(table, 3, 0x2000, 0x5000 | 3);
  guest.start();
  ASSERT_TRUE(unit.add_endpoint(device, std::nullopt, &host));
  unit.finish();
  EXPECT_EQ(host.held().size(), 1U);
  const GuestRam more{1U << 20, 0x2000'0000};
  const auto id = memory.add(more.config());
  ASSERT_TRUE(id);
  EXPECT_EQ(unit.memory_added(), Progress::done);
  EXPECT_EQ(host.held().size(), 2U);
  EXPECT_EQ(unit.memory_removing(*memory.view().find(0x2000'0000)), Progress::done);
  ASSERT_TRUE(memory.remove(*id));
  EXPECT_EQ(host.held().size(), 1U);
}

// The recorded guest's descriptors and tables together: every descriptor of the log is executed on the snapshot, whose
// tables do not change any more; the shadow must be unmoved by any of them.
TEST_F(VtdTest, AUnitsStateGoesToAnotherHost) {
  const std::uint64_t table = guest.new_table();
  guest.set_context(device, table, 4, 1);
  guest.start();
  ASSERT_TRUE(unit.add_endpoint(device, std::nullopt, &host));
  for (std::uint64_t i = 0; i < 100; ++i) guest.put(table, 4, 0x40'0000 + i * 4096, (0x100'0000 + i * 8192) | 3);
  guest.domain(1);
  guest.wait(1);
  EXPECT_EQ(guest.ring(), Progress::done);
  const Vtd::State state = unit.save_state();
  EXPECT_EQ(state.head, state.tail);
  CountingEvents other_events;
  RecordingTarget other_host;
  Vtd other{memory, legacy_config(), other_events};
  ASSERT_TRUE(other.add_endpoint(device, std::nullopt, &other_host));
  for (const auto damage : {&Vtd::State::head, &Vtd::State::tail, &Vtd::State::iqa}) {
    Vtd::State bad = state;
    bad.*damage = 0x7777'7777;
    EXPECT_EQ(other.restore_state(bad).error().code, Errc::bad_format);
  }
  Vtd::State newer = state;
  newer.version = 2;
  EXPECT_EQ(other.restore_state(newer).error().code, Errc::bad_format);
  ASSERT_TRUE(other.restore_state(state));
  EXPECT_EQ(other_host.held(), host.held());
  EXPECT_EQ(other.head(), unit.head());
  // The queue goes on where it stood.
  guest.put(table, 4, 0x40'0000, 0);
  guest.page(1, 0x40'0000);
  guest.wait(2);
  EXPECT_EQ(other.write_tail((state.tail + 32) % 4096), Progress::done);
  EXPECT_EQ(guest.waited(), 2U);
  EXPECT_EQ(other_host.held().size(), host.held().size() - 1);
  // A queue that stands still does so there too.
  ram.store(VtdGuest::queue + (state.tail + 32) % 4096, 0xf);
  EXPECT_EQ(other.write_tail((state.tail + 48) % 4096), Progress::done);
  const Vtd::State broken = other.save_state();
  EXPECT_EQ(broken.queue_error, 1U);
  ASSERT_TRUE(unit.restore_state(broken));
  EXPECT_EQ(unit.write_tail((state.tail + 64) % 4096), Progress::done);
  EXPECT_EQ(unit.head(), broken.head);
  ASSERT_TRUE(other.remove_endpoint(device, std::nullopt));
}

TEST_F(VtdTest, MovesOfDevicesAreWorkThatIsBounded) {
  VtdConfig config = legacy_config();
  config.work_per_call = 1000;
  Vtd bounded{memory, config, events};
  VtdGuest mover{ram, bounded, 0x200000};
  const std::array tables{mover.new_table(), mover.new_table()};
  for (std::uint64_t i = 0; i < 400; ++i)
    for (const std::uint64_t table : tables) mover.put(table, 4, 0x40'0000 + i * 4096, (0x100'0000 + i * 8192) | 3);
  mover.set_context(device, tables[0], 4, 1);
  mover.start();
  ASSERT_TRUE(bounded.add_endpoint(device, std::nullopt, &host));
  // Another processor of the guest flips the device's table while the unit works through 40 invalidations of it.
  for (int i = 0; i < 40; ++i) mover.context_device(device, 1), mover.context_device(device, 2);
  mover.wait(1);
  int calls = 1;
  for (Progress progress = mover.ring(); progress == Progress::pending; progress = bounded.advance(), ++calls)
    mover.set_context(device, tables[static_cast<std::size_t>(calls) % 2], 4,
                      static_cast<std::uint16_t>(1 + calls % 2));
  EXPECT_GT(bounded.stats().yields, 0U);
  EXPECT_EQ(mover.waited(), 1U);
  EXPECT_EQ(host.held().size(), 400U);
  ASSERT_TRUE(bounded.remove_endpoint(device, std::nullopt));
}

TEST(VtdReplay, ARealGuestsInvalidationsOfUnchangedTablesChangeNothing) {
  const VtdSnapshot snapshot{"vtd-snap-1"};
  CountingEvents events;
  VtdConfig config;
  config.capabilities = VtdCapabilities::from_registers(snapshot.reg("CAP"), snapshot.reg("ECAP"), 39);
  RecordingTarget host;
  Vtd unit{snapshot.memory, config, events};
  unit.set_root_table(snapshot.reg("RTADDR"));
  unit.set_translation(true);
  ASSERT_TRUE(unit.add_endpoint(0x08, std::nullopt, &host));
  unit.finish();
  const auto held = host.held().size();
  EXPECT_GT(held, 400U);
  const auto operations = host.operations();
  std::size_t executed = 0;
  for_each_line(read_recorded("vtd-qi-legacy.log"), [&](std::string_view line) {
    if (line.substr(0, 13) != "vtd_inv_desc ") return;
    auto descriptor = decode_descriptor({number_after(line, "low "), number_after(line, "high "), 0, 0}, {});
    ASSERT_TRUE(descriptor);
    descriptor->write_status = false;
    ASSERT_EQ(unit.execute(*descriptor), Progress::done);
    ++executed;
  });
  EXPECT_GT(executed, 10000U);
  EXPECT_EQ(host.operations(), operations);
  EXPECT_EQ(host.held().size(), held);
  ASSERT_TRUE(unit.remove_endpoint(0x08, std::nullopt));
}

}  // namespace
}  // namespace iovane::viommu
