// AddressSpace::acquire() on every interface, with a device's DMA as the proof: what is cached is right, what has left
// the cache is out of reach, and memory seen before costs no kernel call.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "backends/uapi/iommufd.hpp"
#include "backends/uapi/vfio.hpp"
#include "conformance/engine_conformance.hpp"
#include "support/seed.hpp"
#include "support/syscall_counter.hpp"
#if defined(IOVANE_TEST_TRACES)
#include "trace/format.hpp"
#endif

namespace iovane::test {
namespace {

using namespace iovane::literals;

class CacheContract : public EngineConformance {
 protected:
  void TearDown() override {
    close_space();
    Conformance::TearDown();
  }
  void open_cache(CacheConfig config = {}) {
    open_space(*kernel_);
    if (HasFatalFailure()) return;
    config.ceiling = low_addresses;
    const auto opened = address_space_.open_cache(config);
    ASSERT_TRUE(opened) << opened.error().message();
  }
  MemoryLease acquire(std::span<std::byte> memory, Access access = Access::read_write) {
    auto lease = address_space_.acquire(MemoryPiece::of(memory), access);
    EXPECT_TRUE(lease) << lease.error().message();
    return lease ? *std::move(lease) : MemoryLease{};
  }
  std::uint64_t unmap_calls() const {
    return kernel_->calls(stage1()                           ? uapi::iommufd::HwptInvalidate::request
                          : GetParam() == Interface::iommufd ? uapi::iommufd::IoasUnmap::request
                                                             : uapi::vfio::Type1DmaUnmap::request);
  }
  std::uint64_t page_bytes() const { return os_page_bytes(); }
  /// Nothing waits for a lease any more: what the monitor saw has been unmapped.
  bool drained() {
    for (int i = 0; i < 2000; ++i) {
      if (address_space_.cache_stats().retired == 0) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds{2});
    }
    return false;
  }

