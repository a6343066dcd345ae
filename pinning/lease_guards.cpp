#include "pinning/lease_guards.hpp"

#include <pthread.h>
#include <sys/mman.h>

#include <mutex>
#include <new>

namespace iovane::pinning {
namespace {

// Attaching happens once per thread, so a mutex is enough. Never destroyed: threads may end after main().
constinit std::mutex attach_lock;

// A pthread key rather than a thread_local destructor: it runs again when another destructor takes a lease after us.
pthread_key_t exit_key;
bool exit_key_made = false;

}  // namespace

constinit thread_local ThreadGuards* LeaseGuards::current_ = nullptr;
constinit std::atomic<std::size_t> LeaseGuards::blocks_used_{0};
constinit ThreadGuards* LeaseGuards::blocks_ = nullptr;

ThreadGuards* LeaseGuards::attach() noexcept {
  if (current_ != nullptr) return current_;
  const std::lock_guard held{attach_lock};
  if (!exit_key_made) {
    const auto give_back = [](void* block) {
      auto* guards = static_cast<ThreadGuards*>(block);
      current_ = nullptr;
      // A lease that outlives its thread is the caller's error. Its word keeps its region pinned, so its block is not
      // handed on: the memory stays right, the leak stays visible in the statistics.
      if (!guards->all_free()) return;
      // R.owned - release, pairs with A.owned: the next owner comes after our last use.
      guards->owned.store(0, std::memory_order_release);
    };
    if (pthread_key_create(&exit_key, give_back) != 0) return nullptr;
    exit_key_made = true;
  }
  if (blocks_ == nullptr) {
    void* memory = mmap(nullptr, threads_max * sizeof(ThreadGuards), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    blocks_ = static_cast<ThreadGuards*>(memory);
  }
  // relaxed: only attach() writes it, under the lock.
  const std::size_t used = blocks_used_.load(std::memory_order_relaxed);
  ThreadGuards* mine = nullptr;
  for (std::size_t i = 0; i < used && mine == nullptr; ++i)
    // A.owned - acquire, pairs with R.owned.
    if (blocks_[i].owned.load(std::memory_order_acquire) == 0) mine = &blocks_[i];
  if (mine == nullptr) {
    if (used == threads_max) return nullptr;
    mine = ::new (static_cast<void*>(&blocks_[used])) ThreadGuards{};
  }
  mine->owned.store(1, std::memory_order_relaxed);  // relaxed: read under the lock only
  if (pthread_setspecific(exit_key, mine) != 0) {
    mine->owned.store(0, std::memory_order_relaxed);  // relaxed: as above
    return nullptr;
  }
  // R.blocks - release, pairs with A.blocks in for_each_busy(): a scan sees the constructed block.
  if (mine == &blocks_[used]) blocks_used_.store(used + 1, std::memory_order_release);
  current_ = mine;
  return mine;
}

}  // namespace iovane::pinning
