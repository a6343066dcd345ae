// The map of the whole space, as a value: an immutable B+ tree over address order.
//
// Purpose: every unit of the space belongs to exactly one segment, and a segment is free, a hole (not usable), or part
//   of a run (run.hpp). A change makes a new tree that shares all but one path with the old one; which tree is current
//   is one word (extent_map.hpp). So each change of the map, however many segments it touches, is a single-word
//   decision, and every reader sees a map that was true at one moment.
// Shape: a leaf holds the first unit and the value of up to 22 consecutive segments; a segment ends where the next one
//   begins. An inner node holds, per child, its first unit and its *reach*: the longest free segment below it and the
//   largest order k for which a free, naturally aligned block of 2^k units exists. Equal free or hole neighbours are
//   always merged.
// Search: descend, in the wanted direction, into children whose reach can hold the request. One path when the reach
//   decides alone (naturally aligned powers of two, or length + alignment - 1 fits), O(log n) then.
// Source: path copying after Driscoll, Sarnak, Sleator, Tarjan, "Making data structures persistent" (1989).
// Proven by: tests/model/extent_tree_test.cpp.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>

#include "iova/metadata_arena.hpp"
#include "iova/unit.hpp"

namespace iovane::iova {

/// What a segment is: free, a hole, or a run's id.
struct SegmentValue {
  std::uint64_t raw = 0;
  static constexpr SegmentValue free() noexcept { return {0}; }
  static constexpr SegmentValue hole() noexcept { return {1}; }
  static constexpr SegmentValue run(ObjectId id) noexcept { return {(std::uint64_t{id} << 2) | 2}; }
  constexpr bool is_free() const noexcept { return raw == 0; }
  constexpr bool is_hole() const noexcept { return raw == 1; }
  constexpr bool is_run() const noexcept { return (raw & 2) != 0; }
  constexpr ObjectId run_id() const noexcept { return static_cast<ObjectId>(raw >> 2); }
  constexpr bool operator==(const SegmentValue&) const noexcept = default;
};

struct Segment {
  UnitRange range;
  SegmentValue value;
};

/// The best that free segments can hold: maximum of each part on its own.
struct Reach {
  std::uint64_t packed = 0;  ///< longest << 6 | order + 1 (0: no free unit)
  static Reach of_free(UnitRange range) noexcept;
  constexpr std::uint64_t longest() const noexcept { return packed >> 6; }
  constexpr unsigned order_plus_1() const noexcept { return static_cast<unsigned>(packed & 63); }
  static constexpr Reach max(Reach a, Reach b) noexcept {
    const std::uint64_t longest = a.longest() > b.longest() ? a.longest() : b.longest();
    const unsigned order = a.order_plus_1() > b.order_plus_1() ? a.order_plus_1() : b.order_plus_1();
    return {(longest << 6) | order};
  }
};

struct TreeNode : VersionedObject {
  static constexpr unsigned leaf_entries = 22;
  static constexpr unsigned inner_entries = 17;
  struct Leaf {
    Unit first[leaf_entries];
    SegmentValue value[leaf_entries];
  };
  struct Inner {
    Unit first[inner_entries];
    Reach reach[inner_entries];
    ObjectId child[inner_entries];
  };
  std::uint16_t count;
  std::uint16_t level;  ///< 0: leaf
  union {
    Leaf leaf;
    Inner inner;
  };
};
static_assert(sizeof(TreeNode) == 6 * MetadataArena::step_bytes);

enum class Direction : std::uint8_t { top_down, bottom_up };

struct SearchRequest {
  std::uint64_t count = 1;  ///< units
  unsigned align_log2 = 0;  ///< of the first unit
  Unit last_max = 0;        ///< no unit above this one
  Direction direction = Direction::top_down;
};

/// Reads one tree. The caller keeps its nodes alive (an era guard, or it owns them).
class TreeView {
 public:
  TreeView(const MetadataArena& arena, ObjectId root, Unit last) noexcept : arena_{&arena}, root_{root}, last_{last} {}
  /// The segment that holds `unit`; precondition: unit <= the space's last.
  Segment find(Unit unit) const noexcept;
  /// Where a free block as asked for begins: the one nearest to the end of the space where the direction starts among
  /// those whose room suffices wherever they begin; failing these, any.
  std::optional<Unit> search(const SearchRequest& request) const noexcept;
  ObjectId root() const noexcept { return root_; }
  Unit last() const noexcept { return last_; }

 private:
  struct Probe;
  std::optional<Unit> search_below(ObjectId node, Unit last, Probe& probe) const noexcept;
  const TreeNode& node(ObjectId id) const noexcept { return *arena_->at<TreeNode>(id); }

  const MetadataArena* arena_;
  ObjectId root_;
  Unit last_;
};

/// A thread's few spare nodes, so that a change need not go to the arena for each one.
struct NodeStash {
  static constexpr unsigned capacity = 32;
  std::array<ObjectId, capacity> ids;
  unsigned count = 0;
};

/// Makes a new tree out of an old one. Not shared: one thread builds it, then publishes or abandons it.
class TreeEdit {
 public:
  /// `birth`: the version that the result will be. `last_resort`: may use the arena's reserve.
  TreeEdit(MetadataArena& arena, NodeStash& stash, ObjectId root, Unit last, std::uint64_t birth,
           bool last_resort) noexcept
      : arena_{arena}, stash_{stash}, root_{root}, last_{last}, birth_{birth}, last_resort_{last_resort} {}

  /// A tree of one segment. False without memory.
  bool make_empty(SegmentValue value) noexcept;
  /// Makes `range` one segment of `value`, merged with equal free or hole neighbours. False without memory (then only
  /// abandon() is left to do) or when one edit would grow beyond its fixed bounds.
  bool put(UnitRange range, SegmentValue value) noexcept;
  /// Frees every node that this edit made.
  void abandon() noexcept;

  ObjectId root() const noexcept { return root_; }
  TreeView view() const noexcept { return {arena_, root_, last_}; }
  /// Nodes of older versions that the new tree no longer uses.
  std::span<const ObjectId> replaced() const noexcept { return {replaced_.data(), replaced_count_}; }

 private:
  static constexpr unsigned nodes_max = 192;
  struct Item {
    Unit first;
    Reach reach;
    ObjectId id;
  };
  struct Change {
    UnitRange range;
    SegmentValue value;
  };

  ObjectId new_node(unsigned level) noexcept;
  void drop(ObjectId id) noexcept;
  void drop_subtree(ObjectId id) noexcept;
  unsigned rebuild(ObjectId id, UnitRange covered, const Change& change, Item out[2]) noexcept;
  unsigned rebuild_leaf(const TreeNode& old, UnitRange covered, const Change& change, Item out[2]) noexcept;
  unsigned rebuild_inner(const TreeNode& old, UnitRange covered, const Change& change, Item out[2]) noexcept;
  unsigned merge_small(Item* items, unsigned count) noexcept;
  bool try_merge(const Item& left, const Item& right, Item& out) noexcept;
  unsigned emit_inner(const Item* items, unsigned count, unsigned level, Item out[2]) noexcept;
  TreeNode& node(ObjectId id) const noexcept { return *arena_.at<TreeNode>(id); }

  MetadataArena& arena_;
  NodeStash& stash_;
  ObjectId root_;
  Unit last_;
  std::uint64_t birth_;
  bool last_resort_;
  bool failed_ = false;
  unsigned replaced_count_ = 0;
  unsigned fresh_count_ = 0;
  std::array<ObjectId, nodes_max> replaced_;
  std::array<ObjectId, nodes_max> fresh_;
};

}  // namespace iovane::iova
