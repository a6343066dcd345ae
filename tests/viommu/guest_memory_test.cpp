#include "viommu/guest_memory.hpp"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <thread>

#include "guest_ram.hpp"

namespace iovane::viommu {
namespace {

using namespace iovane::literals;

TEST(GuestMemory, RefusesWhatIsNotARegion) {
  GuestMemory memory;
  const GuestRam ram{1U << 20};
  const auto code = [&](RegionConfig c) { return memory.add(c).error().code; };
  EXPECT_EQ(code({0, 0_KiB, ram.at(0), -1, 0, false}), Errc::invalid_argument);
  EXPECT_EQ(code({0x800, 4_KiB, ram.at(0), -1, 0, false}), Errc::invalid_argument);
  EXPECT_EQ(code({0, {4095}, ram.at(0), -1, 0, false}), Errc::invalid_argument);
  EXPECT_EQ(code({0, 4_KiB, nullptr, -1, 0, false}), Errc::invalid_argument);
  EXPECT_EQ(code({0, 4_KiB, ram.at(8), -1, 0, false}), Errc::invalid_argument);
  EXPECT_EQ(code({0xffff'ffff'ffff'f000, 8_KiB, ram.at(0), -1, 0, false}), Errc::overflow);
  ASSERT_TRUE(memory.add({0x10000, 64_KiB, ram.at(0), -1, 0, false}));
  EXPECT_EQ(code({0x1f000, 8_KiB, ram.at(0), -1, 0, false}), Errc::invalid_argument) << "overlaps from below";
  EXPECT_EQ(code({0xf000, 8_KiB, ram.at(0), -1, 0, false}), Errc::invalid_argument) << "overlaps from above";
  EXPECT_TRUE(memory.add({0x20000, 4_KiB, ram.at(0x10000), -1, 0, false})) << "touching is fine";
}

TEST(GuestMemory, ReadsAcrossAdjacentRegionsAndRefusesHoles) {
  GuestMemory memory;
  const GuestRam low{0x1000, 0x1000};
  const GuestRam high{0x1000, 0x2000};
  ASSERT_TRUE(memory.add(low.config()));
  ASSERT_TRUE(memory.add(high.config()));
  const auto view = memory.view();
  std::array<std::byte, 16> in{};
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<std::byte>(i + 1);
  ASSERT_TRUE(view.write(0x1ff8, in));
  std::array<std::byte, 16> out{};
  ASSERT_TRUE(view.read(0x1ff8, out));
  EXPECT_EQ(in, out);
  EXPECT_EQ(view.read_le64(0x2000), 0x100f'0e0d'0c0b'0a09U);
  EXPECT_EQ(view.read_be64(0x2000), 0x090a'0b0c'0d0e'0f10U);
  EXPECT_EQ(view.read_le64(0x2001), std::nullopt) << "misaligned";
  EXPECT_FALSE(view.read(0x2ff8, out)) << "runs out of RAM";
  EXPECT_FALSE(view.read(0xff8, out)) << "begins before it";
  EXPECT_EQ(view.table(0x3000), nullptr);
  EXPECT_EQ(view.next_region_start(0x1fff), 0x2000U);
  EXPECT_EQ(view.next_region_start(0x2000), std::nullopt);
}

TEST(GuestMemory, TheLastPageOfTheAddressSpaceIsReachable) {
  GuestMemory memory;
  const GuestRam top{0x1000, 0xffff'ffff'ffff'f000};
  ASSERT_TRUE(memory.add(top.config()));
  const auto view = memory.view();
  std::array<std::byte, 8> bytes{};
  EXPECT_TRUE(view.read(0xffff'ffff'ffff'fff8, bytes));
  std::array<std::byte, 16> wraps{};
  EXPECT_FALSE(view.read(0xffff'ffff'ffff'fff8, wraps));
}

TEST(GuestMemory, ReadOnlyRegionsAreNotWritten) {
  GuestMemory memory;
  const GuestRam rom{0x1000};
  auto config = rom.config();
  config.read_only = true;
  ASSERT_TRUE(memory.add(config));
  EXPECT_FALSE(memory.view().write_le32(0, 1));
  EXPECT_EQ(rom.load(0), 0U);
}

TEST(GuestMemory, MapsADescriptorThatHasNoAddress) {
  const int fd = ::memfd_create("guest", MFD_CLOEXEC);
  ASSERT_GE(fd, 0);
  ASSERT_EQ(::ftruncate(fd, 0x3000), 0);
  GuestMemory memory;
  EXPECT_EQ(memory.add({0, {0x3000}, nullptr, fd, 0x1000, false}).error().code, Errc::invalid_argument)
      << "the file is too short: reading it would be a SIGBUS";
  const auto id = memory.add({0x8000, {0x2000}, nullptr, fd, 0x1000, false});
  ASSERT_TRUE(id);
  ASSERT_TRUE(memory.view().write_le32(0x8000, 0x12345678));
  std::uint32_t in_file = 0;
  ASSERT_EQ(::pread(fd, &in_file, 4, 0x1000), 4);
  EXPECT_EQ(in_file, 0x12345678U);
  EXPECT_TRUE(memory.remove(*id));
  EXPECT_EQ(memory.remove(*id).error().code, Errc::not_found);
  ::close(fd);
}

// Readers look while regions come and go; a removed region's memory is made inaccessible at once, so a reader that
// still used it would die.
TEST(GuestMemory, RemoveWaitsForThoseWhoStillLook) {
  GuestMemory memory;
  const GuestRam steady{0x10000};
  ASSERT_TRUE(memory.add(steady.config()));
  std::atomic<bool> stop{false};
  std::vector<std::thread> readers;
  for (int t = 0; t < 2; ++t)
    readers.emplace_back([&, t] {
      GuestMemory::Reader own{memory};
      // relaxed: a flag.
      while (!stop.load(std::memory_order_relaxed)) {
        const auto view = t == 0 ? memory.view() : own.view();
        const auto inner = t == 0 ? memory.view() : own.view();
        ASSERT_TRUE(inner.read_le64(0x8).has_value());
        ASSERT_TRUE(view.read_le64(0x8).has_value());
        for (std::uint64_t gpa = 0x100000; gpa < 0x110000; gpa += 0x800)
          if (const auto word = view.read_le64(gpa); word) {
            ASSERT_EQ(*word, 0U);
          }
      }
    });
  for (int round = 0; round < 25; ++round) {
    void* page = ::mmap(nullptr, 0x10000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(page, MAP_FAILED);
    const auto id = memory.add({0x100000, {0x10000}, static_cast<std::byte*>(page), -1, 0, false});
    ASSERT_TRUE(id);
    std::this_thread::yield();
    ASSERT_TRUE(memory.remove(*id));
    ASSERT_EQ(::munmap(page, 0x10000), 0);
  }
  stop.store(true, std::memory_order_relaxed);
  for (auto& reader : readers) reader.join();
}

}  // namespace
}  // namespace iovane::viommu
