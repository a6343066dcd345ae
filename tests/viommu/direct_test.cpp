// Guests' first-level tables walked directly by the software IOMMU: a real Linux guest's, as they lay in its memory,
// and a small driver's.
#include <gtest/gtest.h>

#include <algorithm>

#include "backends/kernel_decorators.hpp"
#include "backends/model/model_kernel.hpp"
#include "recorded_data.hpp"
#include "viommu/smmuv3_direct.hpp"
#include "viommu/vtd_direct.hpp"

namespace iovane::viommu {
namespace {

using namespace backends;
using backends::stage1::GuestNesting;

class Notes final : public VtdEvents {
 public:
  void wait_completed() noexcept override { ++waits; }
  void queue_error(std::uint64_t) noexcept override { ++errors; }
  void shadow_failed(std::uint16_t, const Error&) noexcept override { ++failed; }
  int waits = 0, errors = 0, failed = 0;
};

std::unique_ptr<model::ModelKernel> nesting_host(model::Nesting nesting, std::size_t devices) {
  model::ModelOptions options;
  options.iommus.front().nesting = nesting;
  options.devices.assign(devices, {});
  options.memory_check = model::MemoryCheck::mapped;  // guest RAM is sparse here
  for (auto& device : options.devices) device.reserved.clear();
  return *model::ModelKernel::create(options);
}

TEST(VtdDirectTest, a_real_guests_tables_are_walked_as_they_lay_in_its_memory) {
  const VtdSnapshot snapshot{"vtd-snap-sm-3"};
  const auto lists = kernel_listing(snapshot, true);
  ASSERT_EQ(lists.size(), 3U);
  auto model = nesting_host(model::Nesting::vtd, lists.size());
  CountingKernel kernel{*model};
  {
    auto host = *GuestNesting::open(kernel, {});
    const RegionConfig ram = snapshot.ram.config();
    const auto added = host->add_memory(ram.gpa, {.address = ram.address, .length = ram.length});
    ASSERT_TRUE(added) << added.error().message();
    Notes notes;
    VtdDirect unit{snapshot.memory,
                   *host,
                   VtdCapabilities::from_registers(snapshot.reg("CAP"), snapshot.reg("ECAP"), 39),
                   {.scalable = true},
                   notes};
    std::size_t index = 0;
    for (const auto& [name, list] : lists) {
      const auto device = host->attach({.pci_address = model->device(index).address()}, source_of(name));
      ASSERT_TRUE(device) << device.error().message();
      unit.add_endpoint(source_of(name), device->id);
      ++index;
    }
    const std::uint64_t maps = kernel.calls(uapi::iommufd::IoasMap::request);
    unit.set_root_table(snapshot.reg("RTADDR"));
    unit.set_translation(true);
    EXPECT_EQ(notes.failed, 0);
    index = 0;
    std::size_t checked = 0;
    for (const auto& [name, list] : lists) {
      EXPECT_FALSE(unit.needs_shadow(source_of(name)));
      model::SimulatedDevice& device = model->device(index++);
      for (std::size_t i = 0; i < list.size(); i += 1 + list.size() / 400) {
        const Leaf& leaf = list[i];
        // A pattern in the guest's page, read by the device through the guest's own tables.
        const std::uint64_t offset = (std::uint64_t{1} << leaf.shift) - 8;
        const std::uint64_t before = snapshot.ram.load(leaf.gpa + offset);
        snapshot.ram.store(leaf.gpa + offset, 0x1234'5678'0000'0000 + i);
        std::array<std::byte, 8> bytes{};
        ASSERT_TRUE(device.dma_read(Iova{leaf.iova + offset}, bytes).ok()) << name << std::hex << leaf.iova;
        std::uint64_t value = 0;
        std::memcpy(&value, bytes.data(), 8);
        EXPECT_EQ(value, 0x1234'5678'0000'0000 + i);
        EXPECT_EQ(device.dma_write(Iova{leaf.iova + offset}, bytes).ok(), may_write(leaf.access));
        snapshot.ram.store(leaf.gpa + offset, before);
        ++checked;
      }
    }
    EXPECT_GT(checked, 500U);
    EXPECT_EQ(kernel.calls(uapi::iommufd::IoasMap::request), maps) << "no shadow";
    std::printf("%zu leaves of a Linux guest read by DMA\n", checked);
  }
  EXPECT_EQ(model->usage(), model::ModelUsage{});
}

/// A guest's VT-d driver in scalable mode, small.
class ScalableGuest {
 public:
  static constexpr std::uint64_t root = 0x10000, queue = 0x20000, status = 0x30000;
  ScalableGuest(const GuestRam& ram, VtdDirect& unit) : ram_{ram}, unit_{unit} {}
  std::uint64_t new_table() { return std::exchange(next_, next_ + 4096); }
  /// Context and PASID entries: first level, four levels at `table`.
  void set_device(std::uint16_t source, std::uint64_t table, std::uint16_t domain) {
    const std::uint64_t half = root + (source >> 8U) * 16U + ((source & 0x80U) != 0 ? 8 : 0);
    if (ram_.load(half) == 0) ram_.store(half, new_table() | 1);
    const std::uint64_t context = (ram_.load(half) & ~0xfffULL) + (source & 0x7fU) * 32U;
    const std::uint64_t directory = new_table(), entries = new_table();
    ram_.store(directory, entries | 1);
    ram_.store(entries + 8, domain);
    ram_.store(entries + 16, table);   // four levels: FLPM 0
    ram_.store(entries, 1 | 1U << 6);  // present, first level only
    ram_.store(context + 8, 0);
    ram_.store(context, directory | 1);
    pasid_entry_ = entries;
  }
  std::uint64_t pasid_entry() const { return pasid_entry_; }
  void put(std::uint64_t table, std::uint64_t iova, std::uint64_t entry) {
    for (unsigned level = 4; level > 1; --level) {
      const std::uint64_t at = table + (iova >> (12 + 9 * (level - 1)) & 511) * 8;
      if (ram_.load(at) == 0) ram_.store(at, new_table() | 7);
      table = ram_.load(at) & ~0xfffULL;
    }
    ram_.store(table + (iova >> 12 & 511) * 8, entry);
  }
  void start() {
    unit_.set_queue(queue | 1U << 11);  // descriptors of 256 bits
    unit_.set_root_table(root | 1U << 10);
    unit_.set_translation(true);
  }
  void enqueue(std::uint64_t low, std::uint64_t high) {
    for (unsigned i = 0; i < 4; ++i) ram_.store(queue + tail_ * 32 + i * 8, i == 0 ? low : i == 1 ? high : 0);
    tail_ = (tail_ + 1) % 128;
  }
  void page(std::uint16_t domain, std::uint64_t iova) {
    enqueue(6 | 3U << 4 | std::uint64_t{domain} << 16, iova & ~0xfffULL);
  }
  void pasid(std::uint16_t domain) { enqueue(6 | 2U << 4 | std::uint64_t{domain} << 16, 0); }
  void pasid_cache() { enqueue(7 | 3U << 4, 0); }
  bool ring() {
    enqueue(0x25 | std::uint64_t{++waited_} << 32, status);
    unit_.write_tail(tail_ * 32);
    return static_cast<std::uint32_t>(ram_.load(status)) == waited_;
  }

 private:
  const GuestRam& ram_;
  VtdDirect& unit_;
  std::uint64_t next_ = 0x100000, pasid_entry_ = 0, tail_ = 0;
  std::uint32_t waited_ = 0;
};

/// Guest RAM, the host's nesting over a kernel, and a unit in scalable mode between them.
struct ScalableUnit {
  ScalableUnit(Kernel& kernel, std::size_t ram_bytes) : host{*GuestNesting::open(kernel, {})}, ram{ram_bytes} {
    EXPECT_TRUE(memory.add(ram.config()));
    EXPECT_TRUE(host->add_memory(0, {.address = ram.at(0), .length = Bytes{ram_bytes}}));
  }
  static VtdCapabilities first_level() {
    VtdCapabilities out;
    out.scalable = out.first_level = true;
    return out;
  }
  std::unique_ptr<GuestNesting> host;
  GuestRam ram;
  GuestMemory memory;
  Notes notes;
  VtdDirect unit{memory, *host, first_level(), {.scalable = true}, notes};
};

TEST(VtdDirectTest, a_guests_unmap_is_final_when_its_wait_completes) {
  auto model = nesting_host(model::Nesting::vtd, 2);
  CountingKernel kernel{*model};
  {
    ScalableUnit made{kernel, 16U << 20};
    auto& [host, ram, memory, notes, unit] = made;
    ScalableGuest guest{ram, unit};
    const auto first = *host->attach({.pci_address = model->device(0).address()}, 8);
    const auto second = *host->attach({.pci_address = model->device(1).address()}, 16);
    unit.add_endpoint(8, first.id);
    unit.add_endpoint(16, second.id);
    std::array<std::byte, 16> bytes{};
    const auto reads = [&](std::size_t device, std::uint64_t at) {
      return model->device(device).dma_read(Iova{at}, bytes).ok();
    };
    EXPECT_TRUE(reads(0, 0x5000)) << "before the guest translates, its addresses are physical";
    const std::uint64_t table = guest.new_table();
    guest.set_device(8, table, 7);
    guest.set_device(16, table, 7);
    guest.put(table, 0x40000, 0x800000 | 0x67);
    guest.put(table, 0x41000, 0x801000 | 0x67);
    guest.start();
    EXPECT_EQ(host->table_of(first.id), host->table_of(second.id)) << "one table of the guest, one of the host";
    EXPECT_TRUE(reads(0, 0x40000) && reads(1, 0x41000));
    EXPECT_FALSE(reads(0, 0x5000));
    // A hundred pages in one queue: one array, because the table is one.
    for (std::uint64_t i = 0; i < 100; ++i) guest.put(table, 0x100000 + i * 4096, (0x900000 + i * 4096) | 0x67);
    for (std::uint64_t i = 0; i < 100; ++i) EXPECT_TRUE(reads(i % 2, 0x100000 + i * 4096));
    const std::uint64_t calls = kernel.calls();
    for (std::uint64_t i = 0; i < 100; ++i) {
      guest.put(table, 0x100000 + i * 4096, 0);
      guest.page(7, 0x100000 + i * 4096);
    }
    ASSERT_TRUE(guest.ring());
    EXPECT_EQ(kernel.calls(), calls + 1);
    for (std::uint64_t i = 0; i < 100; ++i) EXPECT_FALSE(reads(i % 2, 0x100000 + i * 4096));
    EXPECT_TRUE(reads(0, 0x40000));
    // Another table for one of them.
    const std::uint64_t other = guest.new_table();
    guest.put(other, 0x40000, 0xa00000 | 0x65);
    ram.store(guest.pasid_entry() + 16, other);  // the second device's
    guest.pasid_cache();
    guest.pasid(7);
    ASSERT_TRUE(guest.ring());
    EXPECT_NE(host->table_of(first.id), host->table_of(second.id));
    EXPECT_TRUE(reads(1, 0x40000));
    EXPECT_FALSE(reads(1, 0x41000));
    EXPECT_FALSE(model->device(1).dma_write(Iova{0x40000}, bytes).ok()) << "read-only there";
    EXPECT_TRUE(reads(0, 0x41000));
    // A second-level table is not for us; nor is what is not there.
    ram.store(guest.pasid_entry(), 1 | 2U << 6 | 1U << 2);
    guest.pasid_cache();
    ASSERT_TRUE(guest.ring());
    EXPECT_TRUE(unit.needs_shadow(16));
    EXPECT_FALSE(reads(1, 0x40000));
    ram.store(guest.pasid_entry(), 0);
    guest.pasid_cache();
    ASSERT_TRUE(guest.ring());
    EXPECT_FALSE(reads(1, 0x40000));
    EXPECT_EQ(notes.errors, 0);
    guest.enqueue(0xf, 0);
    EXPECT_FALSE(guest.ring());
    EXPECT_EQ(notes.errors, 1);
  }
  EXPECT_EQ(model->usage(), model::ModelUsage{});
}

// A host that swallows invalidations must show: the canary of the test above.
class DeafKernel final : public KernelDecorator {
 public:
  using KernelDecorator::KernelDecorator;
  long ioctl(int fd, unsigned long request, void* argument) noexcept override {
    if (request == uapi::iommufd::HwptInvalidate::request) {
      if (refuse) return -5;
      return 0;
    }
    return inner().ioctl(fd, request, argument);
  }
  bool refuse = false;
};

TEST(VtdDirectTest, without_the_hosts_invalidation_the_page_stays_reachable_and_a_refused_one_holds_the_wait) {
  auto model = nesting_host(model::Nesting::vtd, 1);
  DeafKernel kernel{*model};
  {
    ScalableUnit made{kernel, 16U << 20};
    auto& [host, ram, memory, notes, unit] = made;
    ScalableGuest guest{ram, unit};
    unit.add_endpoint(8, host->attach({.pci_address = model->device(0).address()}, 8)->id);
    const std::uint64_t table = guest.new_table();
    guest.set_device(8, table, 7);
    guest.put(table, 0x40000, 0x800000 | 0x67);
    guest.start();
    std::array<std::byte, 16> bytes{};
    ASSERT_TRUE(model->device(0).dma_read(Iova{0x40000}, bytes).ok());
    guest.put(table, 0x40000, 0);
    guest.page(7, 0x40000);
    EXPECT_TRUE(guest.ring());
    EXPECT_TRUE(model->device(0).dma_read(Iova{0x40000}, bytes).ok()) << "nobody told the device";
    kernel.refuse = true;
    guest.page(7, 0x40000);
    EXPECT_FALSE(guest.ring()) << "a wait after an invalidation that failed must not complete";
    EXPECT_EQ(notes.errors, 1);
  }
}

// SMMUv3, what the conformance test with its witness cannot do: addresses passed through, several streams, two-level
// stream tables, arrays.
TEST(Smmuv3DirectTest, streams_follow_a_two_level_stream_table_and_commands_go_in_arrays) {
  auto model = nesting_host(model::Nesting::smmuv3, 2);
  CountingKernel kernel{*model};
  {
    auto host = *GuestNesting::open(kernel, {});
    GuestRam ram{16U << 20};
    GuestMemory memory;
    ASSERT_TRUE(memory.add(ram.config()));
    ASSERT_TRUE(host->add_memory(0, {.address = ram.at(0), .length = Bytes{16U << 20}}));
    Smmuv3Direct smmu{memory, *host};
    constexpr std::uint32_t streams[2] = {3, 0x108};
    std::array<std::byte, 16> bytes{};
    const auto reads = [&](std::size_t device, std::uint64_t at) {
      return model->device(device).dma_read(Iova{at}, bytes).ok();
    };
    for (std::size_t i = 0; i < 2; ++i) {
      const auto device = host->attach({.pci_address = model->device(i).address()}, streams[i]);
      ASSERT_TRUE(device) << device.error().message();
      ASSERT_TRUE(smmu.add_endpoint(streams[i], device->id));
      EXPECT_TRUE(reads(i, 0x5000)) << "off: guest physical addresses";
    }
    // Level 1 at 0x10000, a page of entries for each 2^8 streams; contexts at 0x40000 with their tables.
    for (std::uint64_t i = 0; i < 2; ++i) {
      const std::uint64_t entries = 0x20000 + i * 0x8000, context = 0x40000 + i * 64, root = 0x100000 + i * 0x10000;
      ram.store(0x10000 + (streams[i] >> 8) * 8, entries | 9);
      ram.store(entries + (streams[i] & 0xff) * 64 + 8, 1U << 2 | 1U << 4 | 3U << 6);
      ram.store(entries + (streams[i] & 0xff) * 64, 1 | 5U << 1 | context);
      ram.store(context + 8, root);
      ram.store(context, 25 | 1ULL << 30 | 1ULL << 31 | 5ULL << 32 | 1ULL << 41 | std::uint64_t{10 + i} << 48);
      ram.store(root, (root + 0x1000) | 3);
      ram.store(root + 0x1000, (root + 0x2000) | 3);
      for (std::uint64_t page = 0; page < 300; ++page)
        ram.store(root + 0x2000 + page * 8, (0x800000 + page * 4096) | 0x0060'0000'0000'0f43);
    }
    smmu.set_stream_table(0x10000, 16 | 8U << 6 | 1U << 16);
    smmu.set_command_queue(0x60000 | 9);
    smmu.set_event_queue(0x70000 | 4);
    ASSERT_TRUE(smmu.set_enabled(true));
    EXPECT_EQ(smmu.stats().refused_entries, 0U);
    EXPECT_TRUE(reads(0, 0x5000) && reads(1, 299 * 4096));
    EXPECT_FALSE(reads(0, 0x800000)) << "translated now";
    // Three hundred pages of one ASID: two arrays.
    std::uint32_t prod = 0;
    const auto command = [&](std::uint64_t low, std::uint64_t high) {
      ram.store(0x60000 + prod * 16, low);
      ram.store(0x60000 + prod * 16 + 8, high);
      ++prod;
    };
    for (std::uint64_t page = 0; page < 300; ++page) {
      ASSERT_TRUE(reads(0, page * 4096) && reads(1, page * 4096));
      ram.store(0x102000 + page * 8, 0);
      command(0x12 | 10ULL << 48, page * 4096 | 1);
    }
    command(0x46 | 1U << 12, 0);
    const std::uint64_t calls = kernel.calls();
    const auto done = smmu.write_command_tail(prod);
    EXPECT_EQ(done.error, Smmuv3Direct::CommandError::none);
    EXPECT_EQ(done.cons, prod);
    EXPECT_EQ(done.interrupts, 1U);
    EXPECT_EQ(kernel.calls(), calls + 2);
    for (std::uint64_t page = 0; page < 300; ++page) {
      EXPECT_FALSE(reads(0, page * 4096));
      EXPECT_TRUE(reads(1, page * 4096));
    }
    // The event queue has sixteen places; more is lost, and said so.
    const auto events = smmu.deliver_events(0);
    ASSERT_TRUE(events) << events.error().message();
    EXPECT_EQ(*events & 31, 16U) << "full: the index has wrapped";
    EXPECT_NE(smmu.stats().lost_events, 0U);
    EXPECT_EQ(ram.load(0x70000), 0x10U | std::uint64_t{streams[0]} << 32);
    // CFGI_ALL after the second stream's entry says bypass, and the first one's what nobody can do.
    ram.store(0x20000 + 0x8000 + 8 * 64, 1 | 4U << 1);
    ram.store(0x20000 + 3 * 64, 1 | 6U << 1);
    command(0x04, 31);
    command(0x46, 0);
    EXPECT_EQ(smmu.write_command_tail(prod).cons, prod);
    EXPECT_TRUE(reads(1, 0x800000));
    EXPECT_FALSE(reads(0, 0x800000));
    EXPECT_EQ(smmu.stats().refused_entries, 1U);
    ASSERT_TRUE(smmu.set_enabled(false));
    EXPECT_TRUE(reads(0, 0x800000));
  }
  EXPECT_EQ(model->usage(), model::ModelUsage{});
}

// Whatever a guest writes, into registers, queues and tables: nothing but its own devices' DMA is at stake.
TEST(Smmuv3DirectTest, a_guest_that_writes_nonsense_harms_itself_alone) {
  auto model = nesting_host(model::Nesting::smmuv3, 2);
  {
    auto host = *GuestNesting::open(*model, {});
    GuestRam ram{1U << 20};
    GuestMemory memory;
    ASSERT_TRUE(memory.add(ram.config()));
    ASSERT_TRUE(host->add_memory(0, {.address = ram.at(0), .length = Bytes{1U << 20}}));
    Smmuv3Direct smmu{memory, *host};
    std::mt19937_64 random{test_seed()};
    const auto word = [&] {  // small ones, addresses in and out of RAM, anything
      const std::uint64_t value = random();
      switch (random() % 4) {
        case 0: return value & 0xff;
        case 1: return value & 0xf'fff0;
        case 2: return (value & 0xf'ffff) | (value & 0xff) << 56;
        default: return value;
      }
    };
    for (std::uint32_t i = 0; i < 2; ++i)
      ASSERT_TRUE(smmu.add_endpoint(i, host->attach({.pci_address = model->device(i).address()}, i)->id));
    for (int round = 0; round < 3000; ++round) {
      for (int i = 0; i < 64; ++i) ram.store(random() % (1U << 17) * 8, word());
      if (random() % 16 == 0) smmu.set_stream_table(word(), static_cast<std::uint32_t>(word()));
      if (random() % 16 == 0) smmu.set_command_queue(word());
      if (random() % 16 == 0) smmu.set_event_queue(word());
      if (random() % 16 == 0) (void)smmu.set_enabled(random() % 4 != 0);
      // Commands that mean something, too.
      smmu.set_command_queue(0x8000 | 6);
      constexpr std::uint64_t known[] = {0x01, 0x03, 0x04, 0x05, 0x06, 0x10, 0x11, 0x12, 0x13, 0x30, 0x40, 0x46};
      for (std::uint64_t i = 0; i < 64; ++i)
        if (random() % 2 == 0) ram.store(0x8000 + i * 16, known[random() % std::size(known)] | (random() << 12));
      const auto done = smmu.write_command_tail(static_cast<std::uint32_t>(word()));
      ASSERT_LT(done.cons, 128U);
      std::array<std::byte, 64> bytes{};
      (void)model->device(random() % 2).dma_read(Iova{word()}, bytes);
      (void)smmu.deliver_events(static_cast<std::uint32_t>(word()));
    }
    EXPECT_GT(smmu.stats().commands, 1000U);
    EXPECT_GT(smmu.stats().stream_entries, 10U);
    EXPECT_GT(smmu.stats().refused_entries, 10U);
  }
  EXPECT_EQ(model->usage(), model::ModelUsage{});
}

TEST(VtdDirectTest, a_guest_that_writes_nonsense_harms_itself_alone) {
  auto model = nesting_host(model::Nesting::vtd, 2);
  {
    ScalableUnit made{*model, 1U << 20};
    auto& [host, ram, memory, notes, unit] = made;
    std::mt19937_64 random{test_seed()};
    for (std::uint16_t i = 0; i < 2; ++i)
      unit.add_endpoint(i, host->attach({.pci_address = model->device(i).address()}, i)->id);
    for (int round = 0; round < 3000; ++round) {
      // Tables of tables: small words with low bits set, so that some lead somewhere.
      for (int i = 0; i < 200; ++i) ram.store(random() % (1U << 17) * 8, (random() & 0xff000) | (random() & 0x1ff));
      unit.set_queue(0x8000 | 1U << 11);
      if (random() % 4 == 0) unit.set_root_table((random() & 0xff000) | 1U << 10);
      if (random() % 8 == 0) unit.set_translation(random() % 4 != 0);
      for (std::uint64_t i = 0; i < 128; ++i) {
        // Mostly what decodes: context cache, IOTLB, PASID cache, PASID-based IOTLB, waits.
        constexpr std::uint64_t known[] = {0x11, 0x12, 0x22, 0x37, 0x26, 0x36, 0x25};
        const std::uint64_t nonsense = (1 + random() % 8) | (random() & 0xff0);
        ram.store(0x8000 + i * 32, (random() % 32 == 0 ? nonsense : known[random() % std::size(known)]) | (random() & 3)
                                                                                                              << 16);
        for (unsigned w = 1; w < 4; ++w) ram.store(0x8000 + i * 32 + w * 8, w == 1 ? random() & 0xff000 : 0);
      }
      unit.write_tail(random() % 128 * 32);
      std::array<std::byte, 64> bytes{};
      (void)model->device(random() % 2).dma_read(Iova{random() & 0xfffff}, bytes);
    }
    EXPECT_GT(unit.stats().descriptors, 1000U);
    EXPECT_GT(unit.stats().rebound, 10U);
  }
  EXPECT_EQ(model->usage(), model::ModelUsage{});
}

TEST(GuestNestingTest, a_host_that_cannot_says_why_and_nothing_is_left) {
  for (const model::Nesting nesting : {model::Nesting::none, model::Nesting::amd}) {
    auto model = nesting_host(nesting, 1);
    {
      auto host = *GuestNesting::open(*model, {});
      const auto device = host->attach({.pci_address = model->device(0).address()}, 1);
      ASSERT_FALSE(device);
      EXPECT_EQ(device.error().code, Errc::unsupported) << device.error().message();
    }
    EXPECT_EQ(model->usage(), model::ModelUsage{});
  }
  auto model = nesting_host(model::Nesting::smmuv3, 2);
  auto host = *GuestNesting::open(*model, {});
  ASSERT_TRUE(host->attach({.pci_address = model->device(0).address()}, 1));
  EXPECT_EQ(host->attach({.pci_address = model->device(1).address()}, 1).error().code, Errc::busy);
  EXPECT_EQ(host->use_first_level(DeviceId{1}, 0, 4).error().code, Errc::unsupported);
  EXPECT_EQ(host->add_memory(0x1234, {.address = nullptr, .length = Bytes{4096}}).error().code, Errc::invalid_argument);
}

}  // namespace
}  // namespace iovane::viommu
