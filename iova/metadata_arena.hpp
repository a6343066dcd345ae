// Where the allocator's own records live: type-stable memory without locks.
//
// Purpose: objects of a few fixed sizes, named by 32-bit ids (their offset in 64-byte steps), from one reserved range
//   of virtual memory. An id always names memory of the arena, so a reader that follows a stale id reads an object of
//   another time, never an unmapped page; generation numbers and eras (era.hpp) tell it so.
// Roles: any thread may allocate and release.
// Progress: both are lock-free: one CAS loop on the kind's free list, else one on the bump cursor. A loop repeats only
//   because another thread's CAS succeeded.
// State word of a free list: [63..26] pop count | [25..0] id of the first free object, 0 for none.
// Linearization: the successful CAS.
// ABA: every pop counts up 38 bits of tag; a thread would have to be stopped over exactly 2^38 pops of one kind between
//   its load and its CAS to be fooled.
// Reclamation: none; memory of one kind is reused for that kind. The kernel gives pages on first touch, so resident
//   memory follows the high-water mark of what was live.
// Proven by: tests/unit/run_shelf_test.cpp, and the allocator's own stress tests.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "base/cacheline.hpp"
#include "iovane/result.hpp"
#include "iovane/types.hpp"

namespace iovane::iova {

enum class ObjectKind : std::uint8_t {
  run_single,    ///< a run of one slot
  run_few,       ///< a run of up to run_few_slots
  run_many,      ///< a run of up to run_many_slots
  tree_node,     ///< extent_tree.hpp
  window_list,   ///< usable windows of one version
  map_version,   ///< extent_map.hpp
  shelf_node,    ///< run_shelf.hpp
  length_class,  ///< length_class.hpp
  magazine,      ///< thread_cache.hpp
  thread_cache,  ///< thread_cache.hpp
};
inline constexpr std::size_t object_kinds = 10;

/// Names an object; 0 names none.
using ObjectId = std::uint32_t;

/// Every object begins with this; it belongs to the arena while the object is free.
struct ArenaObject {
  std::atomic<ObjectId> next_free{0};
};

/// An object that readers of older versions of the map may still see after it left the current one.
struct VersionedObject : ArenaObject {
  ObjectKind kind;
  std::uint16_t bytes;        ///< its size, for release()
  std::uint64_t birth;        ///< the first version of the map that contains it
  std::uint64_t retired = 0;  ///< the first that does not; valid once it is in a limbo list
};

class MetadataArena {
 public:
  static constexpr std::size_t step_bytes = 64;
  static constexpr std::uint64_t limit_bytes_max = std::uint64_t{1} << 32;

  /// Reserves `limit` bytes of address space (no memory yet). Control plane. Errors: invalid_argument, out_of_memory.
  static Result<MetadataArena> create(Bytes limit);
  MetadataArena(MetadataArena&& o) noexcept;
  MetadataArena& operator=(MetadataArena&&) = delete;
  ~MetadataArena();

  /// Uninitialised memory (zero when fresh) for one object of `bytes` bytes, 0 when the limit is reached. One kind has
  /// one size. `last_resort` may dip into the reserve that is kept for giving space back.
  ObjectId allocate(ObjectKind kind, std::size_t bytes, bool last_resort = false) noexcept;
  /// The object must be unreachable for every thread.
  void release(ObjectKind kind, std::size_t bytes, ObjectId id) noexcept;

  template <typename T>
  T* at(ObjectId id) const noexcept {
    return reinterpret_cast<T*>(base_ + std::size_t{id} * step_bytes);
  }
  ObjectId id_of(const void* object) const noexcept {
    return static_cast<ObjectId>(static_cast<std::size_t>(static_cast<const std::byte*>(object) - base_) / step_bytes);
  }
  /// Bytes in objects that are allocated now; a snapshot without order.
  std::uint64_t bytes_in_use() const noexcept;
  /// Bytes ever handed out: what is resident at most.
  std::uint64_t bytes_high_water() const noexcept;

 private:
  MetadataArena(std::byte* base, std::uint64_t limit) noexcept;

  void populate_behind(std::uint64_t from, std::uint64_t to) noexcept;

  struct alignas(base::cacheline_bytes) FreeList {
    std::atomic<std::uint64_t> head{0};
    std::atomic<std::uint64_t> bytes_free{0};
  };
  std::byte* base_;
  std::uint64_t limit_;
  alignas(base::cacheline_bytes) std::atomic<std::uint64_t> cursor_;
  std::array<FreeList, object_kinds> free_;
};

}  // namespace iovane::iova
