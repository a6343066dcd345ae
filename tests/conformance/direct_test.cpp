// A guest's own first-stage tables, walked by the IOMMU: the test is the guest. It has RAM, a stream table, a context
// descriptor, tables and a command queue in it, and the device's DMA is the proof.
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <thread>

#include "backends/kernel_decorators.hpp"
#include "backends/stage1/guest_nesting.hpp"
#include "backends/uapi/iommufd.hpp"
#include "conformance/conformance.hpp"
#include "conformance/memory.hpp"
#include "viommu/smmuv3_direct.hpp"

namespace iovane::test {
namespace {

using namespace backends;
using viommu::GuestMemory;
using viommu::Smmuv3Direct;

constexpr std::uint64_t k4 = 4096;
constexpr std::uint64_t ram_at = 0x4000'0000;      // the guest's own idea of where its RAM is
constexpr std::uint64_t foreign_at = 0x5000'0000;  // where the test puts other memory of the process
constexpr std::uint32_t stream = 5;
constexpr std::uint16_t asid = 3;

/// The guest's driver: writes tables and commands as any driver of an SMMUv3 does.
class GuestDriver {
 public:
  static constexpr std::uint64_t stream_table = 0, context = k4, commands = 2 * k4, events = 3 * k4, message = 4 * k4,
                                 first_table = 5 * k4;

  explicit GuestDriver(Smmuv3Direct& smmu) : smmu_{smmu} {}

  std::uint64_t gpa(std::uint64_t offset) const { return ram_at + offset; }
  std::uint64_t* word(std::uint64_t guest_address) {
    return reinterpret_cast<std::uint64_t*>(ram_.data() + (guest_address - ram_at));
  }
  std::uint64_t new_table() { return gpa(std::exchange(next_table_, next_table_ + k4)); }
  void start() {
    std::memset(ram_.data(), 0, ram_.length().value);
    root_ = new_table();
    write_context();
    write_stream_entry(1 | 5U << 1 | gpa(context), 2U << 0 | 1U << 2 | 1U << 4 | 3U << 6);
    smmu_.set_stream_table(gpa(stream_table), 6);  // 64 entries, linear
    smmu_.set_command_queue(gpa(commands) | 7);    // 128 entries
    smmu_.set_event_queue(gpa(events) | 6);        // 64 entries
  }
  void write_stream_entry(std::uint64_t low, std::uint64_t high) {
    word(gpa(stream_table) + stream * 64)[1] = high;
    word(gpa(stream_table) + stream * 64)[0] = low;
  }
  /// 39 bits, 4 KiB granule, AA64, R, A, ASET, EPD1, write-back, inner shareable, 48 bits out.
  void write_context() {
    std::uint64_t* const words = word(gpa(context));
    words[1] = root_;
    words[3] = 0xff;
    words[0] = 25 | 1U << 8 | 1U << 10 | 3U << 12 | 1ULL << 30 | 1ULL << 31 | 5ULL << 32 | 1ULL << 41 | 1ULL << 45 |
               1ULL << 46 | 1ULL << 47 | std::uint64_t{asid} << 48;
  }
  std::uint64_t& root() { return root_; }
  std::uint64_t* slot(std::uint64_t iova) {
    std::uint64_t table = root_;
    for (unsigned level = 2; level > 0; --level) {
      std::uint64_t* const place = word(table) + (iova >> (12 + 9 * level) & 511);
      if (*place == 0) *place = new_table() | 3;
      table = *place & 0x0000'ffff'ffff'f000;
    }
    return word(table) + (iova >> 12 & 511);
  }
  void map(std::uint64_t iova, std::uint64_t guest_address, Access access) {
    __atomic_store_n(slot(iova), guest_address | 0x0060'0000'0000'0f43 | (may_write(access) ? 0 : 1U << 7),
                     __ATOMIC_RELEASE);
  }
  std::uint64_t clear(std::uint64_t iova) {
    const std::uint64_t was = *slot(iova);
    __atomic_store_n(slot(iova), 0, __ATOMIC_RELEASE);
    return was;
  }
  void command(std::uint64_t low, std::uint64_t high) {
    std::uint64_t* const at = word(gpa(commands)) + 2 * (prod_ & 127);
    at[0] = low;
    at[1] = high;
    prod_ = (prod_ + 1) & 255;
  }
  void invalidate_page(std::uint64_t iova) { command(0x12 | std::uint64_t{asid} << 48, (iova & ~0xfffULL) | 1); }
  /// Rings, and says whether everything up to a CMD_SYNC with a message has been carried out.
  bool sync() {
    command(0x46 | 2U << 12 | std::uint64_t{++message_} << 32, gpa(message));
    const auto done = smmu_.write_command_tail(prod_);
    return done.error == Smmuv3Direct::CommandError::none && done.cons == prod_ &&
           static_cast<std::uint32_t>(*word(gpa(message))) == message_;
  }
  std::uint32_t produced() const { return prod_; }

