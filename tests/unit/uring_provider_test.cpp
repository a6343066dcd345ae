// Real pins: what the kernel says about them, and bytes that go through them.
#include "pinning/uring_provider.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/capability.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "pinning/map_cache.hpp"
#include "pinning/memlock.hpp"
#include "pinning/staleness_monitor.hpp"
#include "support/raw_fork.hpp"
#include "support/seed.hpp"
#include "support/syscall_counter.hpp"

#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21U << 26)  // linux/memfd.h
#endif

namespace iovane::pinning {
namespace {

constexpr std::size_t os_page = 4096;

std::byte* map_pages(std::size_t pages) {
  void* p = mmap(nullptr, pages * os_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  EXPECT_NE(p, MAP_FAILED);
  return static_cast<std::byte*>(p);
}

std::uint64_t pinned_now() { return read_memlock_state()->pinned; }

// What a device sees of pinned memory: io_uring writes the buffer's pages, not the address's, into a pipe.
std::vector<std::byte> device_reads(UringProvider& provider, const Region& region, std::uint64_t address,
                                    unsigned length) {
  std::array<int, 2> ends{};
  EXPECT_EQ(pipe(ends.data()), 0);
  io_uring_sqe* sqe = io_uring_get_sqe(&provider.ring());
  io_uring_prep_write_fixed(sqe, ends[1], reinterpret_cast<void*>(address), length, 0,
                            static_cast<int>(UringProvider::buffer_index(region.handle)));
  EXPECT_EQ(io_uring_submit_and_wait(&provider.ring(), 1), 1);
  io_uring_cqe* cqe = nullptr;
  EXPECT_EQ(io_uring_wait_cqe(&provider.ring(), &cqe), 0);
  EXPECT_EQ(cqe->res, static_cast<int>(length));
  io_uring_cqe_seen(&provider.ring(), cqe);
  std::vector<std::byte> bytes(length);
  EXPECT_EQ(read(ends[0], bytes.data(), length), static_cast<ssize_t>(length));
  close(ends[0]);
  close(ends[1]);
  return bytes;
}

class UringTest : public testing::Test {
 protected:
  void SetUp() override {
    auto opened = UringProvider::open({.buffers = 256});
    if (!opened) GTEST_SKIP() << opened.error().message();
    provider = *std::move(opened);
  }
  std::unique_ptr<UringProvider> provider;
  PinBudget budget;
};

TEST_F(UringTest, TheKernelCountsThePinsAndTheUnpins) {
  std::byte* p = map_pages(64);
  std::memset(p, 1, 64 * os_page);
  const std::uint64_t before = pinned_now();
  std::array<PinRequest, 4> requests;
  std::array<PinOutcome, 4> outcomes;
  for (std::size_t i = 0; i < 4; ++i)
    requests[i] = {.range = *MemoryRange::of(p + i * 16 * os_page, Bytes{16 * os_page})};
  provider->pin(requests, outcomes);
  for (const auto& o : outcomes) ASSERT_FALSE(o.error) << o.error.message();
  EXPECT_EQ(pinned_now() - before, 64 * os_page);
  std::array<UnpinRequest, 4> undo;
  std::array<Error, 4> errors;
  for (std::size_t i = 0; i < 4; ++i) undo[i] = {requests[i].range, Access::read_write, outcomes[i].handle};
  provider->unpin(undo, errors);
  for (const auto& e : errors) EXPECT_FALSE(e) << e.message();
  EXPECT_EQ(pinned_now(), before);
  munmap(p, 64 * os_page);
}

TEST_F(UringTest, EachElementOfABatchHasItsOwnVerdict) {
  std::byte* p = map_pages(8);
  munmap(p + 2 * os_page, os_page);
  munmap(p + 5 * os_page, os_page);
  std::array<PinRequest, 8> requests;
  std::array<PinOutcome, 8> outcomes;
  for (std::size_t i = 0; i < 8; ++i) requests[i] = {.range = *MemoryRange::of(p + i * os_page, Bytes{os_page})};
  provider->pin(requests, outcomes);
  for (std::size_t i = 0; i < 8; ++i) {
    EXPECT_EQ(bool{outcomes[i].error}, i == 2 || i == 5) << i;
    if (outcomes[i].error) {
      EXPECT_EQ(outcomes[i].error.code, Errc::bad_memory);
    }
  }
  munmap(p, 8 * os_page);
}

TEST_F(UringTest, BytesGoThroughTheLeasedBuffer) {
  auto cache = MapCache::open(*provider, budget, {.chunk = Bytes{65536}});
  ASSERT_TRUE(cache);
  std::byte* p = map_pages(32);
  std::memset(p, 0x5a, 32 * os_page);
  const auto range = *MemoryRange::of(p + 7 * os_page + 100, Bytes{1000});
  const auto lease = (*cache)->acquire(range, Access::read_write);
  ASSERT_TRUE(lease) << lease.error().message();
  EXPECT_EQ(lease->address(), range.start);
  const auto seen = device_reads(*provider, lease->region(), lease->address(), 1000);
  EXPECT_EQ(std::memcmp(seen.data(), p + 7 * os_page + 100, 1000), 0);
  munmap(p, 32 * os_page);
}

// The caller's own ring: the lease's address and buffer index are all that its fixed-buffer I/O needs.
TEST_F(UringTest, ACallersRingReadsAndWritesWithTheLeasedBuffer) {
  io_uring ring{};
  ASSERT_EQ(io_uring_queue_init(8, &ring, 0), 0);
  const int from = memfd_create("iovane-test", MFD_CLOEXEC);
  const int to = memfd_create("iovane-test", MFD_CLOEXEC);
  std::vector<std::byte> written(2 * os_page);
  for (std::size_t i = 0; i < written.size(); ++i) written[i] = std::byte(i * 7 >> 3 & 0xff);
  ASSERT_EQ(pwrite(from, written.data(), written.size(), 100), static_cast<ssize_t>(written.size()));
  std::byte* room = map_pages(32);
  std::byte* p = room + (-reinterpret_cast<std::uintptr_t>(room) & 65535U);  // a whole chunk
  const auto one = [&](auto&& prepare) {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring);
    prepare(sqe);
    EXPECT_EQ(io_uring_submit_and_wait(&ring, 1), 1);
    io_uring_cqe* cqe = nullptr;
    EXPECT_EQ(io_uring_wait_cqe(&ring, &cqe), 0);
    const int result = cqe->res;
    io_uring_cqe_seen(&ring, cqe);
    return result;
  };
  const std::uint64_t before = pinned_now();
  {
    auto own = UringProvider::open({.ring = &ring, .buffers = 16});
    ASSERT_TRUE(own) << own.error().message();
    EXPECT_EQ(&(*own)->ring(), &ring);
    EXPECT_EQ(UringProvider::open({.ring = &ring, .buffers = 16}).error().code, Errc::busy);
    auto cache = MapCache::open(**own, budget, {.chunk = Bytes{65536}});
    ASSERT_TRUE(cache);
    for (int use = 0; use < 3; ++use) {  // a miss, then hits
      std::byte* at = p + 3 * os_page + 40 * use;
      const auto length = static_cast<unsigned>(written.size());
      const auto lease = (*cache)->acquire(*MemoryRange::of(at, Bytes{length}), Access::read_write);
      ASSERT_TRUE(lease) << lease.error().message();
      ASSERT_GE(lease->length().value, length);
      const int index = static_cast<int>(UringProvider::buffer_index(lease->region().handle));
      void* buffer = reinterpret_cast<void*>(lease->address());
      ASSERT_EQ(one([&](auto* sqe) { io_uring_prep_read_fixed(sqe, from, buffer, length, 100, index); }),
                static_cast<int>(length));
      EXPECT_EQ(std::memcmp(at, written.data(), length), 0) << "the I/O went into the pinned pages";
      ASSERT_EQ(one([&](auto* sqe) { io_uring_prep_write_fixed(sqe, to, buffer, length, 0, index); }),
                static_cast<int>(length));
      std::vector<std::byte> back(length);
      ASSERT_EQ(pread(to, back.data(), length, 0), static_cast<ssize_t>(length));
      EXPECT_EQ(back, written);
    }
    EXPECT_EQ((*cache)->stats().misses, 1U);
  }
  EXPECT_EQ(pinned_now(), before);
  io_uring_queue_exit(&ring);
  munmap(room, 32 * os_page);
  close(from);
  close(to);
}

// A request that the kernel has taken keeps its buffer, whatever the cache does with the entry meanwhile.
TEST_F(UringTest, AnUnpinnedBufferStaysForTheRequestThatHasIt) {
  std::byte* p = map_pages(16);
  std::array<int, 2> ends{};
  ASSERT_EQ(pipe(ends.data()), 0);
  auto cache = MapCache::open(*provider, budget, {.chunk = Bytes{os_page}});
  ASSERT_TRUE(cache);
  {
    const auto lease = (*cache)->acquire(*MemoryRange::of(p, Bytes{8}), Access::read_write);
    ASSERT_TRUE(lease) << lease.error().message();
    io_uring_prep_read_fixed(io_uring_get_sqe(&provider->ring()), ends[0], reinterpret_cast<void*>(lease->address()), 8,
                             static_cast<std::uint64_t>(-1),
                             static_cast<int>(UringProvider::buffer_index(lease->region().handle)));
    ASSERT_EQ(io_uring_submit(&provider->ring()), 1);
  }
  EXPECT_EQ((*cache)->evict(1, any_node), os_page);
  EXPECT_EQ((*cache)->stats().bytes_pinned, 0U);
  ASSERT_EQ(write(ends[1], "iovane!", 8), 8);
  io_uring_cqe* cqe = nullptr;
  ASSERT_EQ(io_uring_wait_cqe(&provider->ring(), &cqe), 0);
  EXPECT_EQ(cqe->res, 8);
  io_uring_cqe_seen(&provider->ring(), cqe);
  EXPECT_EQ(std::memcmp(p, "iovane!", 8), 0);
  close(ends[0]);
  close(ends[1]);
  munmap(p, 16 * os_page);
}

TEST_F(UringTest, CachedPinsAreGivenBackToTheLastPage) {
  const std::uint64_t before = pinned_now();
  std::byte* p = map_pages(4096);
  {
    auto cache = MapCache::open(*provider, budget, {.chunk = Bytes{65536}, .bytes_max = Bytes{1U << 20}});
    ASSERT_TRUE(cache);
    for (std::size_t page = 0; page < 4096; page += 7) {
      const auto lease = (*cache)->acquire(*MemoryRange::of(p + page * os_page, Bytes{os_page}), Access::read_write);
      ASSERT_TRUE(lease) << lease.error().message();
      ASSERT_LE(pinned_now() - before, 1U << 20);
    }
    EXPECT_EQ(pinned_now() - before, (*cache)->stats().bytes_pinned);
  }
  EXPECT_EQ(pinned_now(), before);
  munmap(p, 4096 * os_page);
}

TEST_F(UringTest, FilesArePinnedByDescriptor) {
  auto cache = MapCache::open(*provider, budget, {.chunk = Bytes{65536}});
  ASSERT_TRUE(cache);
  const int fd = memfd_create("iovane-test", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(fd, 1 << 20), 0);
  ASSERT_EQ(pwrite(fd, "hello", 5, 70'000), 5);
  const auto window = (*cache)->add_file(fd, Bytes{1U << 20});
  ASSERT_TRUE(window) << window.error().message();
  {
    const auto lease = (*cache)->acquire({window->start + 70'000, window->start + 70'004}, Access::read);
    ASSERT_TRUE(lease) << lease.error().message();
    const auto seen = device_reads(*provider, lease->region(), lease->address(), 5);
    EXPECT_EQ(std::memcmp(seen.data(), "hello", 5), 0);
  }
  EXPECT_TRUE((*cache)->remove_file(*window));
  EXPECT_EQ((*cache)->stats().bytes_pinned, 0U);
  close(fd);
}

TEST_F(UringTest, AFullTableIsAnEntryLimitAndTheCacheEvicts) {
  std::byte* p = map_pages(600);
  auto cache = MapCache::open(*provider, budget, {.chunk = Bytes{os_page}, .evict_min = 1});
  ASSERT_TRUE(cache);
  for (std::size_t i = 0; i < 600; ++i)
    ASSERT_TRUE((*cache)->acquire(*MemoryRange::of(p + i * os_page, Bytes{os_page}), Access::read_write)) << i;
  EXPECT_GT((*cache)->stats().evictions, 300U);
  munmap(p, 600 * os_page);
}

TEST_F(UringTest, NeverServesAnOldPageUnderTheMonitor) {
  auto monitor = StalenessMonitor::open();
  if (!monitor) GTEST_SKIP() << monitor.error().message();
  auto cache = MapCache::open(*provider, budget, {.chunk = Bytes{65536}}, monitor->get());
  ASSERT_TRUE(cache);
  std::byte* p = map_pages(32);
  const auto device_sees = [&](std::byte* at) {
    const auto lease = (*cache)->acquire(*MemoryRange::of(at, Bytes{8}), Access::read_write);
    EXPECT_TRUE(lease) << lease.error().message();
    return lease ? device_reads(*provider, lease->region(), lease->address(), 1)[0] : std::byte{0xff};
  };
  std::byte* at = p + 20 * os_page;
  for (int round = 1; round < 40; ++round) {
    const std::byte mark{static_cast<unsigned char>(round)};
    *at = mark;
    ASSERT_EQ(device_sees(at), mark);
    switch (round % 4) {
      case 0: ASSERT_EQ(syscall(SYS_madvise, at, os_page, MADV_DONTNEED), 0); break;
      case 1:
        ASSERT_EQ(syscall(SYS_munmap, at, os_page), 0);
        ASSERT_EQ(mmap(at, os_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), at);
        break;
      case 2: {
        const long child = test::raw_fork();
        if (child == 0) {
          usleep(1000);
          syscall(SYS_exit_group, 0);
        }
        *at = std::byte{0xee};  // copies the page while the child lives
        waitpid(static_cast<pid_t>(child), nullptr, 0);
        break;
      }
      default: {
        void* elsewhere = mmap(nullptr, os_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        static_cast<std::byte*>(elsewhere)[0] = std::byte{0xdd};
        ASSERT_EQ(mremap(elsewhere, os_page, os_page, MREMAP_MAYMOVE | MREMAP_FIXED, at), at);
      }
    }
    const std::byte fresh{static_cast<unsigned char>(100 + round)};
    *at = fresh;
    ASSERT_EQ(device_sees(at), fresh) << "round " << round;
  }
  munmap(p, 32 * os_page);
}

// Real pins, a real monitor, and the kernel's own entry as the witness.
TEST_F(UringTest, AHitMakesNoSystemCallAtAll) {
  const auto canary = test::SyscallCounter::of([] {
    syscall(SYS_getppid);
    syscall(SYS_getppid);
  });
  if (!canary) GTEST_SKIP() << "needs Syscall User Dispatch: Linux 5.11 on x86-64, and no ThreadSanitizer";
  ASSERT_EQ(canary->calls, 2U);
  ASSERT_EQ(canary->last, SYS_getppid);

  auto monitor = StalenessMonitor::open();
  auto cache = MapCache::open(*provider, budget, {.chunk = Bytes{65536}}, monitor ? monitor->get() : nullptr);
  ASSERT_TRUE(cache);
  constexpr std::size_t pages = 64;
  std::byte* room = map_pages(pages + 16);
  std::byte* p = room + (-reinterpret_cast<std::uintptr_t>(room) & 65535U);  // whole chunks
  bool all = true;
  const auto use_everything = [&] {
    for (std::size_t i = 0; i < pages; ++i) {
      const auto lease = (*cache)->acquire(*MemoryRange::of(p + i * os_page + 100, Bytes{3000}), Access::read_write);
      all = all && bool{lease};
      const Hold hold = lease ? lease->hold() : Hold{};
      all = all && bool{hold};
    }
  };
  const auto cold = test::SyscallCounter::of(use_everything);
  EXPECT_GE(cold->calls, pages * os_page / 65536) << "each chunk is pinned once";
  const auto warm = test::SyscallCounter::of([&] {
    for (int round = 0; round < 100; ++round) use_everything();
  });
  EXPECT_TRUE(all);
  EXPECT_EQ(warm->calls, 0U) << "the last one was system call " << warm->last;
  EXPECT_EQ((*cache)->stats().pins, pages * os_page / 65536);
  munmap(room, (pages + 16) * os_page);
}

// The frame behind an address, 0 when it is not there or not to be seen.
std::uint64_t frame_of(int pagemap, const std::byte* at) {
  std::uint64_t entry = 0;
  const auto offset = static_cast<off_t>(reinterpret_cast<std::uintptr_t>(at) / os_page * sizeof entry);
  if (pread(pagemap, &entry, sizeof entry, offset) != sizeof entry || (entry >> 63) == 0) return 0;
  return entry & ((std::uint64_t{1} << 55) - 1);
}

// pagemap as the judge: whenever the cache hits, the frame behind the address is the one that was pinned.
TEST_F(UringTest, PagemapAgreesWithEveryHit) {
  auto monitor = StalenessMonitor::open();
  if (!monitor) GTEST_SKIP() << monitor.error().message();
  const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (pagemap < 0) GTEST_SKIP() << "/proc/self/pagemap: " << std::strerror(errno);
  const std::uint64_t before = pinned_now();
  constexpr std::size_t pages = 16;
  std::byte* p = map_pages(pages);
  std::memset(p, 1, pages * os_page);
  if (frame_of(pagemap, p) == 0) GTEST_SKIP() << "frames are hidden without CAP_SYS_ADMIN";
  const std::uint64_t seed = test::seed();
  SCOPED_TRACE("IOVANE_SEED=" + std::to_string(seed));
  test::Random random{seed};
  int hits = 0;
  int changed = 0;
  {
    auto cache = MapCache::open(*provider, budget, {.chunk = Bytes{os_page}}, monitor->get());
    ASSERT_TRUE(cache);
    std::array<std::uint64_t, pages> pinned_frame{};
    for (int step = 0; step < 400; ++step) {
      const std::size_t i = random.below(pages);
      std::byte* at = p + i * os_page;
      switch (random.below(8)) {
        case 0: ASSERT_EQ(syscall(SYS_madvise, at, os_page, MADV_DONTNEED), 0); break;
        case 1:
          ASSERT_EQ(mmap(at, os_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), at);
          break;
        case 2: {
          const long child = test::raw_fork();
          if (child == 0) {
            usleep(500);
            syscall(SYS_exit_group, 0);
          }
          for (std::size_t k = 0; k < pages; ++k) p[k * os_page] = std::byte{2};  // some of them copy
          waitpid(static_cast<pid_t>(child), nullptr, 0);
          break;
        }
        case 3: {
          void* other = mmap(nullptr, os_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
          *static_cast<std::byte*>(other) = std::byte{3};
          ASSERT_EQ(mremap(other, os_page, os_page, MREMAP_MAYMOVE | MREMAP_FIXED, at), at);
          break;
        }
        default: *at = std::byte{4};
      }
      const MemoryRange range = *MemoryRange::of(at, Bytes{os_page});
      const bool hit = bool{(*cache)->try_acquire(range, Access::read_write)};
      if (hit) {
        ++hits;
        ASSERT_EQ(frame_of(pagemap, at), pinned_frame[i]) << "a stale hit in step " << step;
      } else {
        ASSERT_TRUE((*cache)->acquire(range, Access::read_write)) << step;
        const std::uint64_t frame = frame_of(pagemap, at);
        ASSERT_NE(frame, 0U) << "pinned memory is present";
        changed += frame != pinned_frame[i] ? 1 : 0;
        pinned_frame[i] = frame;
      }
    }
  }
  EXPECT_GT(hits, 50);
  EXPECT_GT(changed, 50);
  EXPECT_EQ(pinned_now(), before);
  close(pagemap);
  munmap(p, pages * os_page);
}

// hugetlbfs by descriptor: a huge page is charged whole, so one lease charges one.
TEST_F(UringTest, HugePagesArePinnedByDescriptor) {
  constexpr std::size_t huge = 2U << 20;
  if (std::getenv("IOVANE_LAB") != nullptr) std::ofstream{"/proc/sys/vm/nr_hugepages"} << 4;  // a kernel of our own
  const int fd = memfd_create("iovane-test", MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB);
  if (fd < 0) GTEST_SKIP() << "no huge pages of 2 MiB: " << std::strerror(errno);
  ASSERT_EQ(ftruncate(fd, huge), 0);
  void* view = mmap(nullptr, huge, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (view == MAP_FAILED) {
    close(fd);
    GTEST_SKIP() << "no huge page of 2 MiB is free (vm.nr_hugepages)";
  }
  auto* bytes = static_cast<std::byte*>(view);
  bytes[huge - 1] = std::byte{0x77};
  const std::uint64_t before = pinned_now();
  {
    auto cache = MapCache::open(*provider, budget, {.chunk = Bytes{huge}});
    ASSERT_TRUE(cache);
    const auto window = (*cache)->add_file(fd, Bytes{huge});
    ASSERT_TRUE(window) << window.error().message();
    const auto lease = (*cache)->acquire({window->start + huge - 1, window->start + huge - 1}, Access::read_write);
    ASSERT_TRUE(lease) << lease.error().message();
    EXPECT_EQ(device_reads(*provider, lease->region(), lease->address(), 1)[0], std::byte{0x77});
    EXPECT_EQ(pinned_now() - before, huge);
  }
  EXPECT_EQ(pinned_now(), before);
  munmap(view, huge);
  close(fd);
}

// In a child without CAP_IPC_LOCK: the kernel enforces the limit there.
int in_child_with_memlock(rlim_t limit, const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    const rlimit r{limit, limit};
    if (setrlimit(RLIMIT_MEMLOCK, &r) != 0) _exit(77);
    if (setresgid(65534, 65534, 65534) != 0 || setresuid(65534, 65534, 65534) != 0) _exit(78);
    _exit(body());
  }
  int status = -1;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

int pin_until_refused(std::size_t pages_expected_max) {
  auto provider = UringProvider::open({.buffers = 256});
  if (!provider) return provider.error().os_errno == ENOMEM ? 10 : 11;
  PinBudget budget;
  auto cache = MapCache::open(**provider, budget, {.chunk = Bytes{os_page}, .evict_min = 1});
  if (!cache) return 12;
  std::byte* p = map_pages(64);
  std::vector<Hold> holds;
  for (std::size_t i = 0; i < 64; ++i) {
    auto hold = (*cache)->acquire_hold(*MemoryRange::of(p + i * os_page, Bytes{os_page}), Access::read_write);
    if (!hold) {
      if (hold.error().code != Errc::memlock_exceeded) return 13;
      if (hold.error().detail().find("ulimit -l") == std::string::npos) return 14;
      if (i > pages_expected_max) return 15;
      holds.clear();
      // With the holds gone, evicting makes room under the kernel's own limit.
      return i == 0 || (*cache)->acquire(*MemoryRange::of(p + i * os_page, Bytes{os_page}), Access::read_write) ? 0
                                                                                                                : 16;
    }
    holds.push_back(*std::move(hold));
  }
  return pages_expected_max >= 64 ? 0 : 17;
}

TEST(UringMemlock, LimitOf64KiB) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root to become somebody without CAP_IPC_LOCK";
  const int code = in_child_with_memlock(65536, [] { return pin_until_refused(16); });
  if (code == 11) GTEST_SKIP() << "io_uring is not available to an unprivileged user here";
  EXPECT_EQ(code, 0);
}

TEST(UringMemlock, LimitOfZero) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root to become somebody without CAP_IPC_LOCK";
  const int code = in_child_with_memlock(0, [] { return pin_until_refused(0); });
  if (code == 11) GTEST_SKIP() << "io_uring is not available to an unprivileged user here";
  EXPECT_TRUE(code == 0 || code == 10) << code;  // 10: even the ring was refused, as memlock
}

TEST(UringMemlock, Unlimited) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root";
  const int code = in_child_with_memlock(RLIM_INFINITY, [] { return pin_until_refused(64); });
  if (code == 77) GTEST_SKIP() << "this process may not raise its hard RLIMIT_MEMLOCK (CAP_SYS_RESOURCE)";
  if (code == 11) GTEST_SKIP() << "io_uring is not available to an unprivileged user here";
  EXPECT_EQ(code, 0);
}

TEST(UringMemlock, UnlimitedByCapability) {
  auto provider = UringProvider::open({.buffers = 256});
  if (!provider) GTEST_SKIP() << provider.error().message();
  if (!read_memlock_state()->exempt) GTEST_SKIP() << "needs CAP_IPC_LOCK";
  EXPECT_EQ(pin_until_refused(64), 0);
}

}  // namespace
}  // namespace iovane::pinning
