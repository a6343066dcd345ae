// Discards, unmaps and touches of one page against pins of its neighbours in the same chunk, checked byte by byte
// through a real pin: what a device reads is what the address holds.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <iostream>
#include <stop_token>
#include <thread>

#include "pinning/map_cache.hpp"
#include "pinning/staleness_monitor.hpp"
#include "pinning/uring_provider.hpp"

namespace iovane::pinning {
namespace {

constexpr std::size_t os_page = 4096;
constexpr std::uint64_t rounds_min = 100;

std::byte device_reads(io_uring& ring, const Region& region, std::uint64_t address, std::array<int, 2> pipe_ends) {
  io_uring_sqe* sqe = io_uring_get_sqe(&ring);
  io_uring_prep_write_fixed(sqe, pipe_ends[1], reinterpret_cast<void*>(address), 1, 0,
                            static_cast<int>(UringProvider::buffer_index(region.handle)));
  io_uring_submit_and_wait(&ring, 1);
  io_uring_cqe* cqe = nullptr;
  io_uring_wait_cqe(&ring, &cqe);
  const bool ok = cqe->res == 1;
  io_uring_cqe_seen(&ring, cqe);
  std::byte seen{};
  if (!ok || read(pipe_ends[0], &seen, 1) != 1) ADD_FAILURE() << "the fixed write failed";
  return seen;
}

// Disabled: under load it aborts or hangs on a two-core machine; the cause (the monitor or the test) is not known yet.
TEST(StalenessStress, WhatADeviceReadsIsWhatTheAddressHolds) {
  auto provider = UringProvider::open({.buffers = 256});
  if (!provider) GTEST_SKIP() << provider.error().message();
  auto monitor = StalenessMonitor::open();
  if (!monitor) GTEST_SKIP() << monitor.error().message();
  PinBudget budget;
  auto opened = MapCache::open(**provider, budget, {.chunk = Bytes{65536}}, monitor->get());
  ASSERT_TRUE(opened);
  MapCache& cache = **opened;
  auto* room =
      static_cast<std::byte*>(mmap(nullptr, 32 * os_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(room, MAP_FAILED);
  auto* chunk = reinterpret_cast<std::byte*>((reinterpret_cast<std::uintptr_t>(room) + 65535) & ~std::uintptr_t{65535});
  std::array<int, 2> ends{};
  ASSERT_EQ(pipe(ends.data()), 0);

  // The neighbour: pins the chunk again as soon as it was dropped, in the middle of the discards.
  std::jthread neighbour{[&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      const auto lease = cache.acquire(*MemoryRange::of(chunk + 9 * os_page, Bytes{8}), Access::read_write);
      if (!lease) std::this_thread::yield();
    }
  }};
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds{2500};
  std::uint64_t rounds = 0;
  std::uint64_t stale = 0;
  std::uint64_t refused = 0;
  std::byte* page = chunk + 3 * os_page;
  // On a busy machine a round can take many milliseconds: at least so many, however long that is.
  while (std::chrono::steady_clock::now() < until || rounds <= rounds_min) {
    const std::byte mark{static_cast<unsigned char>(++rounds % 251)};
    if (rounds % 3 == 0) {
      // In one step, so that the neighbour cannot take the address in between.
      ASSERT_EQ(mmap(page, os_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), page);
    } else {
      ASSERT_EQ(syscall(SYS_madvise, page, os_page, MADV_DONTNEED), 0);
    }
    *page = mark;
    const auto lease = cache.acquire(*MemoryRange::of(page, Bytes{1}), Access::read_write);
    if (!lease) {
      // busy: the neighbour's discards never left a gap. entry_limit: the neighbour was interrupted inside a lookup for
      // so long that 256 regions had to wait for it.
      ASSERT_TRUE(lease.error().code == Errc::busy || lease.error().code == Errc::entry_limit)
          << lease.error().message();
      ++refused;
      continue;
    }
    if (device_reads((*provider)->ring(), lease->region(), lease->address(), ends) != mark) ++stale;
  }
  neighbour.request_stop();
  neighbour.join();
  EXPECT_EQ(stale, 0U) << "of " << rounds;
  EXPECT_LT(refused, rounds / 2);
  EXPECT_EQ(cache.stats().regions_lost, 0U);
  RecordProperty("rounds", std::to_string(rounds));
  RecordProperty("late_discards", std::to_string((*monitor)->stats().late_discards));
  std::cout << rounds << " rounds, " << (*monitor)->stats().late_discards << " discards came late\n";
  munmap(room, 32 * os_page);
  close(ends[0]);
  close(ends[1]);
}

}  // namespace
}  // namespace iovane::pinning
