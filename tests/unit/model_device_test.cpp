#include "backends/model/simulated_device.hpp"

#include <gtest/gtest.h>

#include <cstring>

#include "backends/model/domain.hpp"
#include "model_support.hpp"

namespace iovane::backends::model {
namespace {

using namespace iovane::literals;

IovaRange span(std::uint64_t start, std::uint64_t bytes) { return {Iova{start}, Iova{start + (bytes - 1)}}; }

class DeviceInDomain : public ::testing::Test {
 protected:
  explicit DeviceInDomain(unsigned iotlb = 64)
      : iommu{.iotlb_entries = iotlb}, device{{.address = "0000:00:03.0"}, iommu}, domain{iommu} {
    domain.join(device);
  }
  ~DeviceInDomain() override { domain.leave(device); }
  int map(std::uint64_t iova, std::byte* memory, std::uint64_t bytes, Access access = Access::read_write) {
    return domain.map(span(iova, bytes), memory, access, true);
  }
  IommuOptions iommu;
  SimulatedDevice device;
  Domain domain;
};

class DeviceWithoutIotlb : public DeviceInDomain {
 protected:
  DeviceWithoutIotlb() : DeviceInDomain{0} {}
};

TEST_F(DeviceInDomain, MovesBytesByIova) {
  TestMemory memory{5 * 4096};
  ASSERT_EQ(map(0x10000, memory.data(), memory.size()), 0);
  const auto sent = pattern(3 * 4096, 1);
  const DmaResult wrote = device.dma_write(Iova{0x10000 + 1000}, sent);
  EXPECT_TRUE(wrote.ok());
  EXPECT_EQ(wrote.bytes, sent.size());
  EXPECT_EQ(std::memcmp(memory.data() + 1000, sent.data(), sent.size()), 0);
  EXPECT_EQ(memory.data()[999], std::byte{0});
  std::vector<std::byte> received(sent.size());
  EXPECT_TRUE(device.dma_read(Iova{0x10000 + 1000}, received).ok());
  EXPECT_EQ(received, sent);
}

TEST_F(DeviceInDomain, StopsAtTheFirstUnmappedByteAndRecordsIt) {
  TestMemory memory{4096};
  ASSERT_EQ(map(0x10000, memory.data(), 4096), 0);
  const auto sent = pattern(8192, 2);
  const DmaResult result = device.dma_write(Iova{0x10800}, sent);
  EXPECT_EQ(result.bytes, 0x800U);
  const DmaFault expected{Iova{0x11000}, Access::write, FaultReason::not_present, &device};
  EXPECT_EQ(result.fault, expected);
  EXPECT_EQ(std::memcmp(memory.data() + 0x800, sent.data(), 0x800), 0);
  EXPECT_EQ(device.take_faults(), std::vector<DmaFault>{expected});
  EXPECT_TRUE(device.take_faults().empty());
  EXPECT_EQ(device.fault_count(), 1U);
}

TEST_F(DeviceInDomain, HonoursAccessRights) {
  TestMemory memory{2 * 4096};
  ASSERT_EQ(map(0x10000, memory.data(), 4096, Access::read), 0);
  ASSERT_EQ(map(0x11000, memory.data() + 4096, 4096, Access::write), 0);
  std::vector<std::byte> bytes(16, std::byte{0xff});
  EXPECT_EQ(device.dma_write(Iova{0x10000}, bytes).fault->reason, FaultReason::no_permission);
  EXPECT_EQ(memory.data()[0], std::byte{0});
  EXPECT_EQ(device.dma_read(Iova{0x11000}, bytes).fault->reason, FaultReason::no_permission);
  EXPECT_TRUE(device.dma_read(Iova{0x10000}, bytes).ok());
  EXPECT_TRUE(device.dma_write(Iova{0x11000}, bytes).ok());
  // A translation that is cached for reading does not allow a write.
  EXPECT_EQ(device.dma_write(Iova{0x10000}, bytes).fault->reason, FaultReason::no_permission);
}

TEST_F(DeviceInDomain, NamesWhyAnAddressCannotBeReached) {
  std::vector<std::byte> bytes(8);
  EXPECT_EQ(device.dma_read(Iova{1ULL << 48}, bytes).fault->reason, FaultReason::outside_aperture);
  EXPECT_EQ(device.dma_read(Iova{~0ULL - 3}, bytes).fault->reason, FaultReason::outside_aperture);
  EXPECT_EQ(device.dma_write(Iova{0xfee00000}, bytes).fault->reason, FaultReason::interrupt_range);
  domain.leave(device);
  EXPECT_EQ(device.dma_read(Iova{0x1000}, bytes).fault->reason, FaultReason::not_attached);
  domain.join(device);
}

TEST_F(DeviceInDomain, KeepsTheNewestFaults) {
  std::vector<std::byte> bytes(1);
  for (std::uint64_t i = 0; i < SimulatedDevice::faults_kept + 10; ++i) {
    EXPECT_FALSE(device.dma_read(Iova{i * 4096}, bytes).ok());
  }
  const auto faults = device.take_faults();
  ASSERT_EQ(faults.size(), SimulatedDevice::faults_kept);
  EXPECT_EQ(faults.front().address.value, 10U * 4096);
  EXPECT_EQ(faults.back().address.value, (SimulatedDevice::faults_kept + 9) * 4096);
  EXPECT_EQ(device.fault_count(), SimulatedDevice::faults_kept + 10);
}

// This is what makes a forgotten invalidation fail a test: the device goes on using what it cached.
TEST_F(DeviceInDomain, UsesStaleTranslationsUntilInvalidated) {
  TestMemory memory{4096};
  ASSERT_EQ(map(0x10000, memory.data(), 4096), 0);
  const auto sent = pattern(64, 3);
  ASSERT_TRUE(device.dma_write(Iova{0x10000}, sent).ok());
  ASSERT_EQ(domain.unmap_without_invalidation(span(0x10000, 4096)), 4096);
  std::memset(memory.data(), 0, 64);
  EXPECT_TRUE(device.dma_write(Iova{0x10000}, sent).ok()) << "still cached";
  EXPECT_EQ(std::memcmp(memory.data(), sent.data(), 64), 0);
  domain.invalidate(span(0x20000, 4096));
  EXPECT_TRUE(device.dma_write(Iova{0x10000}, sent).ok()) << "another range was invalidated";
  domain.invalidate(span(0x10000, 4096));
  EXPECT_FALSE(device.dma_write(Iova{0x10000}, sent).ok());
  EXPECT_GE(device.iotlb_statistics().hits, 2U);
}

TEST_F(DeviceWithoutIotlb, WalksEveryTime) {
  TestMemory memory{4096};
  ASSERT_EQ(map(0x10000, memory.data(), 4096), 0);
  std::vector<std::byte> bytes(8);
  ASSERT_TRUE(device.dma_read(Iova{0x10000}, bytes).ok());
  ASSERT_EQ(domain.unmap_without_invalidation(span(0x10000, 4096)), 4096);
  EXPECT_FALSE(device.dma_read(Iova{0x10000}, bytes).ok());
}

TEST_F(DeviceInDomain, LeavingADomainForgetsItsTranslations) {
  TestMemory memory{4096};
  ASSERT_EQ(map(0x10000, memory.data(), 4096), 0);
  std::vector<std::byte> bytes(8);
  ASSERT_TRUE(device.dma_read(Iova{0x10000}, bytes).ok());
  Domain other{iommu};
  other.join(device);
  domain.forget(device);
  EXPECT_EQ(device.dma_read(Iova{0x10000}, bytes).fault->reason, FaultReason::not_present);
  domain.join(device);
  other.forget(device);
  EXPECT_TRUE(device.dma_read(Iova{0x10000}, bytes).ok());
}

TEST_F(DeviceInDomain, DirtyTrackingSeesEveryWriteOnce) {
  TestMemory memory{4 * 4096};
  ASSERT_EQ(map(0, memory.data(), memory.size()), 0);
  std::vector<std::byte> bytes(8);
  ASSERT_TRUE(device.dma_write(Iova{0x3000}, bytes).ok());
  domain.set_dirty_tracking(true);
  ASSERT_TRUE(device.dma_write(Iova{0x1000}, bytes).ok());
  ASSERT_TRUE(device.dma_write(Iova{0x1100}, bytes).ok());
  ASSERT_TRUE(device.dma_read(Iova{0x2000}, bytes).ok());
  std::vector<IovaRange> dirty;
  const auto record = [&](IovaRange r) { dirty.push_back(r); };
  domain.read_dirty(IovaRange::everything(), true, record);
  EXPECT_EQ(dirty, std::vector{span(0x1000, 4096)});
  dirty.clear();
  ASSERT_TRUE(device.dma_write(Iova{0x1000}, bytes).ok()) << "through the cached translation";
  domain.read_dirty(IovaRange::everything(), true, record);
  EXPECT_EQ(dirty, std::vector{span(0x1000, 4096)});
}

}  // namespace
}  // namespace iovane::backends::model
