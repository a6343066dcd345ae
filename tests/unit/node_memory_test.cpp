// Built twice: as it is, and with jemalloc in the process (IOVANE_TEST_JEMALLOC).
#include "base/node_memory.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "base/fault_point.hpp"
#include "base/slab.hpp"

namespace iovane::base {
namespace {

#ifdef IOVANE_TEST_JEMALLOC
constexpr auto expected_provider = NodeMemory::Provider::jemalloc;
#define IOVANE_TEST_SUITE NodeMemoryOnJemalloc
#else
constexpr auto expected_provider = NodeMemory::Provider::mmap;
#define IOVANE_TEST_SUITE NodeMemoryOnMmap
#endif

const Topology& machine() {
  static const Topology topology = Topology::load();
  return topology;
}

TEST(IOVANE_TEST_SUITE, UsesJemallocWhereTheProcessHasIt) {
  const auto memory = NodeMemory::create(machine(), 0);
  ASSERT_TRUE(memory) << memory.error().message();
  EXPECT_EQ(memory->provider(), expected_provider);
  const auto asked = NodeMemory::create(machine(), 0, NodeMemory::Provider::jemalloc);
  EXPECT_EQ(asked.error().code, expected_provider == NodeMemory::Provider::jemalloc ? Errc::ok : Errc::unsupported);
  EXPECT_EQ(NodeMemory::create(machine(), 0, NodeMemory::Provider::mmap)->provider(), NodeMemory::Provider::mmap);
}

TEST(IOVANE_TEST_SUITE, RefusesANodeThatDoesNotExist) {
  EXPECT_EQ(NodeMemory::create(machine(), machine().node_count()).error().code, Errc::not_found);
}

TEST(IOVANE_TEST_SUITE, GivesAlignedMemoryThatCanBeUsedAndGivenBack) {
  for (const auto provider : {NodeMemory::Provider::automatic, NodeMemory::Provider::mmap}) {
    for (unsigned node = 0; node < machine().node_count(); ++node) {
      auto memory = *NodeMemory::create(machine(), node, provider);
      for (const std::size_t bytes : {1UL, 4096UL, 5000UL, 1UL << 20, (2UL << 20) + 1, 9UL << 20}) {
        for (const std::size_t alignment : {64UL, 4096UL, 65536UL, 2UL << 20}) {
          void* piece = memory.allocate(bytes, alignment);
          ASSERT_NE(piece, nullptr);
          EXPECT_EQ(reinterpret_cast<std::uintptr_t>(piece) % alignment, 0U);
          std::memset(piece, 0x5a, bytes);
          memory.release(piece, bytes, alignment);
        }
      }
    }
  }
}

TEST(IOVANE_TEST_SUITE, PiecesDoNotOverlap) {
  auto memory = *NodeMemory::create(machine(), 0);
  std::vector<unsigned char*> pieces;
  constexpr std::size_t bytes = 12288;
  for (unsigned n = 0; n < 100; ++n) {
    pieces.push_back(static_cast<unsigned char*>(memory.allocate(bytes, 64)));
    ASSERT_NE(pieces.back(), nullptr);
    std::memset(pieces.back(), static_cast<int>(n), bytes);
  }
  for (unsigned n = 0; n < 100; ++n) {
    EXPECT_EQ(pieces[n][0], n);
    EXPECT_EQ(pieces[n][bytes - 1], n);
    memory.release(pieces[n], bytes, 64);
  }
}

TEST(IOVANE_TEST_SUITE, TellsThatThereIsNone) {
  auto memory = *NodeMemory::create(machine(), 0);
  EXPECT_EQ(memory.allocate(~std::size_t{0}, 64), nullptr);
  EXPECT_EQ(memory.allocate(std::size_t{1} << 60, 64), nullptr);
  arm_fault(static_cast<std::uint32_t>(FaultKind::allocation), 1);
  EXPECT_EQ(memory.allocate(4096, 64), nullptr);
  EXPECT_TRUE(disarm_fault());
}

TEST(IOVANE_TEST_SUITE, ServesASlab) {
  auto memory = *NodeMemory::create(machine(), 0);
  auto moved = std::move(memory);
  Slab<std::uint64_t> slab{100'000, moved};
  std::vector<std::uint64_t*> values;
  for (std::uint64_t n = 0; n < 100'000; ++n) values.push_back(slab.acquire(n));
  for (std::uint64_t n = 0; n < 100'000; ++n) ASSERT_EQ(*values[n], n);
}

TEST(IOVANE_TEST_SUITE, MayBeReleasedByAnotherThread) {
  auto memory = *NodeMemory::create(machine(), 0);
  void* piece = memory.allocate(4096, 64);
  std::thread{[&] { memory.release(piece, 4096, 64); }}.join();
  void* next = memory.allocate(4096, 64);
  EXPECT_NE(next, nullptr);
  memory.release(next, 4096, 64);
}

}  // namespace
}  // namespace iovane::base
