// The monitor and the map cache against real system calls, most of them raw, so that no library could have hooked them.
#include "pinning/staleness_monitor.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/magic.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstring>
#include <fstream>
#include <thread>

#include "pinning/counting_provider.hpp"
#include "pinning/map_cache.hpp"
#include "support/raw_fork.hpp"

namespace iovane::pinning {
namespace {

constexpr std::size_t os_page = 4096;

class StalenessTest : public testing::Test {
 protected:
  void SetUp() override {
    auto opened = StalenessMonitor::open();
    if (!opened) GTEST_SKIP() << opened.error().message();
    monitor = *std::move(opened);
    auto cache_opened = MapCache::open(provider, budget, {.chunk = Bytes{16384}}, monitor.get());
    ASSERT_TRUE(cache_opened) << cache_opened.error().message();
    cache = *std::move(cache_opened);
  }
  // At a chunk's border, so that four OS pages are one region.
  static std::byte* map(std::size_t pages, int flags = MAP_PRIVATE | MAP_ANONYMOUS, void* at = nullptr, int fd = -1) {
    if (at == nullptr) {
      constexpr std::size_t chunk = 16384;
      auto* room = static_cast<std::byte*>(
          mmap(nullptr, pages * os_page + chunk, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      at = room + (-reinterpret_cast<std::uintptr_t>(room) & (chunk - 1));
      munmap(room, pages * os_page + chunk);
    }
    void* p = mmap(at, pages * os_page, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
    EXPECT_EQ(p, at);
    return static_cast<std::byte*>(p);
  }
  static MemoryRange range_of(const void* p, std::size_t pages) { return *MemoryRange::of(p, Bytes{pages * os_page}); }
  std::uint64_t pin(const void* p, std::size_t pages = 1, Access access = Access::read_write) {
    auto lease = cache->acquire(range_of(p, pages), access);
    EXPECT_TRUE(lease) << lease.error().message();
    return lease ? lease->address() : 0;
  }
  bool hits(const void* p) { return bool{cache->try_acquire(range_of(p, 1), Access::read)}; }
  // Until the second thread has unpinned what nobody uses.
  bool drained() {
    for (int i = 0; i < 500; ++i) {
      if (provider.counts().bytes_pinned == cache->stats().bytes_pinned && cache->stats().regions_retired == 0)
        return true;
      std::this_thread::sleep_for(std::chrono::milliseconds{2});
    }
    return false;
  }

  CountingProvider provider;
  PinBudget budget;
  std::unique_ptr<StalenessMonitor> monitor;
  std::unique_ptr<MapCache> cache;
};

TEST_F(StalenessTest, RawMunmapAndRemapOfTheSameAddress) {
  for (int round = 0; round < 100; ++round) {
    std::byte* p = map(4);
    const std::uint64_t before = pin(p);
    ASSERT_TRUE(hits(p));
    ASSERT_EQ(syscall(SYS_munmap, p, 4 * os_page), 0);
    ASSERT_FALSE(hits(p)) << "round " << round;
    ASSERT_EQ(map(4, MAP_PRIVATE | MAP_ANONYMOUS, p), p);
    ASSERT_NE(pin(p), before);
    ASSERT_EQ(syscall(SYS_munmap, p, 4 * os_page), 0);
  }
  EXPECT_TRUE(drained());
  EXPECT_GE(monitor->stats().unmaps, 100U);
}

TEST_F(StalenessTest, MmapOverIt) {
  std::byte* p = map(4);
  const std::uint64_t before = pin(p);
  map(1, MAP_PRIVATE | MAP_ANONYMOUS, p);
  EXPECT_FALSE(hits(p));
  EXPECT_NE(pin(p), before);
  munmap(p, 4 * os_page);
}

TEST_F(StalenessTest, RawMadviseDontneed) {
  std::byte* p = map(4);
  for (int round = 0; round < 100; ++round) {
    std::memset(p, round, os_page);
    const std::uint64_t before = pin(p);
    ASSERT_EQ(syscall(SYS_madvise, p + os_page, os_page, MADV_DONTNEED), 0);
    ASSERT_FALSE(hits(p)) << "the chunk has a stale part";
    p[os_page] = std::byte{1};
    ASSERT_NE(pin(p), before);
  }
  munmap(p, 4 * os_page);
  EXPECT_TRUE(drained());
}

TEST_F(StalenessTest, MadviseFreeAndRemove) {
  std::byte* p = map(4);
  pin(p);
  ASSERT_EQ(syscall(SYS_madvise, p, os_page, MADV_FREE), 0);
  EXPECT_FALSE(hits(p));
  munmap(p, 4 * os_page);

  const int fd = memfd_create("iovane-test", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(fd, 4 * os_page), 0);
  std::byte* shared = map(4, MAP_SHARED, nullptr, fd);
  pin(shared);
  ASSERT_EQ(syscall(SYS_madvise, shared, os_page, MADV_REMOVE), 0);
  EXPECT_FALSE(hits(shared));
  munmap(shared, 4 * os_page);
  close(fd);
}

TEST_F(StalenessTest, Mremap) {
  std::byte* p = map(4);
  std::byte* target = map(8);
  pin(p);
  void* moved =
      reinterpret_cast<void*>(syscall(SYS_mremap, p, 4 * os_page, 4 * os_page, MREMAP_MAYMOVE | MREMAP_FIXED, target));
  ASSERT_EQ(moved, target);
  EXPECT_FALSE(hits(p));
  EXPECT_FALSE(hits(target));
  std::memset(target, 3, 4 * os_page);
  const std::uint64_t fresh = pin(target);
  EXPECT_TRUE(hits(target));
  ASSERT_EQ(syscall(SYS_madvise, target, os_page, MADV_DONTNEED), 0);
  EXPECT_FALSE(hits(target)) << "the moved memory is watched again";
  EXPECT_NE(fresh, 0U);
  munmap(target, 8 * os_page);
}

TEST_F(StalenessTest, ForkMakesPrivateMemoryStale) {
  std::byte* p = map(4);
  std::memset(p, 1, 4 * os_page);
  const std::uint64_t before = pin(p);
  // Raw, so that no atfork handler runs.
  const long child = test::raw_fork();
  if (child == 0) syscall(SYS_exit_group, 0);
  ASSERT_GT(child, 0);
  EXPECT_FALSE(hits(p)) << "either side's next write may copy the page";
  p[0] = std::byte{2};
  EXPECT_NE(pin(p), before);
  EXPECT_TRUE(hits(p));
  int status = 0;
  waitpid(static_cast<pid_t>(child), &status, 0);
  EXPECT_TRUE(hits(p));
  EXPECT_EQ(monitor->stats().forks, 1U);
  munmap(p, 4 * os_page);
}

TEST_F(StalenessTest, InUseMemoryIsQuarantinedUntilReleased) {
  std::byte* p = map(4);
  auto lease = cache->acquire(range_of(p, 1), Access::read);
  ASSERT_TRUE(lease);
  auto hold = lease->hold();
  munmap(p, 4 * os_page);
  std::this_thread::sleep_for(std::chrono::milliseconds{50});
  EXPECT_TRUE(provider.is_pinned(range_of(p, 1), lease->address()));
  EXPECT_EQ(cache->stats().stale_in_use, 1U);
  lease->drop();
  std::this_thread::sleep_for(std::chrono::milliseconds{50});
  EXPECT_TRUE(provider.is_pinned(range_of(p, 1), hold.address()));
  hold.drop();
  EXPECT_TRUE(drained());
  EXPECT_EQ(provider.counts().bytes_pinned, 0U);
}

// Pins only what it is asked for a second time: memory discarded between the watch and the pin looks like that.
class RefusingOnce final : public PinProvider {
 public:
  explicit RefusingOnce(unsigned times) : left_{times} {}
  const ProviderTraits& traits() const noexcept override { return inner.traits(); }
  void pin(std::span<const PinRequest> requests, std::span<PinOutcome> outcomes) noexcept override {
    ++calls;
    if (left_ == 0) return inner.pin(requests, outcomes);
    --left_;
    for (PinOutcome& outcome : outcomes)
      outcome = {{}, make_error(Errc::bad_memory, Stage::pin, "the page was not there")};
  }
  void unpin(std::span<const UnpinRequest> requests, std::span<Error> outcomes) noexcept override {
    inner.unpin(requests, outcomes);
  }
  CountingProvider inner;
  unsigned calls = 0;

 private:
  unsigned left_;
};

TEST_F(StalenessTest, APinThatMissedTheMemoryIsTriedAgain) {
  std::byte* p = map(4);
  RefusingOnce once{2};  // the first refusal is put down to the margin
  auto opened = MapCache::open(once, budget, {.chunk = Bytes{4096}}, monitor.get());
  ASSERT_TRUE(opened);
  const auto lease = (*opened)->acquire(range_of(p, 1), Access::read_write);
  EXPECT_TRUE(lease) << lease.error().message();
  munmap(p, 4 * os_page);
}

TEST_F(StalenessTest, MemoryThatCanNeverBePinnedIsSaidToBe) {
  std::byte* p = map(4);
  RefusingOnce always{~0U};
  auto opened = MapCache::open(always, budget, {.chunk = Bytes{4096}}, monitor.get());
  ASSERT_TRUE(opened);
  const auto lease = (*opened)->acquire(range_of(p, 1), Access::read_write);
  ASSERT_FALSE(lease);
  EXPECT_EQ(lease.error().code, Errc::bad_memory);
  EXPECT_LT(always.calls, 20U);
  munmap(p, 4 * os_page);
}

// A thread that waits for a discarded page while the mapping around it is replaced: its wake-up must not depend on the
// mapping that it began to wait in.
TEST(StalenessWaiters, AWaiterGoesOnWhenItsMappingWasReplaced) {
  auto uffd = Userfaultfd::open(false);
  if (!uffd) GTEST_SKIP() << uffd.error().message();
  void* room = mmap(nullptr, os_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(room, MAP_FAILED);
  auto* page = static_cast<volatile std::byte*>(room);
  const MemoryRange range = *MemoryRange::of(room, Bytes{os_page});
  ASSERT_TRUE(uffd->watch(range));
  const auto next_event = [&](Userfaultfd::EventKind kind) {
    for (int i = 0; i < 2000; ++i) {
      std::array<Userfaultfd::Event, 1> event;
      if (uffd->read(event) == 1) return event[0].kind == kind;
      std::this_thread::sleep_for(std::chrono::milliseconds{1});
    }
    return false;
  };
  std::atomic<bool> went_on{false};
  std::thread toucher{[&] {
    *page = std::byte{1};
    went_on = true;
  }};
  EXPECT_TRUE(next_event(Userfaultfd::EventKind::fault));
  std::thread replacer{[&] {
    EXPECT_EQ(mmap(room, os_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), room);
  }};
  EXPECT_TRUE(next_event(Userfaultfd::EventKind::unmap));
  replacer.join();
  uffd->unwatch(range);
  for (int i = 0; i < 2000 && !went_on; ++i) std::this_thread::sleep_for(std::chrono::milliseconds{1});
  EXPECT_TRUE(went_on) << "it sleeps although nobody watches that address any more";
  if (!went_on) uffd = Userfaultfd::open(false);  // closing the old one lets it go
  toucher.join();
  munmap(room, os_page);
}

TEST_F(StalenessTest, MemoryThatCannotBeWatchedIsRefusedWithTheReason) {
  const auto nowhere = cache->acquire({0x10000, 0x10fff}, Access::read);
  ASSERT_FALSE(nowhere);
  EXPECT_EQ(nowhere.error().code, Errc::bad_memory);

  const int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
  struct statfs on {};
  ASSERT_EQ(fstatfs(fd, &on), 0);
  if (on.f_type == TMPFS_MAGIC || on.f_type == RAMFS_MAGIC) {
    close(fd);
    GTEST_SKIP() << "this program lies in memory, where files can be watched";
  }
  void* file = mmap(nullptr, os_page, PROT_READ, MAP_PRIVATE, fd, 0);
  ASSERT_NE(file, MAP_FAILED);
  const auto mapped_file = cache->acquire(range_of(file, 1), Access::read);
  ASSERT_FALSE(mapped_file);
  EXPECT_NE(mapped_file.error().detail().find("watched"), std::string::npos) << mapped_file.error().detail();
  munmap(file, os_page);
  close(fd);
  EXPECT_EQ(provider.counts().bytes_pinned, 0U);
}

TEST_F(StalenessTest, HeapMemoryUnderAllocationAndFree) {
  // Large blocks come and go by mmap and munmap inside malloc.
  for (int round = 0; round < 200; ++round) {
    auto block = std::make_unique<std::byte[]>(300'000);
    auto* aligned = reinterpret_cast<std::byte*>((reinterpret_cast<std::uintptr_t>(block.get()) + 65535) & ~65535UL);
    block[0] = std::byte{1};
    ASSERT_NE(pin(aligned, 4), 0U);
  }
  EXPECT_TRUE(drained());
}

TEST_F(StalenessTest, ThreadsAreNamedAndBlockAllSignals) {
  int found = 0;
  DIR* tasks = opendir("/proc/self/task");
  ASSERT_NE(tasks, nullptr);
  while (const dirent* entry = readdir(tasks)) {
    const std::string dir = std::string{"/proc/self/task/"} + entry->d_name;
    std::string name;
    std::ifstream{dir + "/comm"} >> name;
    if (name != "iovane-uffd" && name != "iovane-unpin") continue;
    ++found;
    std::ifstream status{dir + "/status"};
    for (std::string line; std::getline(status, line);)
      if (line.starts_with("SigBlk:")) {
        const auto blocked = std::stoull(line.substr(7), nullptr, 16);
        for (const int s : {SIGINT, SIGTERM, SIGUSR1, SIGCHLD, SIGALRM})
          EXPECT_NE(blocked & (1ULL << (s - 1)), 0U) << name << " " << s;
      }
  }
  closedir(tasks);
  EXPECT_EQ(found, 2);
}

TEST_F(StalenessTest, ForkedChildCanLeaveWithoutTheMonitor) {
  std::byte* p = map(4);
  pin(p);
  const pid_t child = fork();
  if (child == 0) {
    const bool closed = cache->acquire(range_of(p, 1), Access::read).error().code == Errc::closed;
    munmap(p, 4 * os_page);  // must not wait for the parent's monitor
    cache.reset();
    monitor.reset();
    _exit(closed ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  munmap(p, 4 * os_page);
}

TEST(StalenessOpen, SaysWhatWouldAllowIt) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root to become somebody who may not";
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    if (setresgid(65534, 65534, 65534) != 0 || setresuid(65534, 65534, 65534) != 0) _exit(9);
    const auto opened = StalenessMonitor::open();
    if (opened) _exit(3);  // the host allows it to everyone
    const std::string text = opened.error().detail();
    _exit(opened.error().code == Errc::permission && text.find("vm.unprivileged_userfaultfd") != std::string::npos &&
                  text.find("/dev/userfaultfd") != std::string::npos && text.find("CAP_SYS_PTRACE") != std::string::npos
              ? 0
              : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFEXITED(status));
  if (WEXITSTATUS(status) == 3) GTEST_SKIP() << "this host lets everyone use userfaultfd";
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

// A container's filter that answers ENOSYS is not an old kernel, and the message has both.
TEST(StalenessOpen, NamesASeccompFilter) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root to become somebody who may not";
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    if (setresgid(65534, 65534, 65534) != 0 || setresuid(65534, 65534, 65534) != 0) _exit(9);
    std::array<sock_filter, 4> filter{{{BPF_LD | BPF_W | BPF_ABS, 0, 0, offsetof(seccomp_data, nr)},
                                       {BPF_JMP | BPF_JEQ | BPF_K, 0, 1, SYS_userfaultfd},
                                       {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ERRNO | ENOSYS},
                                       {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW}}};
    const sock_fprog program{.len = filter.size(), .filter = filter.data()};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
      _exit(3);
    const auto opened = StalenessMonitor::open();
    if (opened) _exit(1);
    const std::string text = opened.error().detail();
    _exit(opened.error().code == Errc::unsupported && text.find("seccomp") != std::string::npos &&
                  text.find("invalidate()") != std::string::npos
              ? 0
              : 2);
  }
  int status = -1;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFEXITED(status));
  if (WEXITSTATUS(status) == 3) GTEST_SKIP() << "no seccomp filters in this kernel";
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST(StalenessOpen, TakesADescriptorFromAManager) {
  const int fd = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC));
  if (fd < 0) GTEST_SKIP() << "userfaultfd: " << std::strerror(errno);
  auto opened = StalenessMonitor::open({.fd = fd, .need_fork_events = false});
  EXPECT_TRUE(opened) << opened.error().message();
  close(fd);
}

}  // namespace
}  // namespace iovane::pinning
