#include "viommu/papr.hpp"

#include <gtest/gtest.h>

#include <map>

#include "fake_kvm.hpp"
#include "recorded_data.hpp"
#include "viommu/recording_target.hpp"

namespace iovane::viommu {
namespace {

constexpr std::uint64_t buid = 0x8000'0000'2000'0000;
constexpr std::uint32_t liobn = 0x8000'0000;
constexpr std::uint64_t dma64 = std::uint64_t{1} << 59;

PhbConfig small_phb() {
  PhbConfig config;
  config.buid = buid;
  config.dma32_bytes = 1U << 24;
  return config;
}

struct PaprTest : ::testing::Test {
  GuestRam ram{256U << 20};
  GuestMemory memory;
  RecordingTarget host;
  PaprTce papr{memory, nullptr};
  void SetUp() override {
    ASSERT_TRUE(memory.add(ram.config()));
    ASSERT_TRUE(papr.add_phb(small_phb()));
    ASSERT_TRUE(papr.add_device(buid, &host));
  }
  void TearDown() override { static_cast<void>(papr.remove_device(buid, &host)); }

  static std::int64_t call(PaprTce& on, std::uint64_t number, std::uint64_t a, std::uint64_t b, std::uint64_t c = 0,
                           std::uint64_t d = 0) {
    return on.call_and_wait(number, std::array{a, b, c, d}).status;
  }
  std::int64_t put(std::uint64_t address, std::uint64_t tce, std::uint32_t table = liobn) {
    return call(papr, hcall::put_tce, table, address, tce);
  }
  std::uint64_t get(std::uint64_t address, std::uint32_t table = liobn) {
    return papr.call_and_wait(hcall::get_tce, std::array<std::uint64_t, 4>{table, address, 0, 0}).value;
  }
  void list(std::uint64_t gpa, const std::vector<std::uint64_t>& tces) const {
    for (std::size_t i = 0; i < tces.size(); ++i) ram.store(gpa + i * 8, __builtin_bswap64(tces[i]));
  }
};

TEST_F(PaprTest, PutsGetsReplacesAndClears) {
  EXPECT_EQ(put(0x5123, 0x7003), hcall::success);
  EXPECT_EQ(get(0x5000), 0x7003U);
  ASSERT_EQ(host.held().size(), 1U);
  EXPECT_EQ(host.held().at(0x5000).region_offset, 0x7000U);
  EXPECT_EQ(put(0x5000, 0x9001), hcall::success);
  EXPECT_EQ(host.held().at(0x5000).access, Access::read);
  EXPECT_EQ(host.held().at(0x5000).region_offset, 0x9000U);
  EXPECT_EQ(papr.translate(liobn, 0x5010).gpa, 0x9010U);
  EXPECT_EQ(put(0x5000, 0xabc000), hcall::success) << "no rights: nothing mapped, but the entry is kept";
  EXPECT_EQ(get(0x5000), 0xabc000U);
  EXPECT_TRUE(host.held().empty());
}

TEST_F(PaprTest, EveryBadCallHasItsReturnCode) {
  EXPECT_EQ(call(papr, 0x999, liobn, 0), hcall::function);
  EXPECT_EQ(put(0, 3, liobn + 5), hcall::parameter) << "no such LIOBN";
  EXPECT_EQ(put(0, 3, liobn + 1), hcall::parameter) << "not enabled yet";
  EXPECT_EQ(call(papr, hcall::put_tce, 0x1'8000'0000, 0, 3), hcall::parameter);
  EXPECT_EQ(put(1U << 24, 3), hcall::parameter) << "beyond the window";
  EXPECT_EQ(put(~0ULL, 3), hcall::parameter);
  EXPECT_EQ(call(papr, hcall::get_tce, liobn, 1U << 24), hcall::parameter);
  EXPECT_EQ(call(papr, hcall::put_tce_indirect, liobn, 0, 0x1000, 513), hcall::parameter) << "too many";
  EXPECT_EQ(call(papr, hcall::put_tce_indirect, liobn, 0, 0x1008, 1), hcall::parameter) << "misaligned list";
  EXPECT_EQ(call(papr, hcall::put_tce_indirect, liobn, 0, 0x4000'0000, 1), hcall::parameter) << "list not in RAM";
  EXPECT_EQ(call(papr, hcall::put_tce_indirect, liobn, 0, 0x1000, 0), hcall::success);
  EXPECT_EQ(call(papr, hcall::stuff_tce, liobn, 0, 0, 4097), hcall::parameter) << "more than the table has";
  EXPECT_EQ(call(papr, hcall::stuff_tce, liobn, 0, 3, 513), hcall::parameter) << "live pages by the thousand";
  EXPECT_TRUE(host.held().empty());
}

TEST_F(PaprTest, IndirectMergesWhatFollowsOnAndKeepsWhatItDidBeforeAnError) {
  list(0x1000, {0x10003, 0x11003, 0x12003, 0x20001, 0x21001, 0});
  EXPECT_EQ(call(papr, hcall::put_tce_indirect, liobn, 0x8000, 0x1000, 6), hcall::success);
  ASSERT_EQ(host.held().size(), 2U);
  EXPECT_EQ(host.held().at(0x8000).range.length(), Bytes{3 << 12});
  EXPECT_EQ(host.held().at(0xb000).access, Access::read);
  EXPECT_EQ(get(0x9000), 0x11003U);
  // The last two are outside the window.
  list(0x1000, {0x30003, 0x40003, 0x50003});
  EXPECT_EQ(call(papr, hcall::put_tce_indirect, liobn, (1U << 24) - 0x1000, 0x1000, 3), hcall::parameter);
  EXPECT_EQ(get((1U << 24) - 0x1000), 0x30003U);
  EXPECT_EQ(call(papr, hcall::stuff_tce, liobn, 0, 0, 4096), hcall::success);
  EXPECT_TRUE(host.held().empty());
  EXPECT_EQ(get(0x9000), 0U);
  EXPECT_EQ(call(papr, hcall::stuff_tce, liobn, 0x4000, 0x77003, 3), hcall::success);
  EXPECT_EQ(get(0x6000), 0x77003U);
  EXPECT_EQ(host.held().size(), 3U);
}

TEST_F(PaprTest, AHostThatRefusesIsAHardwareErrorAndTheEntryIsZero) {
  host.fault = [](const HostOp& op) {
    return op.kind == HostOp::Kind::map ? make_error(Errc::memlock_exceeded, Stage::pin, "limit") : Error{};
  };
  EXPECT_EQ(put(0x5000, 0x7003), hcall::hardware);
  EXPECT_EQ(get(0x5000), 0U);
  host.fault = nullptr;
  EXPECT_EQ(put(0x5000, 0x7003), hcall::success);
}

TEST_F(PaprTest, MemoryComesAndGoesUnderAMappedGuest) {
  constexpr std::uint64_t plugged = std::uint64_t{4} << 30;
  EXPECT_EQ(put(0x5000, 0x7003), hcall::success);
  const GuestRam more{1U << 20, plugged};
  const auto id = memory.add(more.config());
  ASSERT_TRUE(id);
  ASSERT_TRUE(papr.memory_added());
  EXPECT_EQ(put(0x6000, plugged | 3), hcall::success);
  EXPECT_EQ(host.held().size(), 2U);
  ASSERT_TRUE(papr.memory_removing(*memory.view().find(plugged)));
  EXPECT_EQ(host.held().size(), 1U);
  EXPECT_EQ(get(0x6000), plugged | 3) << "the guest's own entry stays";
  ASSERT_TRUE(memory.remove(*id));
  ASSERT_TRUE(memory.add(more.config()));
  ASSERT_TRUE(papr.memory_added());
  EXPECT_EQ(host.held().size(), 2U);
}

TEST_F(PaprTest, ExactKeepsEveryEntryAHostMappingOfItsOwn) {
  PhbConfig config = small_phb();
  config.buid = buid + 1;
  config.liobn = liobn + 16;  // the next number is the first bridge's second window
  config.domain.exact = true;
  RecordingTarget apart{"exact"};
  ASSERT_TRUE(papr.add_phb(config));
  ASSERT_TRUE(papr.add_device(config.buid, &apart));
  list(0x1000, {0x10'0003, 0x10'1003, 0x10'2003, 0x10'3003});
  EXPECT_EQ(call(papr, hcall::put_tce_indirect, config.liobn, 0, 0x1000, 4), hcall::success);
  EXPECT_EQ(apart.held().size(), 4U);
  EXPECT_EQ(call(papr, hcall::stuff_tce, config.liobn, 0x1000, 0, 1), hcall::success);
  EXPECT_EQ(apart.held().size(), 3U);
  EXPECT_EQ(papr.domain(config.buid)->stats().cuts, 0U);
  EXPECT_EQ(papr.domain(config.buid)->stats().gap_bytes, 0U);
  ASSERT_TRUE(papr.remove_device(config.buid, &apart));
}

TEST_F(PaprTest, HypercallsWaitForASlowHost) {
  host.asynchronous = true;
  EXPECT_EQ(papr.call(hcall::put_tce, std::array<std::uint64_t, 4>{liobn, 0x5000, 0x7003, 0}), Progress::pending);
  EXPECT_EQ(papr.advance(), Progress::pending);
  host.finish();
  EXPECT_EQ(papr.advance(), Progress::done);
  EXPECT_EQ(papr.answer().status, hcall::success);
  host.asynchronous = false;
}

TEST_F(PaprTest, DynamicWindowsOfEveryPageSize) {
  const auto query = papr.query_window(buid);
  EXPECT_EQ(query.status, rtas::success);
  EXPECT_EQ(query.windows_available, 1U);
  EXPECT_EQ(query.page_sizes, 0x107U);
  EXPECT_EQ(papr.query_window(1).status, rtas::parameter_error);
  EXPECT_EQ(papr.create_window(1, 16, 30).status, rtas::parameter_error);
  EXPECT_EQ(papr.create_window(buid, 13, 30).status, rtas::parameter_error) << "no such page size";
  EXPECT_EQ(papr.create_window(buid, 24, 20).status, rtas::parameter_error);
  EXPECT_EQ(papr.create_window(buid, 200, 200).status, rtas::parameter_error);
  EXPECT_EQ(papr.create_window(buid, 12, 63).status, rtas::hardware_error) << "more entries than allowed";
  for (const std::uint32_t shift : {12U, 16U, 21U, 24U}) {
    const auto made = papr.create_window(buid, shift, 28);
    ASSERT_EQ(made.status, rtas::success);
    EXPECT_EQ(made.address, dma64);
    EXPECT_EQ(made.liobn, liobn + 1);
    EXPECT_EQ(papr.create_window(buid, shift, 28).status, rtas::hardware_error) << "no third window";
    const std::uint64_t page = std::uint64_t{1} << shift;
    EXPECT_EQ(put(dma64 + page * 3 + 5, page * 2 | 3, liobn + 1), hcall::success);
    ASSERT_EQ(host.held().size(), 1U);
    EXPECT_EQ(host.held().begin()->second.range.length(), Bytes{page});
    EXPECT_EQ(host.held().begin()->second.region_offset, page * 2);
    EXPECT_EQ(papr.translate(liobn + 1, dma64 + page * 3 + 5).gpa, page * 2 + 5);
    if (shift > 12) {
      EXPECT_EQ(put(dma64, 0x1003, liobn + 1), hcall::parameter) << "a page number that is not a page";
    }
    EXPECT_EQ(put(0x3000, 0x5003), hcall::success) << "the default window beside it";
    EXPECT_EQ(host.held().size(), 2U);
    EXPECT_EQ(papr.remove_window(liobn + 1), rtas::success);
    EXPECT_EQ(papr.remove_window(liobn + 1), rtas::parameter_error);
    EXPECT_EQ(host.held().size(), 1U);
    EXPECT_EQ(put(0x3000, 0), hcall::success);
  }
  // Without the default window, the next one takes its place; reset brings the default back.
  EXPECT_EQ(papr.remove_window(liobn), rtas::success);
  EXPECT_EQ(papr.create_window(buid, 16, 28).address, 0U);
  EXPECT_EQ(put(0x20000, 0x30003), hcall::success);
  EXPECT_EQ(papr.reset_windows(buid), rtas::success);
  EXPECT_TRUE(host.held().empty());
  EXPECT_EQ(papr.query_window(buid).windows_available, 1U);
  EXPECT_EQ(put(0x3000, 0x5003), hcall::success);
}

TEST_F(PaprTest, WindowsAndTablesGoToAnotherHost) {
  for (std::uint64_t i = 0; i < 20; ++i) ASSERT_EQ(put(0x1000 * i, (0x10'0000 + i * 0x3000) | 3), hcall::success);
  ASSERT_EQ(put(0x80'0000, 0xabc000), hcall::success) << "kept, though it has no rights";
  const auto made = papr.create_window(buid, 16, 30);
  ASSERT_EQ(made.status, rtas::success);
  ASSERT_EQ(put(made.address + 0x5'0000, 0x20'0003, made.liobn), hcall::success);
  const auto bytes = papr.save_state();
  RecordingTarget other_host;
  PaprTce other{memory, nullptr};
  ASSERT_TRUE(other.add_phb(small_phb()));
  ASSERT_TRUE(other.add_device(buid, &other_host));
  call(other, hcall::put_tce, liobn, 0x7000, 0x1003);
  for (std::size_t i = 0; i < bytes.size(); i += 7) {
    auto damaged = bytes;
    damaged[i] ^= std::byte{4};
    ASSERT_EQ(other.restore_state(damaged).error().code, Errc::bad_format) << i;
    ASSERT_EQ(other.restore_state(std::span{bytes}.first(i)).error().code, Errc::bad_format) << i;
  }
  EXPECT_EQ(other_host.held().size(), 1U) << "what is damaged changes nothing";
  ASSERT_TRUE(other.restore_state(bytes));
  EXPECT_EQ(other.save_state(), bytes);
  std::map<std::uint64_t, std::uint64_t> here;
  std::map<std::uint64_t, std::uint64_t> there;
  for (const auto& [at, held] : host.held()) here[at] = held.region_offset;
  for (const auto& [at, held] : other_host.held()) there[at] = held.region_offset;
  EXPECT_EQ(there, here);
  EXPECT_EQ(other.translate(made.liobn, made.address + 0x5'1234).gpa, 0x20'1234U);
  other_host.fault = [](const HostOp& op) {
    return op.kind == HostOp::Kind::map ? make_error(Errc::entry_limit, Stage::map, "full") : Error{};
  };
  EXPECT_EQ(other.restore_state(bytes).error().code, Errc::entry_limit);
  EXPECT_TRUE(other_host.held().empty());
  EXPECT_EQ(call(other, hcall::put_tce, liobn, 0x1000, 0), hcall::success) << "the default window is there";
  EXPECT_EQ(other.query_window(buid).windows_available, 1U);
  other_host.fault = nullptr;
  PaprTce nothing{memory, nullptr};
  EXPECT_EQ(nothing.restore_state(bytes).error().code, Errc::bad_format) << "other host bridges";
  ASSERT_TRUE(other.remove_device(buid, &other_host));
}

TEST_F(PaprTest, ContainersShareATableByReference) {
  RecordingTarget other{"other"};
  EXPECT_EQ(put(0x3000, 0x5003), hcall::success);
  ASSERT_TRUE(papr.add_device(buid, &other));
  EXPECT_EQ(other.held().size(), 1U) << "a late device sees what is there";
  ASSERT_TRUE(papr.add_device(buid, &other));
  EXPECT_EQ(put(0x4000, 0x6003), hcall::success);
  EXPECT_EQ(other.held(), host.held());
  ASSERT_TRUE(papr.remove_device(buid, &other));
  EXPECT_EQ(other.held().size(), 2U) << "one of its two devices is left";
  ASSERT_TRUE(papr.remove_device(buid, &other));
  EXPECT_TRUE(other.held().empty());
  EXPECT_EQ(papr.remove_device(buid, &other).error().code, Errc::not_found);
}

// The kernel answers hypercalls as long as every container can be coupled; the table moves when that changes, and no
// container's hardware ever lacks an entry meanwhile.
TEST(PaprKvm, TheTableMovesBothWaysAndHardwareNeverNotices) {
  const GuestRam ram{256U << 20};
  GuestMemory memory;
  ASSERT_TRUE(memory.add(ram.config()));
  FakeKvm kvm{memory};
  PaprTce papr{memory, &kvm};
  PhbConfig config = small_phb();
  ASSERT_TRUE(papr.add_phb(config));
  EXPECT_TRUE(papr.in_kvm(liobn)) << "nobody needs userspace";
  std::map<std::uint64_t, std::uint64_t> model;
  std::mt19937_64 random{test_seed()};
  const auto guest_writes = [&](int n) {
    for (int i = 0; i < n; ++i) {
      const std::uint64_t address = (random() % 4096) << 12;
      const std::uint64_t tce = random() % 4 == 0 ? 0 : ((random() % 65536) << 12 | (1 + random() % 3));
      const auto in_kernel = kvm.put_tce(liobn, address, tce);
      ASSERT_EQ(in_kernel.has_value(), papr.in_kvm(liobn));
      const std::int64_t status =
          in_kernel ? *in_kernel
                    : papr.call_and_wait(hcall::put_tce, std::array<std::uint64_t, 4>{liobn, address, tce, 0}).status;
      ASSERT_EQ(status, hcall::success);
      model[address] = tce;
    }
  };
  const auto expect_hardware = [&](const FakeSpaprContainer& container) {
    std::size_t live = 0;
    for (const auto& [address, tce] : model) {
      ASSERT_EQ(papr.translate(liobn, address).access, static_cast<Access>(tce & 3));
      if ((tce & 3) == 0) continue;
      ++live;
      const auto entry = container.hardware.find(address);
      ASSERT_NE(entry, container.hardware.end()) << container.name();
      ASSERT_EQ(entry->second.offset, tce & ~0xfffULL);
      ASSERT_EQ(entry->second.access, static_cast<Access>(tce & 3));
    }
    ASSERT_EQ(container.hardware.size(), live);
  };
  guest_writes(500);
  FakeSpaprContainer first{"first"};
  FakeSpaprContainer second{"second"};
  FakeSpaprContainer apart{"type1", false};
  const TceWindow hardware{0, 12, 0, 4096};
  first.windows = second.windows = {hardware};
  ASSERT_TRUE(papr.add_device(buid, &first));
  EXPECT_TRUE(papr.in_kvm(liobn));
  expect_hardware(first);
  guest_writes(500);
  expect_hardware(first);
  ASSERT_TRUE(papr.add_device(buid, &second));
  EXPECT_TRUE(papr.in_kvm(liobn));
  expect_hardware(second);
  EXPECT_TRUE(first.known.empty()) << "the kernel keeps the books";
  ASSERT_TRUE(papr.add_device(buid, &apart));
  EXPECT_FALSE(papr.in_kvm(liobn)) << "one that cannot be coupled";
  expect_hardware(apart);
  guest_writes(500);
  expect_hardware(first);
  expect_hardware(second);
  expect_hardware(apart);
  ASSERT_TRUE(papr.remove_device(buid, &apart));
  EXPECT_TRUE(apart.hardware.empty());
  EXPECT_TRUE(papr.in_kvm(liobn)) << "and back";
  guest_writes(500);
  expect_hardware(first);
  expect_hardware(second);
  ASSERT_TRUE(papr.remove_device(buid, &first));
  EXPECT_TRUE(first.hardware.empty());
  guest_writes(100);
  expect_hardware(second);
  EXPECT_GE(papr.stats().moves_to_kvm, 4U);
  // A container whose hardware window is another one cannot be coupled: the table goes to userspace.
  FakeSpaprContainer odd{"odd"};
  odd.windows = {{0, 12, 0, 2048}};
  EXPECT_EQ(papr.add_device(buid, &odd).error().code, Errc::invalid_argument);
  EXPECT_TRUE(odd.hardware.empty());
  expect_hardware(second);
  ASSERT_TRUE(papr.remove_device(buid, &second));
  EXPECT_TRUE(second.hardware.empty());
}

// A call that the kernel passes on while it has the table: done here, and the kernel's again.
TEST(PaprKvm, WhatTheKernelPassesOnIsDoneAndGivenBack) {
  const GuestRam ram{256U << 20};
  GuestMemory memory;
  ASSERT_TRUE(memory.add(ram.config()));
  FakeKvm kvm{memory};
  PaprTce papr{memory, &kvm};
  ASSERT_TRUE(papr.add_phb(small_phb()));
  FakeSpaprContainer container{"container"};
  FakeSpaprContainer apart{"type1", false};
  container.windows = {{0, 12, 0, 4096}};
  ASSERT_TRUE(papr.add_device(buid, &container));
  ASSERT_TRUE(papr.in_kvm(liobn));
  const auto put = [&](std::uint64_t address, std::uint64_t tce) {
    if (const auto in_kernel = kvm.put_tce(liobn, address, tce); in_kernel) return *in_kernel;
    return papr.call_and_wait(hcall::put_tce, std::array<std::uint64_t, 4>{liobn, address, tce, 0}).status;
  };
  const auto offset_at = [&](std::uint64_t address) {
    const auto found = container.hardware.find(address);
    return found == container.hardware.end() ? ~std::uint64_t{0} : found->second.offset;
  };
  ASSERT_EQ(put(0x5000, 0x7003), hcall::success);
  // No RAM there: refused, and neither the entry nor the hardware's changes.
  EXPECT_EQ(put(0x5000, 0x4000'0003), hcall::parameter);
  EXPECT_EQ(papr.translate(liobn, 0x5000).gpa, 0x7000U);
  EXPECT_EQ(offset_at(0x5000), 0x7000U);
  for (std::uint64_t i = 0; i < 3; ++i)
    ram.store(0x1000 + 8 * i, __builtin_bswap64(i == 2 ? 0x4000'0003 : 0x2'0003 + 4096 * i));
  EXPECT_EQ(papr.call_and_wait(hcall::put_tce_indirect, std::array<std::uint64_t, 4>{liobn, 0x8000, 0x1000, 3}).status,
            hcall::parameter);
  EXPECT_EQ(offset_at(0x9000), 0x2'1000U) << "what came before the bad entry stays";
  EXPECT_EQ(papr.translate(liobn, 0xa000).access, Access::none);
  EXPECT_EQ(papr.call_and_wait(hcall::stuff_tce, std::array<std::uint64_t, 4>{liobn, 0x8000, 0x4000'0003, 2}).status,
            hcall::parameter);
  // Good calls that are passed on.
  kvm.too_hard = true;
  EXPECT_EQ(put(0x5000, 0x9003), hcall::success);
  EXPECT_EQ(offset_at(0x5000), 0x9000U);
  EXPECT_TRUE(container.known.empty()) << "the kernel keeps the books";
  EXPECT_EQ(put(0x6000, 0x9003), hcall::success);
  EXPECT_EQ(put(0x6000, 0), hcall::success);
  EXPECT_EQ(offset_at(0x6000), ~std::uint64_t{0});
  EXPECT_EQ(papr.call_and_wait(hcall::stuff_tce, std::array<std::uint64_t, 4>{liobn, 0x8000, 0, 2}).status,
            hcall::success);
  EXPECT_EQ(offset_at(0x8000), ~std::uint64_t{0});
  // The kernel takes the entry away; then the table moves here, and the same entry again must reach the hardware.
  kvm.too_hard = false;
  EXPECT_EQ(put(0x5000, 0), hcall::success);
  ASSERT_TRUE(papr.add_device(buid, &apart));
  ASSERT_FALSE(papr.in_kvm(liobn));
  EXPECT_EQ(put(0x5000, 0x9003), hcall::success);
  EXPECT_EQ(offset_at(0x5000), 0x9000U);
  ASSERT_TRUE(papr.remove_device(buid, &apart));
  ASSERT_TRUE(papr.in_kvm(liobn));
  // Back to the default window, empty: also what KVM brought to the hardware.
  EXPECT_EQ(papr.reset_windows(buid), rtas::success);
  EXPECT_TRUE(container.hardware.empty());
  EXPECT_TRUE(papr.in_kvm(liobn));
  ASSERT_TRUE(papr.remove_device(buid, &container));
}

// A real guest's hypercalls, and every translation that QEMU then made for its devices. QEMU's log has of an indirect
// call only the last entry; the others are taken from the first translation that shows them, or assumed to follow on.
TEST(PaprReplay, AnswersAsQemuDid) {
  const GuestRam ram{2ULL << 30};
  GuestMemory memory;
  ASSERT_TRUE(memory.add(ram.config()));
  RecordingTarget host;
  host.may_cut = true;
  PaprTce papr{memory, nullptr};
  PhbConfig config;
  config.buid = 0x8000'0000'2000'0000;
  ASSERT_TRUE(papr.add_phb(config));
  ASSERT_TRUE(papr.add_device(config.buid, &host));
  std::vector<std::string_view> lines;
  const std::string log = read_recorded("papr-nvme-a.log");
  for_each_line(log, [&](std::string_view line) { lines.push_back(line); });
  const auto starts = [](std::string_view line, std::string_view what) { return line.substr(0, what.size()) == what; };
  const auto xlate_address = [](std::string_view line) {
    return std::strtoull(std::string{line.substr(line.find(' ', line.find("liobn=")) + 1, 20)}.c_str(), nullptr, 16);
  };
  // Which translation shows an entry first, before it is written again.
  const auto shown_later = [&](std::size_t from, std::uint64_t page) -> std::optional<std::uint64_t> {
    for (std::size_t i = from + 1; i < lines.size() && i < from + 4000; ++i) {
      if (starts(lines[i], "spapr_iommu_xlate") && (xlate_address(lines[i]) & ~0xfffULL) == page)
        return number_after(lines[i], "-> ") | number_after(lines[i], "perm=");
      if (starts(lines[i], "spapr_iommu_pci_put") && number_after(lines[i], "ioba=") == page) return std::nullopt;
    }
    return std::nullopt;
  };
  std::size_t translations = 0;
  std::size_t calls = 0;
  std::size_t guessed = 0;
  std::map<std::uint64_t, bool> uncertain;  // pages whose entry was assumed
  for (std::size_t at = 0; at < lines.size(); ++at) {
    const std::string_view line = lines[at];
    if (starts(line, "spapr_iommu_pci_put")) {
      const std::uint64_t address = number_after(line, "ioba=");
      ASSERT_EQ(papr.call_and_wait(hcall::put_tce, std::array<std::uint64_t, 4>{number_after(line, "liobn="), address,
                                                                                number_after(line, "tce="), 0})
                    .status,
                static_cast<std::int64_t>(number_after(line, "ret=")));
      uncertain.erase(address);
      ++calls;
    } else if (starts(line, "spapr_iommu_pci_stuff")) {
      const std::uint64_t count = number_after(line, "npages=");
      const std::uint64_t address = number_after(line, "ioba=") - count * 4096;  // QEMU logs the address it got to
      ASSERT_EQ(
          papr.call_and_wait(hcall::stuff_tce, std::array<std::uint64_t, 4>{number_after(line, "liobn="), address,
                                                                            number_after(line, "tcevalue="), count})
              .status,
          0);
      uncertain.erase(uncertain.lower_bound(address), uncertain.lower_bound(address + count * 4096));
      ++calls;
    } else if (starts(line, "spapr_iommu_pci_indirect")) {
      const std::uint64_t list = number_after(line, "tcelist=");
      const std::uint64_t address = number_after(line, "ioba=");
      const std::uint64_t last = number_after(line, "iobaN=");
      const std::uint64_t tce = number_after(line, "tceN=");
      for (std::uint64_t i = 0; i <= last; ++i) {
        std::uint64_t entry = tce - (last - i) * 4096;
        const std::uint64_t page = address + i * 4096;
        uncertain.erase(page);
        if (i != last) {
          if (const auto seen = shown_later(at, page); seen) {
            entry = *seen;
          } else {
            uncertain[page] = true;
            ++guessed;
          }
        }
        ram.store(list + i * 8, __builtin_bswap64(entry));
      }
      ASSERT_EQ(papr.call_and_wait(hcall::put_tce_indirect,
                                   std::array<std::uint64_t, 4>{number_after(line, "liobn="), address, list, last + 1})
                    .status,
                0);
      ++calls;
    } else if (starts(line, "spapr_iommu_xlate")) {
      const std::uint64_t address = xlate_address(line);
      const auto ours = papr.translate(static_cast<std::uint32_t>(number_after(line, "liobn=")), address);
      ++translations;
      ASSERT_EQ(static_cast<std::uint64_t>(ours.access), number_after(line, "perm=")) << line;
      ASSERT_EQ(ours.page_mask, number_after(line, "mask="));
      if (uncertain.count(address & ~0xfffULL) != 0) continue;
      ASSERT_EQ(ours.gpa & ~ours.page_mask, number_after(line, "-> ")) << line;
      // And the host was told the same.
      const auto* held = host.find(address);
      ASSERT_NE(held, nullptr);
      ASSERT_EQ(held->region_offset + (address - held->range.start.value), ours.gpa);
    } else if (starts(line, "spapr_iommu_ddw_query")) {
      const auto query = papr.query_window(config.buid);
      EXPECT_EQ(query.windows_available, 1U);
      EXPECT_EQ(query.largest_entries, number_after(line, "max window size="));
      EXPECT_EQ(query.page_sizes, number_after(line, "mask="));
    }
  }
  EXPECT_EQ(calls, 19146U);
  EXPECT_EQ(translations, 56716U);
  EXPECT_LT(guessed, calls);
  RecordProperty("guessed_entries", static_cast<int>(guessed));
  ASSERT_TRUE(papr.remove_device(config.buid, &host));
  EXPECT_TRUE(host.held().empty());
}

}  // namespace
}  // namespace iovane::viommu