  Memory& ram() { return ram_; }

 private:
  Smmuv3Direct& smmu_;
  Memory ram_{64};
  std::uint64_t next_table_ = first_table;
  std::uint64_t root_ = 0;
  std::uint32_t prod_ = 0, message_ = 0;
};

/// What the witness maps and unmaps for its own scratch page goes through the guest's driver too.
class GuestSpace final : public BackendSpace {
 public:
  GuestSpace(GuestDriver& guest, GuestMemory& memory, stage1::GuestNesting& host)
      : guest_{guest}, memory_{memory}, host_{host} {}
  const SpaceFacts& facts() const noexcept override { return facts_; }
  void execute(std::span<const BackendOp> ops, std::span<BackendOpResult> results) noexcept override {
    for (std::size_t i = 0; i < ops.size(); ++i) {
      results[i] = {};
      if (ops[i].kind == OpKind::map) {
        guest_.map(ops[i].range.start.value, guest_address(ops[i].memory), ops[i].access);
        continue;
      }
      guest_.clear(ops[i].range.start.value);
      guest_.invalidate_page(ops[i].range.start.value);
      if (!guest_.sync()) results[i].error = make_error(Errc::io_error, Stage::unmap, "the guest's CMD_SYNC failed");
    }
  }
  /// Where the guest sees a page of the process; made part of its RAM when it is not.
  std::uint64_t guest_address(std::uint64_t address) {
    const auto known = known_.find(address);
    if (known != known_.end()) return known->second;
    const std::uint64_t gpa = foreign_at + known_.size() * k4;
    auto* const memory = reinterpret_cast<std::byte*>(address);
    EXPECT_TRUE(memory_.add({.gpa = gpa, .length = {k4}, .address = memory}));
    const auto added = host_.add_memory(gpa, {.address = memory, .length = {k4}});
    EXPECT_TRUE(added) << added.error().message();
    return known_[address] = gpa;
  }
  Result<Bytes> unmap_all() noexcept override { return Bytes{}; }
  Result<RegionId> register_memory(const MemoryRange&) override { return RegionId{}; }
  Result<void> unregister_memory(RegionId) override { return {}; }
  Result<AttachedDevice> attach(const DeviceSource&) override { return AttachedDevice{}; }
  Result<void> detach(DeviceId) override { return {}; }
  Result<std::vector<IovaRange>> usable_ranges() override { return std::vector<IovaRange>{}; }
  Result<void> promise(std::span<const IovaRange>) override { return {}; }
  Headroom headroom() noexcept override { return {}; }