  // The witness has a page of its own high up, of which the engine's allocator knows nothing.
  static constexpr Iova low_addresses{0xffff'ffff};
};

TEST_P(CacheContract, memory_seen_before_costs_no_kernel_call_and_is_right) {
  open_cache({.chunk = Bytes{2 * page_bytes()}});
  if (HasFatalFailure()) return;
  const Memory memory{8};
  std::vector<Iova> first;
  for (std::size_t i = 0; i < 8; ++i) {
    const auto lease = acquire(memory.page(i));
    first.push_back(lease.iova());
    EXPECT_TRUE(reads(*witness_, lease.iova(), memory.page(i)));
    EXPECT_TRUE(writes(*witness_, lease.iova(), memory.page(i)));
  }
  const std::uint64_t before = kernel_->calls();
  for (std::size_t i = 0; i < 8; ++i) {
    const auto lease = acquire(memory.page(i).subspan(100, 60));  // of any alignment
    EXPECT_EQ(lease.iova().value, first[i].value + 100);
    EXPECT_EQ(lease.length().value, 60U);
  }
  EXPECT_EQ(kernel_->calls(), before);
  const auto lease = acquire(memory.page(5).subspan(256));
  EXPECT_TRUE(reads(*witness_, lease.iova(), memory.page(5).subspan(256)));
}

TEST_P(CacheContract, an_evicted_page_is_out_of_reach_and_a_cached_one_still_right) {
  open_cache({.chunk = Bytes{page_bytes()}, .bytes_max = Bytes{4 * page_bytes()}, .evict_min = 1});
  if (HasFatalFailure()) return;
  std::vector<Memory> memories;
  for (unsigned i = 0; i < 6; ++i) memories.emplace_back(1, 100 + i);
  std::vector<Iova> where;
  for (const Memory& m : memories) {
    auto lease = acquire(m.page(0));
    where.push_back(lease.iova());
    lease.release();
  }
  EXPECT_GE(address_space_.cache_stats().evictions, 2U);
  EXPECT_LE(address_space_.cache_stats().bytes_pinned.value, 4 * page_bytes());
  const auto kept = acquire(memories[5].page(0));
  (void)address_space_.evict(Bytes{~std::uint64_t{0}});
  EXPECT_TRUE(reads(*witness_, kept.iova(), memories[5].page(0)));
  EXPECT_TRUE(writes(*witness_, kept.iova(), memories[5].page(0)));
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_TRUE(cannot_read(*witness_, where[i], memories[i].page(0))) << i;
    EXPECT_TRUE(cannot_write(*witness_, where[i], memories[i].page(0))) << i;
  }
  EXPECT_EQ(address_space_.cache_stats().bytes_pinned.value, page_bytes());
}

TEST_P(CacheContract, invalidated_memory_is_out_of_reach_unless_in_use_and_then_when_released) {
  open_cache({.chunk = Bytes{page_bytes()}});
  if (HasFatalFailure()) return;
  Memory memory{2};
  auto idle = acquire(memory.page(0));
  auto used = acquire(memory.page(1));
  const Iova idle_at = idle.iova();
  const Iova used_at = used.iova();
  idle.release();
  EXPECT_EQ(address_space_.invalidate(MemoryPiece::of(memory.bytes())), 2U);
  EXPECT_TRUE(cannot_read(*witness_, idle_at, memory.page(0)));
  EXPECT_TRUE(reads(*witness_, used_at, memory.page(1))) << "a lease keeps its mapping";
  MemoryLease again;
  if (spapr_v2()) {  // whose registrations go by address: the old one stands in the way
    const auto refused = address_space_.acquire(MemoryPiece::of(memory.page(1)), Access::read_write);
    EXPECT_EQ(refused.error().code, Errc::busy) << refused.error().message();
  } else {
    again = acquire(memory.page(1));
    EXPECT_NE(again.iova(), used_at) << "never handed out again";
  }
  EXPECT_EQ(address_space_.cache_stats().stale_in_use, 1U);
  used.release();
  (void)address_space_.evict(Bytes{1});
  EXPECT_TRUE(cannot_read(*witness_, used_at, memory.page(1)));
  if (spapr_v2()) again = acquire(memory.page(1));
  EXPECT_TRUE(reads(*witness_, again.iova(), memory.page(1)));
}

// The seed's storage stack: buffers come from a small pool, in any order, cut anywhere.
TEST_P(CacheContract, a_replay_over_a_small_pool_makes_no_kernel_call_after_warm_up) {
  open_cache();
  if (HasFatalFailure()) return;
  const Memory pool{64};
  std::mt19937_64 random{seed()};
  const auto draw = [&] {
    const std::size_t at = random() % (pool.length().value - 512);
    return pool.bytes().subspan(at, 1 + random() % std::min<std::size_t>(16384, pool.length().value - at));
  };
  std::vector<MemoryLease> leases(8);
  for (std::size_t i = 0; i < 64; ++i) acquire(pool.page(i)).release();
  const std::uint64_t before = kernel_->calls();
  std::uint64_t by_witness = 0;  // driving a real device's registers takes calls, too
  for (int i = 0; i < 20'000; ++i) {
    const auto buffer = draw();
    const auto count = address_space_.acquire_all(MemoryPiece::of(buffer), Access::read_write, leases);
    ASSERT_TRUE(count) << count.error().message();
    if (i % 5000 == 0) {
      const std::uint64_t so_far = kernel_->calls();
      EXPECT_TRUE(reads(*witness_, leases[0].iova(), buffer.first(std::min<std::size_t>(8, buffer.size()))));
      by_witness += kernel_->calls() - so_far;
    }
    for (std::size_t l = 0; l < *count; ++l) leases[l].release();
  }
  EXPECT_EQ(kernel_->calls() - by_witness, before);
  EXPECT_EQ(address_space_.cache_stats().evictions, 0U);
}

#if defined(IOVANE_TEST_TRACES)
// What a real guest's disk did, as a storage stack's buffers: each recorded map is an acquisition of the memory that it
// named, each unmap a release. The recorded frames become pages of one pool.
TEST_P(CacheContract, a_recorded_disk_makes_no_kernel_call_after_warm_up) {
  const auto read = trace::read_file(IOVANE_TEST_TRACES "/rr4k.iovtrace");
  if (!read && read.error().os_errno == ENOENT) GTEST_SKIP() << read.error().message() << " (tools/lab run --file)";
  ASSERT_TRUE(read) << read.error().message();
  std::map<std::uint64_t, std::uint64_t> pages;  // recorded frame -> page of the pool
  for (const auto& event : read->events)
    if (event.kind == trace::EventKind::map)
      for (std::uint64_t at = 0; at < event.range.length().value; at += trace::granule)
        pages.try_emplace(event.physical + at, pages.size());
  ASSERT_LT(pages.size(), 4096U);
  const Memory pool{(pages.size() * trace::granule + page_bytes() - 1) / page_bytes()};
  open_cache();
  if (HasFatalFailure()) return;

  std::map<std::uint64_t, MemoryLease> live;  // by recorded IOVA
  std::uint64_t acquired = 0;
  std::uint64_t wrong = 0;
  const auto replay = [&] {
    for (const auto& event : read->events) {
      for (std::uint64_t at = 0; at < event.range.length().value; at += trace::granule) {
        const std::uint64_t iova = event.range.start.value + at;
        if (event.kind == trace::EventKind::unmap) {
          live.erase(iova);
          continue;
        }
        const std::uint64_t offset = pages.at(event.physical + at) * trace::granule;
        auto lease = address_space_.acquire_portable(MemoryPiece::of(pool.bytes().subspan(offset, trace::granule)));
        ++acquired;
        wrong += lease ? 0 : 1;
        if (lease) live.insert_or_assign(iova, *std::move(lease));
      }
    }
    live.clear();
  };
  replay();  // warm-up
  const std::uint64_t before = kernel_->calls();
  const CacheStats warm = address_space_.cache_stats();
  replay();
  EXPECT_EQ(wrong, 0U);
  EXPECT_EQ(kernel_->calls(), before) << "by the seam below the backends";
  EXPECT_EQ(address_space_.cache_stats().misses, warm.misses);
  EXPECT_EQ(address_space_.cache_stats().evictions, 0U);

  // Short leases, as one request takes them, and the kernel's own entry as the witness: the maps above allocate.
  std::vector<std::uint64_t> offsets;
  for (const auto& event : read->events)
    if (event.kind == trace::EventKind::map) offsets.push_back(pages.at(event.physical) * trace::granule);
  std::uint64_t sum = 0;
  const auto system_calls = SyscallCounter::of([&] {
    for (const std::uint64_t offset : offsets) {
      const auto lease = address_space_.acquire(MemoryPiece::of(pool.bytes().subspan(offset, trace::granule)));
      if (lease)
        sum += lease->iova().value & 1U;
      else
        ++wrong;
    }
  });
  EXPECT_EQ(wrong + sum, 0U);
  if (system_calls) {
    EXPECT_EQ(system_calls->calls, 0U) << "the last one was system call " << system_calls->last;
  }
  std::printf("%zu pages, %llu acquisitions twice: %llu misses, then %llu kernel calls; %zu hits: %lld system calls\n",
              pages.size(), static_cast<unsigned long long>(acquired / 2), static_cast<unsigned long long>(warm.misses),
              static_cast<unsigned long long>(kernel_->calls() - before), offsets.size(),
              system_calls ? static_cast<long long>(system_calls->calls) : -1LL);
  const auto lease = acquire(pool.page(0));
  EXPECT_TRUE(reads(*witness_, lease.iova(), pool.page(0)));
}
#endif

TEST_P(CacheContract, an_eviction_shares_kernel_calls_between_neighbours) {
  open_cache({.chunk = Bytes{page_bytes()}});
  if (HasFatalFailure()) return;
  const Memory memory{32};
  for (std::size_t i = 0; i < 32; ++i) acquire(memory.page(i)).release();
  const std::uint64_t before = unmap_calls();
  EXPECT_EQ(address_space_.evict(Bytes{~std::uint64_t{0}}), memory.length());
  const std::uint64_t calls = unmap_calls() - before;
  if (version_1())
    EXPECT_EQ(calls, 32U) << "version 1 unmaps one mapping per call";
  else
    EXPECT_LE(calls, 16U);
}

TEST_P(CacheContract, registered_memory_is_acquired_by_offset) {
  open_cache();
  if (HasFatalFailure()) return;
  const Memory memory{64};
  auto registered = address_space_.register_memory({memory.data(), memory.length(), -1, 0});
  ASSERT_TRUE(registered) << registered.error().message();
  const Bytes pinned = machine_->kernel().memlock().pinned;
  Iova where{};
  {
    const auto lease = address_space_.acquire(registered->piece(Bytes{3 * page_bytes() + 16}, Bytes{page_bytes()}),
                                              Access::read_write);
    ASSERT_TRUE(lease) << lease.error().message();
    where = lease->iova();
    EXPECT_TRUE(reads(*witness_, where, memory.bytes().subspan(3 * page_bytes() + 16)));
  }
  if (by_cdev()) {
    EXPECT_EQ(machine_->kernel().memlock().pinned, pinned) << "a copy shares the pin";
    EXPECT_EQ(address_space_.cache_stats().bytes_pinned.value, 0U);
  }
  EXPECT_FALSE(address_space_.acquire(registered->piece(memory.length(), Bytes{1})));
  const MemoryPiece last = registered->piece(Bytes{memory.length().value - 1}, Bytes{1});
  EXPECT_TRUE(address_space_.acquire(last));
  *registered = iovane::Memory{};
  EXPECT_TRUE(cannot_read(*witness_, where, memory.bytes().subspan(3 * page_bytes() + 16)));
  EXPECT_EQ(address_space_.acquire(last).error().code, Errc::stale_handle);
}

TEST_P(CacheContract, the_last_device_goes_although_memory_is_cached) {
  open_cache({.chunk = Bytes{page_bytes()}});
  if (HasFatalFailure()) return;
  const Memory memory{1};
  ASSERT_TRUE(acquire(memory.page(0)));
  witness_.reset();
  const auto gone = address_space_.detach(attached_.id.value);
  ASSERT_TRUE(gone) << gone.error().message();
  const auto back = address_space_.attach({.pci_address = machine_->devices().front()});
  ASSERT_TRUE(back) << back.error().message();
  attached_.id = DeviceId{back->id};
  attached_.device_fd = back->device_fd;
  restart_device();
  if (HasFatalFailure()) return;
  const MemoryLease lease = acquire(memory.page(0));
  EXPECT_TRUE(reads(*witness_, lease.iova(), memory.page(0)));
}

TEST_P(CacheContract, populated_memory_is_registered_and_reported) {
  open_cache();
  if (HasFatalFailure()) return;
  const std::size_t bytes = 64 * page_bytes();
  void* const room = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(room, MAP_FAILED);
  {
    Bytes seen{};
    auto registered = address_space_.register_memory({room, Bytes{bytes}, -1, 0},
                                                     {.threads = 2, .progress = [&](Bytes done, Bytes total) {
                                                        EXPECT_EQ(total.value, bytes);
                                                        seen = done;
                                                        return true;
                                                      }});
    ASSERT_TRUE(registered) << registered.error().message();
    EXPECT_EQ(seen.value, bytes);
    EXPECT_TRUE(address_space_.acquire(registered->piece({}, Bytes{1})));
    const auto cancelled =
        address_space_.register_memory({room, Bytes{bytes}, -1, 0}, {.progress = [](Bytes, Bytes) { return false; }});
    EXPECT_EQ(cancelled.error().code, Errc::cancelled);
  }
  close_space();
  ::munmap(room, bytes);
}

TEST_P(CacheContract, remapped_memory_is_seen_by_the_monitor) {
  open_space(*kernel_);
  if (HasFatalFailure()) return;
  const auto opened = address_space_.open_cache(
      {.chunk = Bytes{page_bytes()}, .ceiling = low_addresses, .staleness = Staleness::monitored_except_fork});
  if (!opened && opened.error().code == Errc::permission) GTEST_SKIP() << opened.error().message();
  ASSERT_TRUE(opened) << opened.error().message();
  const Memory memory{1, 5};
  const std::vector<std::byte> before{memory.bytes().begin(), memory.bytes().end()};
  const Iova old = acquire(memory.page(0)).iova();
  machine_->pages_leave(memory.page(0));
  ASSERT_EQ(::mmap(memory.data(), page_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
            memory.data());
  std::fill(memory.bytes().begin(), memory.bytes().end(), std::byte{0x42});
  const auto fresh = acquire(memory.page(0));
  EXPECT_TRUE(reads(*witness_, fresh.iova(), memory.page(0))) << "the device must see what the address holds now";
  EXPECT_TRUE(drained());
  EXPECT_TRUE(cannot_read(*witness_, old, before));
}

// Every way in which an address can get another page, by raw system calls, with the device as the judge.
TEST_P(CacheContract, no_change_of_memory_leaves_a_stale_page_under_the_monitor) {
  open_space(*kernel_);
  if (HasFatalFailure()) return;
  const auto opened = address_space_.open_cache(
      {.chunk = Bytes{page_bytes()}, .ceiling = low_addresses, .staleness = Staleness::monitored});
  if (!opened && opened.error().code == Errc::permission) GTEST_SKIP() << opened.error().message();
  ASSERT_TRUE(opened) << opened.error().message();
  const Memory memory{1, 5};
  const std::size_t length = page_bytes();
  const auto remap = [&](int how) {
    void* const at = memory.data();
    switch (how) {
      case 0:
        EXPECT_EQ(::syscall(SYS_munmap, at, length), 0);
        EXPECT_EQ(::mmap(at, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), at);
        break;
      case 1: EXPECT_EQ(::syscall(SYS_madvise, at, length, MADV_DONTNEED), 0); break;
      case 2: {
        void* const other = ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        *static_cast<std::byte*>(other) = std::byte{1};
        EXPECT_EQ(::mremap(other, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, at), at);
        break;
      }
      default: {
        const long child = ::syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);  // fork(2), which arm64 does not have
        if (child == 0) {
          ::usleep(20'000);
          ::syscall(SYS_exit_group, 0);
        }
        memory.data()[1] = std::byte{9};  // copies the page while the child has it too
        ::waitpid(static_cast<pid_t>(child), nullptr, 0);
      }
    }
  };
  for (int how = 0; how < 4; ++how) {
    (void)acquire(memory.page(0));
    auto used = acquire(memory.page(0));
    const std::vector<std::byte> before{memory.bytes().begin(), memory.bytes().end()};
    if (how < 3) machine_->pages_leave(memory.page(0));
    remap(how);
    std::memset(memory.data(), 0x40 + how, length);
    MemoryLease fresh;
    // sPAPR's registrations go by address: the old pages stand in the way of the new ones. After a fork they are the
    // same.
    const bool in_the_way = spapr_v2() && how < 3;
    if (in_the_way) {
      const auto refused = address_space_.acquire(MemoryPiece::of(memory.page(0)), Access::read_write);
      EXPECT_EQ(refused.error().code, Errc::busy) << refused.error().message();
      EXPECT_TRUE(reads(*witness_, used.iova(), before)) << "who has a lease still reaches what it was for";
    } else {
      fresh = acquire(memory.page(0));
      EXPECT_NE(fresh.iova(), used.iova()) << how;
      EXPECT_TRUE(reads(*witness_, fresh.iova(), memory.page(0))) << "change " << how;
    }
    for (int i = 0; i < 1000 && address_space_.cache_stats().stale_in_use < static_cast<unsigned>(how) + 1; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds{2});
    EXPECT_EQ(address_space_.cache_stats().stale_in_use, static_cast<unsigned>(how) + 1) << "reported while in use";
    const Iova old = used.iova();
    used.release();
    EXPECT_TRUE(drained());
    EXPECT_TRUE(cannot_read(*witness_, old, memory.page(0))) << "change " << how;
    if (!in_the_way) continue;
    EXPECT_TRUE(cannot_read(*witness_, old, before)) << "change " << how;
    fresh = acquire(memory.page(0));
    EXPECT_TRUE(reads(*witness_, fresh.iova(), memory.page(0))) << "change " << how;
  }
}

// A process that may not use userfaultfd learns it when it opens the cache, and is told what would allow it.
TEST_P(CacheContract, opening_says_so_where_the_monitor_is_not_permitted) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root to become somebody who may not";
  open_space(*kernel_);
  if (HasFatalFailure()) return;
  int code = -1;
  std::string text;
  bool explicit_works = false;
  // A thread of its own with its own credentials: raw system calls change those of the calling thread only.
  std::thread{[&] {
    ::syscall(SYS_setresgid, 65534, 65534, 65534);
    ::syscall(SYS_setresuid, 65534, 65534, 65534);
    const auto opened = address_space_.open_cache({.ceiling = low_addresses, .staleness = Staleness::monitored});
    code = static_cast<int>(opened.error().code);
    text = opened.error().detail();
    explicit_works = bool{address_space_.open_cache({.ceiling = low_addresses})};
  }}.join();
  if (code == static_cast<int>(Errc::ok)) GTEST_SKIP() << "this host lets everyone use userfaultfd";
  EXPECT_EQ(code, static_cast<int>(Errc::permission)) << text;
  EXPECT_NE(text.find("userfaultfd"), std::string::npos) << text;
  EXPECT_TRUE(explicit_works) << "the mode without a monitor needs no right, and a refusal leaves nothing behind";
}

// Registered by descriptor: memfd, and huge pages where there are any.
TEST_P(CacheContract, a_registered_file_is_acquired_by_offset) {
  open_cache({.chunk = 64_KiB});
  if (HasFatalFailure()) return;
  for (const bool huge : {false, true}) {
    const std::size_t length = huge ? std::size_t{2} << 20 : 64 * page_bytes();
    const int fd = ::memfd_create("iovane-test", MFD_CLOEXEC | (huge ? MFD_HUGETLB : 0U));
    if (fd < 0) continue;
    void* const view = ::ftruncate(fd, static_cast<off_t>(length)) == 0
                           ? ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
                           : MAP_FAILED;
    if (view == MAP_FAILED) {  // no huge page is free
      ::close(fd);
      continue;
    }
    const std::span<std::byte> bytes{static_cast<std::byte*>(view), length};
    std::fill(bytes.begin(), bytes.end(), huge ? std::byte{0x6d} : std::byte{0x3b});
    {
      auto registered = address_space_.register_memory({nullptr, Bytes{length}, fd, 0});
      // Linux before 6.13, and every container: the same memory by the address it is mapped at.
      if (!registered && registered.error().code == Errc::unsupported)
        registered = address_space_.register_memory({view, Bytes{length}, -1, 0});
      ASSERT_TRUE(registered) << registered.error().message();
      const std::uint64_t offset = length - page_bytes() + 64;
      const auto lease = address_space_.acquire(registered->piece(Bytes{offset}, Bytes{256}), Access::read_write);
      ASSERT_TRUE(lease) << lease.error().message();
      EXPECT_TRUE(reads(*witness_, lease->iova(), bytes.subspan(offset, 256)));
      EXPECT_TRUE(writes(*witness_, lease->iova(), bytes.subspan(offset, 256)));
    }
    ::munmap(view, length);
    ::close(fd);
  }
}

// 64 KiB is what a container gets, 0 what a locked-down one gets, nothing what a service with LimitMEMLOCK=infinity
// gets.
TEST_P(CacheContract, memlock_of_64_KiB_of_0_and_unlimited) {
  if (GetParam() == Interface::spapr_v1 || GetParam() == Interface::spapr_v2)
    GTEST_SKIP() << "sPAPR charges windows and registered memory, not mappings";
  if (stage1())
    GTEST_SKIP() << "stage1 pins 256 KiB for its tables first: stage1_says_when_its_tables_cannot_be_pinned";
  const Memory memory{64};
  for (const Bytes limit : {64_KiB, Bytes{0}}) {
    restart({.memlock = limit});
    ASSERT_NE(machine_, nullptr) << "this machine cannot limit pinned memory";
    open_cache({.chunk = Bytes{page_bytes()}});
    if (HasFatalFailure()) return;
    std::vector<MemoryLease> leases;
    Error refused{};
    for (std::size_t i = 0; i < 64 && !refused; ++i) {
      auto lease = address_space_.acquire(MemoryPiece::of(memory.page(i)));
      if (lease)
        leases.push_back(*std::move(lease));
      else
        refused = lease.error();
    }
    EXPECT_EQ(refused.code, Errc::memlock_exceeded) << limit.value;
    EXPECT_LE(leases.size() * page_bytes(), limit.value);
    EXPECT_FALSE(std::string{refused.detail()}.empty());
    if (!leases.empty()) {
      EXPECT_TRUE(reads(*witness_, leases[0].iova(), memory.page(0)));
    }
    leases.clear();
    if (limit.value != 0) {
      for (std::size_t i = 0; i < 64; ++i) EXPECT_TRUE(acquire(memory.page(i))) << "unused pins make room";
    }
    close_space();
  }
  restart({});
  open_cache({.chunk = Bytes{page_bytes()}});
  if (HasFatalFailure()) return;
  std::vector<MemoryLease> leases;
  for (std::size_t i = 0; i < 64; ++i) leases.push_back(acquire(memory.page(i)));
  for (const MemoryLease& lease : leases) EXPECT_TRUE(lease);
}

TEST_P(CacheContract, stage1_says_when_its_tables_cannot_be_pinned) {
  if (!stage1()) GTEST_SKIP() << "has no tables of its own";
  restart({.memlock = 64_KiB});
  ASSERT_NE(machine_, nullptr) << "this machine cannot limit pinned memory";
  auto backend = open_backend(*kernel_, {.name = std::string{to_string(GetParam())}, .descriptor = {}});
  ASSERT_TRUE(backend) << backend.error().message();
  engine_ = EngineAccess::open(*std::move(backend), std::string{to_string(GetParam())});
  auto space = engine_.create_address_space({});
  if (space) {
    address_space_ = *std::move(space);
    const auto device = address_space_.attach({.pci_address = machine_->devices().front()});
    ASSERT_FALSE(device);
    EXPECT_NE(std::string{device.error().detail()}.find("RLIMIT_MEMLOCK"), std::string::npos)
        << device.error().message();
  } else {
    EXPECT_NE(std::string{space.error().detail()}.find("RLIMIT_MEMLOCK"), std::string::npos) << space.error().message();
  }
}

TEST_P(CacheContract, the_kernels_memlock_limit_evicts_instead_of_failing) {
  if (GetParam() == Interface::spapr_v1 || GetParam() == Interface::spapr_v2)
    GTEST_SKIP() << "sPAPR charges windows and registered memory, not mappings";
  restart({.memlock = 1_MiB});
  ASSERT_NE(machine_, nullptr) << "this machine cannot limit pinned memory";
  open_cache({.chunk = 64_KiB});
  if (HasFatalFailure()) return;
  const Memory memory{1024};  // four times the limit
  for (std::size_t i = 0; i < 1024; i += 16) {
    const auto lease = acquire(memory.page(i));
    ASSERT_TRUE(lease);
    if (i % 256 == 0) {
      EXPECT_TRUE(reads(*witness_, lease.iova(), memory.page(i)));
    }
  }
  EXPECT_GT(address_space_.cache_stats().evictions, 40U);
  EXPECT_EQ(address_space_.check_memlock(64_MiB).error().code, Errc::memlock_exceeded);
}

TEST_P(CacheContract, everything_in_use_is_a_clear_refusal) {
  open_cache({.chunk = Bytes{page_bytes()}, .bytes_max = Bytes{2 * page_bytes()}});
  if (HasFatalFailure()) return;
  const Memory memory{3};
  const auto a = acquire(memory.page(0));
  const auto b = acquire(memory.page(1));
  const auto refused = address_space_.acquire(MemoryPiece::of(memory.page(2)));
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, Errc::memlock_exceeded);
  EXPECT_NE(refused.error().detail().find(std::to_string(2 * page_bytes())), std::string::npos);
  EXPECT_TRUE(reads(*witness_, a.iova(), memory.page(0)));
  EXPECT_TRUE(reads(*witness_, b.iova(), memory.page(1)));
}

TEST_P(CacheContract, closing_gives_every_pin_back_and_leases_may_end_later) {
  open_cache();
  if (HasFatalFailure()) return;
  const Memory memory{4};
  auto lease = acquire(memory.page(0));
  auto portable = address_space_.acquire_portable(MemoryPiece::of(memory.page(1)));
  ASSERT_TRUE(portable) << portable.error().message();
  std::thread{[other = *std::move(portable)]() mutable { other.release(); }}.join();
  auto outliving = address_space_.acquire_portable(MemoryPiece::of(memory.page(2)));
  ASSERT_TRUE(outliving);
  close_space();
  EXPECT_EQ(machine_->kernel().memlock().pinned, pinned_before_);
  lease.release();
  outliving->release();
}

IOVANE_CONFORMANCE(CacheContract);

}  // namespace
}  // namespace iovane::test
