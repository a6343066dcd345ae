#include "pinning/population.hpp"

#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <tbb/info.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>
#include <tbb/task_group.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <thread>

#include "base/error_text.hpp"
#include "pinning/population_plan.hpp"

// Linux 5.14; older C libraries do not name them.
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

namespace iovane::pinning {
namespace {

// oneTBB opens its library for NUMA with RTLD_DEEPBIND, at which a sanitizer ends the process: no placement under them.
#if defined(IOVANE_SANITIZED)
std::vector<tbb::numa_node_id> numa_nodes() { return {tbb::task_arena::automatic}; }
tbb::task_arena::constraints arena_constraints(tbb::numa_node_id, int threads) {
  return tbb::task_arena::constraints{}.set_max_concurrency(threads);
}
#else
std::vector<tbb::numa_node_id> numa_nodes() { return tbb::info::numa_nodes(); }
tbb::task_arena::constraints arena_constraints(tbb::numa_node_id node, int threads) {
  return tbb::task_arena::constraints{}.set_numa_id(node).set_max_concurrency(threads);
}
#endif

// TBB's workers belong to the whole process: while they run a task of ours they block all signals, afterwards they have
// their own mask again. A scheduler observer cannot promise the second half: it is gone as soon as the last task is
// done, workers leave the arena some time later, and then nobody tells them.
class BlockSignalsOnWorkers {
 public:
  explicit BlockSignalsOnWorkers(std::thread::id caller) noexcept : on_worker_{std::this_thread::get_id() != caller} {
    if (!on_worker_) return;
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~BlockSignalsOnWorkers() {
    if (on_worker_) pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  BlockSignalsOnWorkers(const BlockSignalsOnWorkers&) = delete;
  BlockSignalsOnWorkers& operator=(const BlockSignalsOnWorkers&) = delete;

 private:
  const bool on_worker_;
  sigset_t before_{};
};

struct NodeArena {
  NodeArena(int node, int threads) : arena{arena_constraints(node, threads)} {}
  tbb::task_arena arena;
  tbb::task_group group;
  std::vector<MemoryRange> pieces;
};

// The node that the memory's own policy names, if it names exactly one.
std::optional<int> bound_node(const MemoryRange& range) noexcept {
  constexpr int policy_preferred = 1;  // linux/mempolicy.h: MPOL_PREFERRED, MPOL_BIND, MPOL_F_ADDR
  constexpr int policy_bind = 2;
  constexpr unsigned long flag_address = 1UL << 1;
  if (range.is_file()) return std::nullopt;
  int policy = 0;
  std::array<unsigned long, 16> mask{};
  if (syscall(SYS_get_mempolicy, &policy, mask.data(), mask.size() * 64, range.start, flag_address) != 0)
    return std::nullopt;
  if (policy != policy_preferred && policy != policy_bind) return std::nullopt;
  std::optional<int> only;
  for (std::size_t i = 0; i < mask.size() * 64; ++i)
    if (((mask[i / 64] >> (i % 64)) & 1U) != 0) {
      if (only) return std::nullopt;
      only = static_cast<int>(i);
    }
  return only;
}

// Shared by the workers of one call.
class Progress {
 public:
  Progress(const PopulationConfig& config, Bytes total) noexcept : config_{config}, total_{total.value} {}

  bool stopped() const noexcept {
    // relaxed: a worker that sees it late does one piece more.
    return failed_.load(std::memory_order_relaxed) || config_.stop.stop_requested();
  }
  void fail(const Error& error) noexcept {
    const std::lock_guard held{lock_};
    if (!error_) error_ = error;
    failed_.store(true, std::memory_order_relaxed);  // relaxed: see stopped()
  }
  void add(std::uint64_t bytes) noexcept {
    const std::lock_guard held{lock_};
    done_ += bytes;
    if (config_.progress && !config_.progress(Bytes{done_}, Bytes{total_})) cancel_locked();
  }
  Error result() noexcept {
    const std::lock_guard held{lock_};
    if (!error_ && config_.stop.stop_requested()) cancel_locked();
    return error_;
  }

 private:
  void cancel_locked() noexcept {
    if (!error_)
      error_ =
          base::fail(Errc::cancelled, Stage::pin, 0, "population was cancelled after {} of {} bytes", done_, total_);
    failed_.store(true, std::memory_order_relaxed);  // relaxed: see stopped()
  }
  const PopulationConfig& config_;
  std::uint64_t total_;
  std::mutex lock_;
  std::uint64_t done_ = 0;
  Error error_{};
  std::atomic<bool> failed_{false};
};

Result<std::vector<Hold>> hold_all(MapCache& cache, MemoryRange rest, Access access) {
  std::vector<Hold> holds;
  for (;;) {
    auto hold = cache.acquire_hold(rest, access);
    if (!hold) return hold.error();
    const std::uint64_t covered = hold->length().value;
    holds.push_back(*std::move(hold));
    if (covered > rest.last - rest.start) return holds;
    rest.start += covered;
  }
}

// Runs work(i) for every piece on its node's threads and waits. Throws std::bad_alloc.
template <typename Work>
void spread_over_nodes(const std::vector<MemoryRange>& pieces, unsigned threads, const Work& work) {
  const std::vector<tbb::numa_node_id> nodes = numa_nodes();
  std::vector<std::unique_ptr<NodeArena>> arenas;
  std::vector<std::vector<std::size_t>> shares(nodes.size());
  const auto per_node = static_cast<int>((threads + nodes.size() - 1) / nodes.size());
  for (const auto node : nodes) arenas.push_back(std::make_unique<NodeArena>(node, per_node));
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    std::size_t share = i * nodes.size() / pieces.size();
    if (const auto bound = bound_node(pieces[i]))
      for (std::size_t n = 0; n < nodes.size(); ++n)
        if (nodes[n] == *bound) share = n;
    shares[share].push_back(i);
  }
  const auto caller = std::this_thread::get_id();
  for (std::size_t n = 0; n < arenas.size(); ++n)
    arenas[n]->arena.execute([&, n] {
      for (const std::size_t i : shares[n])
        arenas[n]->group.run([&work, i, caller] {
          const BlockSignalsOnWorkers blocked{caller};
          work(i);
        });
    });
  for (auto& a : arenas) a->arena.execute([&] { a->group.wait(); });
}

unsigned thread_count(const PopulationConfig& config) noexcept {
  return config.threads != 0 ? config.threads : std::max(1U, std::thread::hardware_concurrency());
}

}  // namespace

Result<void> make_present(const MemoryRange& range, Access access, int fd, std::uint64_t offset) noexcept {
  const std::uint64_t length = range.length().value;
  void* at = reinterpret_cast<void*>(range.start);
  if (fd >= 0) {
    at = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(offset));
    if (at == MAP_FAILED)
      return base::fail(Errc::bad_memory, Stage::pin, errno, "descriptor {} cannot be mapped at {:#x} for {} bytes", fd,
                        offset, length);
  }
  int error = 0;
  while (madvise(at, length, may_write(access) ? MADV_POPULATE_WRITE : MADV_POPULATE_READ) != 0) {
    error = errno;
    if (error != EINTR && error != EAGAIN) break;
    error = 0;
  }
  if (fd >= 0) munmap(at, length);
  if (error == 0) return {};
  if (error == EINVAL)
    return base::fail(Errc::unsupported, Stage::pin, error,
                      "memory [{:#x}, {:#x}] cannot be made present: device memory, or no MADV_POPULATE_WRITE (Linux "
                      "5.14); switch PopulationConfig::prefault off",
                      range.start, range.last);
  return base::fail(Errc::bad_memory, Stage::pin, error,
                    "memory [{:#x}, {:#x}] could not be made present: not mapped, too few huge pages, or not enough "
                    "memory",
                    range.start, range.last);
}

Result<Registration> Population::register_memory(MapCache& cache, const MemoryRange& range,
                                                 const PopulationConfig& config) {
  if (!range.well_formed() || config.access == Access::none)
    return base::fail(Errc::invalid_argument, Stage::validate, 0,
                      "memory [{:#x}, {:#x}]: expected start <= last and a "
                      "right to read or write",
                      range.start, range.last);
  const ProviderTraits& traits = cache.provider().traits();
  const unsigned threads = thread_count(config);
  const MemoryRange whole = range.grown_to(traits.granule.value);
  try {
    const std::vector<MemoryRange> pieces = cut_for_population(whole, config.os_page, traits.border, threads);
    Progress progress{config, whole.length()};
    Registration result;
    result.range_ = range;
    std::vector<std::vector<Hold>> holds(pieces.size());

    const auto populate = [&](std::size_t i, bool pin) {
      if (progress.stopped()) return;
      if (config.prefault) {
        const PinRequest request = cache.request_for(pieces[i], config.access);
        if (auto done = make_present(pieces[i], config.access, request.fd, request.offset); !done)
          return progress.fail(done.error());
      }
      if (pin) {
        auto held = hold_all(cache, pieces[i], config.access);
        if (!held) return progress.fail(held.error());
        holds[i] = *std::move(held);
        progress.add(pieces[i].length().value);
      }
    };

    if (threads == 1 || pieces.size() == 1) {
      for (std::size_t i = 0; i < pieces.size(); ++i) populate(i, true);
    } else {
      spread_over_nodes(pieces, threads, [&](std::size_t i) { populate(i, traits.parallel); });
      // A provider that pins one at a time anyway is asked in order, by one thread, once the memory is there.
      if (!traits.parallel)
        for (std::size_t i = 0; i < pieces.size() && !progress.stopped(); ++i) {
          auto held = hold_all(cache, pieces[i], config.access);
          if (!held) {
            progress.fail(held.error());
            break;
          }
          holds[i] = *std::move(held);
          progress.add(pieces[i].length().value);
        }
    }
    if (const Error error = progress.result()) return error;
    for (auto& of_piece : holds)
      for (Hold& hold : of_piece) result.parts_.push_back(std::move(hold));
    return result;
  } catch (const std::bad_alloc&) {
    return base::fail(Errc::out_of_memory, Stage::pin, ENOMEM, "no memory for the list of pieces of {} bytes",
                      whole.length().value);
  }
}

Result<void> Population::prefault(const MemoryRange& range, int fd, std::uint64_t offset, Bytes border,
                                  const PopulationConfig& config) {
  const unsigned threads = thread_count(config);
  try {
    const std::vector<MemoryRange> pieces = cut_for_population(range, config.os_page, border, threads);
    Progress progress{config, range.length()};
    const auto populate = [&](std::size_t i) {
      if (progress.stopped()) return;
      const std::uint64_t at = offset + (pieces[i].start - range.start);
      if (auto done = make_present(pieces[i], config.access, fd, at); !done) return progress.fail(done.error());
      progress.add(pieces[i].length().value);
    };
    if (threads == 1 || pieces.size() == 1)
      for (std::size_t i = 0; i < pieces.size(); ++i) populate(i);
    else
      spread_over_nodes(pieces, threads, populate);
    if (const Error error = progress.result()) return error;
    return {};
  } catch (const std::bad_alloc&) {
    return base::fail(Errc::out_of_memory, Stage::pin, ENOMEM, "no memory for the list of pieces of {} bytes",
                      range.length().value);
  }
}

}  // namespace iovane::pinning
