#include "iova/thread_slots.hpp"

#include <pthread.h>

#include <mutex>
#include <unordered_map>

#include "base/asymmetric_barrier.hpp"
#include "iova/allocator_core.hpp"

namespace iovane::iova {

constinit thread_local ThreadSlots thread_slots IOVANE_INITIAL_EXEC = {};

namespace {

// The registry's mutex guards creation, destruction and thread exit; allocate() and free() do not take it.
struct Registry {
  std::mutex mutex;
  std::unordered_map<std::uint64_t, AllocatorCore*> allocators;
  std::uint64_t next_id = 1;
  pthread_key_t exit_key;
  bool has_exit_key = false;
};

Registry& registry() {
  static Registry* const instance = new Registry;  // outlives every thread, so it is never destroyed
  return *instance;
}

struct Membership {
  std::uint64_t allocator_id = 0;
  ThreadCache* cache = nullptr;
};
struct Memberships {
  std::array<Membership, allocators_per_thread> of;
  unsigned count;
};
constinit thread_local Memberships memberships{};

void leave_all(void* /*armed*/) {
  Registry& r = registry();
  const std::lock_guard lock{r.mutex};
  for (unsigned i = 0; i < memberships.count; ++i) {
    const auto found = r.allocators.find(memberships.of[i].allocator_id);
    if (found != r.allocators.end()) found->second->release_cache(*memberships.of[i].cache);
  }
  memberships.count = 0;
  thread_slots = {};
}

// The quick slots lead to the paths that use announce_fast().
void note_quick(std::uint64_t id, ThreadCache* cache) noexcept {
  if (!base::fast_announce_allowed()) return;
  thread_slots.allocator_id[id % ThreadSlots::quick] = id;
  thread_slots.cache[id % ThreadSlots::quick] = cache;
}

}  // namespace

std::uint64_t register_allocator(AllocatorCore& allocator) {
  Registry& r = registry();
  const std::lock_guard lock{r.mutex};
  // A key's destructor runs at thread exit without the allocation that thread_local destructors need.
  if (!r.has_exit_key) r.has_exit_key = ::pthread_key_create(&r.exit_key, leave_all) == 0;
  const std::uint64_t id = r.next_id++;
  r.allocators.emplace(id, &allocator);
  return id;
}

void unregister_allocator(std::uint64_t id) noexcept {
  Registry& r = registry();
  const std::lock_guard lock{r.mutex};
  r.allocators.erase(id);
}

ThreadCache* find_thread_cache(std::uint64_t allocator_id) noexcept {
  for (unsigned i = 0; i < memberships.count; ++i) {
    if (memberships.of[i].allocator_id != allocator_id) continue;
    note_quick(allocator_id, memberships.of[i].cache);
    return memberships.of[i].cache;
  }
  return nullptr;
}

bool remember_thread_cache(std::uint64_t allocator_id, ThreadCache* cache) noexcept {
  Registry& r = registry();
  if (memberships.count == allocators_per_thread) {
    const std::lock_guard lock{r.mutex};
    unsigned kept = 0;
    for (unsigned i = 0; i < memberships.count; ++i)
      if (r.allocators.contains(memberships.of[i].allocator_id)) memberships.of[kept++] = memberships.of[i];
    memberships.count = kept;
    if (kept == allocators_per_thread) return false;
  }
  if (memberships.count == 0 && r.has_exit_key) ::pthread_setspecific(r.exit_key, &memberships);
  memberships.of[memberships.count++] = {allocator_id, cache};
  note_quick(allocator_id, cache);
  return true;
}

}  // namespace iovane::iova
