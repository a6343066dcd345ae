// acquire(), release, invalidate and evict of one address space by several threads: while a lease lives its IOVA leads
// to the memory that it was taken for, and in the end nothing is left mapped.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <random>
#include <thread>
#include <vector>

#include "engine/engine_core.hpp"
#include "iovane/engine.hpp"
#include "support/recording_backend.hpp"
#include "support/seed.hpp"

namespace iovane {
namespace {

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t base_address = 0x7f00'0000'0000;
constexpr std::uint64_t pages = 64;

class AcquireStress : public ::testing::Test {
 protected:
  void SetUp() override {
    iovane::testing::RecordingSpace* recorder = nullptr;
    engine = EngineAccess::open(std::make_unique<iovane::testing::RecordingBackend>(recorder), "recording");
    space = *engine.create_address_space({});
    const auto opened =
        space.open_cache({.chunk = Bytes{4 * page}, .bytes_max = Bytes{pages / 2 * page}, .evict_min = 2});
    ASSERT_TRUE(opened) << opened.error().message();
    auto registered = space.register_memory({reinterpret_cast<void*>(base_address), Bytes{pages * page}, -1, 0});
    ASSERT_TRUE(registered);
    memory = *std::move(registered);
  }

  MemoryPiece draw(std::mt19937_64& random) const {
    const std::uint64_t offset = random() % (pages * page);
    const Bytes length{1 + random() % std::min<std::uint64_t>(3 * page, pages * page - offset)};
    return random() % 4 == 0 ? memory.piece(Bytes{offset}, length) : MemoryPiece{{}, base_address + offset, length};
  }

  void work(std::uint64_t seed, int rounds) {
    std::mt19937_64 random{seed};
    for (int i = 0; i < rounds; ++i) {
      const MemoryPiece piece = draw(random);
      const auto dice = random() % 32;
      if (dice == 0) {
        (void)space.invalidate(piece);
        continue;
      }
      if (dice == 1) {
        (void)space.evict(Bytes{random() % 8 * page});
        continue;
      }
      auto lease = dice < 5 ? space.acquire_portable(piece) : space.acquire(piece);
      if (!lease) {
        // Everything in use, or evicted by the others faster than it was pinned.
        const Errc code = lease.error().code;
        if (code != Errc::memlock_exceeded && code != Errc::busy) {
          ADD_FAILURE() << lease.error().message();
          return;
        }
        refused.fetch_add(1, std::memory_order_relaxed);
        continue;
      }
      if (dice < 16) {
        const auto found = space.find(lease->iova());
        if (!found) {
          ADD_FAILURE() << "a leased IOVA is not mapped: " << found.error().message();
          return;
        }
        const std::uint64_t into = lease->iova().value - found->range.start.value;
        EXPECT_EQ(found->memory.offset + into, piece.offset);
        EXPECT_EQ(found->memory.memory.value, piece.memory.value);
        EXPECT_LE(into + lease->length().value, found->range.length().value);
      }
      served.fetch_add(1, std::memory_order_relaxed);
    }
  }

  Engine engine;
  AddressSpace space;
  Memory memory;
  std::atomic<std::uint64_t> served{0};
  std::atomic<std::uint64_t> refused{0};
};

TEST_F(AcquireStress, ALeasedIovaLeadsToItsMemoryAndNothingIsLeft) {
  const std::uint64_t seed = test::seed();
  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < 3; ++t) threads.emplace_back([this, seed, t] { work(seed + t, 8000); });
  for (std::thread& t : threads) t.join();
  EXPECT_GT(served.load(std::memory_order_relaxed), 10'000U);
  EXPECT_LT(refused.load(std::memory_order_relaxed), served.load(std::memory_order_relaxed) / 4);
  EXPECT_GT(space.cache_stats().evictions, 0U);
  (void)space.evict(Bytes{~std::uint64_t{0}});
  EXPECT_EQ(space.cache_stats().bytes_pinned.value, 0U);
  EXPECT_EQ(space.cache_stats().mappings_lost, 0U);
  EXPECT_EQ(space.stats().live_mappings, 0U);
}

}  // namespace
}  // namespace iovane
