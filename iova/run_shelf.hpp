// A length class's runs, and which of them have free slots: a three-level bitmap of 262,144 positions.
//
// Purpose: find a run with free slots in three words, whatever their number. Lower positions are older runs, so slots
//   are reused in the order in which runs were made and the youngest runs drain.
// Roles: any thread.
// Progress: lock-free; every loop is bounded by a constant or repeats after another thread's success. A thread stopped
//   between two words may hide up to 64 runs from find_ready() until it goes on; they are found by the reclaiming pass.
// State words per node: `ready` and `taken`. In a leaf a ready bit says that the run may have free slots, a taken bit
//   that the position is in use. Above, ready says that some child has a ready bit, taken that all its positions are.
// Both summaries are hints: who finds one wrong corrects it, then looks below once more and takes the correction back
//   if the child changed meanwhile; who changes a child sets the summary after it. One of the two sees the other.
// Linearization: the operation on the leaf's word.
// Reclamation: nodes are never freed while the class lives; a node serves 64 runs.
// Proven by: tests/unit/run_shelf_test.cpp.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>

#include "iova/metadata_arena.hpp"

namespace iovane::iova {

struct ShelfNode : ArenaObject {
  std::atomic<std::uint64_t> ready;
  std::atomic<std::uint64_t> taken;
  std::atomic<ObjectId> child[64];
};

class RunShelf {
 public:
  static constexpr unsigned levels = 3;
  using Position = std::uint32_t;
  static constexpr Position positions = Position{1} << (6 * levels);

  /// Puts a run that is not ready yet on the shelf. Nothing when the shelf or the arena is full.
  std::optional<Position> put(MetadataArena& arena, ObjectId run) noexcept;
  /// Empties a position; the caller is the only one who does so for this run.
  void remove(const MetadataArena& arena, Position position) noexcept;
  void set_ready(const MetadataArena& arena, Position position) noexcept;
  void clear_ready(const MetadataArena& arena, Position position) noexcept;
  /// A run that was ready, or nothing. `bias` spreads threads over the runs of a leaf.
  struct Found {
    ObjectId run;
    Position position;
  };
  std::optional<Found> find_ready(const MetadataArena& arena, unsigned bias) noexcept;
  /// The first run at or above `from` that was ready, or nothing: for passes over all, which begin again at 0 then.
  std::optional<Found> next_ready(const MetadataArena& arena, Position from) const noexcept;

 private:
  static constexpr unsigned index_at(Position p, unsigned level) noexcept { return (p >> (6 * level)) & 63; }
  ShelfNode& node_above(const MetadataArena& arena, Position position, unsigned level) noexcept;

  ShelfNode root_{};
};

}  // namespace iovane::iova
