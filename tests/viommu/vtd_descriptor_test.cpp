// Invalidation descriptors against the specification's figures: every bit of every kind, and queues of both widths.
#include "viommu/vtd_descriptor.hpp"

#include <gtest/gtest.h>

#include "viommu/recording_target.hpp"
#include "vtd_guest.hpp"

namespace iovane::viommu {
namespace {

// The fields of each descriptor as the figures of section 6.5.2 show them, as ranges of bits of the 128; everything
// else is reserved. `well_formed` is one that no rule forbids.
struct Field {
  unsigned high;
  unsigned low;
};
struct Shape {
  const char* name;
  std::array<std::uint64_t, 2> well_formed;
  std::vector<Field> fields;
};
const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all{
      // Type 11:9 and 3:0, granularity 5:4, DID 31:16, SID 47:32, FM 49:48.
      {"context cache", {0x31, 0}, {{3, 0}, {5, 4}, {11, 9}, {31, 16}, {47, 32}, {49, 48}}},
      // Type, granularity, DW 6, DR 7, DID; AM 64+5:0, IH 64+6, address 64+63:12.
      {"IOTLB", {0x32, 0}, {{3, 0}, {5, 4}, {6, 6}, {7, 7}, {11, 9}, {31, 16}, {69, 64}, {70, 70}, {127, 76}}},
      // Type, MIP 20:16 (of MaxInvsPend, split with 31:21 by later revisions), SID 47:32, PFSID 15:12 and 63:52; S,
      // address.
      {"device TLB", {0x3, 0}, {{3, 0}, {11, 9}, {15, 12}, {20, 16}, {47, 32}, {63, 52}, {64, 64}, {127, 76}}},
      // Type, granularity 4, IM 31:27, IIDX 47:32.
      {"interrupt cache", {0x4, 0}, {{3, 0}, {4, 4}, {11, 9}, {31, 27}, {47, 32}}},
      // Type, IF 4, SW 5, FN 6, PD 7 (not offered), data 63:32; address 64+63:2.
      {"wait", {0x25, 0}, {{3, 0}, {4, 4}, {5, 5}, {6, 6}, {11, 9}, {63, 32}, {127, 66}}},
      // Type, granularity, DID, PASID 51:32; AM, IH, address.
      {"PASID IOTLB", {0x36, 0}, {{3, 0}, {5, 4}, {11, 9}, {31, 16}, {51, 32}, {69, 64}, {70, 70}, {127, 76}}},
      // Type, granularity, DID, PASID.
      {"PASID cache", {0x37, 0}, {{3, 0}, {5, 4}, {11, 9}, {31, 16}, {51, 32}}},
  };
  return all;
}

TEST(VtdDescriptor, EveryReservedBitMakesItOneThatIsNone) {
  VtdDescriptorRules rules;
  rules.scalable = true;
  rules.address_mask_max = 63;
  for (const Shape& shape : shapes()) {
    const VtdRawDescriptor good{shape.well_formed[0], shape.well_formed[1], 0, 0};
    const auto meaning = decode_descriptor(good, rules);
    ASSERT_TRUE(meaning) << shape.name;
    for (unsigned bit = 0; bit < 256; ++bit) {
      VtdRawDescriptor raw = good;
      raw[bit / 64] ^= std::uint64_t{1} << bit % 64;
      bool reserved = true;
      bool kind_or_scope = false;
      for (const Field& field : shape.fields) {
        const bool inside = field.low <= bit && bit <= field.high;
        reserved = reserved && !inside;
        kind_or_scope = kind_or_scope || (inside && field.high <= 11 && field.high != 6 && field.high != 7);
      }
      const auto decoded = decode_descriptor(raw, rules);
      if (reserved) {
        EXPECT_FALSE(decoded) << shape.name << ": bit " << bit;
      } else if (!kind_or_scope) {
        ASSERT_TRUE(decoded) << shape.name << ": bit " << bit;
        EXPECT_EQ(decoded->kind, meaning->kind) << shape.name << ": bit " << bit;
      }
    }
  }
}

TEST(VtdDescriptor, KindsThatAreNotOfferedAreNone) {
  const auto kind = [](std::uint64_t low, const VtdDescriptorRules& rules) {
    const auto decoded = decode_descriptor({low, 0, 0, 0}, rules);
    return decoded ? static_cast<int>(decoded->kind) : 0;
  };
  VtdDescriptorRules legacy;
  EXPECT_EQ(kind(0x3, legacy), 3);
  EXPECT_EQ(kind(0x36, legacy), 0) << "PASID-based IOTLB without scalable mode";
  EXPECT_EQ(kind(0x37, legacy), 0);
  EXPECT_EQ(kind(0x8, legacy), 0);
  VtdDescriptorRules scalable;
  scalable.scalable = true;
  EXPECT_EQ(kind(0x36, scalable), 6);
  EXPECT_EQ(kind(0x7, scalable), 7) << "PASID cache of a domain";
  EXPECT_EQ(kind(0x8, scalable), 8);
  scalable.device_iotlb = false;
  EXPECT_EQ(kind(0x3, scalable), 0) << "device TLBs without ECAP.DT";
  EXPECT_EQ(kind(0x8, scalable), 0);
  for (const std::uint64_t low : {0x0ULL, 0x01ULL, 0x02ULL, 0x06ULL, 0x16ULL, 0x27ULL, 0x9ULL, 0xfULL, 0x201ULL})
    EXPECT_EQ(kind(low, scalable), 0) << "type or granularity that does not exist: " << low;
}

TEST(VtdDescriptor, AMaskBeyondWhatIsOfferedIsAnError) {
  VtdDescriptorRules rules;
  rules.address_mask_max = 9;
  EXPECT_TRUE(decode_descriptor({0x32, 9, 0, 0}, rules));
  EXPECT_FALSE(decode_descriptor({0x32, 10, 0, 0}, rules));
  EXPECT_TRUE(decode_descriptor({0x22, 10, 0, 0}, rules)) << "the mask counts for the page scope only";
}

TEST(VtdDescriptor, APageScopeNamesTheNaturallyAlignedBlock) {
  VtdDescriptorRules rules;
  rules.address_mask_max = 63;
  const auto block = [&](std::uint64_t address, std::uint64_t mask) {
    const auto d = decode_descriptor({0x32, address | mask, 0, 0}, rules);
    return std::pair{d->first_address(), d->last_address()};
  };
  using Block = std::pair<std::uint64_t, std::uint64_t>;
  EXPECT_EQ(block(0x5000, 0), (Block{0x5000, 0x5fff}));
  EXPECT_EQ(block(0x5000, 2), (Block{0x4000, 0x7fff}));
  EXPECT_EQ(block(0x5000, 51), (Block{0, ~std::uint64_t{0} >> 1}));
  EXPECT_EQ(block(0x5000, 52), (Block{0, ~std::uint64_t{0}}));
  EXPECT_EQ(block(0x5000, 63), (Block{0, ~std::uint64_t{0}}));
}

// A queue of 256-bit descriptors: each kind passes, the device-TLB ones need nothing, waits come in order; the tail
// counts whole descriptors.
TEST(VtdQueue, HoldsDescriptorsOf256Bits) {
  const GuestRam ram{16U << 20};
  GuestMemory memory;
  ASSERT_TRUE(memory.add(ram.config()));
  struct Errors : VtdEvents {
    int errors = 0;
    void queue_error(std::uint64_t) noexcept override { ++errors; }
  } events;
  VtdConfig config;
  config.capabilities.scalable = true;
  config.capabilities.first_level = true;
  Vtd unit{memory, config, events};
  constexpr std::uint64_t queue = 0x20000;
  constexpr std::uint64_t status = 0x30000;
  ASSERT_TRUE(unit.set_queue(queue | 1U << 11));
  std::uint64_t tail = 0;
  const auto enqueue = [&](const VtdRawDescriptor& raw) {
    for (std::size_t i = 0; i < 4; ++i) ram.store(queue + tail + i * 8, raw[i]);
    tail = (tail + 32) % 4096;
  };
  for (const std::uint64_t low : {0x11ULL, 0x12ULL, 0x3ULL, 0x4ULL, 0x26ULL, 0x37ULL, 0x8ULL}) enqueue({low, 0, 0, 0});
  enqueue({0x25 | 9ULL << 32, status, 0, 0});
  EXPECT_EQ(unit.write_tail(tail), Progress::done);
  EXPECT_EQ(events.errors, 0);
  EXPECT_EQ(ram.load(status), 9U);
  EXPECT_EQ(unit.head(), tail);
  EXPECT_EQ(unit.stats().descriptors, 8U);
  EXPECT_EQ(unit.write_tail(tail + 16), Progress::done);
  EXPECT_EQ(events.errors, 1) << "a tail in the middle of a descriptor";
  EXPECT_EQ(unit.clear_queue_error(), Progress::done);
  enqueue({0x25 | 10ULL << 32, status, 0, 1});
  EXPECT_EQ(unit.write_tail(tail), Progress::done);
  EXPECT_EQ(events.errors, 2) << "the upper half is reserved";
  EXPECT_EQ(ram.load(status), 9U);
  EXPECT_FALSE(Vtd(memory, VtdConfig{}, events).set_queue(queue | 1U << 11)) << "wide ones need scalable mode";
}

// Context-cache invalidations: the function mask ignores function bits from bit 2 down.
TEST(VtdContextCache, TheFunctionMaskSaysWhichFunctionsAreMeant) {
  const GuestRam ram{16U << 20};
  GuestMemory memory;
  ASSERT_TRUE(memory.add(ram.config()));
  VtdEvents events;
  for (const std::uint64_t mask : {0ULL, 1ULL, 2ULL, 3ULL}) {
    std::array<RecordingTarget, 8> hosts;
    Vtd unit{memory, VtdConfig{}, events};
    VtdGuest guest{ram, unit};
    ram.store(VtdGuest::root, 0);
    guest.start();
    for (std::uint16_t function = 0; function < 8; ++function)
      ASSERT_TRUE(unit.add_endpoint(static_cast<std::uint16_t>(0x10 | function), std::nullopt, &hosts[function]));
    const std::uint64_t table = guest.new_table();
    for (std::uint16_t function = 0; function < 8; ++function)
      guest.set_context(static_cast<std::uint16_t>(0x10 | function), table, 3, 1);
    constexpr std::uint64_t named = 0x12;
    guest.enqueue(0x31 | 1 << 16 | named << 32 | mask << 48, 0);
    guest.ring();
    unit.finish();
    constexpr std::array<unsigned, 4> ignored{0, 4, 6, 7};
    for (std::uint16_t function = 0; function < 8; ++function) {
      const bool meant = (function & ~ignored[mask]) == (2U & ~ignored[mask]);
      EXPECT_EQ(unit.domain_of(static_cast<std::uint16_t>(0x10 | function), std::nullopt) != nullptr, meant)
          << "mask " << mask << ", function " << function;
    }
    for (std::uint16_t function = 0; function < 8; ++function)
      ASSERT_TRUE(unit.remove_endpoint(static_cast<std::uint16_t>(0x10 | function), std::nullopt));
  }
}

}  // namespace
}  // namespace iovane::viommu
