// The current version of the map, and how it changes.
//
// Purpose: one word names the current tree (extent_tree.hpp) and the usable windows that belong to it.
// Roles: any thread, each with its own Participant.
// Progress: reading is lock-free and, once inside a section, wait-free. commit() is one CAS; callers repeat on a
//   conflict, which means that another thread's commit succeeded. A thread stopped anywhere holds nothing that another
//   needs.
// State word: [63..16] version | [15..0] id of the MapVersion object.
// Invariants: I1 everything reachable from a version is immutable. I2 versions only grow. I3 the segments of a version
//   partition the space; free and hole segments are maximal.
// Linearization: the successful CAS of the state word in commit() (changes); the second load in MapSection (reads).
// Edges: W.version (CAS, release) with R.version (acquire): a reader of the word sees the whole tree.
// ABA: the version is part of the word and 48 bits wide.
// Reclamation: era.hpp.
// Failure and undo: an edit that finds no memory or loses the CAS was never visible; abandon() recycles its nodes.
// Proven by: tests/model/extent_tree_test.cpp (the tree), tests/litmus/interval_allocator_test.cpp (steps).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>

#include "iova/era.hpp"
#include "iova/extent_tree.hpp"
#include "iova/metadata_arena.hpp"

namespace iovane::iova {

/// What one version consists of.
struct MapVersion : VersionedObject {
  ObjectId tree;
  ObjectId windows;
};

/// The usable windows, ascending, disjoint and not adjacent. Immutable.
struct WindowList : VersionedObject {
  static constexpr unsigned capacity = 256;
  std::uint32_t count;
  UnitRange window[capacity];
  std::span<const UnitRange> all() const noexcept { return {window, count}; }
};

/// Finds the participants whose announcements a reclaimer must respect.
class Roster {
 public:
  virtual void for_each_era(void (*see)(void* context, std::uint64_t era), void* context) const noexcept = 0;

 protected:
  ~Roster() = default;
};

class ExtentMap {
 public:
  ExtentMap(MetadataArena& arena, MetadataArena versions, const Roster& roster, Unit last) noexcept
      : arena_{arena}, versions_{std::move(versions)}, roster_{roster}, last_{last} {}

  /// The first version: everything a hole. Before the map is shared. False without memory.
  bool start(Participant& me) noexcept;

  enum class Commit { done, conflict, no_memory };

  Unit last() const noexcept { return last_; }
  std::uint64_t current_version() const noexcept {
    // R.version - acquire: whoever stamps an object with this version ordered its removal before.
    return word_.load(std::memory_order_acquire) >> id_bits;
  }
  /// Takes an object out of use; it left the map before this call. Owner of `me` only.
  void retire(Participant& me, VersionedObject& object, ObjectId id) noexcept;
  /// Tries to reclaim what `me` retired. Owner of `me` only.
  void reclaim(Participant& me) noexcept;

 private:
  friend class MapSection;
  static constexpr unsigned id_bits = 16;
  static constexpr std::uint64_t id_mask = (std::uint64_t{1} << id_bits) - 1;

  const MapVersion& version_of(std::uint64_t word) const noexcept {
    return *versions_.at<MapVersion>(static_cast<ObjectId>(word & id_mask));
  }
  void release(VersionedObject& object, ObjectId id) noexcept;

  MetadataArena& arena_;
  MetadataArena versions_;
  const Roster& roster_;
  Unit last_;
  alignas(base::cacheline_bytes) std::atomic<std::uint64_t> word_{0};
};

/// A section in which one version of the map stays readable. At most one per Participant at a time.
class MapSection {
 public:
  MapSection(ExtentMap& map, Participant& me) noexcept;
  ~MapSection();
  MapSection(const MapSection&) = delete;
  MapSection& operator=(const MapSection&) = delete;

  /// Goes on to the newest version.
  void renew() noexcept;
  std::uint64_t version() const noexcept { return word_ >> ExtentMap::id_bits; }
  TreeView tree() const noexcept { return {map_.arena_, map_.version_of(word_).tree, map_.last_}; }
  std::span<const UnitRange> windows() const noexcept {
    return map_.arena_.at<WindowList>(map_.version_of(word_).windows)->all();
  }
  /// An edit of this version's tree, to be given to commit() or abandoned.
  TreeEdit edit(bool last_resort = false) const noexcept;
  /// Makes the edit the current version if this section's version still is. `windows`: 0 keeps them. On a conflict or
  /// without memory the edit is abandoned; renew() before trying again.
  ExtentMap::Commit commit(TreeEdit& edit, ObjectId windows = 0) noexcept;

 private:
  ExtentMap& map_;
  Participant& me_;
  std::uint64_t word_ = 0;
};

}  // namespace iovane::iova
