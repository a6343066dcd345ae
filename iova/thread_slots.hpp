// From the calling thread to its cache in one allocator, and back when the thread exits.
#pragma once

#include <array>
#include <cstdint>

namespace iovane::iova {

struct ThreadCache;
class AllocatorCore;

/// The last few allocators that this thread used.
struct ThreadSlots {
  static constexpr unsigned quick = 4;
  std::array<std::uint64_t, quick> allocator_id;  ///< 0: none
  std::array<ThreadCache*, quick> cache;
};

#if defined(__GNUC__)
// One offset from the thread pointer instead of a call, also inside a shared library; 64 bytes fit the static TLS
// surplus that the loader keeps for libraries opened later.
#define IOVANE_INITIAL_EXEC __attribute__((tls_model("initial-exec")))
#else
#define IOVANE_INITIAL_EXEC
#endif
extern constinit thread_local ThreadSlots thread_slots IOVANE_INITIAL_EXEC;

/// A new allocator's id; ids never repeat. Control plane: takes the registry's mutex.
std::uint64_t register_allocator(AllocatorCore& allocator);
/// After it returns no exiting thread touches the allocator. Control plane: takes the registry's mutex.
void unregister_allocator(std::uint64_t id) noexcept;
/// The calling thread's cache in that allocator if it has one, which then is in `thread_slots`.
ThreadCache* find_thread_cache(std::uint64_t allocator_id) noexcept;
/// Remembers a cache that the calling thread has just taken, so that it is given back when the thread exits. Lock-free,
/// except that a thread's allocators_per_thread-th allocator makes it drop entries of destroyed ones under the mutex.
/// False when the thread uses too many allocators at once.
bool remember_thread_cache(std::uint64_t allocator_id, ThreadCache* cache) noexcept;
inline constexpr unsigned allocators_per_thread = 64;

}  // namespace iovane::iova