 private:
  GuestDriver& guest_;
  GuestMemory& memory_;
  stage1::GuestNesting& host_;
  SpaceFacts facts_;
  std::map<std::uint64_t, std::uint64_t> known_;
};

class DirectContract : public Conformance {};

TEST_P(DirectContract, a_guests_own_tables_are_walked_without_a_shadow) {
  if (GetParam() != Interface::stage1) GTEST_SKIP() << "only where an IOMMU nests";
  backend_.reset();  // the guest has a descriptor of its own
  auto opened = stage1::GuestNesting::open(*kernel_, {});
  ASSERT_TRUE(opened) << opened.error().message();
  stage1::GuestNesting& host = **opened;
  GuestMemory memory;
  Smmuv3Direct smmu{memory, host};
  GuestDriver guest{smmu};
  ASSERT_TRUE(memory.add({.gpa = ram_at, .length = guest.ram().length(), .address = guest.ram().data()}));
  ASSERT_TRUE(host.add_memory(ram_at, {.address = guest.ram().data(), .length = guest.ram().length()}));
  const auto device = host.attach({.pci_address = machine_->devices().at(0)}, stream);
  ASSERT_TRUE(device) << device.error().message();
  GuestSpace space{guest, memory, host};
  auto witness = machine_->witness(space, *device);
  ASSERT_NE(witness, nullptr);

  guest.start();
  ASSERT_TRUE(smmu.add_endpoint(stream, device->id));
  ASSERT_TRUE(smmu.set_enabled(true));
  EXPECT_EQ(smmu.stats().stream_entries, 1U);
  EXPECT_EQ(smmu.stats().refused_entries, 0U);

  // What the guest maps is there, both ways; what it unmaps is gone when its CMD_SYNC says so.
  const Memory first{1, 1}, second{1, 2};
  constexpr std::uint64_t iova = 0x1'2340'0000;
  const std::uint64_t first_gpa = space.guest_address(first.address()),
                      second_gpa = space.guest_address(second.address());
  EXPECT_TRUE(cannot_read(*witness, Iova{iova}, first.page(0)));
  const std::uint64_t calls = kernel_->calls(uapi::iommufd::IoasMap::request);
  guest.map(iova, first_gpa, Access::read_write);
  guest.map(iova + k4, second_gpa, Access::read);
  EXPECT_TRUE(reads(*witness, Iova{iova}, first.page(0)));
  EXPECT_TRUE(writes(*witness, Iova{iova}, first.page(0)));
  EXPECT_TRUE(reads(*witness, Iova{iova + k4}, second.page(0)));
  EXPECT_TRUE(cannot_write(*witness, Iova{iova + k4}, second.page(0)));
  guest.clear(iova);
  guest.invalidate_page(iova);
  ASSERT_TRUE(guest.sync());
  EXPECT_TRUE(cannot_read(*witness, Iova{iova}, first.page(0)));
  EXPECT_TRUE(reads(*witness, Iova{iova + k4}, second.page(0)));
  EXPECT_LE(kernel_->calls(uapi::iommufd::IoasMap::request), calls + 1) << "the witness's own page, and no map else";

  // The guest hears of what its device did wrong, in its own queue.
  if (host.event_fd() >= 0) {
    std::uint32_t prod = 0;
    bool found = false;
    for (int attempt = 0; attempt < 20 && !found; ++attempt) {
      const auto delivered = smmu.deliver_events(0);
      ASSERT_TRUE(delivered) << delivered.error().message();
      prod = *delivered & 0xffff;
      for (std::uint32_t i = 0; i < prod; ++i) {
        const std::uint64_t* const event = guest.word(guest.gpa(GuestDriver::events)) + 4 * i;
        found = found || ((event[0] & 0xff) == 0x10 && event[0] >> 32 == stream && (event[2] & ~0xfffULL) == iova);
      }
      if (!found) std::this_thread::sleep_for(std::chrono::milliseconds{50});
    }
    EXPECT_TRUE(found) << prod << " events, none of them F_TRANSLATION at the address";
  }

  // Another table behind the same context: after CFGI_CD and TLBI_NH_ASID the device uses it.
  guest.root() = guest.new_table();
  guest.map(iova, second_gpa, Access::read);
  guest.write_context();
  guest.command(0x05 | std::uint64_t{stream} << 32, 1);
  guest.command(0x11 | std::uint64_t{asid} << 48, 0);
  ASSERT_TRUE(guest.sync());
  EXPECT_TRUE(reads(*witness, Iova{iova}, second.page(0)));

  // A stream table entry that is not valid any more.
  guest.write_stream_entry(0, 0);
  guest.command(0x03 | std::uint64_t{stream} << 32, 1);
  ASSERT_TRUE(guest.sync());
  EXPECT_TRUE(cannot_read(*witness, Iova{iova}, second.page(0)));

  // A command that this SMMU does not have stops the queue there.
  guest.command(0x22, 0);
  const auto stopped = smmu.write_command_tail(guest.produced());
  EXPECT_EQ(stopped.error, Smmuv3Direct::CommandError::illegal);
  EXPECT_EQ((stopped.cons + 1) & 255, guest.produced());
  witness.reset();
}

IOVANE_CONFORMANCE(DirectContract);

}  // namespace
}  // namespace iovane::test
